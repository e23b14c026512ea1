"""One look for all pictures: matplotlib drawings as inline SVG whose colours follow the page, and as PNG beside it.

Colours are Okabe and Ito's (2008), which people with any common colour blindness tell apart; each has its own line
style as well, for prints in grey. In the SVG every colour becomes a CSS variable, so that one drawing serves the light
page, the dark page and paper.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import wrap
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

matplotlib.use("agg")

INK, FAINT, GRID = "#22211f", "#6b6a66", "#dddcd8"
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7e")
DASHES: tuple[Any, ...] = ("-", (0, (6, 2)), (0, (2, 1.5)), (0, (7, 2, 1.5, 2)), (0, (1, 1)), (0, (10, 3)), "-")
BETTER, WORSE = SERIES[0], SERIES[1]

_VARIABLES = {INK: "--ink", FAINT: "--faint", GRID: "--grid"}
_VARIABLES |= {colour: f"--series-{number}" for number, colour in enumerate(SERIES, start=1)}
_STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.parse_math": False,  # names may hold $
    "text.color": INK,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "svg.fonttype": "none",  # text stays text: it can be searched, copied and read aloud
}
WIDTH, HEIGHT = 5.0, 3.1  # inches: a phone shows it at its own size
_HEADING = 0.22  # inches of a line of a PNG's title
_LINE, _LONGEST = 64, 34  # letters that stand side by side over a drawing, and of one name


@dataclass(frozen=True)
class Picture:
    """name: also its PNG's. title: a heading. caption: what is to be seen and how it was made, in words."""

    name: str
    title: str
    caption: str
    svg: str


@dataclass(frozen=True)
class Look:
    """How one group of conditions is drawn in every picture."""

    colour: str
    dash: Any


def looks(groups: Sequence[str]) -> dict[str, Look]:
    """A look for each group, in order; with more than seven, colours come again with another line style."""
    return {group: Look(SERIES[number % 7], DASHES[(number + number // 7) % 7]) for number, group in enumerate(groups)}


def draw(
    directory: Path, name: str, title: str, caption: str, paint: Callable[[Axes], None], height: float = HEIGHT
) -> Picture:
    """Lets `paint` draw into new axes; writes DIR/NAME.png, which stands alone and so has its title in it."""
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        paint(figure.add_subplot())
        lines = wrap(title, _LINE)
        heading = figure.suptitle("\n".join(lines), fontsize=10)
        figure.set_figheight(height + _HEADING * len(lines))
        figure.savefig(directory / f"{name}.png", dpi=200, facecolor="white")
        heading.set(visible=False, in_layout=False)  # the page has it as a heading
        figure.set_figheight(height)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
    return Picture(name, title, caption, _inline(text.getvalue(), name, f"{title}. {caption}"))


def _inline(svg: str, name: str, described: str) -> str:
    """The <svg> element alone, with colours as CSS variables and ids that no other picture of the page has."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\b(id="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    for colour, variable in _VARIABLES.items():
        svg = re.sub(colour, f"var({variable})", svg, flags=re.IGNORECASE)
    opening = svg[: svg.index(">")]
    size = re.search(r'viewBox="[^"]*"', opening)
    assert size is not None
    label = described.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return f'<svg {size[0]} role="img" aria-label="{label}"{svg[len(opening) :]}'


def legend_above(axes: Axes) -> None:
    """The legend over the drawing, where it hides nothing, in as many columns as fit."""
    handles, labels = axes.get_legend_handles_labels()
    if labels:
        short = _shortened(labels)
        columns = max(1, _LINE // (max(map(len, short)) + 8))  # a sample of the line takes as much as 8 letters
        axes.legend(
            handles,
            short,
            loc="lower left",
            bbox_to_anchor=(0, 1),
            ncols=columns,
            fontsize=8,
            handlelength=2.6,
            borderaxespad=0.2,
            columnspacing=1.2,
        )


def label_rows(axes: Axes, names: Sequence[str], label: str) -> None:
    """Names down the left side, the first one on top."""
    axes.set_yticks(
        range(len(names)), [n if len(n) <= _LONGEST else f"{n[: _LONGEST - 1]}…" for n in names], fontsize=8
    )
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(label)


def _shortened(names: Sequence[str]) -> list[str]:
    return [name if len(name) <= _LONGEST else f"{name[: _LONGEST - 1]}…" for name in names]
