"""One experiment from its file to results.json: data, plan, cells, collection, with progress."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ctcd_ds.cli import EXIT_DONE, EXIT_FAILED, EXIT_SAVED, RunFailure, UserError
from ctcd_ds.cluster.slurm import Cluster, require_sbatch
from ctcd_ds.experiments.collecting import collect
from ctcd_ds.experiments.grid import expand
from ctcd_ds.experiments.planning import Planned, plan_cells, structural_mistakes
from ctcd_ds.experiments.queueing import queue_cells, refuse_while_queued
from ctcd_ds.experiments.results import FILE, Cell, Results, read_results, write_results
from ctcd_ds.experiments.running import (
    ROOT,
    Ending,
    Machine,
    do_cell,
    found_ending,
    is_done,
    is_finished,
    places,
    recipe_place,
    run_cells,
)
from ctcd_ds.experiments.specification import Experiment, base_recipe, load_experiment
from ctcd_ds.manifest import write_atomic
from ctcd_ds.recipe import Mistakes
from ctcd_ds.training.engine import device_type
from ctcd_ds.training.run_directory import git_commit
from ctcd_ds.training.tensorboard import write_scores


@dataclass(frozen=True)
class Slurm:
    """Where cells are queued; `collecting`: the words that collect this experiment, after the interpreter."""

    cluster: Cluster
    nodes: int
    collecting: Sequence[str]


def run_experiment(
    path: Path,
    directory: Path,
    size: str,
    overrides: Sequence[str],
    data_dir: str | None,
    seeds: list[int] | None,
    max_parallel: int | None,
    resume: bool,
    dry_run: bool,
    slurm: Slurm | None = None,
    only_collect: bool = False,
) -> int:
    """Runs all cells of an experiment file that are not finished yet, and writes DIR/results.json after each.

    `slurm`: the cells are queued instead, and nothing is waited for. `only_collect`: nothing is run, results.json is
    written from what is there. Raises UserError before anything starts where file, recipes, data or directory cannot
    serve. Returns the exit code: 0 all cells are finished (or queued), 1 some are not, 85 stopped with all saved.
    """
    experiment = load_experiment(path, size)
    if seeds is not None:
        experiment = experiment.model_copy(update={"seeds": seeds})
    fresh = not directory.exists()
    _refuse_or_resume(directory, resume or only_collect)
    if slurm is not None and not dry_run:
        require_sbatch()
        refuse_while_queued(directory)
    gpus = _gpus()
    device, world = device_type(), experiment.ranks or max(1, gpus)
    if slurm is not None:
        device, world = slurm.cluster.device, slurm.nodes * slurm.cluster.ranks_per_node
    with tempfile.TemporaryDirectory() as passing:
        place = Path(passing) / "data" if dry_run else directory / "data"
        experiment, overrides = with_data(experiment, place, overrides, data_dir)
        cells = expand(experiment, base_recipe(experiment, overrides), directory)
        if mistakes := structural_mistakes(cells):  # before data is made, which takes a while
            raise Mistakes("the cells' recipes", mistakes)
        if experiment.demo_data:
            make_demo_data(place)
        planned = plan_cells(experiment, cells, directory, world, device)
        _check_glue(experiment)
    print(describe(path.stem, experiment, size, planned), flush=True)
    if dry_run:
        return EXIT_DONE
    _write_recipes(planned, directory)
    about = {
        "experiment": path.stem,
        "size": size,
        "recipe": experiment.recipe,
        "corpus": str(planned[0].recipe.corpus.path),
        "command": ["python", *sys.argv],
        "git_commit": git_commit(),
    }
    if only_collect:
        return _collect(experiment, planned, directory, about)
    if slurm is not None:
        return _queue(experiment, planned, directory, about, slurm, fresh)
    machine = Machine(places(experiment.ranks, max_parallel, gpus, len(os.sched_getaffinity(0))), directory)
    return _run(experiment, planned, machine, directory, about)


def _queue(
    experiment: Experiment, planned: Sequence[Planned], directory: Path, about: Any, slurm: Slurm, fresh: bool
) -> int:
    """All cells into the queue; a first results.json, in which they wait, keeps the command."""
    waiting = {cell.name: Ending("finished" if is_done(cell, experiment) else "waiting", "queued") for cell in planned}
    write_results(directory, collect(experiment, planned, waiting, directory, {**about, "seconds": 0.0}))
    try:
        print(queue_cells(experiment, planned, directory, slurm.cluster, slurm.nodes, slurm.collecting))
    except UserError:
        if fresh:
            shutil.rmtree(directory)
        raise
    return EXIT_DONE


def _collect(experiment: Experiment, planned: Sequence[Planned], directory: Path, about: Any) -> int:
    """results.json from what is there, and what stands in the way of the rest."""
    if (directory / FILE).exists():
        about = {**about, "command": read_results(directory).command}  # the one that repeats it
    endings = {cell.name: found_ending(cell, experiment) for cell in planned if cell.owner == cell.name}
    results = collect(experiment, planned, endings, directory, {**about, "seconds": _seconds_before(directory)})
    write_results(directory, results)
    for cell in planned:
        if cell.owner == cell.name:
            show_scores(cell.run, next(c for c in results.cells if c.name == cell.name))
    print(summary(results, directory), flush=True)
    return EXIT_DONE if all(cell.state == "finished" for cell in results.cells) else EXIT_FAILED


def _refuse_or_resume(directory: Path, resume: bool) -> None:
    if directory.is_file():
        raise UserError(f"output_dir {directory} is a file")
    if not directory.exists() or not any(directory.iterdir()):
        return
    if not (directory / "recipes").is_dir() and not (directory / "data").is_dir():
        raise UserError(f"output_dir {directory} holds other files: give the experiment a directory of its own")
    if not resume:
        raise UserError(
            f"output_dir {directory} holds an experiment already: go on with it (--resume), or name another directory"
        )


def with_data(
    experiment: Experiment, place: Path, overrides: Sequence[str], data_dir: str | None
) -> tuple[Experiment, list[str]]:
    """Where the corpus and the GLUE files are: the demo's own, at `place`, unless others are given."""
    given = any(override.split("=")[0].strip() == "corpus.path" for override in overrides)
    changes: dict[str, Any] = {}
    if experiment.demo_data and given:
        changes["demo_data"] = False
    elif experiment.demo_data:
        overrides = [f"corpus.path={place / 'corpus'}", *overrides]
    if experiment.glue is not None:
        demo = experiment.demo_data and data_dir is None
        where = data_dir or (str(place / "glue") if demo else experiment.glue.data_dir)
        if demo and given:  # a stand-in made from the demo's text says nothing about models of another text
            changes["glue"] = None
        else:
            found = where if where == "hub" else str(Path(where).resolve())  # --resume may be said from anywhere
            changes["glue"] = experiment.glue.model_copy(update={"data_dir": found})
    return experiment.model_copy(update=changes), list(overrides)


