"""Running the cells: several at once, each by the commands that a user would type, failures kept to themselves.

A cell is pretraining, export and scoring, one process after another, with all they say in DIR/logs/CELL.log. What is
done already (exit.json, the exports, the scores' own results.json) is not done again.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import queue
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ctcd_ds.cli import EXIT_SAVED, RunFailure, command
from ctcd_ds.cluster.ranks import free_port
from ctcd_ds.ending import ending, is_finished
from ctcd_ds.experiments.planning import ExperimentPlan, PlannedCell
from ctcd_ds.experiments.specification import Experiment, Glue, LmEval
from ctcd_ds.manifest import write_atomic

REQUEST = "asked.json"  # in the folder of a run that is called like the command that scored it


@dataclass(frozen=True)
class Outcome:
    """How a cell ended, as `results.Cell` says it."""

    state: str
    reason: str = ""


class Stopped(Exception):
    """A command ended early, with all saved: it was told to, or its time was over."""


class Machine:
    """The places where cells run at once, and the processes that run in them."""

    def __init__(self, places: Sequence[Mapping[str, str]], directory: Path) -> None:
        self._places: queue.Queue[Mapping[str, str]] = queue.Queue()
        for place in places:
            self._places.put(place)
        self.width = len(places)
        self._logs = directory / "logs"
        self._running: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()
        self.stopping = False

    @contextlib.contextmanager
    def place(self) -> Iterator[Mapping[str, str]]:
        """The environment of a free place."""
        taken = self._places.get()
        try:
            yield taken
        finally:
            self._places.put(taken)

    def call(self, cell: str, line: Sequence[str], environment: Mapping[str, str]) -> None:
        """Runs a command to its end. Raises RunFailure with its last words where it fails, Stopped where it saved."""
        self._logs.mkdir(exist_ok=True)
        with (self._logs / f"{cell}.log").open("ab") as log:
            log.write(f"$ {' '.join(line)}\n".encode())
            log.flush()
            began = log.tell()
            with self._lock:
                if self.stopping:
                    raise Stopped
                # In a session of its own: a Ctrl-C is this program's to pass on, once.
                own = {**os.environ, **environment}
                process = subprocess.Popen(line, env=own, stdout=log, stderr=log, start_new_session=True)
                self._running.add(process)
            code = process.wait()
            with self._lock:
                self._running.discard(process)
        if self.stopping or code == EXIT_SAVED:
            raise Stopped
        if code:
            said = (self._logs / f"{cell}.log").read_bytes()[began:].decode(errors="replace")
            name = next(word for word in line if word.startswith("ctcd_ds.commands.")).rpartition(".")[2]
            raise RunFailure(f"{name} ended with {code}: {failure_message(said)}")

    def stop(self) -> None:
        """Tells all processes to save and end."""
        with self._lock:
            self.stopping = True
            for process in self._running:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGTERM)


def failure_message(log: str) -> str:
    """What a command said of its failure: its 'error:' or 'failed:' with the list below, else its last line.

    Either may stand behind a progress bar, on the bar's own line.
    """
    lines = [line for line in log.splitlines() if line.strip()]
    for number in range(len(lines) - 1, -1, -1):
        if found := re.search(r"(?:^|\])((?:error|failed): .*)", lines[number]):
            listed = itertools.takewhile(lambda line: line.startswith("  - "), lines[number + 1 :])
            return " ".join(" ".join([found[1], *listed]).split())[:600]
    return lines[-1].strip()[:600] if lines else "it said nothing"


def run_cells(
    planned: Sequence[PlannedCell],
    machine: Machine,
    do: Callable[[PlannedCell], Outcome],
    on_ending: Callable[[PlannedCell, Outcome, list[PlannedCell]], None],
) -> dict[str, Outcome]:
    """Runs each owner's run once all that it needs is finished; calls `on_ending` after each with what still runs.

    Returns how every run ended; a cell whose need failed is waiting.
    """
    owner_of = {cell.name: cell.owner for cell in planned}
    waiting = [cell for cell in planned if cell.owner == cell.name]
    endings: dict[str, Outcome] = {}
    running: dict[Future[Outcome], PlannedCell] = {}
    with ThreadPoolExecutor(machine.width) as pool:
        while waiting or running:
            for cell in list(waiting):
                needs = [owner_of[name] for name in cell.cell.needs]
                bad = [name for name in needs if name in endings and endings[name].state != "finished"]
                if bad:
                    waiting.remove(cell)
                    endings[cell.name] = Outcome("waiting", f"needs {bad[0]}, which is not finished")
                    on_ending(cell, endings[cell.name], list(running.values()))
                elif len(running) < machine.width and not machine.stopping and all(n in endings for n in needs):
                    waiting.remove(cell)
                    running[pool.submit(do, cell)] = cell
            if machine.stopping and not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                cell = running.pop(future)
                endings[cell.name] = future.result()
                on_ending(cell, endings[cell.name], list(running.values()))
    return endings


def do_cell(cell: PlannedCell, plan: ExperimentPlan, machine: Machine) -> Outcome:
    """Pretrains, exports and scores one cell; what is finished already is left."""
    experiment, directory = plan.experiment, plan.directory
    try:
        with machine.place() as environment:
            if not is_finished(cell.run):
                machine.call(cell.name, _pretrain(cell, experiment, directory), environment)
            if not (cell.run / "hf").exists():
                line = command("export", "--checkpoint", cell.run, "--peer", "all", "--output_dir", cell.run / "hf")
                machine.call(cell.name, line, environment)
            for name, asked in experiment.scoring.items():
                if not _is_scored(cell, name, asked):
                    machine.call(cell.name, _score(cell, name, asked), environment)
                    write_atomic(cell.run / name / REQUEST, request(asked))
    except Stopped:
        return Outcome("waiting", "stopped early; go on with --resume")
    except (RunFailure, OSError) as failure:
        return Outcome("failed", str(failure))
    return Outcome("finished")


def found_ending(cell: PlannedCell, experiment: Experiment) -> Outcome:
    """How a run stands by the files it left: for runs that others started."""
    if is_done(cell, experiment):
        return Outcome("finished")
    if is_finished(cell.run):
        return Outcome("waiting", f"trained, but not yet exported and scored; logs in {cell.run / 'slurm'}")
    if (ended := ending(cell.run)) is None:
        return Outcome("waiting", "not finished")
    return Outcome("failed" if ended.state == "failed" else "waiting", f"{ended.state}: {ended.reason}")


def is_done(cell: PlannedCell, experiment: Experiment) -> bool:
    """Whether a run is finished, exported and scored as asked for: nothing is left to do."""
    scored = all(_is_scored(cell, name, asked) for name, asked in experiment.scoring.items())
    return is_finished(cell.run) and (cell.run / "hf").exists() and scored


def _is_scored(cell: PlannedCell, name: str, asked: Glue | LmEval) -> bool:
    """Whether a command has scored this run's exports as asked: it would do nothing, after long imports."""
    try:
        return (cell.run / name / REQUEST).read_text(encoding="utf-8") == request(asked)
    except OSError:
        return False


