"""What tasks have in common that ask every peer the same at all positions that its model gives out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from typing_extensions import Self

from ctcd_ds.corpus.rows import Corpus
from ctcd_ds.objective.batch import Batch, View
from ctcd_ds.recipe.sections import Recipe
from ctcd_ds.tasks.noise import LabelNoise
from ctcd_ds.tasks.task import Task


@dataclass(frozen=True)
class AskedEverywhere(Task):
    """`noise`: by peer, in the graph's order: all that tells them apart. `distils`: there is a soft loss."""

    corpus: Corpus
    noise: Mapping[str, LabelNoise | None]
    distils: bool

    @staticmethod
    def noise_of(recipe: Recipe, corpus: Corpus) -> dict[str, LabelNoise | None]:
        """Each peer's label noise."""
        return {name: LabelNoise.of(name, peer, corpus) for name, peer in recipe.peers.items()}

    @classmethod
    def asked(cls, recipe: Recipe, peer: str) -> int:
        """All positions."""
        return cls.decoder_length(recipe)

    def cut(
        self,
        inputs: Mapping[str, np.ndarray],
        answers: np.ndarray,
        seed: int,
        epochs: np.ndarray,
        rows: np.ndarray,
        micro_batch: int,
    ) -> Iterator[Batch]:
        """Micro-batches of what models read (int [n, L] each) and are to answer at every position (int32 [n, T])."""
        places = np.arange(answers.shape[1])
        labels = {
            own: answers if own is None else own.apply(answers, places, seed, epochs, rows)
            for own in dict.fromkeys(self.noise.values())
        }
        for start in range(0, len(rows), micro_batch):
            part = slice(start, start + micro_batch)
            seen, asked = {name: _int64(ids[part]) for name, ids in inputs.items()}, answers[part].size
            views = {
                own: View(seen, None, _int64(own_labels[part].ravel()), asked) for own, own_labels in labels.items()
            }
            every = tuple(views[own] for own in self.noise.values())
            yield Batch(every, asked if self.distils else 0, torch.tensor(float(asked)), rows[part])

    def held_out(self) -> Self:
        """Without any peer's noise."""
        return replace(self, noise=dict.fromkeys(self.noise))

    @property
    def soft_count_varies(self) -> bool:
        """It is the number of positions, always."""
        return False

    def exceptions(self) -> Iterator[tuple[str, str]]:
        """(peer, what only it is asked)."""
        return ((name, own.describe()) for name, own in self.noise.items() if own is not None)


def _int64(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array.astype(np.int64))
