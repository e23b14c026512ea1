"""Who copies whom: the agreement of all pairs of peers in a study, beside the same pairs trained alone."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from statistics import median

import numpy as np
from matplotlib.axes import Axes
from tqdm import tqdm

from ctcd_ds.cli import RunFailure, UserError
from ctcd_ds.experiments.report.agreement import Agreement, Answers, compare_answers, held_out_answers
from ctcd_ds.experiments.report.drawing import GRID, SERIES, Picture, draw, label_rows, legend_above
from ctcd_ds.experiments.report.logs import slug
from ctcd_ds.experiments.report.study import Study
from ctcd_ds.experiments.statistics import CONFIDENCE, interval
from ctcd_ds.experiments.wording import VERDICTS, Metric, judged

EACH_ALONE = "each alone"
_SHARE = Metric("common mistakes", "common mistakes (%)", 1, largest=100.0)
_SAID = {**VERDICTS, "more": "They share more mistakes together", "fewer": "They share fewer mistakes together"}


@dataclass(frozen=True)
class PairAgreement:
    """One pair of peers in one condition, over its seeds: seed → counts. `pair`: their names."""

    pair: tuple[str, str]
    condition: str
    seeds: dict[int, Agreement]

    def share(self, kind: str) -> float:
        """The median share in percent of one of Agreement's five counts."""
        return 100 * median(getattr(found, kind) / found.positions for found in self.seeds.values())

    @property
    def common_mistakes(self) -> float | None:
        """Median share in percent of the positions where both are wrong at which they say the same."""
        shares = [100 * s for found in self.seeds.values() if (s := found.common_mistakes) is not None]
        return median(shares) if shares else None


def all_pairs(study: Study, rows: int) -> tuple[list[PairAgreement], list[str]]:
    """The agreement of all pairs that trained in one run, and of the same names each trained alone.

    Also returns why something is missing, a sentence each.
    """
    answers, missing = _answers(study, rows)
    found: dict[tuple[tuple[str, str], str], dict[int, Agreement]] = {}
    alone: dict[int, dict[str, Answers]] = {}
    for name, own in answers.items():
        cell = study.cells[name]
        if len(study.runs[name].graph.names) == 1:
            alone.setdefault(cell.seed, {})[next(iter(own.peers))] = own
        for one, two in combinations(own.peers, 2):
            counts = compare_answers(own.peers[one], own.peers[two], own.targets)
            found.setdefault(((one, two), cell.condition), {})[cell.seed] = counts
    pairs = list(dict.fromkeys(pair for pair, _ in found))
    for seed, single in alone.items():
        for one, two in (pair for pair in pairs if set(pair) <= single.keys()):
            if np.array_equal(single[one].targets, single[two].targets):  # the same rows under the same masks
                counts = compare_answers(single[one].peers[one], single[two].peers[two], single[one].targets)
                found.setdefault(((one, two), EACH_ALONE), {})[seed] = counts
    return [PairAgreement(pair, condition, seeds) for (pair, condition), seeds in found.items()], missing


def _answers(study: Study, rows: int) -> tuple[dict[str, Answers], list[str]]:
    answers: dict[str, Answers] = {}
    missing: dict[str, str] = {}
    done: dict[Path, Answers] = {}
    cells = [(name, run.directory) for name, run in study.runs.items() if study.cells[name].state == "finished"]
    for name, run in tqdm(cells, desc="held-out answers", unit="run", disable=None, file=sys.stderr):
        try:
            if run.path not in done:
                done[run.path] = held_out_answers(run, rows)
            answers[name] = done[run.path]
        except (UserError, RunFailure) as problem:
            missing.setdefault(str(problem), name)
    return answers, [f"{name}: {problem}" for problem, name in missing.items()]


def reading(study: Study, found: Sequence[PairAgreement]) -> Iterator[str]:
    """Sentences on common mistakes: together against each alone, over the seeds that both have."""
    alone = {pair.pair: pair for pair in found if pair.condition == EACH_ALONE}
    for pair in found:
        base = alone.get(pair.pair)
        if base is None or pair is base or pair.common_mistakes is None or base.common_mistakes is None:
            continue
        said = (
            f"Where {pair.pair[0]} and {pair.pair[1]} are both wrong, they give the same wrong answer in "
            f"{pair.common_mistakes:.1f} % of the cases when trained as “{study.title(pair.condition)}”, and in "
            f"{base.common_mistakes:.1f} % when each was trained alone."
        )
        yield f"{said} {_judged(pair.seeds, base.seeds)}"


def _judged(ours: Mapping[int, Agreement], theirs: Mapping[int, Agreement]) -> str:
    shares = [(ours[seed].common_mistakes, theirs[seed].common_mistakes) for seed in ours if seed in theirs]
    differences = [100 * (a - b) for a, b in shares if a is not None and b is not None]
    made = interval(differences)
    between = made[0] if made is not None else None
    verdict = "no evidence"
    if between is not None and not between[0] <= 0 <= between[1]:
        verdict = "more" if between[0] > 0 else "fewer"
    return judged(_SHARE, differences, between, verdict, CONFIDENCE, _SAID)


def pictures(study: Study, found: Sequence[PairAgreement], directory: Path) -> Iterator[Picture]:
    """One picture for each pair: a bar for each condition, cut into the five kinds of positions."""
    for one, two in dict.fromkeys(pair.pair for pair in found):
        own = [pair for pair in found if pair.pair == (one, two)]
        title = f"{one} and {two} at the same held-out positions"
        caption = "Medians over seeds, in percent of the positions: who is right, and who makes whose mistakes."
        paint = partial(_bars, own, [study.label(pair.condition) for pair in own])
        yield draw(directory, slug(f"agreement {one} {two}"), title, caption, paint, 1.5 + 0.3 * len(own))


def _bars(pairs: Sequence[PairAgreement], names: Sequence[str], axes: Axes) -> None:
    one, two = pairs[0].pair
    kinds = (
        ("both_right", "both right", SERIES[2], ""),
        ("only_first_right", f"only {one}", SERIES[0], ""),
        ("only_second_right", f"only {two}", SERIES[4], ""),
        ("same_wrong", "both wrong, same answer", SERIES[1], "///"),
        ("different_wrong", "both wrong, different", GRID, ""),
    )
    left = np.zeros(len(pairs))
    for kind, label, colour, hatch in kinds:
        widths = np.array([pair.share(kind) for pair in pairs])
        axes.barh(range(len(pairs)), widths, left=left, color=colour, label=label, height=0.66,
                  hatch=hatch, edgecolor="#fffffe" if hatch else colour, lw=0)  # fmt: skip
        left += widths
    axes.set_xlim(0, 100)
    label_rows(axes, names, "held-out positions (%)")
    legend_above(axes)
