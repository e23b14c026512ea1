"""Pictures of grids: a heat map over two axes; over one axis a curve, and the differences with their threshold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap

from ctcd_ds.experiments.report.drawing import (
    BETTER,
    DASHES,
    FAINT,
    INK,
    WORSE,
    Look,
    Picture,
    draw,
    legend_above,
)
from ctcd_ds.experiments.report.logs import slug
from ctcd_ds.experiments.report.study import Study, plain
from ctcd_ds.experiments.results import Comparison, Condition, Value
from ctcd_ds.experiments.wording import METRICS, Metric

# Not quite the colours of the series, which follow the page: text on a cell fits the cell's own.
_MAP = LinearSegmentedColormap.from_list("worse to better", ["#d45d00", "#f7f6f2", "#0071b1"])


def grid_pictures(study: Study, looks: Mapping[str, Look], directory: Path, metric: str) -> Iterator[Picture]:
    """The pictures that each grid of the experiment can have, for every peer that was measured on it."""
    drawn = set()
    for group in dict.fromkeys(condition.group for condition in study.results.conditions.values()):
        conditions = _of(study, group)
        axes = list(next(iter(conditions.values())).coordinates)
        for peer in study.peers:
            if sum(metric in condition.peers.get(peer, {}) for condition in conditions.values()) < 2:
                continue
            if len(axes) == 2:
                yield from _heat_maps(study, group, axes, peer, metric, directory)
            if len(axes) == 1:
                if (axes[0], peer, _along(study, group, axes[0])) not in drawn:
                    drawn.add((axes[0], peer, _along(study, group, axes[0])))
                    yield _curve(study, group, axes[0], peer, metric, looks, directory)
                yield from _thresholds(study, group, axes[0], peer, metric, directory)


def _of(study: Study, group: str) -> dict[str, Condition]:
    return {name: condition for name, condition in study.results.conditions.items() if condition.group == group}


def _against(study: Study, group: str, peer: str, metric: str) -> Iterator[tuple[str, dict[str, Comparison]]]:
    """What the group's conditions are compared to, with the comparison of each."""
    names = _of(study, group)
    found: dict[tuple[str, str], dict[str, Comparison]] = {}
    for comparison in study.comparisons(metric):
        if comparison.condition in names and comparison.peer == peer and comparison.mean is not None:
            other = study.results.conditions[comparison.against].group
            found.setdefault((other, comparison.against_peer), {})[comparison.condition] = comparison
    for (other, their), comparisons in found.items():
        yield plain(other) if their == peer else f"the {their} of {plain(other)}", comparisons


def _along(study: Study, group: str, axis: str) -> frozenset[str]:
    """The groups that share this group's only axis and one of its values: one curve each in one picture."""
    own = {condition.coordinates[axis] for condition in _of(study, group).values()}
    return frozenset(
        other.group
        for other in study.results.conditions.values()
        if list(other.coordinates) == [axis] and other.coordinates[axis] in own
    )


def _values(conditions: Mapping[str, Condition], axis: str) -> list[Value]:
    """The axis' values in the experiment's order."""
    return list(dict.fromkeys(condition.coordinates[axis] for condition in conditions.values()))


def _heat_maps(study: Study, group: str, axes: list[str], peer: str, metric: str, directory: Path) -> Iterator[Picture]:
    conditions, shown = _of(study, group), METRICS[metric]
    across, up = (_values(conditions, axis) for axis in (axes[1], axes[0]))
    compared = list(_against(study, group, peer, metric))
    for against, comparisons in compared:
        table = np.full((len(up), len(across)), np.nan)
        sure = np.zeros(table.shape, bool)
        for name, comparison in comparisons.items():
            at = conditions[name].coordinates
            place = up.index(at[axes[0]]), across.index(at[axes[1]])
            table[place] = comparison.mean
            sure[place] = comparison.verdict != "no evidence"
        title = f"{peer}: {plain(group)} against {against}"
        confidence = next(iter(comparisons.values())).confidence
        caption = (
            f"Mean difference in {shown.name}. Blue is better, orange worse; a star where the {confidence:.0%} "
            "interval leaves zero out, else there is no evidence of a difference."
        )
        paint = partial(_heat, table, sure, across, up, axes, shown)
        yield draw(directory, slug(f"grid {title}"), title, caption, paint, 0.9 + 0.5 * len(up))


def _heat(
    table: np.ndarray,
    sure: np.ndarray,
    across: list[Value],
    up: list[Value],
    names: list[str],
    shown: Metric,
    axes: Axes,
) -> None:
    good = -table if shown.lower_is_better else table
    size = max(float(np.nanmax(np.abs(table), initial=0.0)), 1e-9)
    axes.pcolormesh(good, cmap=_MAP, vmin=-size, vmax=size, edgecolors="white", linewidth=1.5)
    for (y, x), value in np.ndenumerate(table):
        if not np.isnan(value):
            red, green, blue, _ = _MAP(0.5 + good[y, x] / (2 * size))
            dark = 0.2126 * red + 0.7152 * green + 0.0722 * blue < 0.5
            axes.text(x + 0.5, y + 0.5, f"{shown.signed(value)}{'*' if sure[y, x] else ''}", ha="center",
                      va="center", fontsize=8, color="#fffffe" if dark else "#010100")  # fmt: skip
    axes.set_xticks(np.arange(len(across)) + 0.5, [plain(value) for value in across])
    axes.set_yticks(np.arange(len(up)) + 0.5, [plain(value) for value in up])
    axes.tick_params(length=0)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.set_xlabel(plain(names[1]))
    axes.set_ylabel(plain(names[0]))


