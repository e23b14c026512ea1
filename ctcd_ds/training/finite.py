"""Steps with a loss or a gradient that is not finite: the optimizer does not move, and it is said whose and where.

In fp16 such a step is how the loss scale finds its place, and only at the scale's floor it is an error. At any other
precision it is the recipe's `training.on_nonfinite` that decides.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from ctcd_ds.cli import RunFailure
from ctcd_ds.objective.batch import Batch
from ctcd_ds.objective.fused import Losses

MAX_SKIPS_IN_A_ROW = 10
_ROWS_NAMED = 16


class FiniteGuard:
    """Looks at every step's global values. `zero` is engine.optimizer; `policy` is `training.on_nonfinite`."""

    def __init__(self, zero: Any, precision: str, policy: str) -> None:
        self._scaler = zero.loss_scaler
        self._scale_searches = precision == "fp16" and bool(self._scaler.dynamic)
        self._policy = policy
        self._in_a_row = 0

    def judge(
        self, values: Mapping[str, float], step: int, seen: Sequence[Losses], micro_batches: Sequence[Batch]
    ) -> str | None:
        """None where all values are finite; else what is said of the step (counted from 1), which must be skipped.

        Called by all ranks with equal `values` (losses and gradient norms by their names in metrics.jsonl); `seen` and
        `micro_batches` are this rank's. Raises RunFailure, on all ranks, where the run must end instead.
        """
        bad = [name for name, value in values.items() if not math.isfinite(value)]
        if not bad:
            self._in_a_row = 0
            return None
        self._in_a_row += 1
        what = f"step {step}: {', '.join(f'{name} = {values[name]}' for name in bad)}{_where(seen, micro_batches)}"
        if self._scale_searches:
            if self._at_floor():
                raise RunFailure(f"{what}. {self._diagnosis(bad)}")
            return f"{what}: skipped at loss scale {self._scaler.cur_scale:g}"
        if self._policy == "stop":
            raise RunFailure(
                f"{what}. The optimizer did not move. Lower the learning rate, lengthen the warm-up, or go on over "
                "such steps with training.on_nonfinite=skip"
            )
        if self._in_a_row == MAX_SKIPS_IN_A_ROW:
            raise RunFailure(f"{what}. {MAX_SKIPS_IN_A_ROW} steps in a row were skipped: the weights are past mending")
        return f"{what}: skipped"

    def _at_floor(self) -> bool:
        """Whether DeepSpeed's scaler would have to go below its minimum for this overflow."""
        scaler = self._scaler
        return scaler.cur_scale <= scaler.min_scale and (scaler.delayed_shift == 1 or scaler.cur_hysteresis == 1)

    def _diagnosis(self, bad: Sequence[str]) -> str:
        floor = f"The loss scale is at its floor ({self._scaler.min_scale:g}, fp16.min_loss_scale)"
        peers = ", ".join(sorted({name.split("/")[1] for name in bad}))
        if any(name.startswith("loss/") for name in bad):
            return (
                f"{floor} and cannot help: the forward pass of {peers} itself leaves fp16's range (65504). Use bf16, "
                "or lower the learning rate"
            )
        return (
            f"{floor}: the gradients of {peers} leave fp16's range whatever the scale; the run has most likely "
            "diverged. Lower the learning rate, lengthen the warm-up, or use bf16"
        )


def _where(seen: Sequence[Losses], micro_batches: Sequence[Batch]) -> str:
    """In which rows a loss is not finite, over all ranks; where all losses are finite, it is a gradient's overflow."""
    own = [
        int(row)
        for terms, batch in zip(seen, micro_batches, strict=True)
        if not all(bool(torch.isfinite(loss)) for loss in terms.terms.values())
        for row in batch.rows
    ]
    everyone: list[list[int]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, own)
    rows = sorted(row for some in everyone for row in some)
    if not rows:
        return " (all losses are finite)"
    more = f" and {len(rows) - _ROWS_NAMED} more" if len(rows) > _ROWS_NAMED else ""
    return f" (in a micro-batch of the rows {', '.join(map(str, rows[:_ROWS_NAMED]))}{more})"
