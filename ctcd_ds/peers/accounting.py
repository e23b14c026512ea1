"""What a peer costs: parameters, FLOPs per token. Counted on a model without memory (torch's meta device)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn


class Cost(NamedTuple):
    """Parameters with and without embeddings (tied output embeddings count once), and FLOPs per token.

    `forward_flops`: multiply-adds count two; the head at `head_fraction` of the positions. Training costs three
    times that (backward is two forwards), a frozen peer once.
    """

    parameters: int
    without_embeddings: int
    forward_flops: float


def cost(config: Any, sequence_length: int, head_fraction: float) -> Cost:
    """The cost of a masked LM with this config at this row length."""
    from transformers import AutoModelForMaskedLM

    with torch.device("meta"):
        model = AutoModelForMaskedLM.from_config(config)
    parameters = sum(p.numel() for p in model.parameters())
    embeddings = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Embedding))
    inside = {id(m) for m in model.base_model.modules()}
    encoder = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear) and id(m) in inside)
    head = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear) and id(m) not in inside)
    attention = 2 * 2 * sequence_length * config.hidden_size * config.num_hidden_layers  # Q·Kᵀ and weights·V
    return Cost(parameters, parameters - embeddings, 2.0 * encoder + attention + 2.0 * head * head_fraction)
