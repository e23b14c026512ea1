"""Masking: fixed count, BERT's shares, never a special token, and the same whatever the company."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corpora import SPECIAL
from ctcd_ds.tasks.masking import Masking

VOCAB = 1000
MASKING = Masking(0.15, SPECIAL, VOCAB)
INSIDE = [SPECIAL.cls, SPECIAL.sep, SPECIAL.mask, SPECIAL.pad]


def text(rows: int, length: int, specials: float = 0.0, seed: int = 0) -> np.ndarray:
    """Rows of random tokens, a share of the inner ones special."""
    random = np.random.default_rng(seed)
    tokens = random.integers(5, VOCAB, (rows, length), dtype=np.int32)
    tokens[random.random((rows, length)) < specials] = random.choice(INSIDE)
    tokens[:, 0], tokens[:, -1] = SPECIAL.cls, SPECIAL.sep
    return tokens


def masked(tokens: np.ndarray, masking: Masking = MASKING, seed: int = 1, epoch: int = 0) -> tuple[np.ndarray, ...]:
    return masking.apply(tokens, seed, np.full(len(tokens), epoch), np.arange(len(tokens)))


def within(count: int, trials: int, probability: float) -> bool:
    """Five standard deviations: wrong once in a million."""
    return abs(count - trials * probability) < 5 * math.sqrt(trials * probability * (1 - probability)) + 1


# --- what every row fulfils ----------------------------------------------------------------------------


@pytest.mark.parametrize("whole_word", [False, True])
@given(
    rows=st.integers(1, 8),
    length=st.integers(3, 140),
    fraction=st.floats(0.01, 1.0),
    specials=st.floats(0, 1),
    seed=st.integers(0, 2**64 - 1),
)
@settings(max_examples=80, deadline=None)
def test_every_row_has_its_targets(
    whole_word: bool, rows: int, length: int, fraction: float, specials: float, seed: int
) -> None:
    continuations = np.random.default_rng(0).random(VOCAB) < 0.4 if whole_word else None
    masking = Masking(fraction, SPECIAL, VOCAB, whole_word, continuations)
    tokens = text(rows, length, specials, seed % 1000)
    before = tokens.copy()
    input_ids, positions, targets = masked(tokens, masking, seed)

    count = masking.count(length)
    assert count == max(1, round(fraction * (length - 2)))
    assert (tokens == before).all()
    assert input_ids.shape == tokens.shape and positions.shape == targets.shape == (rows, count)
    assert input_ids.dtype == positions.dtype == targets.dtype == np.int32
    assert (np.diff(positions, axis=1) > 0).all()  # ascending, so distinct
    assert positions.min() >= 1 and positions.max() <= length - 2
    assert (targets == np.take_along_axis(tokens, positions.astype(np.int64), axis=1)).all()

    untouched = np.ones_like(tokens, bool)
    np.put_along_axis(untouched, positions.astype(np.int64), False, axis=1)
    assert (input_ids == tokens)[untouched].all()
    # Special tokens are targets only where a row has too little text, and are shown as they are.
    eligible = (~np.isin(tokens[:, 1:-1], INSIDE)).sum(axis=1)
    assert (np.isin(targets, INSIDE).sum(axis=1) == np.maximum(count - eligible, 0)).all()
    special = np.isin(tokens, INSIDE)
    assert (input_ids == tokens)[special].all()
    assert np.isin(input_ids, [SPECIAL.cls, SPECIAL.sep, SPECIAL.pad])[~special].sum() == 0


def test_unknown_words_may_be_targets() -> None:
    tokens = np.full((50, 64), SPECIAL.unk, np.int32)
    assert (masked(tokens)[2] == SPECIAL.unk).all()


def test_a_row_of_separators_only_is_left_as_it_is() -> None:
    tokens = np.full((3, 64), SPECIAL.sep, np.int32)
    input_ids, positions, targets = masked(tokens)
    assert (input_ids == tokens).all() and (targets == SPECIAL.sep).all()
    assert len(set(map(tuple, positions.tolist()))) == 3  # in the order of their hashes


# --- statistics ----------------------------------------------------------------------------------------


def test_shares_of_mask_random_and_kept() -> None:
    tokens = text(8000, 128)
    input_ids, positions, targets = masked(tokens)
    shown = np.take_along_axis(input_ids, positions.astype(np.int64), axis=1)
    kept, mask = shown == targets, shown == SPECIAL.mask
    random = ~kept & ~mask
    candidates = VOCAB - 5
    assert within(mask.sum(), targets.size, 0.8)
    assert within(kept.sum(), targets.size, 0.1 + 0.1 / candidates)  # random may hit the original
    assert within(random.sum(), targets.size, 0.1 * (1 - 1 / candidates))
    # Random tokens come from all of the vocabulary but its special ids, equally often.
    counts = np.bincount(shown[random], minlength=VOCAB)
    assert counts[: max(INSIDE) + 1].sum() == 0 and counts[SPECIAL.unk] == 0
    expected = random.sum() / candidates
    chi_square = ((counts[5:] - expected) ** 2 / expected).sum()
    assert abs(chi_square - (candidates - 1)) < 5 * math.sqrt(2 * candidates)


def test_positions_are_chosen_equally_often() -> None:
    rows, length = 8000, 66
    positions = masked(text(rows, length))[1]
    counts = np.bincount(positions.ravel(), minlength=length)
    share = MASKING.count(length) / (length - 2)
    assert counts[0] == counts[-1] == 0
    assert all(within(count, rows, share) for count in counts[1:-1])


def test_choice_and_change_do_not_depend_on_each_other() -> None:
    """The share of [MASK] is the same at each place among a row's targets."""
    tokens = text(8000, 66)
    input_ids, positions, _ = masked(tokens)
    mask = np.take_along_axis(input_ids, positions.astype(np.int64), axis=1) == SPECIAL.mask
    assert all(within(count, 8000, 0.8) for count in mask.sum(axis=0))


