"""The report in plain words, for someone who never saw the project."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ctcd_ds.cli import count
from ctcd_ds.evaluation.speed import Speed
from ctcd_ds.experiments.report.study import Study, plain
from ctcd_ds.experiments.results import Comparison
from ctcd_ds.objective.graph import DistillationGraph

_ONE_BY_ONE = 8  # comparisons: more of them are counted


@dataclass(frozen=True)
class Metric:
    """How a metric of results.json is shown: `factor` times the value, with so many digits and a unit."""

    name: str
    label: str
    digits: int
    factor: float = 1.0
    unit: str = ""
    lower_is_better: bool = False

    def shown(self, value: float) -> str:
        return f"{self.factor * value:.{self.digits}f}{self.unit}"

    def signed(self, value: float) -> str:
        return f"{self.factor * value:+.{self.digits}f}".replace("-", "−")


class _Metrics(dict[str, Metric]):
    def __missing__(self, key: str) -> Metric:
        task = key.removeprefix("glue/")
        return Metric(f"GLUE {task}", f"GLUE {task}", 1)


METRICS = _Metrics(
    {
        "valid_loss": Metric("held-out loss", "held-out loss (nats)", 3, lower_is_better=True),
        "valid_accuracy": Metric("held-out accuracy", "held-out accuracy (%)", 1, 100.0, " %"),
        "glue/average": Metric("GLUE average", "GLUE average (without WNLI)", 1),
    }
)


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
    exchange = [run.graph for run in study.runs.values() if run.graph.edges()]
    if not exchange:
        several = max(len(run.graph.names) for run in study.runs.values()) > 1
        what = "Language models were trained on the same text" if several else "A language model was trained on text"
        return f"{what} to fill in hidden words. They did not learn from each other."
    mutual = any({(j, i) for i, j, _ in g.edges()} & {(i, j) for i, j, _ in g.edges()} for g in exchange)
    way = (
        "each also learned from what the other predicted" if mutual else "one also learned from what another predicted"
    )
    return (
        f"Language models were trained side by side on the same text to fill in hidden words, and {way}. "
        "This page holds them against the same models trained otherwise."
    )


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
    if len(comparisons) <= _ONE_BY_ONE:
        return [_one(study, comparison) for comparison in comparisons]
    return list(_counted(study, comparisons))


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
    metric, seeds = METRICS[comparison.metric], count(len(comparison.seeds), "seed")
    if comparison.mean is None:
        return "No seed is finished in both."
    if comparison.interval is None:
        return f"No evidence of a difference: {seeds} (mean {metric.signed(comparison.mean)}) cannot tell."
    low, high = (metric.signed(end) for end in comparison.interval)
    numbers = f"mean difference {metric.signed(comparison.mean)}, {comparison.confidence:.0%} interval {low} to {high}"
    said = {"better": "Better", "worse": "Worse", "no evidence": "No evidence of a difference"}[comparison.verdict]
    return f"{said}: {numbers}, {seeds}."


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
        paces.append(f"{theirs.latency_ms / own.latency_ms:.2f} times as fast ({rows} at once)")
    size = f"{small.bytes_on_disk / large.bytes_on_disk:.0%} of the size on disk"
    return f"Against {large.name}, {small.name} is {' and '.join(paces)}, and has {size}."
