"""What rank 0 does for all ranks, and how the others learn of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from ctcd_ds.cli import RunFailure, UserError

T = TypeVar("T")


def on_rank_zero(work: Callable[[], T], device: torch.device | None = None) -> T:
    """`work()` on rank 0; its result on all ranks. Where it fails for a reason that has words, it fails on all."""
    heard: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            heard[0] = work()
        except (UserError, RunFailure, OSError) as failure:
            heard[1] = failure
    dist.broadcast_object_list(heard, src=0, device=device)
    if heard[1] is not None:
        raise heard[1]
    result: T = heard[0]
    return result
