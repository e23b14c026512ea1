"""From an experiment to its cells: one recipe for every condition and seed, each with what it needs."""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ctcd_ds.cli import did_you_mean, one_folder
from ctcd_ds.experiments.results import Value
from ctcd_ds.experiments.specification import Experiment, Group, set_key
from ctcd_ds.recipe.schema import Mistakes


@dataclass(frozen=True)
class Point:
    """One condition: a group at one point of its grid. `changes`: dotted recipe keys → values, null removes."""

    group: str
    coordinates: Mapping[str, Value]
    changes: Mapping[str, Any]

    @property
    def name(self) -> str:
        """GROUP, or GROUP/axis=value,axis=value."""
        shown = ",".join(f"{axis}={_plain(value)}" for axis, value in self.coordinates.items())
        return f"{self.group}/{shown}" if shown else self.group


@dataclass(frozen=True)
class CellPlan:
    """One run to be: `recipe` is the raw recipe, its exports' places filled in; `needs` are names of cells.

    `sources`: peer → (cell, its peer) whose export it starts from, which may not be there yet.
    """

    name: str
    point: Point
    seed: int
    recipe: dict[str, Any]
    needs: tuple[str, ...] = ()
    sources: Mapping[str, tuple[str, str]] = field(default_factory=dict)


def _plain(value: Value) -> str:
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def cell_name(point: Point, seed: int) -> str:
    """A name that is a folder's as well."""
    return f"{_folder(point.name)}-seed-{seed}"


def _folder(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", name)


def points(experiment: Experiment) -> dict[str, list[Point]]:
    """Every group's conditions, in the order of the file and of the values."""
    return {name: list(_points(name, group)) for name, group in experiment.cells.items()}


def _points(name: str, group: Group) -> Iterator[Point]:
    for steps in itertools.product(*(axis.steps for axis in group.grid.values())):
        coordinates = {axis: value for axis, (value, _) in zip(group.grid, steps, strict=True)}
        changes = dict(group.set)
        for _, settings in steps:
            changes.update({key: value for key, value in settings.items() if not key.startswith(_gone(group))})
        yield Point(name, coordinates, changes)


def _gone(group: Group) -> tuple[str, ...]:
    """How the keys of peers begin that the group takes away."""
    return tuple(f"{key}." for key, value in group.set.items() if value is None and re.fullmatch(r"peers\.[^.]+", key))


def partner(point: Point, others: list[Point]) -> Point | None:
    """The condition of another group that belongs to this one: equal on the axes that both have; None without one."""
    fitting = [other for other in others if _agree(point.coordinates, other.coordinates)]
    return fitting[0] if len(fitting) == 1 else None


def _agree(one: Mapping[str, Value], other: Mapping[str, Value]) -> bool:
    return all(one[axis] == other[axis] for axis in one.keys() & other.keys())


def expand(experiment: Experiment, base: Mapping[str, Any], directory: Path) -> list[CellPlan]:
    """All cells, those that others need before them. Raises Mistakes where what a cell needs cannot be told."""
    found, mistakes = points(experiment), []
    cells: list[CellPlan] = []
    for name, group in experiment.cells.items():
        for label, axis in group.grid.items():
            if axis.keys and all(key.startswith(_gone(group)) for key in axis.keys):
                mistakes.append(f"cells.{name}.grid.{label}: sets only what this cell takes away: {axis.keys[0]}")
        for point in found[name]:
            partners = {}
            for other in group.needed:
                if (fitting := partner(point, found[other])) is None:
                    mistakes.append(
                        f"cells.{name}: needs {other!r}, of which no single condition belongs to {point.name}: "
                        "give both the same axes with the same values"
                    )
                else:
                    partners[other] = fitting
            if len(partners) == len(group.needed):
                cells += [_cell(point, seed, partners, base, directory) for seed in experiment.seeds]
    if same := one_folder((point.name for group in found.values() for point in group), _folder):
        mistakes.append(f"cells: {same} would be one folder; rename a cell, or give its values other labels")
    if mistakes:
        raise Mistakes("this experiment", mistakes)
    by_name = {cell.name: cell for cell in cells}
    for cell in cells:
        for peer, (source, taken) in cell.sources.items():
            there = by_name[source].recipe.get("peers") or {}
            if taken not in there:
                mistakes.append(f"cells.{cell.point.group}: peers.{peer}.pretrained: {source} has no peer {taken!r}; "
                                f"{did_you_mean(taken, there)}")  # fmt: skip
    if mistakes:
        raise Mistakes("this experiment", list(dict.fromkeys(mistakes)))
    return cells


def _cell(point: Point, seed: int, partners: Mapping[str, Point], base: Mapping[str, Any], directory: Path) -> CellPlan:
    raw = copy.deepcopy(dict(base))
    for key, value in point.changes.items():
        set_key(raw, key, copy.deepcopy(value))
    raw["seed"] = seed
    sources = {}
    for name, peer in (raw.get("peers") or {}).items():
        reference = peer.get("pretrained") if isinstance(peer, dict) else None
        if isinstance(reference, dict) and set(reference) == {"cell", "peer"}:
            source = cell_name(partners[reference["cell"]], seed)
            sources[name] = (source, reference["peer"])
            peer["pretrained"] = str(export_place(directory, source, reference["peer"]))
    needs = tuple(cell_name(other, seed) for other in partners.values())
    return CellPlan(cell_name(point, seed), point, seed, raw, needs, sources)


def run_place(directory: Path, cell: str) -> Path:
    """The run directory of a cell."""
    return directory / "cells" / cell


def export_place(directory: Path, cell: str, peer: str) -> Path:
    """Where a cell's peer is exported to."""
    return run_place(directory, cell) / "hf" / peer
