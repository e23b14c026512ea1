"""The objective that training uses: closed-form gradients, chunked over positions, LM-head projection included.

∂L/∂z_i = [ hard_i (p_i − y) + τ Σ_j soft_ij (p_i^τ − p_j^τ) ] / |P|        (DESIGN §2)

The gradient needs the same softmax as the loss, so one pass over a chunk of positions gives both: logits of all
peers, their statistics, every loss, and then every gradient, which goes at once through the projection into
the hidden states and the output embedding. No tensor of vocabulary size outlives its chunk.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ctcd_ds.objective.graph import DistillationGraph

# Logits of one peer in one chunk: large enough for a GEMM at full rate, small beside a model.
CHUNK_BYTES = 128 * 2**20

Count = float | Tensor  # of positions


class Projection(NamedTuple):
    """The last linear map of a peer: logits = hidden · weightᵀ + bias.

    hidden: [P, E]; weight: [V, E]; bias: [V] or None. `weight` is None where an architecture is only known by its
    logits (the general path): then `hidden` holds the logits [P, V] themselves. V may exceed the vocabulary.
    """

    hidden: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None

    @property
    def width(self) -> int:
        """Columns of the logits: the vocabulary with its padding."""
        return self.hidden.shape[1] if self.weight is None else self.weight.shape[0]


class Losses(NamedTuple):
    """total: 0-dim fp32, differentiable. hard [N] and soft [N, N]: fp32, unweighted, τ² in, detached."""

    total: Tensor
    hard: Tensor
    soft: Tensor


def fused_objective(
    projections: Sequence[Projection],
    targets: Tensor | Sequence[Tensor],
    graph: DistillationGraph,
    vocab_size: int,
    temperature: float = 1.0,
    hard_count: Count | Sequence[Count] | None = None,
    soft_count: Count | None = None,
    shared: int | None = None,
) -> Losses:
    """CTCD's loss over one set of positions, all peers at once. The oracle is `reference_objective`.

    Args:
        projections: one a peer, all over the same P positions; or each over P_i, of which the first `shared` are the
            same positions for all peers that distil.
        targets: int64 [P], or one [P_i] a peer; −100 where a position has no hard loss.
        vocab_size: columns from here on are padding: they get no probability and no gradient.
        hard_count, soft_count: what the sums are divided by; default: positions with a target, shared positions.
            `hard_count` may be one a peer. A run passes its global share (positions over all ranks and accumulation
            steps, divided by world size · accumulation), because DeepSpeed averages over both.
        shared: how many positions have a soft loss, where peers were masked differently; default: all.
    """
    labels = [targets] * len(projections) if isinstance(targets, Tensor) else list(targets)
    shared = labels[0].numel() if shared is None else shared
    if hard_count is None:
        hard_count = [(own >= 0).sum() for own in labels]
    elif isinstance(hard_count, (int, float, Tensor)):
        hard_count = [hard_count] * len(labels)
    soft_count = max(1, shared) if soft_count is None else soft_count
    task = _Task(graph, vocab_size, float(temperature), labels, shared, list(hard_count), soft_count)
    flat = [tensor for projection in projections for tensor in projection]
    total, hard, soft = _Fused.apply(task, *flat)
    return Losses(total, hard, soft)


def project(projection: Projection, rows: slice) -> Tensor:
    """fp32 logits [rows, V] of a chunk of positions, always in a buffer of their own.

    The GEMM accumulates in fp32 anyway and is asked to give it out: p_i − p_j is a difference of nearly
    equal numbers, and logits rounded to bf16 put 4 to 20 % error into it.
    """
    hidden, weight, bias = projection
    if weight is None:
        return hidden[rows].to(torch.float32, copy=True)
    logits = _mm(hidden[rows], weight.t())
    return logits if bias is None else logits.add_(bias)


class _Task(NamedTuple):
    graph: DistillationGraph
    vocab_size: int
    temperature: float
    targets: list[Tensor]
    shared: int
    hard_count: list[Count]
    soft_count: Count


class _Fused(torch.autograd.Function):
    """Forward computes losses and gradients together; backward only scales what is there."""

    @staticmethod
    def forward(ctx: Any, task: _Task, *flat: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        projections = [Projection(*flat[k : k + 3]) for k in range(0, len(flat), 3)]  # type: ignore[arg-type]
        graph, n = task.graph, len(projections)
        device = task.targets[0].device
        hard = torch.zeros(n, device=device)
        soft = torch.zeros(n, n, device=device)
        wanted = ctx.needs_input_grad[1:]
        learning = [graph.trained[i] and any(wanted[3 * i : 3 * i + 3]) for i in range(n)]
        gradients = [_Gradients.zeros(p) if learning[i] else None for i, p in enumerate(projections)]

        for rows, peers in _chunks(task, projections[0].width):
            logits = {i: project(projections[i], rows) for i in peers}
            _losses_then_gradients(logits, rows, task, hard, soft, learning)
            for i in peers:
                gradient = gradients[i]
                if gradient is not None:
                    gradient.add(projections[i], rows, logits[i])

        for i in range(n):
            hard[i] /= task.hard_count[i]
        soft *= task.temperature**2
        soft /= task.soft_count
        total = torch.zeros((), device=device)
        for i in graph.hard_peers():
            total = total + graph.hard[i] * hard[i]
        for i, j, weight in graph.edges():
            total = total + weight * soft[i, j]
        ctx.gradients, ctx.hard_count = gradients, task.hard_count
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in flat]
        ctx.mark_non_differentiable(hard, soft)
        return total, hard, soft

    @staticmethod
    def backward(ctx: Any, total_gradient: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        # Unnormalised fp32 until here: only now the loss scale is in, so p/|P| survives the cast to fp16.
        flat: list[Tensor | None] = []
        for gradient, hard_count in zip(ctx.gradients, ctx.hard_count, strict=True):
            scale = total_gradient / hard_count
            flat += [None if g is None else g.mul_(scale) for g in gradient or (None, None, None)]
        ctx.gradients = None
        return None, *(None if g is None else g.to(dtype) for g, dtype in zip(flat, ctx.dtypes, strict=True))


def _chunks(task: _Task, width: int) -> Iterator[tuple[slice, list[int]]]:
    """Positions to do at once, and whose: the shared ones of all peers that distil, then what each has of its own."""
    size = max(1, CHUNK_BYTES // (4 * width))
    distilling = sorted({k for i, j, _ in task.graph.edges() for k in (i, j)})
    for start in range(0, task.shared if distilling else 0, size):
        yield slice(start, min(start + size, task.shared)), distilling
    for i in task.graph.hard_peers():
        for start in range(task.shared if i in distilling else 0, len(task.targets[i]), size):
            yield slice(start, start + size), [i]


class _Gradients(NamedTuple):
    """Sums over the chunks, fp32, not yet divided by the number of positions."""

    hidden: Tensor
    weight: Tensor | None
    bias: Tensor | None

    @staticmethod
    def zeros(projection: Projection) -> _Gradients:
        hidden, weight, bias = (
            None if t is None else torch.zeros(t.shape, dtype=torch.float32, device=t.device) for t in projection
        )
        assert hidden is not None
        return _Gradients(hidden, weight, bias)

    def add(self, projection: Projection, rows: slice, logits_gradient: Tensor) -> None:
        if projection.weight is None or self.weight is None:
            self.hidden[rows] = logits_gradient
            return
        low = logits_gradient.to(projection.weight.dtype)
        self.hidden[rows] = _mm(low, projection.weight)
        if low.dtype == torch.float32:
            self.weight.addmm_(low.t(), projection.hidden[rows])
        else:
            self.weight.add_(_mm(low.t(), projection.hidden[rows]))
        if self.bias is not None:
            self.bias.add_(logits_gradient.sum(dim=0))


def _losses_then_gradients(
    logits: dict[int, Tensor], rows: slice, task: _Task, hard: Tensor, soft: Tensor, learning: list[bool]
) -> None:
    """Adds one chunk's loss sums to `hard` and `soft`, then overwrites the logits of learning peers with gradients.

    `logits`: fp32 [C, V] of the peers that have these positions. The gradients are those of the sum over positions
    times hard_count/|P| of each loss (so that one division by the peer's hard_count remains), and 0 in the padding
    columns.
    """
    graph, tau = task.graph, task.temperature
    edges = [(i, j, weight) for i, j, weight in graph.edges() if i in logits and j in logits]
    targets = {i: task.targets[i][rows] for i in logits}
    known = {i: own.clamp(min=0).unsqueeze(1) for i, own in targets.items()}
    z = {i: x[:, : task.vocab_size] for i, x in logits.items()}
    for x in z.values():
        x -= x.amax(dim=1, keepdim=True)  # max and log-sum stay apart: log-sum-exp itself would lose digits

    # (softmax [C, V], log of its normaliser [C]) at temperature 1 for hard losses, at τ for soft ones
    at_1 = {i: _softmax(z[i], 1.0) for i in graph.hard_peers() if i in z}
    distilled = sorted({k for i, j, _ in edges for k in (i, j)})
    at_tau = {i: at_1[i] if tau == 1.0 and i in at_1 else _softmax(z[i], tau) for i in distilled}

    for i, (_, log_sum) in at_1.items():
        hard[i] += torch.where(targets[i] >= 0, log_sum - z[i].gather(1, known[i]).squeeze(1), 0.0).sum()
    for i, j, _ in edges:
        (_, log_sum_i), (q_j, log_sum_j) = at_tau[i], at_tau[j]
        cross = (z[j] - z[i]).mul_(q_j).sum(dim=1) / tau
        soft[i, j] += (cross - log_sum_j + log_sum_i).sum()

    for i in logits:
        if not learning[i]:
            continue
        logits[i].zero_()
        if graph.hard[i]:
            z[i].add_(at_1[i][0], alpha=graph.hard[i])
            z[i].scatter_add_(1, known[i], torch.full_like(known[i], -graph.hard[i], dtype=z[i].dtype))
            z[i].mul_((targets[i] >= 0).unsqueeze(1))
        ratio = task.hard_count[i] / task.soft_count
        for learner, j, weight in edges:
            if learner == i:
                z[i].add_((at_tau[i][0] - at_tau[j][0]).mul_(ratio), alpha=weight * tau)


def _softmax(shifted: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """softmax(shifted / tau) [C, V] and the log of its normaliser [C]; the largest entry of a row is 0."""
    p = torch.exp(shifted if tau == 1.0 else shifted / tau)
    total = p.sum(dim=1, keepdim=True)
    return p.div_(total), total.log().squeeze(1)


def _mm(a: Tensor, b: Tensor) -> Tensor:
    """a · b with fp32 output, whatever the inputs' dtype (torch offers fp32 output of 16-bit GEMMs on CUDA only)."""
    if a.dtype == torch.float32:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()
