"""The distillation graph: how much each peer learns from the ground truth and from every other peer."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace

from ctcd_ds.objective.course import Course, in_words, value_at
from ctcd_ds.objective.divergences import KL, Divergence
from ctcd_ds.objective.signals import Signal


@dataclass(frozen=True)
class DistillationGraph:
    """All weights of a run. Every mode of training is such a graph, never another code path.

    `hard[i]` weighs the hard loss of peer i; `soft[i][j]` weighs what peer i learns from peer j.
    A weight of 0 is no edge: not computed, not logged. `trained[i]` is False for a frozen peer.
    `courses[i][j]`: how the weight of edge i ← j changes over the run, if it does; `soft` then has the most it ever is.
    `divergences[i][j]`: in what peer i is to come near to j; empty: KL everywhere.
    `temperature`: τ of the soft losses, or how it changes; `temperatures[i][j]`: that of edge i ← j, if it has its own.
    `signals`: what is learned from the insides of peers, beside their predictions; in `soft` and `terms` is none of it.
    `cached`: so many names, the last ones, are of finished teachers without a model in the run: what they predict was
    written down before.
    """

    names: tuple[str, ...]
    hard: tuple[float, ...]
    soft: tuple[tuple[float, ...], ...]
    trained: tuple[bool, ...]
    courses: tuple[tuple[Course | None, ...], ...] = ()
    divergences: tuple[tuple[Divergence, ...], ...] = ()
    temperature: float | Course = 1.0
    temperatures: tuple[tuple[float | Course | None, ...], ...] = ()
    signals: tuple[Signal, ...] = ()
    cached: int = 0

    def __post_init__(self) -> None:
        n = len(self.names)
        assert len(self.hard) == len(self.soft) == len(self.trained) == n
        assert all(len(row) == n and row[i] == 0 for i, row in enumerate(self.soft))

    @classmethod
    def of(
        cls,
        soft: Mapping[str, Mapping[str, float]],
        hard: Mapping[str, float] | None = None,
        frozen: Collection[str] = (),
        temperature: float = 1.0,
        signals: Collection[Signal] = (),
    ) -> DistillationGraph:
        """A graph by names: {learner: {teacher: weight}} with every peer as a key, {peer: weight of its hard loss}.

        Hard weights are 1 unless given; frozen peers learn nothing. In `signals` peers are numbers, in this order.
        """
        names, given = tuple(soft), hard or {}
        return cls(
            names=names,
            hard=tuple(0.0 if name in frozen else given.get(name, 1.0) for name in names),
            soft=tuple(tuple(soft[name].get(other, 0.0) for other in names) for name in names),
            trained=tuple(name not in frozen for name in names),
            temperature=temperature,
            signals=tuple(signals),
        )

    def at(self, done: float) -> DistillationGraph:
        """The graph when `done` (0 to 1) of the run is over: every weight, and τ, is what it is then."""
        if not self.courses and not self.signals and not self._cools:
            return self
        tau, own = value_at(self.temperature, done), self.temperatures
        rows = zip(self.soft, self.courses, strict=True) if self.courses else ()
        soft = tuple(tuple(c.at(done) if c else w for w, c in zip(*row, strict=True)) for row in rows) or self.soft
        signals = tuple(signal.at(done) for signal in self.signals)
        temperatures = tuple(tuple(x if x is None else value_at(x, done) for x in row) for row in own)
        return replace(self, soft=soft, courses=(), temperature=tau, temperatures=temperatures, signals=signals)

    @property
    def _cools(self) -> bool:
        return any(isinstance(tau, Course) for row in ((self.temperature,), *self.temperatures) for tau in row)

    @property
    def live(self) -> DistillationGraph:
        """The graph of the models only, without what they learn from cached teachers."""
        if not self.cached:
            return self
        n = len(self.names) - self.cached
        return replace(
            self,
            names=self.names[:n],
            hard=self.hard[:n],
            soft=tuple(row[:n] for row in self.soft[:n]),
            trained=self.trained[:n],
            courses=tuple(row[:n] for row in self.courses[:n]),
            divergences=tuple(row[:n] for row in self.divergences[:n]),
            temperatures=tuple(row[:n] for row in self.temperatures[:n]),
            cached=0,
        )

    def lessons(self) -> dict[int, dict[str, float]]:
        """{learner: {cached teacher: weight}}."""
        found: dict[int, dict[str, float]] = {}
        for i, j, weight in self.edges():
            if j >= len(self.names) - self.cached:
                found.setdefault(i, {})[self.names[j]] = weight
        return found

    def hard_peers(self) -> Iterator[int]:
        """The peers that learn from the ground truth."""
        return (i for i, weight in enumerate(self.hard) if weight)

    def edges(self) -> Iterator[tuple[int, int, float]]:
        """(learner i, taught by j, weight) for every soft loss."""
        return ((i, j, w) for i, row in enumerate(self.soft) for j, w in enumerate(row) if w)

    def divergence(self, i: int, j: int) -> Divergence:
        """In what peer i is to come near to peer j."""
        return self.divergences[i][j] if self.divergences else KL

    def tau(self, i: int, j: int) -> float:
        """The temperature of edge i ← j, of the graph at a step (`at`)."""
        own = self.temperatures[i][j] if self.temperatures else None
        tau = self.temperature if own is None else own
        assert not isinstance(tau, Course)
        return tau

    def distilling(self) -> set[str]:
        """The peers that teach another or learn from one."""
        return {self.names[k] for i, j, _ in self.edges() for k in (i, j)}

    def name_of(self, signal: Signal) -> str:
        """The loss of a signal by its name in metrics.jsonl."""
        return f"loss/{self.names[signal.learner]}/{signal.kind}/{self.names[signal.teacher]}"

    def terms(self) -> list[str]:
        """Every loss of predictions by its name in metrics.jsonl, hard losses first."""
        hard = [f"loss/{self.names[i]}/hard" for i in self.hard_peers()]
        return hard + [f"loss/{self.names[i]}/soft/{self.names[j]}" for i, j, _ in self.edges()]

    def weights(self) -> list[float]:
        """The weight of every loss, in the order of `terms`."""
        return [self.hard[i] for i in self.hard_peers()] + [weight for *_, weight in self.edges()]

    def describe(self) -> list[str]:
        """One line for every loss term, in the field's words."""
        hard = [
            f"{self.names[i]:<12} learns from the ground truth   weight {self.hard[i]:g}" for i in self.hard_peers()
        ]
        soft = [f"{self.names[i]:<12} learns from {self.names[j]:<18} weight {self.said(i, j)}"
                for i, j, _ in self.edges()]  # fmt: skip
        inner = [f"{self.names[s.learner]:<12} learns from {self.names[s.teacher]:<18} weight {s.said()}: {s}"
                 for s in self.signals]  # fmt: skip
        return hard + soft + inner

    def said(self, i: int, j: int) -> str:
        """The weight of edge i ← j in words."""
        course = self.courses[i][j] if self.courses else None
        tau = self.temperatures[i][j] if self.temperatures else None
        kind = "" if (divergence := self.divergence(i, j)) == KL else f" ({divergence})"
        own = "" if tau is None else f", temperature {in_words(tau)}"
        return in_words(course or self.soft[i][j]) + kind + own
