"""A number that changes over a run, as a function of the share of the run that is over: late, ramped or decayed."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Course:
    """`first` until the share `after` of the run is over, then along a line to `then` for the share `over`.

    With `over` 0 it is `then` at once: a late beginning, or an early end.
    """

    first: float
    then: float
    after: float = 0.0
    over: float = 0.0

    def at(self, done: float) -> float:
        """The value when `done` (0 to 1) of the run is over."""
        if done < self.after:
            return self.first
        if done >= self.after + self.over:
            return self.then
        return self.first + (self.then - self.first) * (done - self.after) / self.over

    @property
    def largest(self) -> float:
        """The most it ever is."""
        return max(self.first, self.then)

    def __str__(self) -> str:
        if not self.over:
            return f"{self.first:g} until {self.after:.0%} of the steps, then {self.then:g}"
        return f"{self.first:g} to {self.then:g} from {self.after:.0%} to {self.after + self.over:.0%} of the steps"


def value_at(number: float | Course, done: float) -> float:
    """A number that may be on a course, when `done` (0 to 1) of the run is over."""
    return number.at(done) if isinstance(number, Course) else number


def in_words(number: float | Course) -> str:
    """A number that may be on a course, for people."""
    return str(number) if isinstance(number, Course) else f"{number:g}"
