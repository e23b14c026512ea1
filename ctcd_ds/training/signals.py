"""Requests to stop, kept until the step is done: signals, a dead launcher, a time limit.

A signal reaches one rank, or all at different moments, or one after another with half a minute between (DeepSpeed's
launcher). So a signal only leaves a wish here; the wishes of all ranks meet in the step's all-reduce, and then all
ranks stop after the same step, with everything saved.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType

# In the order in which they are told to the other ranks.
REASONS = ("SIGTERM", "SIGUSR1", "SIGINT", "the launcher died", "training.time_limit_minutes is over")
_PR_SET_PDEATHSIG = 1
_SECOND_INTERRUPT_S = 1.0  # a launcher's Ctrl-C comes twice within 10 ms; a person's second one later


class StopSignals:
    """Catches SIGTERM, SIGUSR1 and SIGINT from its making to `restore()`. A second SIGINT, 1 s later, ends at once.

    With `has_launcher`, the death of the parent process is a request to stop too: nobody else would end this rank.
    `deepspeed` is two processes, and SIGTERM ends the upper one without a word to the lower: its death counts too.
    """

    def __init__(self, has_launcher: bool) -> None:
        self._reason: str | None = None
        self._interrupted_at: float | None = None
        self._parent = os.getppid()
        self._runner = _parent_of(self._parent) if has_launcher and _is_deepspeed(self._parent) else None
        signals = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
        self._before = {number: signal.signal(number, self._caught) for number in signals}
        if has_launcher and sys.platform == "linux":
            ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)

    @property
    def reason(self) -> str | None:
        """Why to stop: one of REASONS; None is no wish."""
        if self._reason is None and self._runner is not None and _parent_of(self._parent) != self._runner:
            self._reason = "the launcher died"
        return self._reason

    def restore(self) -> None:
        """Puts back what handled the signals before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _caught(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if number == signal.SIGINT:
            if self._interrupted_at is not None and now - self._interrupted_at >= _SECOND_INTERRUPT_S:
                os._exit(130)  # the main thread may be inside a collective that never ends
            self._interrupted_at = self._interrupted_at or now
        if self._reason is None:
            died = number == signal.SIGTERM and os.getppid() != self._parent
            self._reason = "the launcher died" if died else signal.Signals(number).name


def _is_deepspeed(pid: int) -> bool:
    """Whether a process is DeepSpeed's launch.py, which the runner, or a shell on this host, started."""
    with suppress(OSError):
        return b"deepspeed.launcher.launch" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


def _parent_of(pid: int) -> int | None:
    """The parent of a process; None where it is gone, or the system has no /proc."""
    with suppress(OSError, ValueError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return None