# --- determinism ---------------------------------------------------------------------------------------


@given(order=st.permutations(range(12)), cut=st.integers(0, 12))
@settings(max_examples=40, deadline=None)
def test_a_row_is_masked_alike_in_any_batch(order: list[int], cut: int) -> None:
    tokens, epochs, rows = text(12, 40, specials=0.05), np.arange(12) % 3, np.arange(12) * 1000
    whole = MASKING.apply(tokens, 1, epochs, rows)
    for part in (np.array(order[:cut], np.int64), np.array(order[cut:], np.int64)):
        alone = MASKING.apply(tokens[part], 1, epochs[part], rows[part])
        assert all((one == every[part]).all() for one, every in zip(alone, whole, strict=True))


def test_seed_epoch_and_row_each_change_the_masks() -> None:
    tokens = np.repeat(text(1, 128), 400, axis=0)
    base = masked(tokens)[1]
    share = MASKING.count(128) / 126
    for other in (masked(tokens, seed=2)[1], masked(tokens, epoch=1)[1], np.roll(base, 1, axis=0)):
        common = sum(len(set(a) & set(b)) for a, b in zip(base.tolist(), other.tolist(), strict=True))
        assert within(common, base.size, share)  # as many as two independent choices have in common


def test_the_masks_stay_what_they_are() -> None:
    """Resuming a run under a later version must mask the same: these numbers may never change."""
    tokens = np.arange(5, 45, dtype=np.int32)[None]
    input_ids, positions, targets = MASKING.apply(tokens, 1, np.array([2]), np.array([9]))
    assert positions.tolist() == [[9, 10, 16, 18, 20, 27]]
    assert targets.tolist() == [[tokens[0, position] for position in positions[0]]]
    assert np.take_along_axis(input_ids, positions.astype(np.int64), axis=1).tolist() == [[4, 4, 4, 596, 25, 4]]


# --- whole words ---------------------------------------------------------------------------------------


def words_of(row: np.ndarray, continuations: np.ndarray) -> list[list[int]]:
    """Positions of a row's words, one token after another: the slow and obvious way."""
    words: list[list[int]] = []
    open_word = False
    for position in range(1, len(row) - 1):
        if row[position] in INSIDE:
            open_word = False
        elif continuations[row[position]] and open_word:
            words[-1].append(position)
        else:
            words.append([position])
            open_word = True
    return words


@given(share=st.floats(0, 1), fraction=st.floats(0.02, 0.9), seed=st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_words_are_taken_whole_but_the_last(share: float, fraction: float, seed: int) -> None:
    continuations = np.random.default_rng(seed).random(VOCAB) < share
    masking = Masking(fraction, SPECIAL, VOCAB, True, continuations)
    tokens = text(6, 80, specials=0.05, seed=seed)
    positions = masked(tokens, masking, seed)[1]
    for row, chosen in zip(tokens, map(set, positions.tolist()), strict=True):
        words = words_of(row, continuations)
        if sum(map(len, words)) < len(chosen):
            continue  # a row with too little text, see above
        cut = [word for word in words if chosen & set(word) and not chosen >= set(word)]
        assert len(cut) <= 1
        for word in cut:  # the cut word is taken from its start
            assert set(word[: len(chosen & set(word))]) <= chosen


def test_every_word_is_taken_equally_often() -> None:
    """A row of words of two tokens: pairs are chosen together, and each about as often as any other."""
    continuations = np.arange(VOCAB) % 2 == 1
    tokens = np.tile(np.array([10, 11], np.int32), (4000, 21))  # 42 positions, 20 whole words inside
    tokens[:, 0], tokens[:, 1] = SPECIAL.cls, SPECIAL.sep
    tokens[:, -1] = SPECIAL.sep
    tokens[:, -2] = SPECIAL.sep
    masking = Masking(0.15, SPECIAL, VOCAB, True, continuations)
    positions = masked(tokens, masking)[1]
    counts = np.bincount(positions.ravel(), minlength=42)
    assert (counts[2:-2:2] == counts[3:-2:2]).all()  # k = 6: three pairs
    pairs = counts[2:-2:2]
    assert all(within(count, 4000, 3 / len(pairs)) for count in pairs)
