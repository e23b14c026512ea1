"""The report in plain words, for someone who never saw the project."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from ctcd_ds.cli import count
from ctcd_ds.evaluation.speed import Speed
from ctcd_ds.experiments.report.study import Study, plain
from ctcd_ds.experiments.results import Comparison
from ctcd_ds.experiments.wording import METRICS, judged
from ctcd_ds.objective.graph import DistillationGraph
from ctcd_ds.tasks import TASKS

_BOXES = 4  # findings on the first screen; of more comparisons, those that answer the question


def role(graph: DistillationGraph, peer: str) -> str:
    """What a peer gave and took in a run: 'alone', 'taught and teaching', …"""
    me = graph.names.index(peer)
    teachers = [graph.names[j] for i, j, _ in graph.edges() if i == me]
    teaches = any(j == me for _, j, _ in graph.edges())
    finished = [name for name in teachers if not graph.trained[graph.names.index(name)]]
    if len(graph.names) == 1:
        return "alone"
    if finished and len(finished) == len(teachers):
        return f"taught by the finished {' and '.join(finished)}"
    if teachers and teaches:
        return "taught and teaching"
    return "taught" if teachers else "teaching" if teaches else "beside the others, untaught"


def role_in(study: Study, condition: str, peer: str) -> str:
    """The role with the condition's name, where it does not say the same."""
    run = study.example(condition)
    shown = study.title(condition)
    if run is None or peer not in run.graph.names:
        return shown
    said = role(run.graph, peer)
    return said if said == "alone" and shown in (f"{peer} alone", "alone") else f"{said} ({shown})"


def opening(study: Study) -> str:
    """What was done, in two sentences that need no knowledge of the project."""
    recipes = [run.recipe for run in study.runs.values()]
    aim = " or ".join(dict.fromkeys(TASKS[recipe.objective.task].words.aim for recipe in recipes))
    text = "the same text" if len({recipe.corpus.title for recipe in recipes}) == 1 else "text"
    exchange = [run.graph for run in study.runs.values() if run.graph.distilling()]
    if not exchange:
        several = max(len(run.graph.names) for run in study.runs.values()) > 1
        what = f"Language models were trained on {text}" if several else "A language model was trained on text"
        return f"{what} {aim}. They did not learn from each other."
    mutual = any({(j, i) for i, j, _ in g.edges()} & {(i, j) for i, j, _ in g.edges()} for g in exchange)
    way = (
        "each also learned from what the other predicted" if mutual else "one also learned from what another predicted"
    )
    held = " This page holds them against the same models trained otherwise." if study.results.comparisons else ""
    return f"Language models were trained side by side on {text} {aim}, and {way}.{held}"


@dataclass(frozen=True)
class Statement:
    """One finding: a sentence with the numbers, and what may be said of it (better | worse | no evidence)."""

    text: str
    verdict: str
    detail: str


def statements(study: Study) -> list[Statement]:
    """The findings of the first screen: every comparison where there are few, else what they come to."""
    comparisons = [
        c for metric in ("glue/average", "valid_loss") for c in study.comparisons(metric) if c.mean is not None
    ]
    if not comparisons:
        return [Statement(text, "", "") for text in _ends(study)]
    shown = comparisons if len(comparisons) <= _BOXES else _answering(study)[:_BOXES]
    return [_one(study, comparison) for comparison in shown] or list(_counted(study, comparisons))[:_BOXES]


def answer(study: Study) -> str:
    """What learning from each other came to, in one sentence; "" where nothing was compared with itself alone."""
    own = _answering(study)
    if not own:
        return ""
    metric, seeds = METRICS[own[0].metric], min(len(c.seeds) for c in own)
    said = []
    for c in own:
        mean = metric.signed(c.mean or 0.0)
        kinds = {"better": "ends better", "worse": "ends worse", "no evidence": "shows no evidence of a difference"}
        kind = f"{kinds[c.verdict]} ({mean})" if c.interval is not None else f"ends at {mean}"
        said.append(f"the {c.peer} {kind if any(c.differences) else 'ends exactly where it ends alone'}")
    over = "one seed" if seeds == 1 else f"{seeds} seeds"
    over += "" if own[0].interval is not None else f" cannot tell {'it' if len(own) == 1 else 'them'} from chance"
    whole = ", ".join(said[:-1]) + " and " * (len(said) > 1) + said[-1]
    return f"As “{study.title(own[0].condition)}”, {whole}, against training alone ({metric.name}; {over})."


def _answering(study: Study) -> list[Comparison]:
    """Of the condition in which most was exchanged, each peer against itself alone, by the weightiest metric."""
    for metric in ("glue/average", "valid_loss"):
        found: dict[str, list[Comparison]] = {}
        for c in study.comparisons(metric):
            alone, run = study.example(c.against), study.example(c.condition)
            itself = c.peer == c.against_peer and alone is not None and c.peer not in alone.graph.distilling()
            if c.mean is not None and itself and run:
                found.setdefault(c.condition, []).append(c)
        if found:
            edges = {name: len(list(run.graph.edges())) for name in found if (run := study.example(name))}
            return found[max(edges, key=lambda name: edges[name])]
    return []


