"""What a run says while it runs: metrics.jsonl, DeepSpeed's monitors, one progress bar. Rank 0 only."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ctcd_ds.training.plan import Plan


class MetricsLog:
    """Writes one row a logged step, flushed, to a file and to the monitors; moves the bar every step."""

    def __init__(self, path: Path, monitor: Any, plan: Plan, start_step: int) -> None:
        _cut_torn_line(path)
        self._file = path.open("a", encoding="utf-8")
        self._monitor, self._plan = monitor, plan
        self._since, self._logged_step, self._logged_wait = time.perf_counter(), start_step, 0.0
        shown = sys.stderr.isatty()
        self._bar = tqdm(
            total=plan.steps, initial=start_step, unit="step", dynamic_ncols=shown, mininterval=0.5 if shown else 30
        )

    def advance(self, step: int, losses: dict[str, float]) -> None:
        """Moves the bar to `step` with the peers' hard losses beside it."""
        if step % self._plan.recipe.training.log_every == 0:
            self._bar.set_postfix({key.split("/")[1]: f"{value:.3f}" for key, value in losses.items()}, refresh=False)
        self._bar.update(step - self._bar.n)

    def say(self, text: str) -> None:
        """A line above the bar."""
        self._bar.write(text, file=sys.stderr)

    def row(self, step: int, values: dict[str, float], waited_s: float) -> None:
        """Logs a step: its own global values, and the pace since the last logged step.

        `waited_s`: seconds spent waiting for data since the start.
        """
        now, rows = time.perf_counter(), self._plan.recipe.training.global_batch_rows
        elapsed, done = max(now - self._since, 1e-9), step - self._logged_step
        tokens_per_step = self._plan.tokens_per_step
        row = {
            "step": step,
            "consumed_rows": step * rows,
            "tokens": step * tokens_per_step,
            "rows_per_s": done * rows / elapsed,
            "tokens_per_s": done * tokens_per_step / elapsed,
            "mfu": None,  # the peak rate of this hardware is not known yet
            "data_wait_share": (waited_s - self._logged_wait) / elapsed,
            **values,
        }
        row = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in row.items()}
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()
        if self._monitor.enabled:
            skipped = ("step", "consumed_rows", "tokens")
            self._monitor.write_events([(k, v, step) for k, v in row.items() if v is not None and k not in skipped])
        self._since, self._logged_step, self._logged_wait = now, step, waited_s

    def pause(self, seconds: float) -> None:
        """Takes time that was no training (validation, saving) out of the pace."""
        self._since += seconds

    def close(self) -> None:
        """Ends the bar and the file."""
        self._bar.close()
        self._file.close()


def _cut_torn_line(path: Path) -> None:
    """A process killed while writing leaves half a line: the rows before it stay."""
    if path.exists() and (content := path.read_bytes()) and not content.endswith(b"\n"):
        with path.open("r+b") as file:
            file.truncate(content.rfind(b"\n") + 1)
