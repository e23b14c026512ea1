"""From run directories to results.json: what each cell gave, what the seeds say together."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ctcd_ds.cli import some
from ctcd_ds.evaluation import metrics
from ctcd_ds.evaluation.claims import called, reservation
from ctcd_ds.experiments.grid import partner, points
from ctcd_ds.experiments.planning import ExperimentPlan, PlannedCell
from ctcd_ds.experiments.results import Cell, Comparison, Condition, GlueScore, PeerResult, Results, Spread
from ctcd_ds.experiments.running import Outcome
from ctcd_ds.experiments.specification import Experiment
from ctcd_ds.experiments.statistics import caveats, compare, spread
from ctcd_ds.manifest import read_json
from ctcd_ds.training.metrics import held_out_values
from ctcd_ds.training.run_directory import RunDirectory, at_word_frequencies

MANY_LOOKS = 4  # at the held-out rows: from so many on they are a curve, and its lowest is a place to stop


def collect(plan: ExperimentPlan, endings: Mapping[str, Outcome], seconds: float) -> Results:
    """The content of results.json. `endings`: by the run's owner; `seconds`: wall time so far."""
    experiment, planned, directory = plan.experiment, plan.cells, plan.directory
    cells = [_cell(cell, endings.get(cell.owner, Outcome("waiting", "not started")), directory) for cell in planned]
    conditions = _conditions(planned, cells)
    comparisons = list(_comparisons(experiment, conditions))
    unfinished = [cell.name for cell in cells if cell.state != "finished"]
    hardware: dict[str, Any] = {}
    for cell in cells:
        environment = read_json(directory / cell.run / "environment.json")
        if cell.state == "finished" and environment:
            known = ("device", "cores", "world", "threads_per_rank", "host")
            hardware = {key: environment.get(key) for key in known}
            break
    axes = {axis: values.keys for group in experiment.cells.values() for axis, values in group.grid.items()}
    return Results(
        question=experiment.question,
        note=experiment.note,
        hardware=hardware,
        seeds=experiment.seeds,
        axes=axes,
        about={name: group.about for name, group in experiment.cells.items() if group.about},
        cells=cells,
        conditions=conditions,
        comparisons=comparisons,
        caveats=caveats(comparisons, unfinished, [experiment.note, *reservations(cell.run for cell in planned)]),
        seconds=seconds,
        **plan.about,
    )


def _cell(cell: PlannedCell, ending: Outcome, directory: Path) -> Cell:
    return Cell(
        name=cell.name,
        condition=cell.cell.point.name,
        seed=cell.cell.seed,
        run=cell.run.relative_to(directory).as_posix(),
        state=ending.state,  # type: ignore[arg-type]
        reason=ending.reason,
        needs=list(cell.cell.needs),
        changes=dict(cell.cell.point.changes),
        steps=cell.steps,
        rows=cell.rows,
        tokens=cell.tokens,
        flops=cell.flops,
        total_flops=cell.total_flops,
        **(outcome(cell.run, cell.peers, directory) if ending.state == "finished" else {}),
    )


def outcome(run: Path, known: Mapping[str, PeerResult], directory: Path) -> dict[str, Any]:
    """What a finished run left, as fields of its Cell; `known`: what its peers are. Exports are below `directory`."""
    summary, prefix = read_json(run / "summary.json"), "valid/agreement/"
    looks = RunDirectory(run).logged()
    agreement = {key.removeprefix(prefix): value for key, value in summary.items() if key.startswith(prefix)}
    peers = {}
    for name, peer in known.items():
        place, held_out = run / "hf" / name, held_out_values(summary, name)
        whole = held_out.pop("", {})
        losses = [loss for row in looks if (loss := row.get(f"valid/{name}/loss")) is not None]
        left = {
            "valid_loss": whole.get("loss"),
            "lowest_loss": min(losses) if len(losses) >= MANY_LOOKS else None,
            "valid_accuracy": whole.get("accuracy"),
            "valid_losses": {of: values["loss"] for of, values in held_out.items() if "loss" in values},
            "glue": task_scores(run, place),
            "export": place.relative_to(directory).as_posix() if place.is_dir() else None,
        }
        peers[name] = peer.model_copy(update=left)
    return {
        "seconds": summary.get("seconds"),
        "peers": peers,
        "agreement": {pair: share for pair, share in agreement.items() if share is not None},
    }


