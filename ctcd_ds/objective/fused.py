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
from typing import Any, NamedTuple

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
    temperature: float = 1.0,
    compiled: bool = False,
) -> Losses:
    """CTCD's loss over one micro-batch, all peers at once. The oracle is `reference_objective`.

    `projections`: one a peer, over the positions of its view. Columns from `vocab_size` on are padding: they get no
    probability and no gradient. `compiled`: what is done to the logits goes through torch.compile, which takes seconds
    for each new shape and then a third of the time.
    """
    after = [(p.scale, p.cap) for p in projections]
    sizes = [max(*p.hidden.shape) if p.weight is not None else len(p.hidden) for p in projections]
    question = _Question(batch, graph, vocab_size, float(temperature), after, sizes, compiled)
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
    temperature: float
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
        hard = [_Term(i, None, None, self.number(self.graph.hard[i])) for i in learners if self.graph.hard[i]]
        soft = [
            _Term(i, j, self.graph.divergence(i, j), self.number(weight * self.temperature))
            for i, j, weight in self.graph.edges()
            if i in learners
        ]
        return hard + soft

    def ratios(self, learners: list[int]) -> dict[int, Tensor]:
        return {i: self.batch.views[i].hard_count / self.batch.soft_count for i in learners}


def _kind(device: torch.device) -> str:
    return device.type if device.type in TILE_BYTES else "cpu"


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False)


class _Seen(NamedTuple):
    """What is known of one peer's logits [P, V] after some tiles; all fp32.

    largest [P, 1]; total [P, 1]: Σ exp(z − largest), and total_tau that of z/τ; picked [P]: z of the right token.
    """

    largest: Tensor
    total: Tensor
    total_tau: Tensor
    picked: Tensor

    @classmethod
    def nothing(cls, targets: Tensor, tau: float) -> _Seen:
        zeros = torch.zeros((len(targets), 1), device=targets.device)
        # One tensor twice where it stays so: a compiled function is compiled anew where that changes.
        softened = zeros if tau == 1.0 else zeros.clone()
        # The lowest finite number, not −∞: differences of two such are numbers.
        return cls(torch.full_like(zeros, torch.finfo(torch.float32).min), zeros, softened, zeros.squeeze(1))


class _Fused(torch.autograd.Function):
    """Forward: one pass over the logits for all losses. Backward: one for all gradients."""

    @staticmethod
    def forward(ctx: Any, question: _Question, *flat: Tensor | None) -> tuple[Tensor, ...]:
        batch, graph, tau = question.batch, question.graph, question.temperature
        projections = question.projections(flat)
        seen = {i: _Seen.nothing(batch.views[i].targets, tau) for group in question.groups() for i in group}
        learning = [  # who has no loss here may have one elsewhere
            trained and i in seen and any(ctx.needs_input_grad[1 + 3 * i : 4 + 3 * i])
            for i, trained in enumerate(graph.trained)
        ]
        divergent = {(i, j): graph.divergence(i, j) for i, j, _ in graph.edges()}
        pairs = {pair for edge, kind in divergent.items() if (pair := kind.pair(*edge)) is not None}
        cross = {pair: torch.zeros(batch.shared, 1, device=question.device) for pair in sorted(pairs)}
        kept: dict[tuple[int, int], Tensor] = {}  # (peer, first column) → logits
        look = question.way(_look)
        for group in question.groups():
            for tile in question.tiles(group):
                logits = {i: project(projections[i], slice(None), tile) for i in group}
                place = question.place(group, tile)
                own = {pair: cross[pair] for pair in cross if pair[0] in logits}
                known, own = look(logits, place, {i: seen[i] for i in group}, own, tau)
                seen.update(known)
                cross.update(own)
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
                by_logits = gradients_by(logits, place, own, ctx.slopes, terms, ratios, dtypes, question.temperature)
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
    cross: dict[tuple[int, int], Tensor],
    tau: float,
) -> tuple[dict[int, _Seen], dict[tuple[int, int], Tensor]]:
    """`seen` and `cross` with one tile of the logits taken in. `logits`: fp32 [P, T], left as they are.

    Sums are those of exp(z − largest so far): where a tile has a larger logit, what was summed is shrunk to fit.
    """
    shifted, powers, risen, now = {}, {}, {}, {}
    for i, whole in logits.items():
        z, before = whole[:, : place.columns], seen[i]
        inside, at = _inside(place, i)
        picked = before.picked + torch.where(inside, z.gather(1, at).squeeze(1), 0.0)
        largest = torch.maximum(before.largest, z.amax(dim=1, keepdim=True))
        risen[i] = before.largest - largest
        shifted[i] = z - largest
        powers[i] = torch.exp(shifted[i])
        total = total_tau = before.total * torch.exp(risen[i]) + powers[i].sum(dim=1, keepdim=True)
        if tau != 1.0:
            powers[i] = torch.exp(shifted[i] / tau)
            total_tau = before.total_tau * torch.exp(risen[i] / tau) + powers[i].sum(dim=1, keepdim=True)
        now[i] = _Seen(largest, total, total_tau, picked)
    first, sums = slice(0, place.shared), {}
    for a, b in cross:  # Σ exp(z_a) (z_a − z_b)
        both = risen[a][first] - risen[b][first]
        old = torch.exp(risen[a][first] / tau) * (cross[a, b] + seen[a].total_tau[first] * both)
        new = (shifted[a][first] - shifted[b][first]).mul_(powers[a][first])
        sums[a, b] = old + new.sum(dim=1, keepdim=True)
    return now, sums


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
            late[i, j] = [torch.zeros(question.batch.shared, 1, device=question.device) for _ in range(2)]
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


