"""Per-peer norms and clipping inside ZeRO's partitioned gradients.

DeepSpeed clips by one norm over everything, which would couple the peers. Between backward and step, ZeRO 1 and 2
hold this rank's reduced gradients in `averaged_gradients[group]`; a group belongs to one peer, so a peer's norm is
a sum over its groups and over the ranks. The step makes of each group's one flat fp32 gradient, which is clipped there,
in one pass and without a rounding to 16 bits, when its optimizer is about to move.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ctcd_ds.recipe.sections import OptimizerSection


class PeerGradients:
    """The reduced gradients of one step, by peer. `zero` is engine.optimizer."""

    def __init__(self, zero: Any, peers: Sequence[str], device: torch.device) -> None:
        self.zero, self.device = zero, device
        self.groups = {
            peer: [i for i, group in enumerate(zero.param_groups) if group["peer"] == peer] for peer in peers
        }
        self._scale = 1.0  # of the loss, in this step's backward
        self._factors: dict[int, Tensor] = {}  # group → what clipping multiplies its gradient by
        self._move, zero._optimizer_step = zero._optimizer_step, self._clip_and_move

    def squared_norms(self) -> Tensor:
        """This rank's share of each peer's squared norm, fp64 [peers], on the device, loss scale taken out."""
        self._scale = float(self.zero.loss_scale)
        shares = [torch.zeros((), dtype=torch.float64, device=self.device) for _ in self.groups]
        for share, groups in zip(shares, self.groups.values(), strict=True):
            for gradients in filter(None, map(self._of, groups)):  # a small group may have nothing on this rank
                share += torch.stack(torch._foreach_norm(gradients, 2, dtype=torch.float32)).double().square().sum()
        return torch.stack(shares) / self._scale**2

    def clip(self, norms: Tensor, settings: Mapping[str, OptimizerSection]) -> None:
        """Scales each peer's gradients, in the step to come, so that its norm is at most its max_grad_norm (0: any).

        `norms`: global norms, [peers]. The factor is torch.nn.utils.clip_grad_norm_'s.
        """
        for norm, (peer, groups) in zip(norms, self.groups.items(), strict=True):
            if limit := settings[peer].max_grad_norm:
                factor = (limit / (norm + 1e-6)).clamp(max=1.0).float()
                self._factors.update(dict.fromkeys(groups, factor))

    def allow_step(self, allowed: bool) -> None:
        """Whether DeepSpeed's next step moves the optimizer, decided by us and equal on all ranks.

        DeepSpeed looks for overflow where it is told to, which costs a pass and a host sync: it is told where there is
        one, and finds it.
        """
        self.zero.check_grad_overflow = not allowed
        if not allowed:
            for gradients in filter(None, map(self._of, range(len(self.zero.param_groups)))):
                torch._foreach_mul_(gradients, math.inf)  # 0 · inf is NaN: nothing stays finite

    def _clip_and_move(self, group: int) -> None:
        """In place of DeepSpeed's own step of one group, which it then calls.

        DeepSpeed has divided the gradient by the loss scale as it is now: where this step lets it grow, that is already
        the next step's, and not what backward multiplied by.
        """
        factor: Tensor | float = self._factors.get(group, 1.0)
        if (grown := float(self.zero.loss_scale) / self._scale) != 1.0:
            factor = factor * grown
        if isinstance(factor, Tensor) or factor != 1.0:
            self.zero.single_partition_of_fp32_groups[group].grad.mul_(factor)
        self._move(group)

    def _of(self, group: int) -> list[Tensor]:
        return [gradient for gradient in self.zero.averaged_gradients[group] if gradient is not None]
