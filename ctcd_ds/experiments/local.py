"""An experiment on this machine: its cells run, or only collected, with progress and a summary in words."""

from __future__ import annotations

import json
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ctcd_ds.cli import EXIT_DONE, EXIT_FAILED, EXIT_SAVED
from ctcd_ds.ending import is_finished
from ctcd_ds.evaluation.claims import title
from ctcd_ds.experiments.collecting import collect
from ctcd_ds.experiments.planning import ExperimentPlan, PlannedCell
from ctcd_ds.experiments.results import FILE, Cell, Results, read_results, write_results
from ctcd_ds.experiments.running import Machine, Outcome, do_cell, found_ending, run_cells
from ctcd_ds.training.tensorboard import write_scores


def run_here(plan: ExperimentPlan, places: Sequence[Mapping[str, str]]) -> int:
    """Runs what is not finished, as many cells at once as there are places; the exit code."""
    began, before = time.monotonic(), _seconds_before(plan.directory)
    machine, runs = Machine(places, plan.directory), plan.runs
    endings: dict[str, Outcome] = {}

    def write() -> Results:
        results = collect(plan, endings, before + time.monotonic() - began)
        write_results(plan.directory, results)
        return results

    with _stopping(machine), _Progress(runs) as progress:

        def on_ending(cell: PlannedCell, ending: Outcome, running: list[PlannedCell]) -> None:
            endings[cell.name] = ending
            results = write()
            result = next(c for c in results.cells if c.name == cell.name)
            progress.say(cell, ending, result)
            show_scores(cell.run, result)
            progress.watch(running)

        write()
        run_cells(plan.cells, machine, lambda cell: do_cell(progress.started(cell), plan, machine), on_ending)
    results = write()
    print(summary(results, plan.directory), flush=True)
    return EXIT_SAVED if machine.stopping else _code(results)


def collect_only(plan: ExperimentPlan) -> int:
    """results.json from what is there, and what stands in the way of the rest; the exit code."""
    if (plan.directory / FILE).exists():  # the command that repeats the experiment stays
        about = {**plan.about, "command": read_results(plan.directory).command}
        plan = replace(plan, about=about)
    results = as_they_stand(plan)
    write_results(plan.directory, results)
    for cell in plan.runs:
        show_scores(cell.run, next(c for c in results.cells if c.name == cell.name))
    print(summary(results, plan.directory), flush=True)
    return _code(results)


def as_they_stand(plan: ExperimentPlan) -> Results:
    """The results of the runs as they stand by the files they left: for runs that others started."""
    endings = {cell.name: found_ending(cell, plan.experiment) for cell in plan.runs}
    return collect(plan, endings, _seconds_before(plan.directory))


def _code(results: Results) -> int:
    return EXIT_DONE if all(cell.state == "finished" for cell in results.cells) else EXIT_FAILED


def show_scores(run: Path, cell: Cell) -> None:
    """GLUE's scores beside the run's curves: `tensorboard --logdir DIR` then compares cells by them too."""
    scores = {
        f"{title(task)}/{name}": score.median for name, peer in cell.peers.items() for task, score in peer.glue.items()
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

    def __init__(self, runs: Sequence[PlannedCell]) -> None:
        self._done = sum(cell.flops for cell in runs if is_finished(cell.run))
        self._running: dict[str, PlannedCell] = {}
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

    def started(self, cell: PlannedCell) -> PlannedCell:
        """Counts what this cell logs from now on."""
        if not is_finished(cell.run):
            self._running[cell.name] = cell
        return cell

    def watch(self, running: Sequence[PlannedCell]) -> None:
        """Forgets the cells that ended."""
        names = {cell.name for cell in running}
        for name in [name for name in self._running if name not in names]:
            self._done += self._flops(self._running.pop(name))

    def say(self, cell: PlannedCell, ending: Outcome, result: Any) -> None:
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
    def _flops(cell: PlannedCell) -> float:
        """What this cell's run has behind it."""
        try:
            last = (cell.run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1]
            return cell.flops * json.loads(last)["step"] / cell.steps
        except (OSError, ValueError, IndexError, KeyError):
            return 0.0
