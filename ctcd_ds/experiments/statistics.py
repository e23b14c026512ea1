"""What seeds can say: spreads, and paired differences with intervals. No claim without several seeds.

Two conditions are compared seed by seed: with the same seed both read the same rows with the same masks, and what they
share cancels out. The interval of the mean difference is Student's t over the pairs; with fewer than three there is
none. A bootstrap's percentiles, moved outwards or not, are too narrow over the few pairs that one can afford: on normal
differences they covered the truth 91 times of 100 with five pairs and 94 with eight (1,200 trials each).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean, median

import numpy as np
from scipy import stats

from ctcd_ds.cli import count, some
from ctcd_ds.experiments.results import Comparison, Spread
from ctcd_ds.experiments.wording import METRICS, judged

CONFIDENCE = 0.95
MINIMUM_PAIRS, FEW_PAIRS = 3, 5


def spread(values: Mapping[int, float]) -> Spread:
    """Seed → value, as median, smallest and largest."""
    numbers = list(values.values())
    return Spread(median=median(numbers), min=min(numbers), max=max(numbers), seeds=list(values), values=numbers)


def interval(differences: Sequence[float], confidence: float = CONFIDENCE) -> tuple[tuple[float, float], str] | None:
    """The interval of the mean of paired differences, and how it was made; None with fewer than three pairs."""
    n = len(differences)
    if n < MINIMUM_PAIRS:
        return None
    values = np.asarray(differences, float)
    if np.ptp(values) == 0:
        return (float(values[0]), float(values[0])), f"all {n} differences are equal"
    low, high = stats.t.interval(confidence, n - 1, loc=values.mean(), scale=stats.sem(values))
    return (float(low), float(high)), f"Student's t over {n} pairs"


def compare(
    condition: str, peer: str, against: str, against_peer: str, metric: str, ours: Spread | None, theirs: Spread | None
) -> Comparison:
    """One peer against another in one metric, over the seeds that both have."""
    mine = {} if ours is None else dict(zip(ours.seeds, ours.values, strict=True))
    other = {} if theirs is None else dict(zip(theirs.seeds, theirs.values, strict=True))
    differences = {seed: mine[seed] - other[seed] for seed in mine if seed in other}
    made = interval(list(differences.values()))
    between, method = made if made is not None else (None, "")
    lower = METRICS[metric].lower_is_better
    verdict = "no evidence"
    if between is not None and (between[0] > 0 or between[1] < 0):
        verdict = "better" if (between[1] < 0) == lower else "worse"
    return Comparison(
        condition=condition,
        peer=peer,
        against=against,
        against_peer=against_peer,
        metric=metric,
        lower_is_better=lower,
        seeds=list(differences),
        differences=list(differences.values()),
        mean=fmean(differences.values()) if differences else None,
        interval=between,
        confidence=CONFIDENCE,
        method=method,
        verdict=verdict,  # type: ignore[arg-type]
        words=f"{peer} of {condition} against {against_peer} of {against}, {METRICS[metric].name}: "
        + judged(METRICS[metric], list(differences.values()), between, verdict, CONFIDENCE),
    )


def caveats(comparisons: Sequence[Comparison], unfinished: Sequence[str], notes: Sequence[str]) -> list[str]:
    """What must stand beside any reading of these comparisons. `unfinished`: names of runs; `notes` come first."""
    said = list(dict.fromkeys(note for note in notes if note))
    if unfinished:
        said.append(f"Not finished: {some(unfinished)}. What is said of their conditions rests on fewer seeds.")
    seeds = min((len(comparison.seeds) for comparison in comparisons if comparison.seeds), default=None)
    few = count(seeds or 0, "seed")
    if seeds is not None and seeds < MINIMUM_PAIRS:
        said.append(f"{few} cannot tell a difference from chance: at least {MINIMUM_PAIRS} are needed.")
    elif seeds is not None and seeds < FEW_PAIRS:
        said.append(f"{few}: only large differences can be told from chance, and spreads are rough.")
    judged = sum(comparison.interval is not None for comparison in comparisons)
    if judged >= 10:
        said.append(
            f"{judged} comparisons at {CONFIDENCE:.0%}: about {judged * (1 - CONFIDENCE):.0f} of them would look like "
            "differences if there were none."
        )
    return said
