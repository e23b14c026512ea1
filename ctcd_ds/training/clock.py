"""The run's time: what was training and what was not, when a checkpoint is due, and when time is over."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import torch.distributed as dist

from ctcd_ds.training.signals import REASONS


class Clock:
    """Starts when it is made. Rank 0's decides; the other ranks hear of it in the step's exchange."""

    def __init__(self, checkpoint_minutes: float | None, limit_minutes: float | None, earlier_s: float = 0.0) -> None:
        self._checkpoint_minutes, self._limit_minutes = checkpoint_minutes, limit_minutes
        self._decides = dist.get_rank() == 0
        self._earlier_s = earlier_s
        self._start = self._saved = time.monotonic()
        self.paused_s = {"validation": 0.0, "saving": 0.0}

    def since_start(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._start

    def of_the_run(self) -> float:
        """Seconds of the run: of this sitting, and of the earlier ones as far as their steps still count."""
        return self._earlier_s + self.since_start()

    def seconds(self) -> float:
        """Seconds of training alone: without validation and saving."""
        return self.since_start() - sum(self.paused_s.values())

    @contextlib.contextmanager
    def paused(self, what: str) -> Iterator[None]:
        """What happens inside is no training, but 'validation' or 'saving'; its seconds are in `paused_s`."""
        began = time.monotonic()
        yield
        self.paused_s[what] += time.monotonic() - began

    def save_due(self) -> bool:
        """Whether the last checkpoint is as old as the recipe allows."""
        minutes = self._checkpoint_minutes
        return self._decides and minutes is not None and time.monotonic() - self._saved >= 60 * minutes

    def saved(self) -> None:
        """A checkpoint was written."""
        self._saved = time.monotonic()

    def over(self) -> str | None:
        """The reason to stop where `time_limit_minutes` is reached."""
        limit = self._limit_minutes
        return REASONS[-1] if self._decides and limit is not None and self.since_start() >= 60 * limit else None
