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
        temperature = graph.tau(i, j)
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


def reference_hidden(pairs: Sequence[tuple[Tensor, Tensor | None, Tensor]]) -> Tensor:
    """The mean over pairs of the mean of (W h − h')², fp64; of each h [B, L, E], W [E', E] or None, h' [B, L, E']."""
    total = torch.zeros((), dtype=torch.float64)
    for own, weight, other in pairs:
        mapped = own.double() if weight is None else torch.einsum("bli,oi->blo", own.double(), weight.double())
        total = total + (mapped - other.detach().double()).pow(2).mean()
    return total / len(pairs)


def reference_relations(
    own: Sequence[Tensor], other: Sequence[Tensor], heads: int, of: Sequence[str], causal: bool
) -> Tensor:
    """MiniLMv2's formula row by row, head by head, fp64; own, other: queries, keys, values, each [B, h, L, w]."""
    losses = []
    for kind in of:
        left, right = {"query": (0, 0), "key": (1, 1), "value": (2, 2), "query-key": (0, 1)}[kind]
        for row in range(own[0].shape[0]):
            mine, theirs = (
                [torch.cat(list(x[k][row].double()), dim=1).chunk(heads, dim=1) for k in (left, right)]
                for x in (own, [tensor.detach() for tensor in other])
            )
            for head in range(heads):
                p = _relation(mine[0][head], mine[1][head], causal)
                q = _relation(theirs[0][head], theirs[1][head], causal)
                losses += [sum(q[t, s] * (q[t, s] / p[t, s]).log() for s in range(t + 1 if causal else len(q)))
                           for t in range(len(q))]  # fmt: skip
    return torch.stack(losses).mean()  # type: ignore[arg-type]


def _relation(left: Tensor, right: Tensor, causal: bool) -> Tensor:
    """softmax(A Bᵀ / √width), [L, L]."""
    scores = left @ right.t() / left.shape[1] ** 0.5
    return torch.softmax(scores.tril() + torch.full_like(scores, -torch.inf).triu(1) if causal else scores, dim=1)
