"""How values and their differences are said: the same words in results.json, on the console and on the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from ctcd_ds.cli import count
from ctcd_ds.evaluation.claims import title

VERDICTS = {"better": "Better", "worse": "Worse", "no evidence": "No evidence of a difference"}


@dataclass(frozen=True)
class Metric:
    """How a value is shown: `factor` times it, with so many digits and a unit.

    `largest`: what a difference cannot exceed, as shown (100 for what is a share or a score).
    """

    name: str
    label: str
    digits: int
    factor: float = 1.0
    unit: str = ""
    lower_is_better: bool = False
    largest: float = float("inf")

    def shown(self, value: float) -> str:
        return f"{self.factor * value:.{self.digits}f}{self.unit}"

    def signed(self, value: float) -> str:
        return f"{self.factor * value:+.{self.digits}f}".replace("-", "−")

    def between(self, interval: Sequence[float]) -> str:
        """The ends of an interval of a difference, which no difference can lie beyond."""
        largest = self.largest / self.factor
        return " to ".join(self.signed(max(-largest, min(largest, end))) for end in interval)


class _Metrics(dict[str, Metric]):
    def __missing__(self, key: str) -> Metric:
        if key.startswith("valid_loss/"):
            loss, of = self["valid_loss"], key.partition("/")[2]
            return replace(loss, name=f"{loss.name} on {of}", label=f"held-out loss on {of} (nats)")
        name = title(key.removeprefix("glue/"))
        return Metric(name, name, 1, largest=100.0)


METRICS = _Metrics(
    {
        "valid_loss": Metric("held-out loss", "held-out loss (nats)", 3, unit=" nats", lower_is_better=True),
        "lowest_loss": Metric(
            "lowest held-out loss", "lowest held-out loss (nats)", 3, unit=" nats", lower_is_better=True
        ),
        "valid_accuracy": Metric("held-out accuracy", "held-out accuracy (%)", 1, 100.0, " %", largest=100.0),
        "glue/average": Metric("GLUE average", "GLUE average (without WNLI)", 1, largest=100.0),
    }
)


def judged(
    metric: Metric,
    differences: Sequence[float],
    interval: tuple[float, float] | None,
    verdict: str,
    confidence: float,
    verdicts: Mapping[str, str] = VERDICTS,
) -> str:
    """What paired differences say, with their numbers, or why they say nothing."""
    seeds = count(len(differences), "seed")
    if not differences:
        return f"{verdicts['no evidence']}: no seed is finished in both."
    if not any(differences):
        return f"Equal to the last digit, {seeds}."
    mean = metric.signed(fmean(differences))
    if interval is None:
        return f"{verdicts['no evidence']}: {seeds} (mean difference {mean}) cannot tell."
    numbers = f"mean difference {mean}, {confidence:.0%} interval {metric.between(interval)}, {seeds}"
    return f"{verdicts[verdict]}: {numbers}."
