"""One step: every micro-batch forward and backward, then what all ranks must know of it, in one exchange."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ctcd_ds.objective.batch import Batch
from ctcd_ds.objective.fused import Losses
from ctcd_ds.objective.graph import DistillationGraph
from ctcd_ds.training.optimizer import PeerGradients
from ctcd_ds.training.signals import REASONS


def forward_and_backward(
    engine: Any, batches: Sequence[Batch], step: int, rank: int, graph: DistillationGraph
) -> list[Losses]:
    """The losses of this rank's micro-batches of a step; ZeRO has the step's reduced gradients afterwards."""
    seen = []
    for k, batch in enumerate(batches):
        losses = engine(batch, step * len(batches) + k, rank, graph)
        engine.backward(losses.total)
        seen.append(losses)
        if k + 1 < len(batches):
            engine.step()  # counts a micro-step; the optimizer moves at the last one, which is the trainer's
    return seen


def with_global_soft_count(batches: Sequence[Batch], device: torch.device) -> list[Batch]:
    """Each with its share of the step's soft positions over all ranks: for tasks where their number varies."""
    count = torch.full((), float(sum(batch.shared for batch in batches)), device=device)
    dist.all_reduce(count)
    share = count.clamp(min=1) / (dist.get_world_size() * len(batches))  # two masks may have nothing in common
    return [replace(batch, soft_count=share) for batch in batches]


def exchange(
    seen: Sequence[Losses], gradients: PeerGradients, save_due: bool, stop: str | None
) -> tuple[dict[str, float], dict[str, float], Tensor, bool, str | None]:
    """The step's global values, and whether any rank asks to save or to stop, in one all-reduce and one host sync.

    Returns the losses and the gradient norms (before clipping) by their names in metrics.jsonl, the norms as a tensor
    on the device, whether a checkpoint is due, and why to stop (None: go on).
    """
    terms = torch.stack([torch.stack(list(losses.terms.values())) for losses in seen]).mean(dim=0)
    terms = terms.double() / dist.get_world_size()
    wishes = [save_due, *(stop == reason for reason in REASONS)]
    asked = torch.zeros(len(wishes), dtype=torch.float64, device=terms.device)  # made there: a copy would wait for it
    for place, wish in enumerate(wishes):
        if wish:
            asked[place].fill_(1.0)
    packed = torch.cat([terms, gradients.squared_norms(), asked])
    dist.all_reduce(packed)
    first, last = len(terms), len(packed) - len(asked)
    norms = packed[first:last].sqrt()
    host = torch.cat([packed[:first], norms, packed[last:]]).tolist()
    reason = next((reason for reason, count in zip(REASONS, host[last + 1 :], strict=True) if count), None)
    named = dict(zip(seen[0].terms, host[:first], strict=True))
    grad_norms = {f"grad_norm/{peer}": norm for peer, norm in zip(gradients.groups, host[first:last], strict=True)}
    return named, grad_norms, norms, host[last] > 0, reason
