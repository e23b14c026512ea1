"""Dropout on the CPU, whose masks cost torch 6 % of a step there: one serial draw for every value."""

from __future__ import annotations

import torch
from torch import Tensor, nn

STEPS = 2**16  # in how many steps the probability is given: 16 random bits a value


class Dropout(nn.Dropout):
    """nn.Dropout that takes four values' masks from each draw on the CPU; elsewhere, and compiled, it is torch's.

    The share that is dropped is `p` to the nearest 1/65,536, and what is kept is scaled by exactly that share.
    """

    def forward(self, input: Tensor) -> Tensor:
        """`input` of any shape and floating dtype."""
        dropped = round(self.p * STEPS)
        torchs = input.device.type != "cpu" or torch.compiler.is_compiling()
        if torchs or not self.training or not 0 < dropped < STEPS:
            return super().forward(input)
        draws = torch.empty(-(-input.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        bits = draws.view(torch.int16)[: input.numel()].view(input.shape)
        kept = bits >= dropped - STEPS // 2
        return input * kept.to(input.dtype).mul_(STEPS / (STEPS - dropped))


def use_fast_dropout(module: nn.Module) -> None:
    """Makes every nn.Dropout inside `module` one of ours, in place; neither has weights or names of its own."""
    for part in module.modules():
        if type(part) is nn.Dropout:
            part.__class__ = Dropout
