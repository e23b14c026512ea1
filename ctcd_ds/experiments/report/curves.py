"""Pictures of what was logged: learning curves, soft losses, gradient norms, pace, and where all ended."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import median

from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, NullFormatter

from ctcd_ds.experiments.collecting import MANY_LOOKS
from ctcd_ds.experiments.report.drawing import Look, Picture, draw, label_rows, legend_above, looks
from ctcd_ds.experiments.report.logs import over_seeds, slug, windows
from ctcd_ds.experiments.report.study import Study, plain
from ctcd_ds.experiments.wording import Metric

_FEW = 7  # conditions: more of them, or several of one group, are drawn thin, in the colour of their group


class Curves:
    """Draws a study's pictures into a directory; a condition looks the same in all of them."""

    def __init__(self, study: Study, directory: Path) -> None:
        self.study, self.directory = study, directory
        self.looks: dict[str, Look] = looks(list(dict.fromkeys(c.group for c in study.results.conditions.values())))

    def learning(self) -> Iterator[Picture]:
        """Each peer's loss in every condition that has it, by step and by compute."""
        for peer in self.study.peers:
            held_out = f"valid/{peer}/loss"
            key = held_out if self._points(held_out) >= MANY_LOOKS else f"loss/{peer}/hard"
            label = "held-out loss (nats)" if key == held_out else "hard loss in training (nats)"
            said = (
                "On held-out rows, the same in every run."
                if key == held_out
                else "The hard loss of training steps, averaged over windows."
            )
            for by_compute in (False, True):
                title = f"{peer}, by {'compute' if by_compute else 'step'}"
                why = (
                    " What all peers of the run cost together, and what had to be trained before it, is counted."
                    if by_compute
                    else ""
                )
                yield from self._lines(
                    f"learning {title}", title, said + why, key, label, by_compute, logarithmic=False
                )

    def soft_losses(self) -> Iterator[Picture]:
        """Every loss by which a peer learns from another, by its name in metrics.jsonl."""
        logged = (key for run in self.study.runs.values() for row in run.rows for key in row)
        for key in dict.fromkeys(key for key in logged if key.startswith("loss/") and key.count("/") == 3):
            _, peer, kind, other = key.split("/")
            title = f"{peer} learning from {other}"
            what, unit = ("KL divergence, unweighted", " (nats)") if kind == "soft" else ("unweighted", "")
            said = f"{kind.capitalize()} loss ({what}) of training steps, averaged over windows."
            yield from self._lines(f"{kind} {title}", title, said, key, f"{kind} loss{unit}")

    def gradient_norms(self) -> Iterator[Picture]:
        """Each peer's gradient norm before clipping."""
        for peer in self.study.peers:
            said = "Before clipping, averaged over windows of steps. A logarithmic scale."
            yield from self._lines(
                f"gradient norm {peer}", peer, said, f"grad_norm/{peer}", "gradient norm", logarithmic=True
            )

    def throughput(self) -> Iterator[Picture]:
        """Tokens a second of each condition: the median over logged steps and seeds."""
        pace = {}
        for name in self.study.results.conditions:
            logged = [value for curve in self.study.curves(name, "tokens_per_s") for _, value in curve[1:] or curve]
            if logged:
                pace[name] = median(logged)
        if pace:
            height = 1.1 + 0.28 * len(pace)
            said = "Rows and tokens are counted once, however many peers read them."
            yield draw(
                self.directory, "throughput", "Throughput", said, partial(self._bars, pace, "tokens a second"), height
            )

    def ends(self, metric: str, shown: Metric) -> Iterator[Picture]:
        """Every seed's end as a dot, the median as a bar: a picture for each peer, conditions as rows."""
        for peer in self.study.peers:
            found = {
                name: [shown.factor * value for value in condition.peers[peer][metric].values]
                for name, condition in self.study.results.conditions.items()
                if metric in condition.peers.get(peer, {})
            }
            if found:
                title, height = f"Where the {peer} ended: {shown.name}", 0.75 + 0.27 * len(found)
                said = "Each dot is one run, the upright bar the median over its seeds."
                paint = partial(self._dots, found, shown.label)
                yield draw(self.directory, slug(f"ends {metric} {peer}"), title, said, paint, height)

    def _points(self, key: str) -> int:
        """How many values of `key` the run with the fewest has."""
        conditions = self.study.results.conditions
        return min((len(curve) for name in conditions for curve in self.study.curves(name, key)), default=0)

    def _lines(
        self,
        name: str,
        title: str,
        caption: str,
        key: str,
        label: str,
        by_compute: bool = False,
        logarithmic: bool = False,
    ) -> Iterator[Picture]:
        curves = {
            condition: [windows(curve) for curve in found]
            for condition in self.study.results.conditions
            if (found := self.study.curves(condition, key, by_compute))
        }
        if not curves:
            return
        groups = [self.study.results.conditions[condition].group for condition in curves]
        few = len(curves) <= _FEW and len(set(groups)) == len(groups)
        if any(len(found) > 1 for found in curves.values()):
            caption += " Median over seeds" + ("; the band spans all of them." if few else ".")

        def paint(axes: Axes) -> None:
            shown = set()
            for condition, found in curves.items():
                group = self.study.results.conditions[condition].group
                look, points = self.looks[group], over_seeds(found)
                xs, middle, low, high = zip(*points, strict=True)
                known = None if group in shown else plain(group)
                shown.add(group)
                axes.plot(
                    xs, middle, color=look.colour, linestyle=look.dash if few else "-", lw=1.8 if few else 0.9,
                    alpha=1 if few else 0.75, label=known, marker="o" if len(xs) < 2 else None,
                )  # fmt: skip
                if few and len(found) > 1:
                    axes.fill_between(xs, low, high, color=look.colour, alpha=0.15, lw=0)
            axes.set_xlabel("training FLOPs, in all" if by_compute else "step")
            axes.set_ylabel(label)
            if by_compute:
                axes.xaxis.set_major_formatter(EngFormatter(sep=""))
            if logarithmic:
                axes.set_yscale("log")
                axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
                axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
                axes.yaxis.set_minor_formatter(NullFormatter())
            legend_above(axes)

        yield draw(self.directory, slug(name), title, caption, paint)

    def _bars(self, values: dict[str, float], label: str, axes: Axes) -> None:
        axes.barh(range(len(values)), list(values.values()), color=[self._colour(n) for n in values], height=0.6)
        label_rows(axes, [self.study.label(name) for name in values], label)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))

    def _dots(self, found: dict[str, list[float]], label: str, axes: Axes) -> None:
        for y, (name, values) in enumerate(found.items()):
            colour = self._colour(name)
            axes.plot([median(values)] * 2, [y - 0.32, y + 0.32], color=colour, lw=2.5, solid_capstyle="butt")
            axes.plot(values, [y] * len(values), "o", color=colour, ms=5, alpha=0.75, mew=0)
        label_rows(axes, [self.study.label(name) for name in found], label)

    def _colour(self, condition: str) -> str:
        return self.looks[self.study.results.conditions[condition].group].colour
