"""The objective that training uses: closed-form gradients in tiles of the vocabulary, LM-head projection included.

    ∂L/∂z_i = [ hard_i (p_i − y) + τ Σ_j soft_ij (p_i^τ − p_j^τ) ] / |P|        (docs/architecture.md)

All peers that distil go through the vocabulary together, a tile of [P, T] logits at a time. The forward pass keeps a
few numbers a position (largest logit, sums of exponentials, one cross sum an edge), from which every loss follows. The
backward pass makes each tile of p_i − y and p_i − p_j from them and multiplies it at once into the gradients: a tile's
rows of the output embedding are final after one GEMM. So nothing of vocabulary size is ever held but the gradients
themselves, and they are written once, with the loss scale in. Where a batch's logits are few, they are kept for the
backward pass; else they are computed again.

What is done to a tile is two functions of tensors, `_look` and `_gradients_by`. Compiled, each is one pass over the
tile's memory; what differs between calls (a tile's first column, weights on a course) is a tensor for them then.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from ctcd_ds.objective.batch import Batch
from ctcd_ds.objective.divergences import KL, Divergence
from ctcd_ds.objective.graph import DistillationGraph
from ctcd_ds.objective.projection import Projection, mm, project, slope_of

# fp32 numbers of one peer that are worked on at once, logits [P, T] or weight gradients [T, E]: enough columns T for a
# GEMM at full rate; on a GPU, whose kernels must be long to hide their start, more.
# A peer that does not distil has tiles of its own, so that its sums are the same in any company.
TILE_BYTES = {"cpu": 16 * 2**20, "cuda": 192 * 2**20}
# fp32 logits of one peer that are kept from forward to backward instead of being computed again (a GEMM of four).
KEPT_BYTES = {"cpu": 64 * 2**20, "cuda": 512 * 2**20}
_TILE_COLUMNS = 64  # widths that are no multiple of it run at a fraction of their rate
_MANY_COLUMNS = 2048  # where there are more than that, of it: on an H200 6,848 once took twice the time of 3,392


class Losses(NamedTuple):
    """total: 0-dim fp32, differentiable. terms: each loss by its name in metrics.jsonl, unweighted, τ² in, detached."""

    total: Tensor
    terms: dict[str, Tensor]


def fused_objective(
    projections: Sequence[Projection],
    batch: Batch,
    graph: DistillationGraph,
    vocab_size: int,
    compiled: bool = False,
) -> Losses:
    """CTCD's loss over one micro-batch, all peers at once. The oracle is `reference_objective`.

    `projections`: one a peer, over the positions of its view. Columns from `vocab_size` on are padding: they get no
    probability and no gradient. `compiled`: what is done to the logits goes through torch.compile, which takes seconds
    for each new shape and then a third of the time.
    """
    after = [(p.scale, p.cap) for p in projections]
    sizes = [max(*p.hidden.shape) if p.weight is not None else len(p.hidden) for p in projections]
    question = _Question(batch, graph, vocab_size, after, sizes, compiled)
    flat = [tensor for p in projections for tensor in (p.hidden, p.weight, p.bias)]
    total, *terms = _Fused.apply(question, *flat)
    return Losses(total, dict(zip(graph.terms(), terms, strict=True)))


def logits_bytes(positions: int, vocab_size: int, device: str) -> int:
    """What the logits of one peer take at most in a step: those that are kept, and some tiles being worked on."""
    whole = 4 * positions * vocab_size
    return (whole if whole <= KEPT_BYTES[device] else 0) + 3 * min(whole, TILE_BYTES[device])


def tiles(rows: int, vocab_size: int, device: torch.device, kept: bool) -> list[slice]:
    """Columns of so many rows to do at once. The last tile runs to the end of the padding, or of 64 columns of it.

    What is `kept` whole anyway is one tile on a GPU; a CPU works within its cache.
    """
    kind = _kind(device)
    most = max(1, (KEPT_BYTES if kept and kind == "cuda" else TILE_BYTES)[kind] // (4 * max(1, rows)))
    step = _MANY_COLUMNS if most >= _MANY_COLUMNS else _TILE_COLUMNS
    width = max(1, most // step) * step
    end = -(-vocab_size // _TILE_COLUMNS) * _TILE_COLUMNS
    return [slice(start, min(start + width, end)) for start in range(0, end, width)]


def keeps(positions: int, vocab_size: int, device: torch.device) -> bool:
    """Whether the logits of one peer wait for the backward pass."""
    return 4 * positions * vocab_size <= KEPT_BYTES[_kind(device)]


class _Question(NamedTuple):
    batch: Batch
    graph: DistillationGraph
    vocab_size: int
    caps: list[tuple[float, float | None]]  # each projection's scale and cap
    sizes: list[int]  # each one's positions or its hidden width, whichever is more: rows of its largest tile
    compiled: bool

    @property
    def device(self) -> torch.device:
        return self.batch.views[0].targets.device

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
        kept = all(self.keeps(i) for i in group)
        return tiles(max(self.sizes[i] for i in group), self.vocab_size, self.device, kept)

    def keeps(self, peer: int) -> bool:
        """Whether a peer's logits wait for the backward pass."""
        return keeps(len(self.batch.views[peer].targets), self.vocab_size, self.device)

    def way(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function` as it is, or compiled."""
        return _compiled(function) if self.compiled else function

    def number(self, value: float) -> Any:
        """A number that a compiled function shall not take for a constant of its code."""
        return torch.full((), value, device=self.device) if self.compiled else value

    def place(self, group: list[int], tile: slice) -> _Place:
        targets = {i: self.batch.views[i].targets for i in group}
        columns = min(tile.stop, self.vocab_size) - tile.start
        return _Place(self.number(tile.start), columns, targets, self.batch.shared)

    def terms(self, learners: list[int]) -> list[_Term]:
        """All losses of some peers, with the weights of their gradients by the logits."""
        tau = self.graph.tau
        hard = [_Term(i, None, None, 1.0, self.number(self.graph.hard[i])) for i in learners if self.graph.hard[i]]
        soft = [
            _Term(i, j, self.graph.divergence(i, j), tau(i, j), self.number(weight * tau(i, j)))
            for i, j, weight in self.graph.edges()
            if i in learners
        ]
        return hard + soft

    def temperatures(self, peer: int) -> list[float]:
        """Those at which a peer is looked at: its own, 1, and those of the edges it is in."""
        return sorted({1.0, *(self.graph.tau(i, j) for i, j, _ in self.graph.edges() if peer in (i, j))})

    def ratios(self, learners: list[int]) -> dict[int, Tensor]:
        return {i: self.batch.views[i].hard_count / self.batch.soft_count for i in learners}


def _kind(device: torch.device) -> str:
    return device.type if device.type in TILE_BYTES else "cpu"


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False)


class _Seen(NamedTuple):
    """What is known of one peer's logits [P, V] after some tiles; all fp32.

    largest [P, 1]; totals: τ → Σ exp((z − largest)/τ) [P, 1]; picked [P]: z of the right token.
    """

    largest: Tensor
    totals: dict[float, Tensor]
    picked: Tensor

    @classmethod
    def nothing(cls, targets: Tensor, temperatures: list[float]) -> _Seen:
        zeros = torch.zeros((len(temperatures), len(targets), 1), device=targets.device)
        # The lowest finite number, not −∞: differences of two such are numbers.
        lowest = torch.full_like(zeros[0], torch.finfo(torch.float32).min)
        return cls(lowest, dict(zip(temperatures, zeros, strict=True)), zeros[0].squeeze(1))


_Cross: TypeAlias = tuple[int, int, float]  # (a, b, τ) of Σ exp(z_a/τ) (z_a − z_b)


class _Fused(torch.autograd.Function):
    """Forward: one pass over the logits for all losses. Backward: one for all gradients."""

    @staticmethod
    def forward(ctx: Any, question: _Question, *flat: Tensor | None) -> tuple[Tensor, ...]:
        batch, graph = question.batch, question.graph
        projections = question.projections(flat)
        peers = [i for group in question.groups() for i in group]
        seen = {i: _Seen.nothing(batch.views[i].targets, question.temperatures(i)) for i in peers}
        learning = [  # who has no loss here may have one elsewhere
            trained and i in seen and any(ctx.needs_input_grad[1 + 3 * i : 4 + 3 * i])
            for i, trained in enumerate(graph.trained)
        ]
        sums = {(*pair, graph.tau(i, j)) for i, j, _ in graph.edges() if (pair := graph.divergence(i, j).pair(i, j))}
        cross = {asked: torch.zeros(batch.shared, 1, device=question.device) for asked in sorted(sums)}
        kept: dict[tuple[int, int], Tensor] = {}  # (peer, first column) → logits
        look = question.way(_look)
        for group in question.groups():
            for tile in question.tiles(group):
                logits = {i: project(projections[i], slice(None), tile) for i in group}
                place = question.place(group, tile)
                own = {asked: cross[asked] for asked in cross if asked[0] in logits}
                known, own = look(logits, place, {i: seen[i] for i in group}, own)
                seen.update(known)
                cross.update(own)
                if any(learning[i] for i in group):
                    kept.update({(i, tile.start): z for i, z in logits.items() if question.keeps(i)})

        terms = []
        for i in graph.hard_peers():
            s, known = seen[i], batch.views[i].targets >= 0
            surprise = s.totals[1.0].log().squeeze(1) - (s.picked - s.largest.squeeze(1))
            terms.append(torch.where(known, surprise, 0.0).sum() / batch.views[i].hard_count)
        apart = _apart(projections, question, seen, cross, kept)
        terms += [apart[i, j][0].sum() * graph.tau(i, j) ** 2 / batch.soft_count for i, j, _ in graph.edges()]
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
            if ctx.learning[i] and i in seen  # who learns from cached teachers only is not
        }
        gradients_by = question.way(_gradients_by)
        for group in question.groups():
            wanted = [i for i in group if i in gradients]
            terms, ratios = question.terms(wanted), question.ratios(wanted)
            dtypes = {i: projections[i].dtype for i in wanted}
            for tile in question.tiles(group) if wanted else ():
                logits = {}
                for i in group:
                    z = kept.pop((i, tile.start), None)
                    logits[i] = project(projections[i], slice(None), tile) if z is None else z
                slopes = {i: slope_of(projections[i], logits[i], tile) for i in wanted}
                place, own = question.place(group, tile), {i: seen[i] for i in group}
                by_logits = gradients_by(logits, place, own, ctx.slopes, terms, ratios, dtypes)
                for i in wanted:
                    gradients[i].add(projections[i], tile, by_logits[i], slopes[i])
        nothing = (None, None, None)
        return None, *(
            g for i in range(len(projections)) for g in (gradients.pop(i).done() if i in gradients else nothing)
        )


class _Place(NamedTuple):
    """Where a tile is: its first column, how many of its columns are words, and what is asked there."""

    start: float | Tensor
    columns: int
    targets: dict[int, Tensor]  # int64 [P] of each peer
    shared: int


def _look(
    logits: dict[int, Tensor],
    place: _Place,
    seen: dict[int, _Seen],
    cross: dict[_Cross, Tensor],
) -> tuple[dict[int, _Seen], dict[_Cross, Tensor]]:
    """`seen` and `cross` with one tile of the logits taken in. `logits`: fp32 [P, T], left as they are.

    Sums are those of exp(z − largest so far): where a tile has a larger logit, what was summed is shrunk to fit.
    """
    shifted, risen, now = {}, {}, {}
    powers: dict[tuple[int, float], Tensor] = {}
    for i, whole in logits.items():
        z, before = whole[:, : place.columns], seen[i]
        inside, at = _inside(place, i)
        picked = before.picked + torch.where(inside, z.gather(1, at).squeeze(1), 0.0)
        largest = torch.maximum(before.largest, z.amax(dim=1, keepdim=True))
        risen[i] = before.largest - largest
        shifted[i] = z - largest
        totals = {}
        for tau, total in before.totals.items():
            powers[i, tau] = torch.exp(_softened(shifted[i], tau))
            totals[tau] = total * torch.exp(_softened(risen[i], tau)) + powers[i, tau].sum(dim=1, keepdim=True)
        now[i] = _Seen(largest, totals, picked)
    first, sums = slice(0, place.shared), {}
    for a, b, tau in cross:
        both = risen[a][first] - risen[b][first]
        old = torch.exp(_softened(risen[a][first], tau)) * (cross[a, b, tau] + seen[a].totals[tau][first] * both)
        new = (shifted[a][first] - shifted[b][first]).mul_(powers[a, tau][first])
        sums[a, b, tau] = old + new.sum(dim=1, keepdim=True)
    return now, sums


def _apart(
    projections: list[Projection],
    question: _Question,
    seen: dict[int, _Seen],
    cross: dict[_Cross, Tensor],
    kept: dict[tuple[int, int], Tensor],
) -> dict[tuple[int, int], tuple[Tensor, Tensor]]:
    """Of every edge, at each shared position: how far the peers are apart, and Σ u; both fp32 [shared, 1].

    Where a divergence is no KL of the two, its sums need the normalisers: the logits are gone through once more.
    """
    graph, first = question.graph, slice(0, question.batch.shared)
    found, late = {}, {}
    for i, j, _ in graph.edges():
        if (pair := graph.divergence(i, j).pair(i, j)) is None:
            late[i, j] = [torch.zeros(question.batch.shared, 1, device=question.device) for _ in range(2)]
            continue
        (a, b), tau = pair, graph.tau(i, j)
        own, other = (seen[k].totals[tau][first] for k in pair)
        divergence = cross[a, b, tau] / own / tau - own.log() + other.log()
        found[i, j] = (divergence, divergence)
    for tile in question.tiles(question.groups()[0]) if late else ():
        columns = slice(0, min(tile.stop, question.vocab_size) - tile.start)
        shifted = {}
        for k in {k for edge in late for k in edge}:
            z = kept.get((k, tile.start))
            z = project(projections[k], first, tile) if z is None else z[first]
            shifted[k] = z[:, columns] - seen[k].largest[first]
        for (i, j), sums in late.items():
            logs = (_log_softened(shifted[k], seen[k], graph.tau(i, j), first) for k in (i, j))
            for total, part in zip(sums, graph.divergence(i, j).summands(*logs), strict=True):
                total.add_(part.sum(dim=1, keepdim=True))
    return found | {edge: (sums[0], sums[1]) for edge, sums in late.items()}


class _Term(NamedTuple):
    """One loss of `learner` and its weight; `teacher` None: the hard one."""

    learner: int
    teacher: int | None
    divergence: Divergence | None
    tau: float
    weight: float | Tensor


def _gradients_by(
    logits: dict[int, Tensor],
    place: _Place,
    seen: dict[int, _Seen],
    slopes: dict[tuple[int, int], Tensor],
    terms: Sequence[_Term],
    ratios: dict[int, Tensor],
    dtypes: dict[int, torch.dtype],
) -> dict[int, Tensor]:
    """The gradients by one tile of the logits (fp32 [P, T], overwritten) of the peers in `dtypes`, in these dtypes.

    They are those of the sum over positions, times hard_count/|P| of each loss (so that one division by the peer's
    hard_count remains), and 0 in the padding columns.
    """
    columns, first = place.columns, slice(0, place.shared)
    z = {i: whole[:, :columns].sub_(seen[i].largest) for i, whole in logits.items()}
    p = {(i, tau): torch.exp(_softened(z[i], tau)).div_(total) for i in logits for tau, total in seen[i].totals.items()}
    others = {}  # what is no KL needs logarithms, which the gradients overwrite
    for i, j, divergence, tau, _ in terms:
        if divergence is not None and divergence != KL and j is not None:
            _, u = divergence.summands(*(_log_softened(z[k][first], seen[k], tau, first) for k in (i, j)))
            others[i, j] = u - p[i, tau][first] * slopes[i, j]
    found = {}
    for i in dtypes:
        gradient = logits[i].zero_()[:, :columns]
        for learner, j, _, tau, weight in terms:
            if learner != i:
                continue
            if j is None:
                _add(gradient, p[i, tau], weight)
                _subtract_at(gradient, *_inside(place, i), weight)
                gradient.mul_((place.targets[i] >= 0).unsqueeze(1))
            else:
                by_logits = others[i, j] if (i, j) in others else p[i, tau][first] - p[j, tau][first]
                _add(gradient[first], by_logits.mul_(ratios[i]), weight)
        found[i] = logits[i].to(dtypes[i])
    return found


def _softened(shifted: Tensor, tau: float) -> Tensor:
    """Differences of logits divided by τ."""
    return shifted if tau == 1.0 else shifted / tau


def _log_softened(shifted: Tensor, seen: _Seen, tau: float, rows: slice) -> Tensor:
    """The logarithms of softmax(z/τ), of some rows of a peer."""
    return _softened(shifted, tau) - seen.totals[tau][rows].log()


def _add(total: Tensor, other: Tensor, weight: float | Tensor) -> None:
    if isinstance(weight, Tensor):
        total.add_(other * weight)
    else:
        total.add_(other, alpha=weight)


def _subtract_at(gradient: Tensor, inside: Tensor, at: Tensor, weight: float | Tensor) -> None:
    """Subtracts `weight` at one column of each row [P, T] that is `inside`."""
    if torch.compiler.is_compiling():  # a scatter would be a pass of its own
        here = inside.unsqueeze(1) & (torch.arange(gradient.shape[1], device=gradient.device) == at)
        gradient.sub_(torch.where(here, weight, 0.0))
    else:
        gradient.scatter_add_(1, at, torch.where(inside, -weight, 0.0).unsqueeze(1))


def _inside(place: _Place, peer: int) -> tuple[Tensor, Tensor]:
    """Which targets [P] lie in the tile, and at which of its columns: bool [P], int64 [P, 1]."""
    at = place.targets[peer] - place.start
    return (at >= 0) & (at < place.columns), at.clamp(0, place.columns - 1).unsqueeze(1)


class Gradients:
    """The gradients of one projection, tile by tile: hidden's in fp32, the others in their own dtype, final at once."""

    def __init__(self, projection: Projection, scale: Tensor) -> None:
        hidden, weight, bias, *_ = projection
        self._scale, self._dtype = scale, hidden.dtype
        self._hidden: Tensor | None = None
        self._weight = None if weight is None else torch.zeros_like(weight)
        self._bias = None if bias is None else torch.zeros_like(bias)

    def add(self, projection: Projection, tile: slice, gradient: Tensor, slope: float | Tensor) -> None:
        """`gradient`: by the logits [P, T] of this tile; `slope`: of the logits by hidden · weightᵀ."""
        if projection.weight is None or self._weight is None:
            if self._hidden is None:
                self._hidden = torch.zeros_like(projection.hidden, dtype=torch.float32)
            self._hidden[:, tile] = gradient
            return
        if self._bias is not None:
            self._bias[tile] = gradient.sum(dim=0, dtype=torch.float32).mul_(self._scale)
        if isinstance(slope, Tensor) or slope != 1.0:
            gradient.mul_(slope)
        by_hidden = mm(gradient, projection.weight[tile])
        self._hidden = by_hidden if self._hidden is None else self._hidden.add_(by_hidden)
        torch.mul(mm(gradient.t(), projection.hidden), self._scale, out=self._weight[tile])

    def done(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Gradients of hidden, weight and bias, in their dtypes."""
        assert self._hidden is not None
        return self._hidden.mul_(self._scale).to(self._dtype), self._weight, self._bias