def task_scores(run: Path, model: Path) -> dict[str, GlueScore]:
    """This model's scores from `ctcd glue` and `ctcd lm-eval`, each under the name that it may have."""
    found = {}
    for content in _scored(run):
        for entry in content["models"].values():
            if Path(entry["path"]).resolve() == model.resolve():
                for task, scores in entry["tasks"].items():
                    if "median" in scores:
                        seeds = {seed: done["score"] for seed, done in scores["seeds"].items()}
                        name = called(task, content["tasks"][task], content["settings"])
                        found[name] = GlueScore(median=scores["median"], seeds=seeds)
    return found


def _scored(run: Path) -> list[dict[str, Any]]:
    """What the commands that score a run's exports have written."""
    contents = (read_json(run / room / "results.json") for room in ("glue", "lm_eval"))
    return [content for content in contents if content]


def reservations(runs: Iterable[Path]) -> list[str]:
    """What must be known of these runs: scores that are not their task's, models that have learned next to nothing."""
    said: dict[str, None] = {}
    at_frequencies: dict[str, list[str]] = {}
    for run in dict.fromkeys(runs):
        summary = read_json(run / "summary.json")
        ends = {key.split("/")[1]: v for key, v in summary.items() if re.fullmatch("valid/[^/]+/loss", key) and v}
        if nothing := at_word_frequencies(ends, summary.get("unigram_loss")):
            at_frequencies.setdefault(nothing, []).append(run.name)
        for content in _scored(run):
            for task, known in content["tasks"].items():
                if why := reservation(task, known, content["settings"]):
                    said[f"{called(task, known, content['settings'])}: {why}."] = None
    return [*(f"{some(names)}: {nothing}." for nothing, names in at_frequencies.items()), *said]


def shapes(results: Results) -> list[str]:
    """One export (relative to the experiment) of each size of model, the largest first: speed is a matter of size."""
    found: dict[tuple[int | None, ...], str] = {}
    for cell in results.cells:
        for peer in cell.peers.values():
            if peer.export is not None:
                found.setdefault((peer.parameters, peer.layers, peer.hidden_size), peer.export)
    return [found[size] for size in sorted(found, key=lambda size: size[0] or 0, reverse=True)]


def _conditions(planned: Sequence[PlannedCell], cells: Sequence[Cell]) -> dict[str, Condition]:
    members: dict[str, list[Cell]] = {}
    for cell in cells:
        members.setdefault(cell.condition, []).append(cell)
    known = {cell.cell.point.name: cell.cell.point for cell in planned}
    return {
        name: Condition(
            group=known[name].group,
            coordinates=dict(known[name].coordinates),
            cells=[cell.name for cell in own],
            peers=spreads([cell for cell in own if cell.state == "finished"]),
        )
        for name, own in members.items()
    }


def spreads(cells: Sequence[Cell]) -> dict[str, dict[str, Spread]]:
    """Trained peer → metric → values over these cells, which differ by their seed."""
    values: dict[str, dict[str, dict[int, float]]] = {}
    for cell in cells:
        for name, peer in cell.peers.items():
            for metric, value in () if peer.frozen else _metrics(peer):
                values.setdefault(name, {}).setdefault(metric, {})[cell.seed] = value
    return {peer: {metric: spread(seeds) for metric, seeds in own.items()} for peer, own in values.items()}


def _metrics(peer: PeerResult) -> Iterator[tuple[str, float]]:
    for metric in ("valid_loss", "lowest_loss", "valid_accuracy"):
        if (value := getattr(peer, metric)) is not None:
            yield metric, value
    for of, loss in peer.valid_losses.items():
        yield f"valid_loss/{of}", loss
    for task, score in peer.glue.items():
        yield f"glue/{task}", score.median
    average = metrics.average({task: score.median for task, score in peer.glue.items()})["without_wnli"]
    if average is not None:
        yield "glue/average", average


def _comparisons(experiment: Experiment, conditions: Mapping[str, Condition]) -> Iterator[Comparison]:
    every = points(experiment)
    for wish in experiment.compare:
        for group in wish.cells or experiment.cells:
            for point in every[group]:
                against, their = partner(point, every[wish.against]), wish.against_peer or wish.peer
                same = against is not None and (point.name, wish.peer) == (against.name, their)
                if against is None or same or not {point.name, against.name} <= conditions.keys():
                    continue
                ours = conditions[point.name].peers.get(wish.peer, {})
                theirs = conditions[against.name].peers.get(their, {})
                for metric in (metric for metric in ours if metric in theirs):
                    yield compare(point.name, wish.peer, against.name, their, metric, ours[metric], theirs[metric])
