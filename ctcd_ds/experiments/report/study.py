"""What a report is about: an experiment, or run directories brought into the same shape, with all that they logged."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ctcd_ds.cli import UserError
from ctcd_ds.experiments.report.logs import LoggedRun, Series, read_run
from ctcd_ds.experiments.report.runs import runs_as_results
from ctcd_ds.experiments.results import FILE, Cell, Comparison, Results, Value, read_results


@dataclass(frozen=True)
class Study:
    """The results, and the run of every cell that has begun one."""

    results: Results
    directory: Path
    runs: dict[str, LoggedRun]
    is_experiment: bool

    @cached_property
    def peers(self) -> list[str]:
        """The names of all trained peers, in the order of the recipes."""
        measured = [name for condition in self.results.conditions.values() for name in condition.peers]
        trained = [n for run in self.runs.values() for n, peer in run.recipe.peers.items() if not peer.frozen]
        return list(dict.fromkeys([*trained, *measured]))

    @cached_property
    def cells(self) -> dict[str, Cell]:
        return {cell.name: cell for cell in self.results.cells}

    def members(self, condition: str) -> Iterator[tuple[Cell, LoggedRun]]:
        """The cells of a condition that have a run."""
        for name in self.results.conditions[condition].cells:
            if name in self.runs:
                yield self.cells[name], self.runs[name]

    def example(self, condition: str) -> LoggedRun | None:
        """One of the condition's runs: what they have in common can be read off any."""
        return next((run for _, run in self.members(condition)), None)

    def curves(self, condition: str, key: str, by_compute: bool = False) -> list[Series]:
        """`key` over the steps of each run of a condition; or over the FLOPs from nothing, what it needed included."""
        found = []
        for cell, run in self.members(condition):
            points = run.series(key)
            if by_compute:
                if not cell.flops or not cell.steps or cell.total_flops is None:
                    continue
                before, each = cell.total_flops - cell.flops, cell.flops / cell.steps
                points = [(before + each * step, value) for step, value in points]
            if points:
                found.append(points)
        return found

    def label(self, condition: str) -> str:
        """A condition's name, short enough for pictures: its group, and its values without the names of the axes."""
        known = self.results.conditions.get(condition)
        if known is None or not known.coordinates:
            return plain(condition)
        return f"{plain(known.group)} {', '.join(plain(value) for value in known.coordinates.values())}"

    def title(self, condition: str) -> str:
        """A condition's name in full, as one reads it."""
        known = self.results.conditions.get(condition)
        if known is None or not known.coordinates:
            return plain(condition)
        at = ", ".join(f"{plain(axis)} {plain(value)}" for axis, value in known.coordinates.items())
        return f"{plain(known.group)} ({at})"

    def comparisons(self, metric: str) -> list[Comparison]:
        return [comparison for comparison in self.results.comparisons if comparison.metric == metric]


def plain(value: Value) -> str:
    """A name or a value of a grid as one reads it."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value).replace("_", " ")


def read_study(paths: Sequence[Path]) -> Study:
    """One experiment's directory, or any number of run directories. Raises UserError for anything else."""
    experiments = [path for path in paths if (path / FILE).is_file() and not (path / "recipe.yaml").exists()]
    if experiments and len(paths) > 1:
        raise UserError(f"{experiments[0]} is an experiment: give it alone, or give run directories only")
    if experiments:
        results, directory = read_results(experiments[0]), experiments[0]
        places = {cell.name: directory / cell.run for cell in results.cells}
        runs = {name: read_run(place) for name, place in places.items() if (place / "recipe.yaml").is_file()}
    else:
        listed = {path.resolve(): read_run(path.resolve()) for path in paths}
        results, directory = runs_as_results(list(listed.values())), Path()
        runs = {cell.name: listed[Path(cell.run)] for cell in results.cells}
    if not any(run.rows for run in runs.values()):
        raise UserError(f"{', '.join(map(str, paths))}: no run has logged a step yet")
    return Study(results, directory, runs, bool(experiments))