class _Term(NamedTuple):
    """One loss of `learner` and its weight; `teacher` None: the hard one."""

    learner: int
    teacher: int | None
    divergence: Divergence | None
    weight: float | Tensor


def _gradients_by(
    logits: dict[int, Tensor],
    place: _Place,
    seen: dict[int, _Seen],
    slopes: dict[tuple[int, int], Tensor],
    terms: Sequence[_Term],
    ratios: dict[int, Tensor],
    dtypes: dict[int, torch.dtype],
    tau: float,
) -> dict[int, Tensor]:
    """The gradients by one tile of the logits (fp32 [P, T], overwritten) of the peers in `dtypes`, in these dtypes.

    They are those of the sum over positions, times hard_count/|P| of each loss (so that one division by the peer's
    hard_count remains), and 0 in the padding columns.
    """
    columns, first = place.columns, slice(0, place.shared)
    p, p_tau = {}, {}
    for i, whole in logits.items():
        z = whole[:, :columns].sub_(seen[i].largest)
        p[i] = torch.exp(z).div_(seen[i].total)
        p_tau[i] = p[i] if tau == 1.0 else torch.exp(z.div_(tau)).div_(seen[i].total_tau)
    others = {}  # what is no KL needs logarithms, which the gradients overwrite
    for i, j, divergence, _ in terms:
        if divergence is not None and divergence != KL and j is not None:
            log_p, log_q = (logits[k][first, :columns] - seen[k].total_tau[first].log() for k in (i, j))
            _, u = divergence.summands(log_p, log_q)
            others[i, j] = u - p_tau[i][first] * slopes[i, j]
    found = {}
    for i in dtypes:
        gradient = logits[i].zero_()[:, :columns]
        for learner, j, _, weight in terms:
            if learner != i:
                continue
            if j is None:
                _add(gradient, p[i], weight)
                _subtract_at(gradient, *_inside(place, i), weight)
                gradient.mul_((place.targets[i] >= 0).unsqueeze(1))
            else:
                by_logits = others[i, j] if (i, j) in others else p_tau[i][first] - p_tau[j][first]
                _add(gradient[first], by_logits.mul_(ratios[i]), weight)
        found[i] = logits[i].to(dtypes[i])
    return found


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
