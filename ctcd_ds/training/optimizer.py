"""Per-peer norms and clipping inside ZeRO's partitioned gradients.

DeepSpeed clips by one norm over everything, which would couple the peers. Between backward and step, ZeRO 1 and 2
hold this rank's reduced gradients in `averaged_gradients[group]`; a group belongs to one peer, so a peer's norm is
a sum over its groups and over the ranks, and clipping scales these tensors in place.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ctcd_ds.recipe import OptimizerSection


class PeerGradients:
    """The reduced gradients of one step, by peer. `zero` is engine.optimizer."""

    def __init__(self, zero: Any, peers: Sequence[str], device: torch.device) -> None:
        self.zero, self.device = zero, device
        self.groups = {
            peer: [i for i, group in enumerate(zero.param_groups) if group["peer"] == peer] for peer in peers
        }

    def squared_norms(self) -> Tensor:
        """This rank's share of each peer's squared norm, fp64 [peers], on the device, loss scale taken out."""
        shares = [torch.zeros((), dtype=torch.float64, device=self.device) for _ in self.groups]
        for share, groups in zip(shares, self.groups.values(), strict=True):
            for gradients in filter(None, map(self._of, groups)):  # a small group may have nothing on this rank
                share += torch.stack(torch._foreach_norm(gradients, 2, dtype=torch.float32)).double().square().sum()
        return torch.stack(shares) / float(self.zero.loss_scale) ** 2

    def clip(self, norms: Tensor, settings: Mapping[str, OptimizerSection]) -> None:
        """Scales each peer's gradients so that its norm is at most its max_grad_norm (0: no clipping).

        `norms`: global norms, [peers]. The factor is torch.nn.utils.clip_grad_norm_'s.
        """
        for norm, (peer, groups) in zip(norms, self.groups.items(), strict=True):
            if limit := settings[peer].max_grad_norm:
                factor = (limit / (norm + 1e-6)).clamp(max=1.0).float()
                for gradients in filter(None, map(self._of, groups)):
                    torch._foreach_mul_(gradients, factor)

    def allow_step(self, allowed: bool) -> None:
        """Whether DeepSpeed's next step moves the optimizer, decided by us and equal on all ranks.

        DeepSpeed looks for overflow where it is told to, which costs a pass and a host sync: it is told where there is
        one, and finds it.
        """
        self.zero.check_grad_overflow = not allowed
        if not allowed:
            for gradients in filter(None, map(self._of, range(len(self.zero.param_groups)))):
                torch._foreach_mul_(gradients, math.inf)  # 0 · inf is NaN: nothing stays finite

    def _of(self, group: int) -> list[Tensor]:
        return [gradient for gradient in self.zero.averaged_gradients[group] if gradient is not None]
