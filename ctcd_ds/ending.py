"""How a run ended, by RUN/exit.json. Exit codes do not survive every launcher, so this file is what is trusted."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ctcd_ds.manifest import read_json

FILE = "exit.json"


@dataclass(frozen=True)
class RunEnding:
    """`state`: finished, saved (it can go on) or failed. `step`: how far it came; -1 where nobody knows."""

    state: str
    step: int
    reason: str


def ending(run: Path) -> RunEnding | None:
    """How the run ended; None where it has not, or its file cannot be read."""
    try:
        return RunEnding(**read_json(run / FILE))
    except TypeError:
        return None


def is_finished(run: Path) -> bool:
    """Whether all its steps are done."""
    ended = ending(run)
    return ended is not None and ended.state == "finished"
