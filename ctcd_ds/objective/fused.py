"""The objective that training uses: closed-form gradients in tiles of the vocabulary, LM-head projection included.

    ∂L/∂z_i = [ hard_i (p_i − y) + τ Σ_j soft_ij (p_i^τ − p_j^τ) ] / |P|        (docs/architecture.md)

All peers that distil go through the vocabulary together, a tile of [P, T] logits at a time. The forward pass keeps a
few numbers a position (largest logit, sums of exponentials, one cross sum an edge), from which every loss follows. The
backward pass makes each tile of p_i − y and p_i − p_j from them and multiplies it at once into the gradients: a tile's
rows of the output embedding are final after one GEMM. So nothing of vocabulary size is ever held but the gradients
themselves, and they are written once, with the loss scale in. Where a batch's logits are few, they are kept for the
backward pass; else they are computed again.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ctcd_ds.objective.batch import Batch
from ctcd_ds.objective.divergences import KL
from ctcd_ds.objective.graph import DistillationGraph
from ctcd_ds.objective.projection import Projection, mm, project, slope_of

# fp32 numbers of one peer that are worked on at once, logits [P, T] or weight gradients [T, E]: enough columns T for a
# GEMM at full rate. A peer that does not distil has tiles of its own, so that its sums are the same in any company.
TILE_BYTES = 16 * 2**20
# fp32 logits of one peer that are kept from forward to backward instead of being computed again (a GEMM of four).
KEPT_BYTES = 64 * 2**20
_TILE_COLUMNS = 64  # widths that are no multiple of it run at a fraction of their rate


class Losses(NamedTuple):
    """total: 0-dim fp32, differentiable. terms: each loss by its name in metrics.jsonl, unweighted, τ² in, detached."""

    total: Tensor
    terms: dict[str, Tensor]


def fused_objective(
    projections: Sequence[Projection],
    batch: Batch,
    graph: DistillationGraph,
    vocab_size: int,
    temperature: float = 1.0,
) -> Losses:
    """CTCD's loss over one micro-batch, all peers at once. The oracle is `reference_objective`.

    `projections`: one a peer, over the positions of its view. Columns from `vocab_size` on are padding: they get no
    probability and no gradient.
    """
    after = [(p.scale, p.cap) for p in projections]
    sizes = [max(*p.hidden.shape) if p.weight is not None else len(p.hidden) for p in projections]
    question = _Question(batch, graph, vocab_size, float(temperature), after, sizes)
    flat = [tensor for p in projections for tensor in (p.hidden, p.weight, p.bias)]
    total, *terms = _Fused.apply(question, *flat)
    return Losses(total, dict(zip(graph.terms(), terms, strict=True)))


def logits_bytes(positions: int, vocab_size: int) -> int:
    """What the logits of one peer take at most in a step: those that are kept, and some tiles being worked on."""
    whole = 4 * positions * vocab_size
    return (whole if whole <= KEPT_BYTES else 0) + 3 * min(whole, TILE_BYTES)


def tiles(rows: int, vocab_size: int) -> list[slice]:
    """Columns of so many rows to do at once. The last tile runs to the end of the padding, or of 64 columns of it."""
    width = max(1, TILE_BYTES // (4 * max(1, rows)) // _TILE_COLUMNS) * _TILE_COLUMNS
    end = -(-vocab_size // _TILE_COLUMNS) * _TILE_COLUMNS
    return [slice(start, min(start + width, end)) for start in range(0, end, width)]


class _Question(NamedTuple):
    batch: Batch
    graph: DistillationGraph
    vocab_size: int
    temperature: float
    caps: list[tuple[float, float | None]]  # each projection's scale and cap
    sizes: list[int]  # each one's positions or its hidden width, whichever is more: rows of its largest tile

    def projections(self, flat: Sequence[Tensor | None]) -> list[Projection]:
        own = [flat[k : k + 3] for k in range(0, len(flat), 3)]
        return [Projection(h, w, b, *caps) for (h, w, b), caps in zip(own, self.caps, strict=True)]  # type: ignore[arg-type]

    def groups(self) -> list[list[int]]:
        """Peers that go through the vocabulary together: those that distil; every other that learns, by itself."""
        distilling = sorted({k for i, j, _ in self.graph.edges() for k in (i, j)})
        alone = [[i] for i in self.graph.hard_peers() if i not in distilling]
        return [distilling, *alone] if distilling else alone

    def tiles(self, group: list[int]) -> list[slice]:
        """Columns to do at once."""
        return tiles(max(self.sizes[i] for i in group), self.vocab_size)

    def keeps(self, peer: int) -> bool:
        """Whether a peer's logits wait for the backward pass."""
        return 4 * len(self.batch.views[peer].targets) * self.vocab_size <= KEPT_BYTES


