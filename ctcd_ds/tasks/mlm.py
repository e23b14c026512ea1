"""Masked language modelling: what is masked in a row, for all peers or for one, and what each is asked.

Three keys of a peer make it differ from the others (`label_noise`, `mask_seed`, `mask_fraction`); only this file knows
them. They are for training rows: held-out rows are masked the same for everybody.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch

from ctcd_ds.corpus.hashing import OWN_MASKS, hashed
from ctcd_ds.corpus.rows import MASKED_LM, Corpus, Role, Rows
from ctcd_ds.objective.batch import NO_TARGET, Batch, View
from ctcd_ds.recipe.sections import PeerSection, Recipe
from ctcd_ds.tasks.masking import Masking, target_count
from ctcd_ds.tasks.noise import LabelNoise
from ctcd_ds.tasks.task import Task, Words

Masked = tuple[np.ndarray, np.ndarray, np.ndarray]  # input_ids [n, L], positions [n, k], targets [n, k]


@dataclass(frozen=True)
class PeerMasks:
    """How one peer's rows are masked, and which of its labels are noise.

    `mask_seed` None: the run's masks. With the same seed and another `mask_fraction` the smaller set of targets lies in
    the larger one: both are the positions with the smallest hashes. `distils`: the peer teaches or learns from another.
    """

    masking: Masking
    mask_seed: int | None = None
    noise: LabelNoise | None = None
    distils: bool = True

    def apply(self, tokens: np.ndarray, seed: int, epochs: np.ndarray, rows: np.ndarray) -> Masked:
        """As `Masking.apply`, the targets with this peer's noise."""
        masks = seed if self.mask_seed is None else int(hashed(seed, OWN_MASKS, self.mask_seed)[0])
        input_ids, positions, targets = self.masking.apply(tokens, masks, epochs, rows)
        if self.noise is not None:
            targets = self.noise.apply(targets, positions, seed, epochs, rows)
        return input_ids, positions, targets


@dataclass(frozen=True)
class MaskedLM(Task):
    """`masks`: by peer, in the graph's order; those of peers that see the same are equal.

    Soft losses are at the targets that all distilling peers have in common, or `everywhere`: at all positions of text.
    """

    words: ClassVar[Words] = Words(
        model="masked language model",
        pipeline="fill-mask",
        example="""fill = pipeline("fill-mask", model=model, tokenizer=tokenizer)
print(fill(f"A {tokenizer.mask_token} of text."))""",
        target="masked tokens",
        aim="to fill in hidden words",
        limit="It fills in masked tokens. It does not write text",
    )

    roles: ClassVar[tuple[Role, ...]] = MASKED_LM

    corpus: Corpus
    sequence_length: int
    common: Masking
    masks: dict[str, PeerMasks]
    everywhere: bool = False

    @classmethod
    def of(cls, recipe: Recipe, corpus: Corpus) -> MaskedLM:
        """The recipe's masks, with what single peers have of their own."""
        common = _masking(recipe, corpus)
        distilling = recipe.graph().distilling()
        masks = {
            name: PeerMasks(
                masking=_own(common, peer),
                mask_seed=peer.mask_seed,
                noise=LabelNoise.of(name, peer, corpus),
                distils=name in distilling,
            )
            for name, peer in recipe.peers.items()
        }
        return cls(corpus, recipe.corpus.sequence_length, common, masks, recipe.objective.soft_positions == "all")

    @staticmethod
    def auto_class() -> Any:
        """The class of transformers that builds, loads and exports a peer."""
        from transformers import AutoModelForMaskedLM

        return AutoModelForMaskedLM

    def rows(self, split: str) -> Rows:
        """Rows in the tokenizer's frame, [CLS] … [SEP]. Raises UserError where the split has not enough text."""
        return self.corpus.rows(split, self.sequence_length, *self.corpus.frame)

    def batches(
        self, tokens: np.ndarray, seed: int, epochs: np.ndarray, rows: np.ndarray, micro_batch: int
    ) -> Iterator[Batch]:
        """What all peers see of these rows, masked together and then cut."""
        seen = {own: own.apply(tokens, seed, epochs, rows) for own in dict.fromkeys(self.masks.values())}
        for start in range(0, len(rows), micro_batch):
            part = slice(start, start + micro_batch)
            cut = {own: (ids[part], places[part], labels[part]) for own, (ids, places, labels) in seen.items()}
            yield self._batch(tokens[part], cut, rows[part])

    def _batch(self, tokens: np.ndarray, seen: dict[PeerMasks, Masked], rows: np.ndarray) -> Batch:
        if len(seen) == 1 and not self.everywhere:  # what most runs do, without maps over all positions
            [(own, masked)] = seen.items()
            views = {own: _plain_view(masked)}
            shared = masked[2].size if own.distils else 0
        else:
            asked = {own: _marked(tokens, positions) for own, (_, positions, _) in seen.items()}
            soft = self._soft(tokens, asked)
            shared = int(soft.sum())
            views = {own: _mapped_view(masked, asked[own], soft & own.distils) for own, masked in seen.items()}
        count = torch.tensor(float(max(1, shared)))
        return Batch(tuple(views[own] for own in self.masks.values()), shared, count, rows)

    def _soft(self, tokens: np.ndarray, asked: dict[PeerMasks, np.ndarray]) -> np.ndarray:
        """Which positions have the soft losses: bool [n, L]."""
        distilling = [marked for own, marked in asked.items() if own.distils]
        if not distilling:
            return np.zeros(tokens.shape, bool)
        if self.everywhere:  # a row short of text has special tokens among its targets
            return np.logical_or.reduce([~self.corpus.special.reserved(tokens), *asked.values()])
        return np.logical_and.reduce(distilling)

    def held_out(self) -> MaskedLM:
        """The recipe's masks for all peers."""
        return replace(self, masks=dict.fromkeys(self.masks, PeerMasks(self.common)), everywhere=False)

    @property
    def soft_count_varies(self) -> bool:
        """Whether batches differ in the number of soft positions."""
        distilling = {own for own in self.masks.values() if own.distils}
        return bool(distilling) and (self.everywhere or len(distilling) > 1)

    @classmethod
    def asked(cls, recipe: Recipe, peer: str) -> int:
        """At how many positions of a row this peer gives logits, at most."""
        length, own = recipe.corpus.sequence_length, recipe.peers[peer].mask_fraction
        if recipe.objective.soft_positions == "all" and peer in recipe.graph().distilling():
            return length
        return target_count(recipe.corpus.mask_fraction if own is None else own, length)

    def describe(self) -> str:
        """What is asked of all peers."""
        soft = "all" if self.everywhere else "targets"
        return f"{self.common.count(self.sequence_length)} masked tokens a row, soft loss at {soft}"

    def exceptions(self) -> Iterator[tuple[str, str]]:
        """(peer, what only it sees or is asked)."""
        for name, own in self.masks.items():
            if own.noise is not None:
                yield name, own.noise.describe()
            if own.mask_seed is not None or own.masking is not self.common:
                seed = "the run's seed" if own.mask_seed is None else f"mask_seed {own.mask_seed}"
                common = "" if self.everywhere else "; soft losses where both are masked"
                yield name, f"masks of its own ({own.masking.mask_fraction:.0%}, {seed}){common}"