def request(asked: Glue | LmEval) -> str:
    """The content of the file CELL/COMMAND/asked.json, which is there when the command is done."""
    return asked.model_dump_json(indent=1, exclude_none=True) + "\n"


def scoring_options(asked: Glue | LmEval) -> dict[str, str]:
    """The options of a command that scores, but for its models and its output."""
    given: dict[str, Any] = asked.model_dump(exclude_none=True)
    return {key: ",".join(map(str, value)) if isinstance(value, list) else str(value) for key, value in given.items()}


def recipe_place(directory: Path, cell: str) -> Path:
    """The cell's recipe, as the launcher reads it."""
    return directory / "recipes" / f"{cell}.yaml"


def _pretrain(cell: PlannedCell, experiment: Experiment, directory: Path) -> list[str]:
    recipe, config = recipe_place(directory, cell.name), experiment.deepspeed_config
    line = command("pretrain", "--recipe", recipe, "--deepspeed_config", config, "--output_dir", cell.run, "--resume")
    if experiment.ranks == 1:
        return line
    ranks = [] if experiment.ranks is None else ["--num_accelerators", str(experiment.ranks)]
    launcher = [str(Path(sys.executable).with_name("deepspeed")), *ranks, "--master_port", str(free_port())]
    return [*launcher, "--module", *line[2:]]


def _score(cell: PlannedCell, name: str, asked: Glue | LmEval) -> list[str]:
    models = [cell.run / "hf" / peer for peer in cell.exports]
    options = [word for option, value in scoring_options(asked).items() for word in (f"--{option}", value)]
    return command(name, "--model", *models, "--output_dir", cell.run / name, *options)


def places(ranks: int | None, max_parallel: int | None, gpus: int, cores: int) -> list[dict[str, str]]:
    """The environments of the places to run in at once.

    Runs of one rank share out the GPUs or, without any, the cores; a run of several ranks has the machine for itself
    unless `max_parallel` says otherwise.
    """
    path = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"}
    number = max_parallel or ((gpus or cores) if ranks == 1 else 1)
    if gpus:
        return [{**path, **({"CUDA_VISIBLE_DEVICES": str(k % gpus)} if ranks == 1 and number > 1 else {})}
                for k in range(number)]  # fmt: skip
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, cores // (number * (ranks or 1)))))
    return [{**path, "OMP_NUM_THREADS": threads, "DS_ACCELERATOR": "cpu"} for _ in range(number)]
