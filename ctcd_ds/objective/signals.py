"""What a learner takes from the inside of a teacher, beside its predictions: hidden states, relations of attention.

Layers are counted as Hugging Face counts `hidden_states`: 0 is what comes into the first, n what layer n puts out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal, TypeAlias

from ctcd_ds.objective.course import Course

Pairs: TypeAlias = tuple[tuple[int, int], ...]  # (a layer of the learner, one of the teacher)
Relation = Literal["query", "key", "value", "query-key"]


@dataclass(frozen=True)
class Signal:
    """One such edge between peers, by their numbers. `weight`: what it is, or the most that its course ever makes it.

    At a step where it is 0 it is no edge: not computed, not logged.
    """

    learner: int
    teacher: int
    weight: float
    course: Course | None = None

    kind: ClassVar[str]

    def at(self, done: float) -> Signal:
        """The edge when `done` (0 to 1) of the run is over."""
        return replace(self, weight=self.course.at(done), course=None) if self.course else self

    def said(self) -> str:
        """Its weight in words."""
        return str(self.course or f"{self.weight:g}")

    def pairs(self, own: int, other: int) -> Pairs:
        """The layers that are compared, where the learner has `own` of them and the teacher `other`."""
        raise NotImplementedError


@dataclass(frozen=True)
class Hidden(Signal):
    """Mean squared difference of hidden states. `layers`: the last ones, as many pairs evenly spread as the smaller of
    the two has layers, or pairs."""

    layers: Literal["last", "even"] | Pairs = "last"

    kind: ClassVar[str] = "hidden"

    def pairs(self, own: int, other: int) -> Pairs:
        if self.layers == "last":
            return ((own, other),)
        if self.layers == "even":
            few = min(own, other)
            return tuple((round(n * own / few), round(n * other / few)) for n in range(1, few + 1))
        return self.layers

    def __str__(self) -> str:
        said = self.layers if isinstance(self.layers, str) else ", ".join(f"{own} from {n}" for own, n in self.layers)
        return f"hidden states ({said})"


@dataclass(frozen=True)
class Relations(Signal):
    """How alike queries, keys and values of different tokens are, in `heads` parts of their width (`relations.py`).

    `causal`: a token is compared with those before it and itself only.
    """

    layer: Literal["last"] | tuple[int, int] = "last"
    heads: int = 1
    of: tuple[Relation, ...] = ("query", "key", "value")
    causal: bool = False

    kind: ClassVar[str] = "relations"

    def pairs(self, own: int, other: int) -> Pairs:
        return ((own, other),) if self.layer == "last" else (self.layer,)

    def __str__(self) -> str:
        layer = "last layer" if self.layer == "last" else f"layer {self.layer[0]} from {self.layer[1]}"
        return f"relations of {', '.join(self.of)} ({layer}, {self.heads} heads)"
