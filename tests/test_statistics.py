"""What seeds can say: intervals that cover, and no claim from few seeds."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctcd_ds.experiments.results import Spread
from ctcd_ds.experiments.statistics import caveats, compare, interval, spread


def seeds(*values: float) -> Spread:
    return spread(dict(enumerate(values, start=1)))


def verdict(ours: Spread, theirs: Spread, metric: str = "valid_loss") -> tuple[str, str]:
    found = compare("ctcd", "student", "alone", "student", metric, ours, theirs)
    return found.verdict, found.words


@pytest.mark.parametrize("pairs", [3, 4, 5, 8])
def test_the_interval_covers_the_truth_as_often_as_it_says(pairs: int) -> None:
    """Where there is no difference, at most about one experiment in twenty may say that there is one."""
    random = np.random.default_rng(pairs)
    trials = 1000
    made = [interval(random.normal(0.3, 1.0, pairs).tolist()) for _ in range(trials)]
    covered = sum(between[0] <= 0.3 <= between[1] for found in made if found for between in [found[0]])
    assert covered >= 0.95 * trials - 3 * (0.95 * 0.05 * trials) ** 0.5


@given(st.lists(st.floats(-5, 5), min_size=0, max_size=2), st.sampled_from(["valid_loss", "glue/rte"]))
def test_one_or_two_seeds_never_make_a_claim(differences: list[float], metric: str) -> None:
    found = compare(
        "ctcd", "student", "alone", "student", metric, seeds(*(d + 3 for d in differences)) if differences else None,
        seeds(*[3.0] * len(differences)) if differences else None,
    )  # fmt: skip
    assert (
        found.verdict == "no evidence"
        and found.interval is None
        and ("No evidence of a difference" in found.words or "Equal to the last digit" in found.words)
    )


@given(st.lists(st.floats(-1, 1), min_size=3, max_size=9))
@settings(max_examples=40, deadline=None)
def test_a_verdict_is_the_sign_of_an_interval_without_zero(differences: list[float]) -> None:
    base = [3.0] * len(differences)
    moved = seeds(*(3.0 + d for d in differences))
    loss = compare("a", "x", "b", "x", "valid_loss", moved, seeds(*base))
    score = compare("a", "x", "b", "x", "glue/rte", moved, seeds(*base))
    assert loss.interval == score.interval and loss.interval is not None
    low, high = loss.interval
    expected = ("worse", "better") if low > 0 else ("better", "worse") if high < 0 else ("no evidence",) * 2
    assert (loss.verdict, score.verdict) == expected
    same = "Equal to the last digit" if not any(loss.differences) else "No evidence of a difference"
    assert (same in loss.words) == (low <= 0 <= high)


def test_differences_are_paired_by_seed_whatever_the_order() -> None:
    """A seed's own luck, ten times the effect, cancels out; seeds that only one has do not count."""
    luck = {1: 5.0, 2: 4.0, 3: 6.0, 4: 4.5, 5: 5.5, 6: 3.0}
    theirs = spread(luck)
    ours = spread({seed: luck[seed] - 0.1 - 0.001 * seed for seed in (6, 3, 2, 5, 1)} | {9: 0.0})
    found = compare("ctcd", "student", "alone", "student", "valid_loss", ours, theirs)
    assert found.verdict == "better" and sorted(found.seeds) == [1, 2, 3, 5, 6]
    assert found.mean == pytest.approx(-0.1034)
    assert "Student's t over 5 pairs" in found.method


def test_the_same_numbers_give_the_same_interval() -> None:
    values = np.random.default_rng(0).normal(size=7).tolist()
    assert interval(values) == interval(values)


def test_words_say_how_much_and_of_how_many() -> None:
    kind, words = verdict(seeds(3.0, 3.1, 2.9), seeds(3.0, 3.05, 3.0))
    assert kind == "no evidence" and "No evidence of a difference: mean difference −0.017, 95% interval" in words
    assert "3 seeds" in words
    kind, words = verdict(seeds(2.0, 2.1, 2.2), seeds(3.0, 3.11, 3.21))
    assert kind == "better" and "−1.007, 95% interval −1.021 to −0.992, 3 seeds" in words
    _, words = verdict(seeds(3.0, 3.1, 2.9), seeds(3.0, 3.1, 2.9))
    assert "Equal to the last digit, 3 seeds" in words


def test_a_held_out_set_is_a_loss_under_its_own_name() -> None:
    found = compare("a", "x", "b", "x", "valid_loss/news", seeds(2.0, 2.1, 2.2), seeds(3.0, 3.11, 3.21))
    assert found.verdict == "better" and found.lower_is_better and "held-out loss on news: " in found.words


def test_no_interval_of_a_share_goes_where_no_difference_can_lie() -> None:
    ours, theirs = seeds(0.0, 90.0, 10.0), seeds(95.0, 10.0, 99.0)
    found = compare("a", "x", "b", "x", "glue/rte", ours, theirs)
    assert found.interval is not None and found.interval[0] < -100 and found.interval[1] > 100
    assert "interval −100.0 to +100.0" in found.words


def test_few_seeds_and_many_comparisons_are_said() -> None:
    one = compare("a", "x", "b", "x", "valid_loss", seeds(1.0, 2.0, 3.0), seeds(1.0, 2.0, 3.1))
    said = caveats([one] * 40, ["ctcd-seed-1", "alone-seed-1"], ["tiny"])
    assert said[0] == "tiny" and said[1].startswith("Not finished: ctcd-seed-1, alone-seed-1.")
    assert "3 seeds: only large differences" in said[2] and "about 2 of them would look like" in said[3]
    few = compare("a", "x", "b", "x", "valid_loss", seeds(1.0), seeds(1.0, 2.0, 3.1))
    assert "one seed cannot tell" in caveats([few], [], [])[0]
    assert caveats([], [], []) == [], "where nothing is compared, no number of seeds is claimed"