def make_demo_data(place: Path) -> None:
    """The demo's text, tokenizer and corpus, by the commands that `make demo` runs; nothing where they are there."""
    if (place / "corpus" / "manifest.json").exists():
        return
    place.mkdir(parents=True, exist_ok=True)
    text, tokenizer, corpus = place / "text.txt", place / "tokenizer", place / "corpus"
    for words in (
        ["make_demo_data", "--output_dir", place, "--size_megabytes", 6],
        ["train_tokenizer", "--input", text, "--type", "wordpiece", "--vocab_size", 4096, "--output_dir", tokenizer],
        ["prepare_corpus", "--input", text, "--tokenizer", tokenizer, "--output_dir", corpus, "--valid_fraction", 0.05],
    ):
        tool, *options = map(str, words)
        print(f"$ python tools/{tool}.py {' '.join(options)}", flush=True)
        line = [sys.executable, str(ROOT / "tools" / f"{tool}.py"), *options]
        if (code := subprocess.run(line, check=False).returncode) != 0:
            raise RunFailure(f"the demo's data could not be made: tools/{tool}.py ended with {code}")


def _check_glue(experiment: Experiment) -> None:
    """Looks at the GLUE files as run_glue will, before hours of training. Raises its UserError."""
    if experiment.glue is not None:
        from ctcd_ds.evaluation.glue import load

        load(tuple(experiment.glue.tasks.split(",")), experiment.glue.data_dir)


def _gpus() -> int:
    import torch

    return torch.cuda.device_count() if device_type() == "cuda" else 0


def _write_recipes(planned: Sequence[Planned], directory: Path) -> None:
    """DIR/recipes/CELL.yaml. Raises Mistakes where a finished cell was run with another recipe."""
    different = []
    for cell in planned:
        place, text = recipe_place(directory, cell.name), cell.recipe.to_yaml()
        if place.exists() and place.read_text(encoding="utf-8") != text and is_finished(cell.run):
            different.append(f"{cell.name} is finished with another recipe ({place}): name another --output_dir")
    if different:
        raise Mistakes(f"--resume of {directory}", different)
    (directory / "recipes").mkdir(parents=True, exist_ok=True)
    for cell in planned:
        write_atomic(recipe_place(directory, cell.name), cell.recipe.to_yaml())


def describe(name: str, experiment: Experiment, size: str, planned: Sequence[Planned]) -> str:
    """What will be run: conditions, steps, cost."""
    lines = [f"{name}, size {size}: {experiment.question}", *([experiment.note] if experiment.note else [])]
    lines += ["", f"{'condition':<44}{'steps':>8}{'FLOPs':>10}{'in all':>10}  peers"]
    for cell in planned:
        if cell.cell.seed != experiment.seeds[0]:
            continue
        peers = ", ".join(f"{peer}{' (frozen)' if known.frozen else ''}" for peer, known in cell.peers.items())
        same = "" if cell.owner == cell.name else f", same run as {cell.owner}"
        costs = f"{cell.flops:>10.2g}{cell.total_flops:>10.2g}"
        lines.append(f"{cell.cell.point.name:<44}{cell.steps:>8}{costs}  {peers}{same}")
    runs = [cell for cell in planned if cell.owner == cell.name]
    total = sum(cell.flops for cell in runs)
    lines.append(f"{len(planned)} cells ({len(experiment.seeds)} seeds), {len(runs)} runs, {total:.3g} FLOPs")
    return "\n".join(lines)