def setting(study: Study) -> str:
    """Models, length and text of the study in one line, as far as its conditions have them in common."""
    models: dict[str, None] = {}
    for cell in study.results.cells:
        for name, peer in cell.peers.items():
            size = f"{peer.parameters / 1e6:,.1f} M parameters" if peer.parameters else "unknown size"
            models[f"{name} ({size}{f', {peer.layers} layers' if peer.layers else ''})"] = None
    length = _range(cell.steps for cell in study.results.cells)
    recipes = [run.recipe for run in study.runs.values()]
    rows = dict.fromkeys(f"{r.training.global_batch_rows} rows of {r.corpus.sequence_length} tokens" for r in recipes)
    texts = " and ".join(dict.fromkeys(recipe.corpus.title for recipe in recipes))
    taken = [recipe.corpus.train_rows for recipe in recipes]
    reduced = f", {_range(taken)} of its rows{'' if all(taken) else ' or all'}" if any(taken) else ""
    return f"{'; '.join(models)}. {length} steps of {' or '.join(rows)}; corpus {texts}{reduced}."


def _range(numbers: Iterable[int | None]) -> str:
    """'800', '100 to 800'; 'no' where there is none."""
    found = sorted({number for number in numbers if number})
    return f"{found[0]:,}" if len(found) == 1 else f"{found[0]:,} to {found[-1]:,}" if found else "no"


def _one(study: Study, comparison: Comparison) -> Statement:
    metric = METRICS[comparison.metric]
    conditions = study.results.conditions
    mine = conditions[comparison.condition].peers[comparison.peer][comparison.metric].median
    other = conditions[comparison.against].peers[comparison.against_peer][comparison.metric].median
    same = comparison.peer == comparison.against_peer
    whom = "" if same else f"the {comparison.against_peer}, "
    theirs = role_in(study, comparison.against, comparison.against_peer)
    text = (
        f"The {comparison.peer}, {role_in(study, comparison.condition, comparison.peer)}, ends at "
        f"a median {metric.name} of {metric.shown(mine)}; {whom}{theirs}, at {metric.shown(other)}."
    )
    return Statement(text, comparison.verdict, difference(comparison))


def difference(comparison: Comparison) -> str:
    """The difference with its interval, or why there is none."""
    metric, c = METRICS[comparison.metric], comparison
    return judged(metric, c.differences, c.interval, c.verdict, c.confidence)


def _counted(study: Study, comparisons: Sequence[Comparison]) -> Iterator[Statement]:
    sets: dict[tuple[str, str, str, str], list[Comparison]] = {}
    for c in comparisons:
        against = study.results.conditions[c.against].group
        sets.setdefault((c.peer, c.against_peer, against, c.metric), []).append(c)
    for (peer, against_peer, against, name), own in sets.items():
        metric = METRICS[name]
        verdicts = [c.verdict for c in own]
        best = min(own, key=lambda c: (c.mean or 0.0) * (1 if c.lower_is_better else -1))
        whom = "itself" if peer == against_peer else f"the {against_peer}"
        text = (
            f"The {peer} against {whom} in “{plain(against)}” ({metric.name}), in {count(len(own), 'condition')}: "
            f"better in {verdicts.count('better')}, worse in {verdicts.count('worse')}, "
            f"no evidence of a difference in {verdicts.count('no evidence')}."
        )
        verdict = "no evidence"
        if len({*verdicts} - {"no evidence"}) == 1:
            verdict = next(iter({*verdicts} - {"no evidence"}))
        elif len({*verdicts}) > 1:
            verdict = "mixed"
        ahead = (best.mean or 0.0) * (1 if best.lower_is_better else -1) < 0
        detail = f"Furthest ahead: {study.title(best.condition)}. {difference(best)}" if ahead else "None ended ahead."
        yield Statement(text, verdict, detail)


def _ends(study: Study) -> Iterator[str]:
    """Where nothing is compared: where each peer ended."""
    metric = METRICS["valid_loss"]
    for name, condition in study.results.conditions.items():
        for peer, measured in condition.peers.items():
            if "valid_loss" in measured:
                spread = measured["valid_loss"]
                seeds = "one seed" if len(spread.seeds) == 1 else f"median of {len(spread.seeds)} seeds"
                yield (
                    f"The {peer}, {role_in(study, name, peer)}, ends at a {metric.name} of "
                    f"{metric.shown(spread.median)} ({seeds})."
                )


def speed_reading(speed: Speed) -> str:
    """What the smallest model saves against the largest, at each size of batch."""
    ordered = sorted(speed.models, key=lambda model: model.parameters)
    small, large = ordered[0], ordered[-1]
    if small.parameters == large.parameters:
        return "All models have the same size."
    paces = []
    for own, theirs in zip(small.timings, large.timings, strict=True):
        rows = "1 row" if own.batch_size == 1 else f"{own.batch_size} rows"
        # As the table beside it: medians over rounds, of one model's time over the other's.
        paces.append(f"{own.speedup / theirs.speedup:.2f} times as fast ({rows} at once)")
    size = f"{small.bytes_on_disk / large.bytes_on_disk:.0%} of the size on disk"
    return f"Against {large.name}, {small.name} is {' and '.join(paces)}, and has {size}."
