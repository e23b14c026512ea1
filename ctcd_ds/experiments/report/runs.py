"""Run directories that no experiment planned, in the shape of one: runs that differ by their seed are one condition."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ctcd_ds.ending import ending
from ctcd_ds.experiments.collecting import outcome, reservations, spreads
from ctcd_ds.experiments.report.logs import LoggedRun
from ctcd_ds.experiments.results import Cell, Comparison, Condition, PeerResult, Results
from ctcd_ds.experiments.statistics import caveats, compare
from ctcd_ds.manifest import canonical_sha256, read_json
from ctcd_ds.peers.accounting import Cost, cost
from ctcd_ds.recipe.reading import flat, is_corpus_place
from ctcd_ds.tasks import TASKS
from ctcd_ds.training import checkpoint
from ctcd_ds.training.plan import flops_beside, peer_flops, signals_of

QUESTION = "How did the models learn, alone and together?"


def runs_as_results(runs: Sequence[LoggedRun]) -> Results:
    """The runs as cells, with each peer compared to itself alone where such a run is among them."""
    groups: dict[str, list[LoggedRun]] = {}
    for run in runs:
        meaning = {key: value for key, value in run.recipe.resolved().items() if key != "seed"}
        groups.setdefault(canonical_sha256(meaning), []).append(run)
    members = dict(zip(_names([group[0].directory.path for group in groups.values()]), groups.values(), strict=True))
    cells = {name: [_cell(name, run) for run in group] for name, group in members.items()}
    conditions = {
        name: Condition(group=name, cells=[cell.name for cell in own], peers=spreads(own))
        for name, own in cells.items()
    }
    pairings, apart = _pairings({name: group[0] for name, group in members.items()})
    comparisons = [
        comparison
        for (name, peer), (against, other) in pairings
        for comparison in _compared(conditions, name, peer, against, other)
    ]
    seeds = sorted({run.recipe.seed for run in runs})
    unfinished = [Path(cell.run).name for own in cells.values() for cell in own if cell.state != "finished"]
    first = runs[0].environment
    notes = [*apart, *reservations(run.directory.path for run in runs)]
    return Results(
        experiment=" and ".join(members) if len(members) < 4 else f"{len(members)} runs",
        question=QUESTION,
        size="full",
        recipe=str(runs[0].directory.recipe),
        corpus=runs[0].recipe.corpus.path or runs[0].recipe.corpus.title,
        command=first.get("command", []),
        git_commit=first.get("git_commit"),
        hardware={key: first.get(key) for key in ("device", "cores", "world", "threads_per_rank", "host")},
        seeds=seeds,
        cells=[cell for own in cells.values() for cell in own],
        conditions=conditions,
        comparisons=comparisons,
        caveats=caveats(comparisons, unfinished, notes),
        seconds=sum(run.summary.get("seconds", 0.0) for run in runs),
    )


def _names(places: Sequence[Path]) -> list[str]:
    """The folders' own names without a seed; with their parents where two are alike."""
    short = [re.sub(r"[-_]seed[-_]?\d+$", "", place.name) for place in places]
    names = [n if short.count(n) == 1 else f"{p.parent.name}/{p.name}" for n, p in zip(short, places, strict=True)]
    return [n if names.count(n) == 1 else str(p) for n, p in zip(names, places, strict=True)]


def _cell(condition: str, run: LoggedRun) -> Cell:
    recipe, ended = run.recipe, ending(run.directory.path)
    state = "waiting" if ended is None or ended.state == "saved" else ended.state
    done = int(run.rows[-1]["step"]) if run.rows else 0
    costs = _costs(run)
    tokens = done * recipe.training.global_batch_rows * recipe.corpus.sequence_length
    flops = tokens * _flops_per_token(run, costs)
    reason = ended.reason if ended is not None else f"not ended; step {done} is the last that was logged"
    return Cell(
        name=str(run.directory.path),
        condition=condition,
        seed=recipe.seed,
        run=str(run.directory.path),
        state=state,  # type: ignore[arg-type]
        reason="" if state == "finished" else reason,
        steps=done,
        rows=done * recipe.training.global_batch_rows,
        tokens=tokens,
        flops=flops or None,
        total_flops=flops or None,
        **(outcome(run.directory.path, _peers(run, costs), run.directory.path) if state == "finished" else {}),
    )


def _flops_per_token(run: LoggedRun, costs: Mapping[str, Cost]) -> float:
    if not costs:
        return 0.0
    signals, _ = signals_of(run.recipe, _configs(run))
    return sum(peer_flops(run.recipe, costs).values()) + flops_beside(run.recipe, costs, signals)


