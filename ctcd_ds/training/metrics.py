"""What a run says while it runs: metrics.jsonl, DeepSpeed's monitors, one progress bar. Rank 0 only."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ctcd_ds.manifest import write_atomic
from ctcd_ds.training.plan import Plan
from ctcd_ds.training.tensorboard import forget_after, write_hparams

_OF_THE_RUN = {
    "rows_per_s": "Pace/rows per second",
    "tokens_per_s": "Pace/tokens per second",
    "mfu": "Pace/share of the hardware's peak",
    "data_wait_share": "Pace/share of time waiting for data",
    "memory_gib": "Pace/memory of rank 0 in GiB",
    "loss_scale": "Precision/loss scale",
    "skipped_steps": "Precision/skipped steps",
}


class MetricsLog:
    """Writes one row a logged step, flushed, to a file and to the monitors; moves the bar every step."""

    def __init__(self, path: Path, monitor: Any, plan: Plan, start_step: int, peak_flops: float | None) -> None:
        self.earlier_s = _forget_after(path, start_step)
        self._file = path.open("a", encoding="utf-8")
        self._monitor, self._plan, self._peak = monitor, plan, peak_flops
        if (board := getattr(monitor, "tb_monitor", None)) is not None and board.enabled:
            write_hparams(Path(board.output_path) / board.job_name, plan.recipe)
            forget_after(board.summary_writer, start_step)
        self._logged_step, self._logged_at, self._logged_wait = start_step, 0.0, 0.0
        shown = sys.stderr.isatty()
        self._bar = tqdm(
            total=plan.steps, initial=start_step, unit="step", dynamic_ncols=shown, mininterval=0.5 if shown else 30
        )

    def advance(self, step: int, said: str | None = None) -> None:
        """Moves the bar to `step`; what is to be said of it stands above the bar."""
        self._bar.update(step - self._bar.n)
        if said:
            self._bar.write(said, file=sys.stderr)

    def row(self, step: int, values: dict[str, float], seconds: float, waited_s: float, memory_bytes: int) -> None:
        """Logs a step: its own global values, and the pace since the last logged step.

        `seconds` of training and `waited_s` of them spent waiting for data, since the start. `memory_bytes`: rank 0's
        peak. `mfu`: the share of the hardware's peak that the FLOPs a step must do reach; null without a known peak.
        """
        rows, done = self._plan.recipe.training.global_batch_rows, step - self._logged_step
        elapsed = max(seconds - self._logged_at, 1e-9)
        tokens_per_step = self._plan.tokens_per_step
        row = {
            "step": step,
            "consumed_rows": step * rows,
            "tokens": step * tokens_per_step,
            "rows_per_s": done * rows / elapsed,
            "tokens_per_s": (pace := done * tokens_per_step / elapsed),
            "mfu": pace * self._plan.flops_per_token / self._peak if self._peak else None,
            "data_wait_share": (waited_s - self._logged_wait) / elapsed,
            "memory_gib": memory_bytes / 2**30,
            **values,
        }
        row = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in row.items()}
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()
        shown = [(shown_as(key), value, step) for key, value in row.items() if value is not None]
        self._monitor.write_events([event for event in shown if event[0]])
        self._logged_step, self._logged_at, self._logged_wait = step, seconds, waited_s
        self._bar.set_postfix(self._beside_the_bar(row), refresh=False)

    def _beside_the_bar(self, row: dict[str, Any]) -> dict[str, str]:
        """Each peer's hard loss (a soft one where it has none), the pace and what it is of the hardware's peak."""
        shown: dict[str, str] = {}
        for key, value in row.items():
            if key.startswith("loss/") and value is not None:
                shown.setdefault(key.split("/")[1], f"{value:.3f}")
        mfu = "" if row["mfu"] is None else f" ({row['mfu']:.0%} of peak)"
        return {**shown, "tokens/s": f"{row['tokens_per_s']:,.0f}{mfu}"}

    def close(self) -> None:
        """Ends the bar and the file."""
        self._bar.close()
        self._file.close()


def shown_as(key: str) -> str:
    """A key of metrics.jsonl as TensorBoard and the other monitors show it, in words; "" where they need not.

    The part before the slash is the group: one quantity, all peers.
    """
    match key.split("/"):
        case ["loss", peer, kind]:
            return f"{kind.capitalize()} loss/{peer}"
        case ["loss", peer, kind, other]:
            return f"{kind.capitalize()} loss/{peer} learning from {other}"
        case ["valid", *of, "agreement", one, other]:
            return f"Same answer on held-out rows{_of(of)}/{one} and {other}"
        case ["valid", *of, peer, what]:
            return f"Held-out {what}{_of(of)}/{peer}"
        case ["grad_norm", peer]:
            return f"Gradient norm before clipping/{peer}"
        case ["lr", peer]:
            return f"Learning rate/{peer}"
        case _:
            return _OF_THE_RUN.get(key, "")


def held_out_values(row: Mapping[str, Any], peer: str) -> dict[str, dict[str, float]]:
    """What a row of metrics.jsonl, or summary.json, holds of a peer: set → loss, accuracy → value.

    The set is "" for what stands for all held-out text, else the name of a held-out set or of a mixture's source.
    """
    found: dict[str, dict[str, float]] = {}
    for key, value in row.items():
        match key.split("/"):
            case ["valid", *of, name, what] if name == peer and "agreement" not in of and value is not None:
                found.setdefault("".join(of), {})[what] = value
    return found


def _of(sets: list[str]) -> str:
    """The name of a held-out set, where it is not what stands for all."""
    return "".join(f" of {name}" for name in sets)


def _forget_after(path: Path, step: int) -> float:
    """Drops the rows of steps that a killed process did and that will be done again, and what it left half written.

    Returns the run's seconds up to the last row that stays.
    """
    kept, seconds = [], 0.0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
        with suppress(ValueError, KeyError, TypeError):
            if (row := json.loads(line))["step"] <= step:
                kept.append(line + "\n")
                seconds = row.get("seconds", 0.0)
    write_atomic(path, "".join(kept))
    return seconds
