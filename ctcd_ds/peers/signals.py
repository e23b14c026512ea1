"""The losses between the insides of peers, and the maps that hidden states of other widths need.

A map belongs to the learner: it is in its optimizer groups, clipped with it, in checkpoints, and in no export.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from ctcd_ds.cli import UserError, count
from ctcd_ds.objective.fused import Losses
from ctcd_ds.objective.graph import DistillationGraph
from ctcd_ds.objective.hidden import hidden_loss
from ctcd_ds.objective.relations import OPERANDS, relations_loss
from ctcd_ds.objective.signals import Hidden, Relations, Signal
from ctcd_ds.peers.build import seed_of
from ctcd_ds.peers.states import Shapes, States, shapes_of, watching

Compared: TypeAlias = list[tuple[int, int, int]]  # (stack, a layer of the learner, one of the teacher)


class Signals(nn.Module):
    """All signals of a graph between these peers.

    maps[s][k]: from the learner's to the teacher's width, of the k-th comparison of signal s; the identity where the
    widths are one. Raises UserError where a model does not give what is to be learned from it.
    """

    def __init__(self, peers: Mapping[str, Any], graph: DistillationGraph, seed: int) -> None:
        super().__init__()
        self._graph = graph
        shapes = {name: shapes_of(peers[name]) for name in watched(graph)}
        if mistakes := list(signal_mistakes(graph, shapes)):
            raise UserError(mistakes[0])
        self._compared: list[Compared] = []
        self.maps = nn.ModuleList()
        with torch.random.fork_rng([]):
            for signal in graph.signals:
                torch.manual_seed(seed_of(seed, "maps", graph.name_of(signal)))
                own, other = (shapes[graph.names[n]] for n in (signal.learner, signal.teacher))
                self._compared.append(_compared(signal, own, other))
                self.maps.append(nn.ModuleList(_map(*widths) for widths in _widths(signal, own, other)))

    def learned_by(self, learner: str) -> Iterator[nn.Parameter]:
        """The parameters of a learner's maps."""
        for signal, maps in zip(self._graph.signals, self.maps, strict=True):
            if self._graph.names[signal.learner] == learner:
                yield from maps.parameters()

    def watch(self, model: Any, peer: int, graph: DistillationGraph) -> AbstractContextManager[States]:
        """Notes what the signals of `graph`, this one at some step, need of a peer as it runs."""
        layers: dict[type[Signal], set[int]] = {Hidden: set(), Relations: set()}
        for signal, compared in zip(graph.signals, self._compared, strict=True):
            if signal.weight and signal.learner == peer:
                layers[type(signal)] |= {own for _, own, _ in compared}
            if signal.weight and signal.teacher == peer:
                layers[type(signal)] |= {other for *_, other in compared}
        return watching(model, layers[Hidden], layers[Relations])

    def added(self, losses: Losses, seen: Sequence[States], graph: DistillationGraph) -> Losses:
        """The losses with those of the signals of `graph`. `seen`: of each peer, by `watch`."""
        total, terms = losses.total, dict(losses.terms)
        for signal, compared, maps in zip(graph.signals, self._compared, self.maps, strict=True):
            if signal.weight:
                loss = _loss(signal, compared, maps, seen[signal.learner], seen[signal.teacher])
                total = total + signal.weight * loss
                terms[graph.name_of(signal)] = loss.detach()
        return Losses(total, terms)


def watched(graph: DistillationGraph) -> list[str]:
    """The peers whose insides are looked at."""
    numbers = {n for signal in graph.signals for n in (signal.learner, signal.teacher)}
    return [name for n, name in enumerate(graph.names) if n in numbers]


def signal_mistakes(graph: DistillationGraph, shapes: Mapping[str, Shapes]) -> Iterator[str]:
    """What is asked of insides that are not so, one line each. `shapes`: of every peer that is `watched`."""
    for signal in graph.signals:
        learner, teacher = (graph.names[n] for n in (signal.learner, signal.teacher))
        for said in _mistakes(signal, {learner: shapes[learner], teacher: shapes[teacher]}):
            yield f"peers.{learner}.{signal.kind}.{teacher}{said}"


class SignalCost(NamedTuple):
    """Values of all maps, and training FLOPs of one row. A signal counts as if its weight were never 0."""

    parameters: int = 0
    flops: int = 0


