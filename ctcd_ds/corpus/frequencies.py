"""What a model scores that knows how often each token occurs and nothing else: the first thing that models learn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

_TOKENS = 1 << 26  # of a split that are counted, an equal share of every shard's first ones: a second's work


def unigram_loss(
    folders: Sequence[Path], splits: Mapping[str, Sequence[Mapping[str, Any]]], dtype: str, identity: Mapping[str, Any]
) -> float | None:
    """Cross entropy (nats a token) of the held-out tokens under the training tokens' frequencies, one added to each.

    `folders`: where a shard may be. Special tokens are no targets and are not counted. None without held-out text.
    """
    training, held_out = (_counts(folders, splits.get(split, ()), dtype, identity) for split in ("train", "valid"))
    if not held_out.sum() or not training.sum():
        return None
    log_share = np.log(training + 1) - np.log(training.sum() + len(training))
    return round(float(-(held_out * log_share).sum() / held_out.sum()), 6)


def _counts(
    folders: Sequence[Path], shards: Sequence[Mapping[str, Any]], dtype: str, identity: Mapping[str, Any]
) -> np.ndarray:
    """How often each id occurs: int64 [vocabulary]."""
    counts = np.zeros(identity["vocab_size"], np.int64)
    for shard in shards:
        file = next(path for folder in folders if (path := folder / f"{shard['name']}.bin").exists())
        tokens = np.fromfile(file, dtype, count=_TOKENS // len(shards))
        counts += np.bincount(tokens, minlength=len(counts))
    counts[[number for role, number in identity["special"].items() if role != "unk"]] = 0
    return counts
