"""The picture beside a model card: how the losses of a run's peers went."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

# Okabe and Ito's colours, which colour-blind readers tell apart too.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
LoggedRows = Sequence[Mapping[str, Any]]  # of metrics.jsonl, by step


def draw(path: Path, rows: LoggedRows, name: str, peers: Iterable[str]) -> bool:
    """Draws the losses of peer `name` (thick) and of its partners into a PNG; False where there are none."""
    from matplotlib.figure import Figure

    others = [peer for peer in peers if peer != name]
    order = [name, *others]
    taught = sorted({key for row in rows for key in row if key.startswith("loss/") and key.count("/") == 3})
    if not any(_series(rows, f"loss/{peer}/hard") or _series(rows, f"valid/{peer}/loss") for peer in order):
        return False
    panels = 2 if taught else 1
    figure = Figure(figsize=(4.2 * panels, 3.2), dpi=110, layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    for peer, colour in zip(order, _COLOURS, strict=False):
        width = 2.2 if peer == name else 1.2
        if trained := _series(rows, f"loss/{peer}/hard"):
            axes[0].plot(*zip(*trained, strict=True), color=colour, linewidth=width / 2, alpha=0.45)
        if held_out := _series(rows, f"valid/{peer}/loss"):
            axes[0].plot(
                *zip(*held_out, strict=True), color=colour, linewidth=width, marker="o", markersize=3, label=peer
            )
        for key in (key for key in taught if key.split("/")[1] == peer):
            _, _, kind, other = key.split("/")
            label = f"{peer} from {other}" if kind == "soft" else f"{peer} from {other}, {kind}"
            axes[1].plot(*zip(*_series(rows, key), strict=True), color=colour, linewidth=width, label=label)
    axes[0].set(title="hard loss: held-out (dots), training (thin)", xlabel="step", ylabel="nats per target")
    if taught:
        axes[1].set(title="soft loss, training", xlabel="step")
    for panel in axes:
        panel.title.set_fontsize(9)
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.25)
        if panel.get_legend_handles_labels()[0]:
            panel.legend(frameon=False, fontsize=8)
    figure.savefig(path, metadata={"Software": None})
    return True


def _series(rows: LoggedRows, key: str) -> list[tuple[int, float]]:
    return [(row["step"], row[key]) for row in rows if row.get(key) is not None]
