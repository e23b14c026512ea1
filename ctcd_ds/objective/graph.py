"""The distillation graph: how much each peer learns from the ground truth and from every other peer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class DistillationGraph:
    """All weights of a run (DESIGN §2). Every mode of training is such a graph, never another code path.

    `hard[i]` weighs the hard loss of peer i; `soft[i][j]` weighs what peer i learns from peer j.
    A weight of 0 is no edge: not computed, not logged. `trained[i]` is False for a frozen peer.
    """

    names: tuple[str, ...]
    hard: tuple[float, ...]
    soft: tuple[tuple[float, ...], ...]
    trained: tuple[bool, ...]

    def __post_init__(self) -> None:
        n = len(self.names)
        assert len(self.hard) == len(self.soft) == len(self.trained) == n
        assert all(len(row) == n and row[i] == 0 for i, row in enumerate(self.soft))

    def hard_peers(self) -> Iterator[int]:
        """The peers that learn from the ground truth."""
        return (i for i, weight in enumerate(self.hard) if weight)

    def edges(self) -> Iterator[tuple[int, int, float]]:
        """(learner i, taught by j, weight) for every soft loss."""
        return ((i, j, w) for i, row in enumerate(self.soft) for j, w in enumerate(row) if w)

    def describe(self) -> list[str]:
        """One line for every loss term, in the field's words."""
        hard = [
            f"{self.names[i]:<12} learns from the ground truth   weight {self.hard[i]:g}" for i in self.hard_peers()
        ]
        soft = [f"{self.names[i]:<12} learns from {self.names[j]:<18} weight {w:g}" for i, j, w in self.edges()]
        return hard + soft