def _run(experiment: Experiment, planned: Sequence[Planned], machine: Machine, directory: Path, about: Any) -> int:
    began, before = time.monotonic(), _seconds_before(directory)
    runs = [cell for cell in planned if cell.owner == cell.name]
    endings: dict[str, Ending] = {}

    def write() -> Results:
        seconds = before + time.monotonic() - began
        results = collect(experiment, planned, endings, directory, {**about, "seconds": seconds})
        write_results(directory, results)
        return results

    with _stopping(machine), _Progress(runs) as progress:

        def told(cell: Planned, ending: Ending, running: list[Planned]) -> None:
            endings[cell.name] = ending
            results = write()
            result = next(c for c in results.cells if c.name == cell.name)
            progress.say(cell, ending, result)
            show_scores(cell.run, result)
            progress.watch(running)

        write()
        run_cells(planned, machine, lambda cell: do_cell(progress.started(cell), experiment, machine, directory), told)
    results = write()
    print(summary(results, directory), flush=True)
    if machine.stopping:
        return EXIT_SAVED
    return EXIT_DONE if all(cell.state == "finished" for cell in results.cells) else EXIT_FAILED


def show_scores(run: Path, cell: Cell) -> None:
    """GLUE's scores beside the run's curves: `tensorboard --logdir DIR` then compares cells by them too."""
    scores = {
        f"GLUE {task}/{name}": score.median for name, peer in cell.peers.items() for task, score in peer.glue.items()
    }
    if scores:
        write_scores(run / "tensorboard", scores, cell.steps or 0)


def _seconds_before(directory: Path) -> float:
    return read_results(directory).seconds if (directory / FILE).exists() else 0.0


def summary(results: Results, directory: Path) -> str:
    """The comparisons in words, and what is not finished and why."""
    lines = ["", *(comparison.words for comparison in results.comparisons if comparison.metric == "valid_loss")]
    lines += ["", *(f"Mind: {caveat}" for caveat in results.caveats)]
    for cell in results.cells:
        if cell.state != "finished":
            lines.append(f"{cell.name}: {cell.state}: {cell.reason}")
    done = sum(cell.state == "finished" for cell in results.cells)
    lines.append(f"{done} of {len(results.cells)} cells are finished; {directory / FILE}")
    return "\n".join(lines)


@contextmanager
def _stopping(machine: Machine) -> Iterator[None]:
    """SIGINT and SIGTERM stop the experiment: its processes save and end."""

    def stop(*_: Any) -> None:
        # Not here, in whatever line was interrupted: `stop` waits for a lock that line may hold.
        threading.Thread(target=machine.stop, daemon=True).start()

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Progress:
    """One bar over the FLOPs of all runs, moved by what the running cells have logged."""

    def __init__(self, runs: Sequence[Planned]) -> None:
        self._done = sum(cell.flops for cell in runs if is_finished(cell.run))
        self._running: dict[str, Planned] = {}
        self._count, self._number = len(runs), 0
        shown = sys.stderr.isatty()
        self._bar = tqdm(
            total=sum(cell.flops for cell in runs),
            initial=self._done,
            unit="FLOP",
            unit_scale=True,
            smoothing=0,
            dynamic_ncols=shown,
            mininterval=1 if shown else 30,
        )
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._move, daemon=True)

    def __enter__(self) -> _Progress:
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._end.set()
        self._thread.join()
        self._bar.close()

    def started(self, cell: Planned) -> Planned:
        """Counts what this cell logs from now on."""
        if not is_finished(cell.run):
            self._running[cell.name] = cell
        return cell

    def watch(self, running: Sequence[Planned]) -> None:
        """Forgets the cells that ended."""
        names = {cell.name for cell in running}
        for name in [name for name in self._running if name not in names]:
            self._done += self._flops(self._running.pop(name))

    def say(self, cell: Planned, ending: Ending, result: Any) -> None:
        """A line above the bar for a cell that ended."""
        self._number += 1
        losses = ", ".join(f"{name} {peer.valid_loss:.4f}" for name, peer in result.peers.items() if peer.valid_loss)
        said = f"held-out loss {losses}" if ending.state == "finished" else ending.reason
        self._bar.write(f"[{self._number}/{self._count}] {cell.name} {ending.state}: {said}", file=sys.stderr)

    def _move(self) -> None:
        while not self._end.wait(1.0):
            now = self._done + sum(self._flops(cell) for cell in list(self._running.values()))
            self._bar.update(max(0.0, now - self._bar.n))

    @staticmethod
    def _flops(cell: Planned) -> float:
        """What this cell's run has behind it."""
        try:
            last = (cell.run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1]
            return cell.flops * json.loads(last)["step"] / cell.steps
        except (OSError, ValueError, IndexError, KeyError):
            return 0.0
