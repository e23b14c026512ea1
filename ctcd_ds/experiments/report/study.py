"""What a report is about: an experiment, or run directories brought into the same shape, with all that they logged."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ctcd_ds.cli import UserError
from ctcd_ds.experiments.report.logs import LoggedRun, Series, read_run
from ctcd_ds.experiments.report.runs import runs_as_results
from ctcd_ds.experiments.results import FILE, Cell, Comparison, Results, read_results


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
        return list(dict.fromkeys(n for run in self.runs.values() for n, p in run.recipe.peers.items() if not p.frozen))

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

    def comparisons(self, metric: str) -> list[Comparison]:
        return [comparison for comparison in self.results.comparisons if comparison.metric == metric]


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
