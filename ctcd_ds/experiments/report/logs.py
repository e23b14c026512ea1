"""What a run directory holds that a report shows: its recipe and what it logged, as curves."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean, median
from typing import Any

from ctcd_ds.cli import UserError
from ctcd_ds.kinds import instead
from ctcd_ds.manifest import read_json
from ctcd_ds.objective.graph import DistillationGraph
from ctcd_ds.recipe.reading import load_recipe
from ctcd_ds.recipe.sections import Recipe
from ctcd_ds.training.run_directory import RunDirectory

Series = list[tuple[float, float]]  # (x, y), x ascending


@dataclass(frozen=True)
class LoggedRun:
    """One run directory, read. `rows`: metrics.jsonl by step, the later row of a step counts."""

    directory: RunDirectory
    recipe: Recipe
    rows: list[dict[str, Any]]
    environment: dict[str, Any]
    deepspeed: dict[str, Any]
    summary: dict[str, Any]

    @cached_property
    def graph(self) -> DistillationGraph:
        return self.recipe.graph()

    def series(self, key: str) -> Series:
        """The steps at which `key` was logged as a number, with its value."""
        return [(row["step"], row[key]) for row in self.rows if row.get(key) is not None]


def read_run(path: Path) -> LoggedRun:
    """Reads a run directory, finished or not. Raises UserError where there is none."""
    directory = RunDirectory(path)
    if not directory.recipe.is_file():
        raise UserError(f"{path} is neither a run nor an experiment: {instead(path, 'run', 'experiment')}")
    return LoggedRun(
        directory,
        load_recipe(directory.recipe),
        directory.logged(),
        *(read_json(path / name) for name in ("environment.json", "ds_config.json", "summary.json")),
    )


def over_seeds(curves: Sequence[Series]) -> list[tuple[float, float, float, float]]:
    """(x, median, smallest, largest) over the curves, at every x that any has."""
    values: dict[float, list[float]] = {}
    for curve in curves:
        for x, y in curve:
            values.setdefault(x, []).append(y)
    return [(x, median(ys), min(ys), max(ys)) for x, ys in sorted(values.items())]


def windows(curve: Series, count: int = 60) -> Series:
    """At most `count` points: the means of as many equal windows of a curve, each at its windows' mean x."""
    size = -(-len(curve) // count)
    parts = [curve[start : start + size] for start in range(0, len(curve), max(1, size))]
    return [(fmean(x for x, _ in part), fmean(y for _, y in part)) for part in parts]


def slug(text: str) -> str:
    """A name that is a file's and an HTML id."""
    return re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-").lower()
