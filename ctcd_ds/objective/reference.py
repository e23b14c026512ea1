"""The oracle: our formulas (docs/architecture.md) as they read, in fp64, with autograd. Slow and plain on purpose.

It shares no code and no cast with `fused.py`, so that agreement of the two means something.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ctcd_ds.objective.graph import DistillationGraph


def reference_objective(
    logits: Sequence[Tensor],
    targets: Tensor | Sequence[Tensor],
    graph: DistillationGraph,
    temperature: float = 1.0,
    shared: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """CTCD's loss over one set of positions (arXiv 2311.02849; our formulas in docs/architecture.md).

    Args:
        logits: one [P, V] tensor a peer, any floating dtype; −inf where a token is impossible for all peers.
        targets: int64 [P], the ground-truth tokens; −100 where a position has none (soft loss only). One for all peers,
            or one a peer: then P too may be another for each.
        shared: the first so many positions are the same for all peers and have a soft loss; default: all.
    Returns:
        (total, hard [N], soft [N, N]) in fp64: hard[i] = CE_i over the positions with a target,
        soft[i, j] = the divergence of peer i from peer j over the shared positions, τ² in; both unweighted, 0 without
        an edge.
    """
    n = len(logits)
    labels = [targets] * n if isinstance(targets, Tensor) else targets
    hard = torch.zeros(n, dtype=torch.float64)
    soft = torch.zeros(n, n, dtype=torch.float64)
    total = torch.zeros((), dtype=torch.float64)

    for i in graph.hard_peers():
        has_target = labels[i] >= 0
        log_p = torch.log_softmax(logits[i].double(), dim=-1)[has_target]
        ce = -log_p.gather(1, labels[i][has_target].unsqueeze(1)).mean()
        hard[i] = ce.detach()
        total = total + graph.hard[i] * ce

    for i, j, weight in graph.edges() if shared != 0 else ():
        log_p = torch.log_softmax(logits[i][:shared].double() / temperature, dim=-1)
        log_q = torch.log_softmax(logits[j][:shared].detach().double() / temperature, dim=-1)
        possible = torch.isfinite(log_q) & torch.isfinite(log_p)  # 0 · log 0 = 0
        log_p, log_q = torch.where(possible, log_p, -1e4), torch.where(possible, log_q, -1e4)
        divergence = temperature**2 * _divergence(log_p.exp(), log_q.exp(), log_p, log_q, graph, i, j).mean()
        soft[i, j] = divergence.detach()
        total = total + weight * divergence

    return total, hard, soft


def _divergence(p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor, graph: DistillationGraph, i: int, j: int) -> Tensor:
    """Of learner p from teacher q at each position, [P]."""
    kind, beta = graph.divergence(i, j).kind, graph.divergence(i, j).beta
    if kind == "kl":
        return (q * (log_q - log_p)).sum(dim=-1)
    if kind == "reverse_kl":
        return (p * (log_p - log_q)).sum(dim=-1)
    log_m = torch.log(beta * q + (1 - beta) * p + 1e-300)
    parts = beta * q * (log_q - log_m) + (1 - beta) * p * (log_p - log_m)
    return torch.where(beta * q + (1 - beta) * p > 0, parts, 0.0).sum(dim=-1)
