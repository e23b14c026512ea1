"""Random tokens: in the place of masked ones, and as a share of one peer's labels (`label_noise`)."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from ctcd_ds.corpus.hashing import LABEL_NOISE, extended, hashed
from ctcd_ds.corpus.rows import Corpus, SpecialIds
from ctcd_ds.recipe.sections import PeerSection

_HALF = np.uint64(32)
_LOW_HALF = np.uint64(2**32 - 1)


def random_words(special: SpecialIds, vocab_size: int, draws: np.ndarray) -> np.ndarray:
    """A token that is not special for each 64 random bits, by the lower half of them: int32, as `draws`."""
    words = _words(special, vocab_size)
    return words[((draws & _LOW_HALF) * np.uint64(len(words))) >> _HALF]


@lru_cache(8)
def _words(special: SpecialIds, vocab_size: int) -> np.ndarray:
    return np.setdiff1d(np.arange(vocab_size, dtype=np.int32), [*special.present.values(), *special.sentinels])


@dataclass(frozen=True)
class LabelNoise:
    """A `share` of a peer's hard targets is random tokens: by a hash of (seed, its name, epoch, row, position)."""

    share: float
    peer: str
    special: SpecialIds
    vocab_size: int

    @classmethod
    def of(cls, name: str, peer: PeerSection, corpus: Corpus) -> LabelNoise | None:
        """The peer's noise, None where it has none."""
        return cls(peer.label_noise, name, corpus.special, corpus.vocab_size) if peer.label_noise else None

    def apply(
        self, targets: np.ndarray, positions: np.ndarray, seed: int, epochs: np.ndarray, rows: np.ndarray
    ) -> np.ndarray:
        """`targets` (int32 [n, k]) at these places of their rows (int [n, k] or [k]), a share of them replaced."""
        keys = hashed(seed, LABEL_NOISE, zlib.crc32(self.peer.encode()), epochs, rows)
        draws = extended(keys[:, None], positions)
        replaced = ((draws >> _HALF) < int(self.share * 2**32)) & ~self.special.reserved(targets)
        return np.where(replaced, random_words(self.special, self.vocab_size, draws), targets)

    def describe(self) -> str:
        """In words for --dry_run."""
        return f"{self.share:.0%} of its hard targets are random tokens"
