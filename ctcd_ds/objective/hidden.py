"""How far hidden states are apart, as in TinyBERT (arXiv 1909.10351, equation 8): mean squared differences."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def hidden_loss(pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """The mean over pairs of the mean squared difference, fp32, 0-dim. No gradient goes into the second of a pair.

    `pairs`: (the learner's states, mapped to the teacher's width, and the teacher's), both [B, L, E]; of any floating
    dtype, E may be another in each pair. That it is a mean keeps the weight what it is, however many are compared.
    """
    losses = [(own.float() - other.detach().float()).square().mean() for own, other in pairs]
    return torch.stack(losses).mean()
