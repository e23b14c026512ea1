"""What single peers see of a batch, where that is not what all see: masks or labels of their own.

The held-out rows are masked the same for everybody; all this is for training rows only.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from ctcd_ds.corpus.hashing import LABEL_NOISE, OWN_MASKS, extended, hashed
from ctcd_ds.corpus.masking import Masking

NO_TARGET = -100


@dataclass(frozen=True)
class View:
    """What one peer sees of a micro-batch, and at which positions it is asked.

    Of peers that distil, the first positions (as many as the batch has soft positions) are the same; each one's other
    targets follow. Flat positions count through the batch row by row: row · L + position.
    """

    input_ids: torch.Tensor  # int64[b, L], masked
    positions: torch.Tensor  # int64[P], flat
    targets: torch.Tensor  # int64[P], the labels there; −100 where only a soft loss is
    hard_count: int  # how many of them are targets: the same in every batch

    def mapped(self, function: Callable[[torch.Tensor], torch.Tensor]) -> View:
        """The same view with `function` applied to its tensors."""
        return View(function(self.input_ids), function(self.positions), function(self.targets), self.hard_count)


@dataclass(frozen=True)
class PeerMasks:
    """How one peer's rows are masked, and which share of its labels is noise.

    `mask_seed` None: the run's masks. With the same seed and another `mask_fraction` the smaller set of targets lies in
    the larger one: both are the positions with the smallest hashes. `distils`: the peer teaches or learns from another.
    """

    masking: Masking
    mask_seed: int | None = None
    label_noise: float = 0.0
    distils: bool = True

    def apply(
        self, name: str, tokens: np.ndarray, seed: int, epochs: np.ndarray, rows: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """As `Masking.apply`, the targets with this peer's noise: keyed by its name, as all that is a peer's own."""
        masks = seed if self.mask_seed is None else int(hashed(seed, OWN_MASKS, self.mask_seed)[0])
        input_ids, positions, targets = self.masking.apply(tokens, masks, epochs, rows)
        if self.label_noise:
            keys = hashed(seed, LABEL_NOISE, zlib.crc32(name.encode()), epochs, rows)
            targets = self.masking.noisy(targets, extended(keys[:, None], positions), self.label_noise)
        return input_ids, positions, targets


def peer_views(
    peers: Mapping[str, PeerMasks],
    everywhere: bool,
    tokens: np.ndarray,
    seed: int,
    epochs: np.ndarray,
    rows: np.ndarray,
) -> tuple[dict[str, View], np.ndarray]:
    """Every peer's view of these rows (tokens int32[n, L]), and the soft positions, flat and ascending.

    Soft positions are those that are targets of all peers that distil; with `everywhere` all positions of text, and all
    targets.
    """
    seen = {name: masks.apply(name, tokens, seed, epochs, rows) for name, masks in peers.items()}
    asked = {name: _marked(tokens, positions) for name, (_, positions, _) in seen.items()}
    distilling = [name for name, masks in peers.items() if masks.distils]
    if everywhere:
        [special] = {masks.masking.special for masks in peers.values()}
        soft = np.logical_or.reduce([~special.reserved(tokens), *asked.values()])
    else:
        soft = np.logical_and.reduce([asked[name] for name in distilling]) & bool(distilling)
    shared = np.flatnonzero(soft)
    views = {}
    for name, masked in seen.items():
        own = np.flatnonzero(asked[name] & ~soft)
        alone = np.flatnonzero(asked[name])
        views[name] = _view(tokens, masked, np.concatenate([shared, own]) if peers[name].distils else alone)
    return views, shared


def _view(tokens: np.ndarray, masked: tuple[np.ndarray, np.ndarray, np.ndarray], flat: np.ndarray) -> View:
    input_ids, positions, targets = masked
    labels = np.full(tokens.shape, NO_TARGET, np.int64)
    np.put_along_axis(labels, positions.astype(np.int64), targets.astype(np.int64), axis=1)
    return View(
        torch.from_numpy(input_ids.astype(np.int64)),
        torch.from_numpy(flat),
        torch.from_numpy(labels.ravel()[flat]),
        targets.size,
    )


def _marked(tokens: np.ndarray, positions: np.ndarray) -> np.ndarray:
    marked = np.zeros(tokens.shape, bool)
    np.put_along_axis(marked, positions.astype(np.int64), True, axis=1)
    return marked