def _masking(recipe: Recipe, corpus: Corpus) -> Masking:
    """How the recipe masks the rows of this corpus."""
    continuing = None
    if recipe.corpus.whole_word_masking:
        from ctcd_ds.corpus.tokenizer import continuations, load_tokenizer

        continuing = continuations(load_tokenizer(corpus.tokenizer_path))
    return Masking(
        mask_fraction=recipe.corpus.mask_fraction,
        special=corpus.special,
        vocab_size=corpus.vocab_size,
        whole_word=recipe.corpus.whole_word_masking,
        continuations=continuing,
    )


def _own(common: Masking, peer: PeerSection) -> Masking:
    """The recipe's masking with the peer's own fraction."""
    return common if peer.mask_fraction is None else replace(common, mask_fraction=peer.mask_fraction)


def _plain_view(masked: Masked) -> View:
    """Asked at its targets, row by row."""
    input_ids, positions, targets = masked
    flat = positions + np.arange(len(positions))[:, None] * input_ids.shape[1]
    return View({"input_ids": _int64(input_ids)}, _int64(flat.ravel()), _int64(targets.ravel()), targets.size)


def _mapped_view(masked: Masked, asked: np.ndarray, soft: np.ndarray) -> View:
    """Asked at the soft positions, then at its other targets. asked, soft: bool [n, L]."""
    input_ids, positions, targets = masked
    flat = np.concatenate([np.flatnonzero(soft), np.flatnonzero(asked & ~soft)])
    labels = np.full(input_ids.shape, NO_TARGET, np.int64)
    np.put_along_axis(labels, positions, targets, axis=1)
    return View({"input_ids": _int64(input_ids)}, torch.from_numpy(flat), _int64(labels.ravel()[flat]), targets.size)


def _int64(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array.astype(np.int64))


def _marked(tokens: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Where these positions (int [n, k]) are: bool [n, L]."""
    marked = np.zeros(tokens.shape, bool)
    np.put_along_axis(marked, positions, True, axis=1)
    return marked
