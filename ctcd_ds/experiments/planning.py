"""All cells of an experiment checked and counted before one of them starts: recipes, corpus, models, steps, FLOPs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

from ctcd_ds.experiments.grid import CellPlan, Point, export_place, partner, points, run_place
from ctcd_ds.experiments.results import PeerResult
from ctcd_ds.experiments.specification import Experiment, prerequisites
from ctcd_ds.manifest import canonical_sha256
from ctcd_ds.recipe.mistakes import recipe_mistakes
from ctcd_ds.recipe.schema import Mistakes
from ctcd_ds.recipe.sections import Recipe
from ctcd_ds.training.deepspeed_config import read_config
from ctcd_ds.training.plan import Plan, make_plan


@dataclass(frozen=True)
class PlannedCell:
    """A cell that can be run. FLOPs are of the whole run; `total_flops` with the runs that it needs.

    `run`: its run directory, which belongs to `owner`: the first cell with the same recipe.
    """

    cell: CellPlan
    recipe: Recipe
    run: Path
    owner: str
    steps: int
    rows: int
    tokens: int
    flops: float
    total_flops: float
    peers: dict[str, PeerResult]

    @property
    def name(self) -> str:
        return self.cell.name

    @property
    def exports(self) -> list[str]:
        """The peers that this run trains."""
        return [name for name, peer in self.peers.items() if not peer.frozen]


@dataclass(frozen=True)
class ExperimentPlan:
    """An experiment checked and counted: all cells, in the order in which they are to be run.

    `directory`: absolute, where all of it goes. `about`: the fields of results.json that only the command knows.
    """

    experiment: Experiment
    cells: Sequence[PlannedCell]
    directory: Path
    about: Mapping[str, Any]

    @property
    def runs(self) -> list[PlannedCell]:
        """The cells that are runs of their own; the others share one of these."""
        return [cell for cell in self.cells if cell.owner == cell.name]


@dataclass(frozen=True)
class _Size:
    """What a condition's run costs: the same for all seeds."""

    steps: int
    rows_per_step: int
    tokens_per_step: int
    flops_per_token: float
    needed_flops: float
    peers: dict[str, PeerResult]

    @property
    def flops_per_step(self) -> float:
        return self.tokens_per_step * self.flops_per_token

    @property
    def total_flops(self) -> float:
        return self.needed_flops + self.steps * self.flops_per_step


def plan_cells(
    experiment: Experiment, cells: Sequence[CellPlan], directory: Path, world: int, device: str
) -> list[PlannedCell]:
    """Every cell with its recipe and cost, in the order in which they are to be run: what others need comes first.

    `world`, `device` ('cuda' or 'cpu'): of the runs to be, which may be on other machines.
    Raises Mistakes with what is wrong in any cell's recipe, corpus or model; nothing was started or written then.
    """
    if mistakes := structural_mistakes(cells):
        raise Mistakes("the cells' recipes", mistakes)
    first_seed = {cell.point.name: cell for cell in reversed(cells)}
    sizes = _sizes(experiment, first_seed, directory, world, device)
    owners: dict[str, str] = {}
    owner_of: dict[str, str] = {}
    planned = []
    for cell in sorted(cells, key=_in_order(experiment)):
        size = sizes[cell.point.name]
        raw = _with_steps(cell, size.steps) if experiment.cells[cell.point.group].compute_of else cell.recipe
        for peer, (source, taken) in cell.sources.items():
            raw["peers"][peer]["pretrained"] = str(export_place(directory, owner_of[source], taken))
        recipe = Recipe.model_validate(raw)
        owner = owner_of[cell.name] = owners.setdefault(_meaning(recipe), cell.name)
        planned.append(
            PlannedCell(
                replace(cell, recipe=raw),
                recipe,
                run_place(directory, owner),
                owner,
                size.steps,
                size.steps * size.rows_per_step,
                size.steps * size.tokens_per_step,
                size.steps * size.flops_per_step,
                size.total_flops,
                size.peers,
            )
        )
    return planned


def _meaning(recipe: Recipe) -> str:
    """A hash that recipes share which make the same run: a soft weight of 0 is no edge."""
    content = recipe.resolved()
    for peer in content["peers"].values():
        peer["soft"] = {other: weight for other, weight in peer["soft"].items() if weight}
    return canonical_sha256(content)


