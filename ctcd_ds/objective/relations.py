"""How differently two models relate the tokens of a row to each other: MiniLMv2's loss (arXiv 2012.15828).

The heads of a model's queries [L, width], side by side, are cut anew into `heads` parts Q_r, whatever the number of its
own heads. R_r = softmax(Q_r Q_rᵀ / √(width / heads)) says how each token relates to all others, and has a shape that
does not know the width. Keys and values alike; query-key is the attention itself (MiniLM, arXiv 2002.10957). With
s = A Bᵀ / √w the scores, the loss is the mean of KL(R of the teacher ‖ R of the learner) over heads and tokens, and

    ∂KL/∂s = R_learner − R_teacher,    ∂s/∂A = B / √w,    ∂s/∂B = A / √w

so the forward pass has all it needs for the gradient, and nothing of [L, L] outlives a few rows of the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ctcd_ds.objective.signals import Relation

Attention: TypeAlias = tuple[Tensor, Tensor, Tensor]  # queries, keys, values that enter a layer's attention

OPERANDS: dict[Relation, tuple[int, int]] = {"query": (0, 0), "key": (1, 1), "value": (2, 2), "query-key": (0, 1)}
# Of the batch, so many rows at once that one relation of theirs is not larger; at least one.
RELATION_BYTES = 32 * 2**20


def relations_loss(own: Attention, other: Attention, heads: int, of: Sequence[Relation], causal: bool) -> Tensor:
    """The mean over the kinds `of` relations, fp32, 0-dim. No gradient goes into `other`.

    Args:
        own, other: the learner's and the teacher's queries, keys and values, each [B, its heads, L, its head's width];
            only B and L must be the same.
        heads: into so many parts each is cut; divides all widths.
        causal: a token is related to those before it and itself only.
    """
    losses = []
    for a, b in (OPERANDS[kind] for kind in of):
        losses.append(_Apart.apply(own[a], own[b], other[a], other[b], heads, causal))
    return torch.stack(losses).mean()


class _Apart(torch.autograd.Function):
    """KL of one kind of relation; its gradient is made in the forward pass, in fp32, and scaled in the backward."""

    @staticmethod
    def forward(
        ctx: Any, left: Tensor, right: Tensor, their_left: Tensor, their_right: Tensor, heads: int, causal: bool
    ) -> Tensor:
        batch, _, length, _ = left.shape
        count = batch * heads * length
        step = max(1, RELATION_BYTES // (4 * heads * length**2))
        hidden = torch.ones(length, length, dtype=torch.bool, device=left.device).triu(1) if causal else None
        total = torch.zeros((), device=left.device)
        gradients: tuple[list[Tensor], list[Tensor]] = ([], [])
        for start in range(0, batch, step):
            a, b, c, d = (_parts(x[start : start + step], heads) for x in (left, right, their_left, their_right))
            log_p, log_q = _log_relations(a, b, hidden), _log_relations(c, d, hidden)
            q = log_q.exp()
            parts = q * (log_q - log_p)
            total += (parts if hidden is None else parts.masked_fill_(hidden, 0.0)).sum()
            by_scores = log_p.exp_().sub_(q).div_(count * a.shape[-1] ** 0.5)
            for found, part in zip(gradients, (by_scores @ b, by_scores.transpose(2, 3) @ a), strict=True):
                found.append(_joined(part, left.shape[1] if found is gradients[0] else right.shape[1]))
        ctx.save_for_backward(*(torch.cat(found) for found in gradients))
        ctx.dtype = left.dtype
        return total / count

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        by_left, by_right = ((gradient * saved).to(ctx.dtype) for saved in ctx.saved_tensors)
        return by_left, by_right, None, None, None, None


def _parts(heads_of_model: Tensor, heads: int) -> Tensor:
    """[B, h, L, w] → fp32 [B, heads, L, h·w / heads]."""
    return heads_of_model.transpose(1, 2).flatten(2).float().unflatten(2, (heads, -1)).transpose(1, 2)


def _joined(parts: Tensor, heads_of_model: int) -> Tensor:
    """The way back from `_parts`."""
    return parts.transpose(1, 2).flatten(2).unflatten(2, (heads_of_model, -1)).transpose(1, 2)


def _log_relations(left: Tensor, right: Tensor, hidden: Tensor | None) -> Tensor:
    scores = left @ right.transpose(2, 3) / left.shape[-1] ** 0.5
    return (scores if hidden is None else scores.masked_fill_(hidden, -torch.inf)).log_softmax(dim=-1)
