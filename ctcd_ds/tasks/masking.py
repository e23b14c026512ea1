"""Masking with a fixed count: which positions of a row are targets, and what the model sees in their place.

Every row has the same number of targets, so shapes are static, the number of targets of a step is a constant,
and no rank ever has an empty batch. All is decided by a hash of (seed, epoch, row, position): a row is masked
the same in whatever batch, on whatever rank and by whatever worker it is read.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ctcd_ds.corpus.hashing import TARGET_CHANGE, TARGET_CHOICE, extended, hashed
from ctcd_ds.corpus.rows import SpecialIds
from ctcd_ds.tasks.noise import random_words

# BERT's shares: 80 % of the targets become [MASK], 10 % a random token, 10 % stay (of 32 random bits).
_MASKED, _MASKED_OR_RANDOM = int(0.8 * 2**32), int(0.9 * 2**32)
_HALF = np.uint64(32)
# A choice's sort key: one bit that puts reserved tokens last, 47 bits of hash, 16 bits of position.
_LAST = np.uint64(1 << 63)
_HASH = np.uint64((1 << 63) - (1 << 16))
_POSITION = np.uint64((1 << 16) - 1)


def target_count(mask_fraction: float, sequence_length: int) -> int:
    """The number k of targets of every row, at least 1."""
    return max(1, round(mask_fraction * (sequence_length - 2)))


@dataclass(frozen=True, eq=False)
class Masking:
    """How rows are masked.

    `mask_fraction` in (0, 1] is the share of the L−2 inner positions that become targets. With `whole_word`
    the words of a row are taken whole, in the order of their hashes, and the last one is cut so that the
    count is reached exactly; `continuations` (bool[vocab_size], see `tokenizer.continuations`) then says
    which tokens go on with the word before them. The recipe has checked all values; sequence_length may be at
    most 65,536.
    """

    mask_fraction: float
    special: SpecialIds
    vocab_size: int
    whole_word: bool = False
    continuations: np.ndarray | None = None

    def count(self, sequence_length: int) -> int:
        """The number k of targets of every row, at least 1."""
        return target_count(self.mask_fraction, sequence_length)

    def apply(
        self, tokens: np.ndarray, seed: int, epochs: np.ndarray, rows: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Masks rows: tokens int32[n, L], of the epochs int64[n] and row numbers int64[n].

        Returns input_ids int32[n, L], positions int32[n, k] (ascending in each row) and targets int32[n, k],
        the original tokens there. The first and the last position are never chosen, nor are [SEP], [CLS],
        [PAD] and [MASK] inside the row. Only a row with fewer than k other tokens (texts of hardly a word
        each) fills up with them, in the order of their hashes, and shows them as they are: a question without
        a riddle, which costs next to nothing in the loss and keeps the count.
        """
        positions = self._chosen(tokens, hashed(seed, TARGET_CHOICE, epochs, rows))
        targets = np.take_along_axis(tokens, positions, axis=1)
        shown = self._shown(targets, extended(hashed(seed, TARGET_CHANGE, epochs, rows)[:, None], positions))
        input_ids = tokens.copy()
        np.put_along_axis(input_ids, positions, shown, axis=1)
        return input_ids, positions.astype(np.int32), targets

    def _chosen(self, tokens: np.ndarray, row_keys: np.ndarray) -> np.ndarray:
        """The k inner positions whose keys are smallest: int64[n, k], ascending."""
        inner = tokens[:, 1:-1]
        places = np.arange(1, tokens.shape[1] - 1)
        reserved = self.special.reserved(inner)
        keys = extended(row_keys[:, None], places)
        if self.whole_word:  # a word's tokens have the hash of its first, and differ by their positions
            keys = np.take_along_axis(keys, self._word_starts(inner, reserved), axis=1)
        keys &= _HASH
        keys |= places.astype(np.uint64)
        keys[reserved] |= _LAST
        count = self.count(tokens.shape[1])
        smallest = np.partition(keys, count - 1, axis=1)[:, :count]
        return np.sort((smallest & _POSITION).astype(np.int64), axis=1)

    def _word_starts(self, inner: np.ndarray, reserved: np.ndarray) -> np.ndarray:
        """For each inner token the column where its word starts: int64[n, L−2].

        A word is a token and the continuations after it. Reserved tokens cut words, and so does the row's
        start.
        """
        assert self.continuations is not None, "whole_word needs to know which tokens continue a word"
        starts = ~self.continuations[inner] | reserved
        starts[:, 0] = True
        starts[:, 1:] |= reserved[:, :-1]
        return np.maximum.accumulate(np.where(starts, np.arange(inner.shape[1]), 0), axis=1)

    def _shown(self, targets: np.ndarray, draws: np.ndarray) -> np.ndarray:
        """What the model sees where `targets` stood, by 64 random bits each: int32[n, k]."""
        share = draws >> _HALF
        shown = np.where(
            share < _MASKED, np.int32(self.special.mask), random_words(self.special, self.vocab_size, draws)
        )
        kept = (share >= _MASKED_OR_RANDOM) | self.special.reserved(targets)
        return np.where(kept, targets, shown)