def structural_mistakes(cells: Sequence[CellPlan]) -> list[str]:
    """What is wrong with the cells' recipes as such, each mistake once, with the first cell that has it."""
    found: dict[str, str] = {}
    for cell in cells:
        for mistake in recipe_mistakes(cell.recipe):
            found.setdefault(mistake, cell.name)
    return [f"{name}: {mistake}" for mistake, name in found.items()]


def _in_order(experiment: Experiment) -> Any:
    """Sort key: groups after those they need; seed by seed, so that the first whole comparison is there early."""
    groups = list(TopologicalSorter({n: g.needed for n, g in experiment.cells.items()}).static_order())
    file_order = list(experiment.cells)
    level = dict.fromkeys(groups, 0)
    for name in groups:
        level[name] = max((level[other] + 1 for other in experiment.cells[name].needed), default=0)
    seeds = experiment.seeds
    return lambda cell: (seeds.index(cell.seed), level[cell.point.group], file_order.index(cell.point.group))


def _sizes(
    experiment: Experiment, cells: Mapping[str, CellPlan], directory: Path, world: int, device: str
) -> dict[str, _Size]:
    """Condition → cost, from a plan of its first cell."""
    conditions: dict[str, list[Point]] = points(experiment)
    sizes: dict[str, _Size] = {}
    mistakes: dict[str, str] = {}
    by_name = {cell.name: cell for cell in cells.values()}
    config = read_config(Path(experiment.deepspeed_config))
    for group in TopologicalSorter(prerequisites(experiment.cells)).static_order():
        for point in conditions[group]:
            cell = cells[point.name]
            before = [by_name[name].point.name for name in cell.needs]
            spent = sum(sizes[name].total_flops for name in before if name in sizes)
            try:
                plan = make_plan(
                    _without_exports(cell, by_name), config, world, device, run_place(directory, cell.name)
                )
            except Mistakes as problem:
                mistakes.update({said: cell.name for said in problem.mistakes if said not in mistakes})
                continue
            size = _Size(
                plan.steps,
                plan.recipe.training.global_batch_rows,
                plan.tokens_per_step,
                plan.flops_per_token,
                spent,
                _peers(plan),
            )
            if goal := experiment.cells[group].compute_of:
                other = partner(point, conditions[goal])
                if other is None or other.name not in sizes:
                    mistakes[f"compute_of = {goal!r}: no single condition of it belongs to {point.name}"] = cell.name
                    continue
                steps = int((sizes[other.name].total_flops - spent) // size.flops_per_step)
                if steps < 1:
                    mistakes[f"compute_of = {goal!r}: what this cell needs costs as much already"] = cell.name
                    continue
                size = replace(size, steps=steps)
            sizes[point.name] = size
    if mistakes:
        raise Mistakes("the cells' recipes", [f"{name}: {said}" for said, name in mistakes.items()])
    return sizes


def _with_steps(cell: CellPlan, steps: int) -> dict[str, Any]:
    training = {**cell.recipe["training"], "steps": steps}
    training.pop("epochs", None)
    return {**cell.recipe, "training": training}


def _without_exports(cell: CellPlan, cells: Mapping[str, CellPlan]) -> Recipe:
    """The recipe with each export that is still to be made replaced by the config it will have."""
    raw = {**cell.recipe, "peers": dict(cell.recipe["peers"])}
    for name, (source, peer) in cell.sources.items():
        known = _without_exports(cells[source], cells).peers[peer]
        if known.init_from is not None and known.init_from.peer is not None:
            said = f"{source}'s {peer} begins as layers of another peer of its own run; give it init_from.pretrained"
            raise Mistakes("this experiment", [f"peers.{name}.pretrained: {said}, or train it from its own config"])
        own = {key: value for key, value in raw["peers"][name].items() if key != "pretrained"}
        raw["peers"][name] = {**own, "model": known.model, "pretrained": known.pretrained, "init_from": known.init_from}
    return Recipe.model_validate(raw)


def _peers(plan: Plan) -> dict[str, PeerResult]:
    """What is known of a condition's peers before they are trained."""
    return {
        name: PeerResult(
            frozen=plan.recipe.peers[name].frozen,
            layers=getattr(config, "num_hidden_layers", None),
            hidden_size=getattr(config, "hidden_size", None),
            parameters=plan.costs[name].parameters,
        )
        for name, config in plan.configs.items()
    }
