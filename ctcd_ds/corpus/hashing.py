"""Random numbers without a state: a hash of what the number is for.

A generator has to be carried along, saved and split between ranks. A hash of (seed, epoch, row, position) is
the same wherever, whenever and in whatever company it is computed, which is all that determinism needs. The
hash is splitmix64's finaliser, folded over its arguments; it is fast and well mixed, not secret.
"""

from __future__ import annotations

import numpy as np

# What a number is for. Streams of equal seeds with different purposes have nothing in common.
ROW_ORDER, TARGET_CHOICE, TARGET_CHANGE, OWN_MASKS, LABEL_NOISE, SPAN_CUTS, SOURCE_ORDER = 1, 2, 3, 4, 5, 6, 7
CACHE_DRAWS = 8
SPAN_TURNS = 100  # and those behind it

_STEP = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio: neighbouring counters end far apart
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_WORD = (1 << 64) - 1


def hashed(*parts: int | np.ndarray) -> np.ndarray:
    """The hash of `parts` in their order: uint64 of their broadcast shape, (1,) where all are plain ints."""
    return extended(np.zeros(1, np.uint64), *parts)


def extended(state: np.ndarray, *parts: int | np.ndarray) -> np.ndarray:
    """Goes on from an earlier hash: `extended(hashed(a), b)` is `hashed(a, b)`."""
    for part in parts:
        number = np.array([part & _WORD], np.uint64) if isinstance(part, int) else part.astype(np.uint64)
        state = _mixed(state + (number + np.uint64(1)) * _STEP)
    return state


def _mixed(state: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser, in place: the arrays are large and fresh, copies would double the time."""
    state ^= state >> np.uint64(30)
    state *= _FIRST
    state ^= state >> np.uint64(27)
    state *= _SECOND
    state ^= state >> np.uint64(31)
    return state