def _costs(run: LoggedRun) -> dict[str, Cost]:
    """What each peer costs; nothing where their configs are gone."""
    recipe, task = run.recipe, TASKS[run.recipe.objective.task]
    length = recipe.corpus.sequence_length
    return {
        name: cost(config, length, task.asked(recipe, name), task.auto_class(), task.decoder_length(recipe))
        for name, config in _configs(run).items()
    }


def _configs(run: LoggedRun) -> dict[str, Any]:
    """Those of all peers, which every run keeps; nothing where they are gone."""
    from transformers import AutoConfig

    places = {name: run.directory.peers / name for name in run.recipe.peers}
    if not all((place / "config.json").is_file() for place in places.values()):
        return {}
    return {n: AutoConfig.from_pretrained(place, trust_remote_code=False) for n, place in places.items()}


def _peers(run: LoggedRun, costs: Mapping[str, Cost]) -> dict[str, PeerResult]:
    """What the peers of a run are."""
    configs = _configs(run)
    return {
        name: PeerResult(
            frozen=section.frozen,
            layers=getattr(configs.get(name), "num_hidden_layers", None),
            hidden_size=getattr(configs.get(name), "hidden_size", None),
            parameters=costs[name].parameters if name in costs else None,
        )
        for name, section in run.recipe.peers.items()
    }


Peer = tuple[str, str]  # condition, peer


def _pairings(runs: Mapping[str, LoggedRun]) -> tuple[list[tuple[Peer, Peer]], list[str]]:
    """Each peer that shares its run with others, against itself alone and against each larger model alone.

    Only where both were trained alike but for what they learned from each other. Also returns what keeps peers of one
    name apart, a sentence a pair of runs.
    """
    alone = {name: next(iter(run.recipe.peers)) for name, run in runs.items() if len(run.graph.names) == 1}
    sizes = {(name, peer): c.parameters for name, run in runs.items() for peer, c in _costs(run).items()}
    found, apart = [], []
    for name, run in runs.items():
        for peer in [] if name in alone else [n for n, p in run.recipe.peers.items() if not p.frozen]:
            for against, other in alone.items():
                ours, theirs = _conditions_of(run, peer), _conditions_of(runs[against], other)
                model = ours.pop("model"), theirs.pop("model")
                either = (k for k in ours | theirs if ours.get(k) != theirs.get(k))  # None is left out of both
                differing = [f"{k} ({ours.get(k)} and {theirs.get(k)})" for k in either]
                if other == peer and model[0] != model[1]:
                    keys = sorted(k for k in model[0] | model[1] if model[0].get(k) != model[1].get(k))
                    differing.append(f"the model itself ({', '.join(keys)})")
                larger = sizes.get((against, other), 0) > sizes.get((name, peer), 0)
                if not differing and (other == peer or larger):
                    found.append(((name, peer), (against, other)))
                elif other == peer:
                    said = f"they differ in {', '.join(differing)}"
                    apart.append(f"{peer} of {name} is not compared with {against}: {said}.")
    return found, apart


def _conditions_of(run: LoggedRun, peer: str) -> dict[str, Any]:
    """What must be equal, beside the seed, where two runs of a peer are to differ by their company only."""
    recipe, newest = run.recipe, checkpoint.newest(run.directory.checkpoints, checkpoint.read, lambda text: None)
    section, steps = recipe.peers[peer], recipe.training.steps
    own = {key: getattr(section, key) for key in ("label_noise", "mask_seed", "mask_fraction")}
    corpus = flat({"corpus": recipe.corpus.model_dump(exclude_none=True)})
    return {
        "corpus": newest[1]["corpus"][:12] if newest else recipe.corpus.title,
        "training.steps": newest[1]["steps"] if newest else steps,
        "training.global_batch_rows": recipe.training.global_batch_rows,
        "objective.task": recipe.objective.task,
        "precision": newest[1]["precision"] if newest else None,
        **{key: value for key, value in corpus.items() if not is_corpus_place(key)},
        **{f"schedule.{key}": value for key, value in recipe.schedule.model_dump().items()},
        **{f"optimizer.{key}": value for key, value in recipe.optimizer_of(peer).model_dump().items()},
        **{f"its {key}": value for key, value in own.items()},
        "model": {**read_json(run.directory.peers / peer / "config.json"), "pretrained": section.origin},
    }


def _compared(
    conditions: Mapping[str, Condition], name: str, peer: str, against: str, other: str
) -> Iterator[Comparison]:
    ours: dict[str, Any] = conditions[name].peers.get(peer, {})
    theirs: dict[str, Any] = conditions[against].peers.get(other, {})
    for metric in (metric for metric in ours if metric in theirs):
        yield compare(name, peer, against, other, metric, ours[metric], theirs[metric])
