"""One micro-batch, from the task that asks it to the objective that weighs the answers: the only record of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

NO_TARGET = -100  # where a position has a soft loss only


class Drawn(NamedTuple):
    """What is known of a cached teacher's prediction q (softened by τ) at some positions.

    tokens: int64 [P, D], drawn from q so that a token's mean share among the D is its probability;
    entropy: fp32 [P], −Σ q log q in nats.
    """

    tokens: Tensor
    entropy: Tensor


@dataclass(frozen=True)
class View:
    """What one peer sees of the rows, and where it is asked.

    Flat positions count through the model's output row by row: row · length + position. Of peers that distil, the first
    `Batch.shared` positions are the same; each one's other targets follow.
    """

    inputs: Mapping[str, Tensor]  # what the model's forward takes: input_ids int64 [b, L], …
    positions: Tensor | None  # int64 [P], flat; None: all of them, in order
    targets: Tensor  # int64 [P], the right tokens there; NO_TARGET where only a soft loss is
    hard_count: int  # what the sum of hard losses is divided by: how many of the positions have a target


@dataclass(frozen=True)
class Batch:
    """What all peers are asked about the same rows: `views` has one a peer, in the graph's order.

    Peers that see the same share one View object. `soft_count` (fp32, 0-dim) is what the sums of soft losses are
    divided by. A run that cuts a step over ranks and accumulation steps gives each micro-batch its share of the global
    counts, because DeepSpeed averages over both. `drawn`: by cached teacher, what it predicted at the shared positions.
    """

    views: tuple[View, ...]
    shared: int  # so many positions have the soft losses
    soft_count: Tensor
    rows: np.ndarray  # int64 [b], the numbers of the rows, for messages
    drawn: Mapping[str, Drawn] = field(default_factory=dict)

    @staticmethod
    def of(inputs: Mapping[str, Tensor], labels: Tensor, peers: int) -> Batch:
        """One batch that all `peers` see alike, from what a Hugging Face collator gives.

        `labels`: int64 [b, L], the right token where the model is asked, −100 elsewhere (masked language models). For
        causal models shift them first: labels[:, t] is the token that follows position t.
        """
        positions = (labels.flatten() != NO_TARGET).nonzero().squeeze(1)
        asked = max(1, len(positions))  # a batch may ask nothing: then all losses are 0
        view = View(inputs, positions, labels.flatten()[positions], asked)
        count = torch.tensor(float(asked), device=labels.device)
        return Batch((view,) * peers, len(positions), count, np.arange(len(labels)))

    def mapped(self, function: Callable[[Tensor], Tensor]) -> Batch:
        """This batch with `function` applied to its tensors, each view's once."""
        done: dict[int, View] = {}
        for view in self.views:
            if id(view) not in done:
                inputs = {name: function(tensor) for name, tensor in view.inputs.items()}
                positions = None if view.positions is None else function(view.positions)
                done[id(view)] = View(inputs, positions, function(view.targets), view.hard_count)
        views, count = tuple(done[id(view)] for view in self.views), function(self.soft_count)
        drawn = {name: Drawn(*map(function, known)) for name, known in self.drawn.items()}
        return replace(self, views=views, soft_count=count, drawn=drawn)

    def to(self, device: torch.device) -> Batch:
        """This batch on `device`; the copies do not wait (from pinned memory, on the caller's stream)."""
        return self.mapped(lambda tensor: tensor.to(device, non_blocking=True))
