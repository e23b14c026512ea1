"""The soft loss from a finished teacher of which only a few tokens a position are kept.

The gradient of KL(q ‖ p) by the learner's logits is p − q, linear in the teacher's distribution q: any q̂ of the mean q
gives it without bias. Here q̂ is the share of each token among D drawn ones (Sparse Logit Sampling, arXiv 2503.16870).
The value is a cross-entropy with q̂ less the stored entropy of q, whose mean is KL(q ‖ p). The largest few of q, kept
in its place, have another mean: what learns from them becomes too sure of itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ctcd_ds.objective.batch import Batch, Drawn
from ctcd_ds.objective.fused import Gradients, Losses, keeps, tiles
from ctcd_ds.objective.graph import DistillationGraph
from ctcd_ds.objective.projection import Projection, project, slope_of


def draw(logits: Tensor, shift: Tensor, draws: int, temperature: float = 1.0) -> Drawn:
    """Draws `draws` tokens at each position from q = softmax(logits / τ).

    logits: [P, V], without padding; shift: [P], uniform in (0, 1). The D points (shift + k) / D are laid against the
    running sum of q: a token comes D·q times on average, as with independent draws, but never a whole time more or less
    (systematic sampling), which takes most of the variance away. Computed in fp64.
    """
    log_q = torch.log_softmax(logits.double() / temperature, dim=1)
    q = log_q.exp()
    ends = q.cumsum(dim=1)
    steps = torch.arange(draws, dtype=torch.float64, device=q.device)
    points = (shift.double().unsqueeze(1) + steps) / draws * ends[:, -1:]
    entropy = torch.special.entr(q).sum(dim=1)
    return Drawn(torch.searchsorted(ends, points, right=True), entropy.float())


def with_cached(
    losses: Losses,
    projections: Sequence[Projection],
    batch: Batch,
    graph: DistillationGraph,
    vocab_size: int,
) -> Losses:
    """The losses of one micro-batch with what peers learn from the graph's cached teachers added.

    Arguments as of `fused_objective`, which gave `losses` for the live part of the graph; `batch.drawn` has every
    cached teacher. The oracle is `reference_objective` with q̂ for the teacher, less what q̂ and q differ in entropy.
    """
    total, terms = losses.total, dict(losses.terms)
    for i, taught in graph.lessons().items():
        hidden, weight, bias, scale, cap = projections[i]
        lesson = _Lesson(
            [batch.drawn[name] for name in taught],
            list(taught.values()),
            batch.soft_count,
            vocab_size,
            graph.tau(i, len(graph.names) - 1),  # all of them were asked at one
            (scale, cap),
        )
        added, *found = _Cached.apply(lesson, hidden[: batch.shared], weight, bias)
        total = total + added
        terms |= {f"loss/{graph.names[i]}/soft/{name}": term for name, term in zip(taught, found, strict=True)}
    return Losses(total, terms)


class _Lesson(NamedTuple):
    """What one peer learns from cached teachers, each with its weight."""

    drawn: list[Drawn]
    weights: list[float]
    soft_count: Tensor
    vocab_size: int
    temperature: float
    after: tuple[float, float | None]  # the projection's scale and cap

    def tiles(self, projection: Projection) -> list[slice]:
        sizes = projection.hidden.shape if projection.weight is not None else projection.hidden.shape[:1]
        return tiles(max(sizes), self.vocab_size, projection.hidden.device, self.keeps(projection))

    def keeps(self, projection: Projection) -> bool:
        """Whether the logits wait for the backward pass."""
        return keeps(len(projection.hidden), self.vocab_size, projection.hidden.device)

    def columns(self, tile: slice) -> int:
        """So many columns of a tile are no padding."""
        return min(tile.stop, self.vocab_size) - tile.start

    def inside(self, tile: slice, drawn: Drawn) -> tuple[Tensor, Tensor]:
        """Which drawn tokens lie in a tile, and at which of its columns: bool [P, D], int64 [P, D]."""
        at, last = drawn.tokens - tile.start, self.columns(tile) - 1
        return (at >= 0) & (at <= last), at.clamp(0, last)


class _Cached(torch.autograd.Function):
    """As `fused_objective`, of one peer and fixed targets: a pass over the logits for the losses, one for gradients."""

    @staticmethod
    def forward(
        ctx: Any, lesson: _Lesson, hidden: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> tuple[Tensor, ...]:
        projection, tau = Projection(hidden, weight, bias, *lesson.after), lesson.temperature
        largest = torch.full((len(hidden), 1), torch.finfo(torch.float32).min, device=hidden.device)
        total = torch.zeros_like(largest)  # Σ exp((z − largest) / τ)
        chosen = [torch.zeros(len(hidden), device=hidden.device) for _ in lesson.drawn]  # the drawn tokens' mean z
        kept: dict[int, Tensor] = {}
        for tile in lesson.tiles(projection):
            logits = project(projection, slice(None), tile)
            z, before = logits[:, : lesson.columns(tile)], largest
            largest = torch.maximum(before, z.amax(dim=1, keepdim=True))
            total = total * torch.exp((before - largest) / tau)
            total += torch.exp((z - largest) / tau).sum(dim=1, keepdim=True)
            for mean, drawn in zip(chosen, lesson.drawn, strict=True):
                inside, at = lesson.inside(tile, drawn)
                mean += torch.where(inside, z.gather(1, at), 0.0).mean(dim=1)
            if lesson.keeps(projection):
                kept[tile.start] = logits

        terms = []
        for mean, drawn in zip(chosen, lesson.drawn, strict=True):
            cross_entropy = total.log().squeeze(1) + (largest.squeeze(1) - mean) / tau
            terms.append(tau**2 * (cross_entropy - drawn.entropy).sum() / lesson.soft_count)
        added = torch.stack([w * term for w, term in zip(lesson.weights, terms, strict=True)]).sum()
        ctx.lesson, ctx.kept = lesson, kept
        ctx.save_for_backward(hidden, weight, bias, largest, total)
        ctx.mark_non_differentiable(*terms)
        return added, *terms

    @staticmethod
    def backward(ctx: Any, total_gradient: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, largest, total = ctx.saved_tensors
        lesson, kept = ctx.lesson, ctx.kept
        projection, tau = Projection(hidden, weight, bias, *lesson.after), lesson.temperature
        gradients = Gradients(projection, total_gradient / lesson.soft_count)  # the loss scale is in only now
        for tile in lesson.tiles(projection):
            logits = kept.pop(tile.start, None)
            logits = project(projection, slice(None), tile) if logits is None else logits
            slope, columns = slope_of(projection, logits, tile), lesson.columns(tile)
            p = torch.exp((logits[:, :columns] - largest) / tau).div_(total)
            gradient = logits.zero_()[:, :columns].add_(p, alpha=tau * sum(lesson.weights))
            for weighed, drawn in zip(lesson.weights, lesson.drawn, strict=True):
                inside, at = lesson.inside(tile, drawn)
                gradient.scatter_add_(1, at, torch.where(inside, -tau * weighed / at.shape[1], 0.0))
            gradients.add(projection, tile, logits.to(projection.dtype), slope)
        return None, *gradients.done()