def _curve(
    study: Study, group: str, axis: str, peer: str, metric: str, looks: Mapping[str, Look], directory: Path
) -> Picture:
    """The medians along one axis: a line for each group that has it, a level for what they are held against."""
    together = [g for g in looks if g in _along(study, group, axis)]
    order = _values({name: c for g in together for name, c in _of(study, g).items()}, axis)
    shown = METRICS[metric]

    def paint(axes: Axes) -> None:
        for name in together:
            measured = [(order.index(c.coordinates[axis]), c.peers[peer][metric])
                        for c in _of(study, name).values() if metric in c.peers.get(peer, {})]  # fmt: skip
            if not measured:
                continue
            xs, spreads = [x for x, _ in measured], [spread for _, spread in measured]
            middle = np.array([shown.factor * spread.median for spread in spreads])
            reach = np.array([[shown.factor * s.min, shown.factor * s.max] for s in spreads]).T
            axes.errorbar(xs, middle, abs(reach - middle), color=looks[name].colour, linestyle=looks[name].dash,
                          marker="o", ms=5, capsize=3, lw=1.8, label=plain(name))  # fmt: skip
        for number, level in enumerate(_levels(study, group, peer, metric, set(together))):
            label, value = level
            axes.axhline(shown.factor * value, color=FAINT, lw=1.3, linestyle=DASHES[1 + number], label=label)
        _ticks(axes, order, axis)
        axes.set_ylabel(shown.label)
        legend_above(axes)

    title = f"{peer} along {plain(axis)}"
    if len(together) == 1:
        title = f"{peer}: {plain(group)}"
    caption = f"Median {shown.name} over seeds; whiskers reach from the smallest to the largest."
    return draw(directory, slug(f"curve {group} {title}"), title, caption, paint)


def _levels(study: Study, group: str, peer: str, metric: str, drawn: set[str]) -> Iterator[tuple[str, float]]:
    """Conditions outside the picture that the group's are compared to, where it is one and the same for all."""
    for against, comparisons in _against(study, group, peer, metric):
        names = {comparison.against for comparison in comparisons.values()}
        condition = study.results.conditions[next(iter(names))]
        their = next(iter(comparisons.values())).against_peer
        if len(names) == 1 and condition.group not in drawn and metric in condition.peers.get(their, {}):
            yield against, condition.peers[their][metric].median


def _thresholds(study: Study, group: str, axis: str, peer: str, metric: str, directory: Path) -> Iterator[Picture]:
    """Differences along an axis with their intervals, and where they begin to harm."""
    conditions, shown = _of(study, group), METRICS[metric]
    order = _values(conditions, axis)
    for against, comparisons in _against(study, group, peer, metric):
        found = [(order.index(conditions[name].coordinates[axis]), c) for name, c in comparisons.items()]
        title = f"{peer}: {plain(group)} against {against}"
        harmful = [plain(order[x]) for x, c in sorted(found, key=lambda pair: pair[0]) if c.verdict == "worse"]
        threshold = (
            f"Worse than that with {plain(axis)} = {', '.join(harmful)}."
            if harmful
            else "Nowhere along this axis is there evidence of harm."
        )
        caption = f"Mean difference over seeds, with its interval. {threshold}"
        yield draw(
            directory, slug(f"difference {title}"), title, caption, partial(_differences, found, order, axis, shown)
        )


def _differences(found: list[tuple[int, Comparison]], order: list[Value], axis: str, shown: Metric, axes: Axes) -> None:
    colours = {"better": BETTER, "worse": WORSE, "no evidence": FAINT}
    axes.axhline(0, color=INK, lw=1)
    for x, comparison in found:
        assert comparison.mean is not None
        colour, mean = colours[comparison.verdict], shown.factor * comparison.mean
        if comparison.interval is not None:
            axes.plot([x, x], [shown.factor * end for end in comparison.interval], color=colour, lw=2.2)
        axes.plot(x, mean, marker="o", color=colour, ms=7)
        each = [shown.factor * difference for difference in comparison.differences]
        axes.plot([x + 0.12] * len(each), each, "_", color=colour, ms=7, alpha=0.8)
    for verdict, word in (("better", "better"), ("worse", "worse"), ("no evidence", "no evidence of a difference")):
        if any(comparison.verdict == verdict for _, comparison in found):
            axes.plot([], [], "o", color=colours[verdict], label=word)
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, -0.05 * (high - low)), max(high, 0.05 * (high - low)))
    if found and len(order) > 1:
        harm = [0, axes.get_ylim()[1]] if shown.lower_is_better else [axes.get_ylim()[0], 0]
        axes.axhspan(*harm, color=WORSE, alpha=0.06, lw=0)
    _ticks(axes, order, axis)
    axes.set_xlim(-0.5, len(order) - 0.5)
    axes.set_ylabel(f"difference in {shown.label}")
    legend_above(axes)


def _ticks(axes: Axes, order: list[Value], axis: str) -> None:
    axes.set_xticks(range(len(order)), [plain(value) for value in order])
    axes.set_xlabel(plain(axis))
    axes.grid(axis="x", visible=False)
