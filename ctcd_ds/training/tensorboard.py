"""What TensorBoard needs beside the curves: the recipe as hparams, and scores that come after training.

DeepSpeed's monitor writes the curves and knows scalars only. These files stand beside its own, in the same folder, so
that TensorBoard takes them as one run and its HPARAMS page sets the recipe's values against the last of every curve.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ctcd_ds.recipe.sections import Recipe


def write_hparams(directory: Path, recipe: Recipe) -> None:
    """The recipe's values under their dotted keys, anew: a resumed run has one such file."""
    from torch.utils.tensorboard.summary import hparams

    _, session, _ = hparams(dict(_flat(recipe.resolved())), {})
    _write(directory, "hparams", [session])


def forget_after(writer: Any, step: int) -> None:
    """Tells readers to drop what earlier files say of later steps: a killed run did them, and they are done again."""
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # type: ignore[import-untyped]

    writer.file_writer.add_event(Event(session_log=SessionLog(status=SessionLog.START)), step + 1)


def write_scores(directory: Path, scores: Mapping[str, float], step: int) -> None:
    """Scores of a finished run (name → value) as scalars at its last step, anew."""
    from torch.utils.tensorboard.summary import scalar

    _write(directory, "scores", [scalar(name, value) for name, value in scores.items()], step)


def _write(directory: Path, kind: str, summaries: list[Any], step: int | None = None) -> None:
    from torch.utils.tensorboard import FileWriter

    for earlier in directory.glob(f"events.out.tfevents.*.{kind}"):
        earlier.unlink()
    writer = FileWriter(str(directory), filename_suffix=f".{kind}")
    for summary in summaries:
        writer.add_summary(summary, step)
    writer.close()


def _flat(section: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, bool | int | float | str]]:
    """Dotted key → value; lists as text."""
    for key, value in section.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if isinstance(value, bool | int | float | str) else str(value)