class _Seen:
    """What is known of one peer's logits [P, V] after some tiles; all fp32.

    largest [P, 1]; total [P, 1]: Σ exp(z − largest), and total_tau that of z/τ; picked [P]: z of the right token.
    """

    def __init__(self, targets: Tensor, tau: float) -> None:
        # The lowest finite number, not −∞: differences of two such are numbers.
        self.largest = torch.full((len(targets), 1), torch.finfo(torch.float32).min, device=targets.device)
        self.total = torch.zeros_like(self.largest)
        self.total_tau = self.total if tau == 1.0 else torch.zeros_like(self.largest)
        self.picked = torch.zeros(len(targets), device=targets.device)


class _Fused(torch.autograd.Function):
    """Forward: one pass over the logits for all losses. Backward: one for all gradients."""

    @staticmethod
    def forward(ctx: Any, question: _Question, *flat: Tensor | None) -> tuple[Tensor, ...]:
        batch, graph, tau = question.batch, question.graph, question.temperature
        projections = question.projections(flat)
        learning = [t and any(ctx.needs_input_grad[1 + 3 * i : 4 + 3 * i]) for i, t in enumerate(graph.trained)]
        seen = {i: _Seen(batch.views[i].targets, tau) for group in question.groups() for i in group}
        divergent = {(i, j): graph.divergence(i, j) for i, j, _ in graph.edges()}
        pairs = {pair for edge, kind in divergent.items() if (pair := kind.pair(*edge)) is not None}
        cross = {pair: torch.zeros(batch.shared, 1, device=seen[pair[0]].largest.device) for pair in sorted(pairs)}
        kept: dict[tuple[int, int], Tensor] = {}  # (peer, first column) → logits
        for group in question.groups():
            for tile in question.tiles(group):
                logits = {i: project(projections[i], slice(None), tile) for i in group}
                _look(logits, tile, question, seen, cross)
                if any(learning[i] for i in group):
                    kept.update({(i, tile.start): z for i, z in logits.items() if question.keeps(i)})

        terms = []
        for i in graph.hard_peers():
            s, known = seen[i], batch.views[i].targets >= 0
            surprise = s.total.log().squeeze(1) - (s.picked - s.largest.squeeze(1))
            terms.append(torch.where(known, surprise, 0.0).sum() / batch.views[i].hard_count)
        apart = _apart(projections, question, seen, cross, kept)
        terms += [apart[i, j][0].sum() * tau**2 / batch.soft_count for i, j, _ in graph.edges()]
        total = torch.zeros((), device=batch.soft_count.device)
        for weight, term in zip(graph.weights(), terms, strict=True):
            total = total + weight * term

        ctx.question, ctx.seen, ctx.kept, ctx.learning = question, seen, kept, learning
        ctx.slopes = {edge: slope for edge, (_, slope) in apart.items()}
        ctx.save_for_backward(*flat)
        ctx.mark_non_differentiable(*terms)
        return total, *terms

    @staticmethod
    def backward(ctx: Any, total_gradient: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        question, seen, kept = ctx.question, ctx.seen, ctx.kept
        projections = question.projections(ctx.saved_tensors)
        # Only now the loss scale is in: unnormalised until it is multiplied in, p/|P| survives the cast to fp16.
        gradients = {
            i: Gradients(projections[i], total_gradient / view.hard_count)
            for i, view in enumerate(question.batch.views)
            if ctx.learning[i]
        }
        for group in question.groups():
            for tile in question.tiles(group) if any(ctx.learning[i] for i in group) else ():
                logits = {}
                for i in group:
                    z = kept.pop((i, tile.start), None)
                    logits[i] = project(projections[i], slice(None), tile) if z is None else z
                slopes = {i: slope_of(projections[i], logits[i], tile) for i in group if i in gradients}
                _overwrite_with_gradients(logits, tile, question, seen, ctx.slopes, gradients)
                for i, slope in slopes.items():
                    gradients[i].add(projections[i], tile, logits[i], slope)
        nothing = (None, None, None)
        return None, *(
            g for i in range(len(projections)) for g in (gradients.pop(i).done() if i in gradients else nothing)
        )


def _look(
    logits: dict[int, Tensor],
    tile: slice,
    question: _Question,
    seen: dict[int, _Seen],
    cross: dict[tuple[int, int], Tensor],
) -> None:
    """Takes one tile of the logits into what is known of them. `logits`: fp32 [P, T], left as they are.

    Sums are those of exp(z − largest so far): where a tile has a larger logit, what was summed is shrunk to fit.
    """
    tau, shared = question.temperature, question.batch.shared
    columns = min(tile.stop, question.vocab_size) - tile.start
    shifted, powers, risen = {}, {}, {}
    before = {i: (seen[i].largest, seen[i].total_tau) for i in logits}
    for i, whole in logits.items():
        z, s = whole[:, :columns], seen[i]
        inside, at = _inside(question.batch.views[i].targets, tile.start, columns)
        s.picked += torch.where(inside, z.gather(1, at).squeeze(1), 0.0)
        s.largest = torch.maximum(s.largest, z.amax(dim=1, keepdim=True))
        risen[i] = before[i][0] - s.largest
        shifted[i] = z - s.largest
        powers[i] = torch.exp(shifted[i])
        s.total = s.total * torch.exp(risen[i]) + powers[i].sum(dim=1, keepdim=True)
        if tau == 1.0:
            s.total_tau = s.total
        else:
            powers[i] = torch.exp(shifted[i] / tau)
            s.total_tau = s.total_tau * torch.exp(risen[i] / tau) + powers[i].sum(dim=1, keepdim=True)
    first = slice(0, shared)
    for a, b in cross:  # Σ exp(z_a) (z_a − z_b)
        if a in logits:
            both = risen[a][first] - risen[b][first]
            old = torch.exp(risen[a][first] / tau) * (cross[a, b] + before[a][1][first] * both)
            new = (shifted[a][first] - shifted[b][first]).mul_(powers[a][first])
            cross[a, b] = old + new.sum(dim=1, keepdim=True)


def _apart(
    projections: list[Projection],
    question: _Question,
    seen: dict[int, _Seen],
    cross: dict[tuple[int, int], Tensor],
    kept: dict[tuple[int, int], Tensor],
) -> dict[tuple[int, int], tuple[Tensor, Tensor]]:
    """Of every edge, at each shared position: how far the peers are apart, and Σ u; both fp32 [shared, 1].

    Where a divergence is no KL of the two, its sums need the normalisers: the logits are gone through once more.
    """
    graph, tau, first = question.graph, question.temperature, slice(0, question.batch.shared)
    found, late = {}, {}
    for i, j, _ in graph.edges():
        if (pair := graph.divergence(i, j).pair(i, j)) is None:
            late[i, j] = [torch.zeros(question.batch.shared, 1, device=seen[i].largest.device) for _ in range(2)]
            continue
        a, b = (seen[k].total_tau[first] for k in pair)
        divergence = cross[pair] / a / tau - a.log() + b.log()
        found[i, j] = (divergence, divergence)
    for tile in question.tiles(question.groups()[0]) if late else ():
        columns = slice(0, min(tile.stop, question.vocab_size) - tile.start)
        logs = {}
        for k in {k for edge in late for k in edge}:
            z = kept.get((k, tile.start))
            z = project(projections[k], first, tile) if z is None else z[first]
            logs[k] = (z[:, columns] - seen[k].largest[first]).div_(tau).sub_(seen[k].total_tau[first].log())
        for (i, j), sums in late.items():
            for total, part in zip(sums, graph.divergence(i, j).summands(logs[i], logs[j]), strict=True):
                total.add_(part.sum(dim=1, keepdim=True))
    return found | {edge: (sums[0], sums[1]) for edge, sums in late.items()}


def _overwrite_with_gradients(
    logits: dict[int, Tensor],
    tile: slice,
    question: _Question,
    seen: dict[int, _Seen],
    slopes: dict[tuple[int, int], Tensor],
    learning: Collection[int],
) -> None:
    """One tile of the logits of learning peers (fp32 [P, T]) becomes the gradient by these logits.

    It is that of the sum over positions, times hard_count/|P| of each loss (so that one division by the peer's
    hard_count remains), and 0 in the padding columns.
    """
    graph, batch, tau = question.graph, question.batch, question.temperature
    columns = min(tile.stop, question.vocab_size) - tile.start
    first = slice(0, batch.shared)
    p, p_tau = {}, {}
    for i, whole in logits.items():
        z = whole[:, :columns].sub_(seen[i].largest)
        p[i] = torch.exp(z).div_(seen[i].total)
        p_tau[i] = p[i] if tau == 1.0 else torch.exp(z.div_(tau)).div_(seen[i].total_tau)
    others = {}  # what is no KL needs logarithms, which the gradients overwrite
    for i, j, _ in graph.edges():
        if i in logits and i in learning and graph.divergence(i, j) != KL:
            log_p, log_q = (logits[k][first, :columns] - seen[k].total_tau[first].log() for k in (i, j))
            _, u = graph.divergence(i, j).summands(log_p, log_q)
            others[i, j] = u - p_tau[i][first] * slopes[i, j]
    for i, whole in logits.items():
        if i not in learning:
            continue
        gradient = whole.zero_()[:, :columns]
        if graph.hard[i]:
            gradient.add_(p[i], alpha=graph.hard[i])
            targets = batch.views[i].targets
            inside, at = _inside(targets, tile.start, columns)
            gradient.scatter_add_(1, at, torch.where(inside, -graph.hard[i], 0.0).unsqueeze(1))
            gradient.mul_((targets >= 0).unsqueeze(1))
        ratio = batch.views[i].hard_count / batch.soft_count
        for learner, j, weight in graph.edges():
            if learner == i:
                by_logits = others[i, j] if (i, j) in others else p_tau[i][first] - p_tau[j][first]
                gradient[first].add_(by_logits.mul_(ratio), alpha=weight * tau)


def _inside(targets: Tensor, start: int, columns: int) -> tuple[Tensor, Tensor]:
    """Which targets [P] lie in these columns of the vocabulary, and at which of them: bool [P], int64 [P, 1]."""
    at = targets - start
    return (at >= 0) & (at < columns), at.clamp(0, columns - 1).unsqueeze(1)


class Gradients:
    """The gradients of one projection, tile by tile: hidden's in fp32, the others in their own dtype, final at once."""

    def __init__(self, projection: Projection, scale: Tensor) -> None:
        hidden, weight, bias, *_ = projection
        self._scale, self._dtype = scale, hidden.dtype
        self._hidden = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
        self._weight = None if weight is None else torch.zeros_like(weight)
        self._bias = None if bias is None else torch.zeros_like(bias)

    def add(self, projection: Projection, tile: slice, gradient: Tensor, slope: float | Tensor) -> None:
        """`gradient`: by the logits [P, T] of this tile; `slope`: of the logits by hidden · weightᵀ."""
        if projection.weight is None or self._weight is None:
            self._hidden[:, tile] = gradient
            return
        if self._bias is not None:
            self._bias[tile] = gradient.sum(dim=0).mul_(self._scale)
        if isinstance(slope, Tensor) or slope != 1.0:
            gradient.mul_(slope)
        low = gradient.to(projection.weight.dtype)
        self._hidden.add_(mm(low, projection.weight[tile]))
        self._weight[tile] = mm(low.t(), projection.hidden).mul_(self._scale)

    def done(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Gradients of hidden, weight and bias, in their dtypes."""
        return self._hidden.mul_(self._scale).to(self._dtype), self._weight, self._bias