def signal_cost(graph: DistillationGraph, shapes: Mapping[str, Shapes], lengths: Sequence[int]) -> SignalCost:
    """What signals cost, where nothing is wrong with them. `lengths`: tokens of a row in each stack.

    Matrix products only, as in `accounting.cost`. A map from a to b values is one of 2·a·b FLOPs a token forward, and
    two backward. A relation of two operands W wide (all heads together) is 2·L²·W for the scores of each of the two
    peers, and as much for the gradient by each of the learner's operands; the backward pass only scales those.
    """
    parameters = flops = 0
    for signal in graph.signals:
        own, other = (shapes[graph.names[n]] for n in (signal.learner, signal.teacher))
        compared = _compared(signal, own, other)
        if isinstance(signal, Hidden):
            for (stack, *_), (mine, theirs) in zip(compared, _widths(signal, own, other), strict=True):
                if mine != theirs:
                    parameters += mine * theirs
                    flops += 3 * 2 * lengths[stack] * mine * theirs
        elif isinstance(signal, Relations):
            [(_, a, b)] = compared
            for n, _ in (OPERANDS[kind] for kind in signal.of):
                flops += 2 * lengths[0] ** 2 * (3 * own.attention[a - 1][n] + other.attention[b - 1][n])
    return SignalCost(parameters, flops)


def _mistakes(signal: Signal, shapes: Mapping[str, Shapes]) -> Iterator[str]:
    own, other = shapes.values()
    if isinstance(signal, Hidden):
        if len(own.hidden) != len(other.hidden):
            yield ": one of the two has an encoder and a decoder, the other has not: their layers are no pairs"
        depths = {name: min(len(stack) for stack in s.hidden) - 1 for name, s in shapes.items()}
        yield from _beyond("layers", signal.layers, depths, 0)
        return
    assert isinstance(signal, Relations)
    for name, s in shapes.items():
        if len(s.hidden) > 1:
            yield (
                f": {name} has an encoder and a decoder, whose attention is not told apart; learn from its hidden "
                "states instead"
            )
            return
        if len(s.attention) != len(s.hidden[0]) - 1:
            shown = f"{len(s.attention)} of {count(len(s.hidden[0]) - 1, 'layer')}" if s.attention else "no layer"
            yield (
                f": {name} shows queries, keys and values of {shown} at transformers' attention interface; relations "
                "need all; learn from its hidden states instead"
            )
            return
    yield from _beyond("layer", signal.layer, {name: len(s.attention) for name, s in shapes.items()}, 1)
    common = math.gcd(*(width for s in shapes.values() for widths in s.attention for width in widths))
    for name, s in shapes.items():
        query, key, _ = s.attention[-1]
        if "query-key" in signal.of and query != key:
            yield f".of: query-key: {name} has queries of {query} values and keys of {key}; leave it out"
        asked = {widths[n] for widths in s.attention for kind in signal.of for n in OPERANDS[kind]}
        if odd := sorted(width for width in asked if width % signal.heads):
            yield (
                f".heads = {signal.heads}: does not divide {odd[0]}, the width of {name}'s queries, keys or values; "
                f"take {common} or what divides it"
            )


def _beyond(key: str, stated: Any, depths: Mapping[str, int], first: int) -> Iterator[str]:
    """Stated layers that are not there."""
    for pair in () if isinstance(stated, str) else [stated] if isinstance(stated[0], int) else stated:
        for layer, (name, depth) in zip(pair, depths.items(), strict=True):
            if not first <= layer <= depth:
                yield f".{key} = {json.dumps(stated)}: layer {layer} of {name}: it has {first} to {depth}"


def _compared(signal: Signal, own: Shapes, other: Shapes) -> Compared:
    if isinstance(signal, Relations):
        return [(0, a, b) for a, b in signal.pairs(len(own.attention), len(other.attention))]
    stacks = enumerate(zip(own.hidden, other.hidden, strict=True))
    return [(k, a, b) for k, (mine, theirs) in stacks for a, b in signal.pairs(len(mine) - 1, len(theirs) - 1)]


def _widths(signal: Signal, own: Shapes, other: Shapes) -> list[tuple[int, int]]:
    """The learner's and the teacher's, of each comparison of hidden states."""
    hidden = _compared(signal, own, other) if isinstance(signal, Hidden) else []
    return [(own.hidden[k][a], other.hidden[k][b]) for k, a, b in hidden]


def _map(own: int, other: int) -> nn.Module:
    return nn.Identity() if own == other else nn.Linear(own, other, bias=False)


def _loss(signal: Signal, compared: Compared, maps: nn.Module, own: States, other: States) -> Tensor:
    if isinstance(signal, Hidden):
        pairs = zip(compared, maps, strict=True)  # type: ignore[call-overload]
        return hidden_loss([(mapped(own.hidden[k][a]), other.hidden[k][b]) for (k, a, b), mapped in pairs])
    assert isinstance(signal, Relations)
    [(_, a, b)] = compared
    return relations_loss(own.attention[a], other.attention[b], signal.heads, signal.of, signal.causal)
