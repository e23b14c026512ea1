"""What a recipe reads: one corpus, or several of one tokenizer, of which each has a fixed share of the rows.

Which rows a step trains on is a pure function of (seed, step), as it is for one corpus: nothing is drawn, nothing is
remembered, and a table of 65,536 places is all the memory it takes, whatever the corpora's sizes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from ctcd_ds.cli import Damage, UserError
from ctcd_ds.corpus.hashing import SOURCE_ORDER, hashed
from ctcd_ds.corpus.rows import Corpus, Rows, endless_rows
from ctcd_ds.manifest import canonical_sha256
from ctcd_ds.recipe.schema import Mistakes
from ctcd_ds.recipe.sections import CorpusSection

PLACES = 1 << 16  # a period: how often each source comes in so many rows is exact


def open_corpus(section: CorpusSection) -> Corpus:
    """The corpus at the recipe's `path`, or the mixture of its `sources`.

    Raises Mistakes with all that is wrong, each with its key; Damage where a corpus is damaged.
    """
    places = {"corpus.path": section.path} if section.path is not None else {}
    places |= {f"corpus.sources.{name}.path": source.path for name, source in (section.sources or {}).items()}
    opened: dict[str, Corpus] = {}
    mistakes = []
    for key, place in places.items():
        try:
            opened[key] = Corpus.open(Path(place))
        except Damage:
            raise
        except UserError as mistake:
            mistakes.append(f"{key} = {place!r}: {mistake}")
    if mistakes := mistakes or list(_unlike(opened)):
        raise Mistakes("the recipe's corpus", mistakes)
    if section.sources is None:
        return opened["corpus.path"]
    # By name, so that their order in the recipe means nothing.
    sources = {name: opened[f"corpus.sources.{name}.path"] for name in sorted(section.sources)}
    return Mixture.of(sources, _weights(section, sources))


def _unlike(opened: Mapping[str, Corpus]) -> Iterator[str]:
    """Why corpora (by their keys) do not make a mixture: they must be different texts of one tokenizer."""
    first, *others = opened.items()
    seen = {first[1].fingerprint: first[0]}
    for key, corpus in others:
        if corpus.tokenizer_fingerprint != first[1].tokenizer_fingerprint:
            yield (
                f"{key} = {str(corpus.path)!r}: its tokenizer ({corpus.vocab_size:,} tokens) is not that of "
                f"{first[0]} ({first[1].vocab_size:,} tokens, {first[1].tokenizer_path}): prepare it with that one"
            )
        if same := seen.get(corpus.fingerprint):
            yield f"{key} = {str(corpus.path)!r}: the same corpus as {same}; name it once, with a larger weight"
        seen[corpus.fingerprint] = key


def _weights(section: CorpusSection, sources: Mapping[str, Corpus]) -> list[float]:
    """The sources' weights as given, or by their sizes. Raises Mistakes where one is too small for a period."""
    assert section.sources is not None
    alpha = section.sampling_alpha
    weights = {
        name: corpus.tokens("train") ** alpha if alpha is not None else section.sources[name].weight or 0.0
        for name, corpus in sources.items()
    }
    whole = sum(weights.values())
    said = [
        f"corpus.sources.{name}: its weight is {weight / whole:.2g} of all, and below 1/{PLACES:,} it may never come; "
        "give it a larger one, or take it out"
        for name, weight in weights.items()
        if weight * PLACES < whole
    ]
    if said:
        raise Mistakes("the recipe's corpus", said)
    return list(weights.values())


@dataclass(frozen=True, kw_only=True)
class Mixture(Corpus):
    """Corpora of one tokenizer as one: `quotas` says how many of PLACES places of training each source has.

    Its splits "train" and "valid" are those of all sources, its held-out splits valid.SOURCE and valid.SOURCE.SET. For
    the tokenizer, `path` is the first source's.
    """

    sources: dict[str, Corpus]
    quotas: tuple[int, ...]

    @classmethod
    def of(cls, sources: dict[str, Corpus], weights: Sequence[float]) -> Mixture:
        """Mixes the sources in their order."""
        first = next(iter(sources.values()))
        same = {field.name: getattr(first, field.name) for field in fields(Corpus)}
        splits = {
            split: tuple(shard for corpus in sources.values() for shard in corpus.splits.get(split, ()))
            for split in ("train", "valid")
        }
        for name, corpus in sources.items():
            splits |= {_within(name, split): corpus.splits[split] for split in corpus.held_out}
        content = {name: corpus.fingerprint for name, corpus in sources.items()}
        quotas = tuple(quotas_of(weights).tolist())
        unigram = _mean([(q, c.unigram_loss) for q, c in zip(quotas, sources.values(), strict=True) if c.held_out])
        own = {"fingerprint": canonical_sha256(content), "splits": splits, "unigram_loss": unigram}
        return cls(**{**same, **own}, sources=sources, quotas=quotas)

    @property
    def parts(self) -> dict[str, Corpus]:
        """The sources by name."""
        return self.sources

    @property
    def shares(self) -> dict[str, float]:
        """The share of the training rows that comes from each source."""
        return {name: quota / PLACES for name, quota in zip(self.sources, self.quotas, strict=True)}

    @property
    def held_out(self) -> dict[str, float]:
        """What the sources hold out, weighted as they are trained on."""
        return {
            _within(name, split): self.shares[name] * weight
            for name, corpus in self.sources.items()
            for split, weight in corpus.held_out.items()
        }

    def rows(
        self,
        split: str,
        sequence_length: int,
        before: tuple[int, ...] = (),
        after: tuple[int, ...] = (),
        lookahead: int = 0,
    ) -> Rows:
        """As of one corpus; the rows of all sources are numbered one source after another."""
        shape = sequence_length, before, after, lookahead
        _, *names = split.split(".")
        if names:
            return self.sources[names[0]].rows(".".join(["valid", *names[1:]]), *shape)
        parts = {
            name: corpus.rows(split, *shape)
            for name, corpus in self.sources.items()
            if split == "train" or corpus.tokens(split)
        }
        return MixedRows(self, split, parts)


def _within(source: str, split: str) -> str:
    """How a mixture calls the held-out split of one of its sources."""
    return f"valid.{source}{split.removeprefix('valid')}"


def _mean(weighted: Sequence[tuple[int, float | None]]) -> float | None:
    """The weighted mean; None where a value is not known, or none is there."""
    known = [(weight, value) for weight, value in weighted if value is not None]
    if not weighted or len(known) < len(weighted):
        return None
    return sum(weight * value for weight, value in known) / sum(weight for weight, _ in known)


def quotas_of(weights: Sequence[float]) -> np.ndarray:
    """int64[n] of sum PLACES, in proportion to the weights: what is left after rounding down goes to the nearest."""
    exact = np.asarray(weights, float) / sum(weights) * PLACES
    quotas: np.ndarray = np.floor(exact).astype(np.int64)
    quotas[np.argsort(quotas - exact, kind="stable")[: PLACES - quotas.sum()]] += 1
    return quotas


class MixedRows(Rows):
    """The rows of several corpora, numbered one corpus after another. In training each has its quota of the places.

    Place g of an endless run is place g mod PLACES of a period, in which every source's places are evenly spread: each
    prefix has of each source its exact share to within half a row for two sources, 4 rows for a hundred. The n-th row
    ever taken of a source is the n-th of that source's own endless order, so each of its rows comes once in its epoch.
    """

    def __init__(self, corpus: Mixture, split: str, parts: dict[str, Rows]) -> None:
        self.corpus, self.split, self._parts = corpus, split, parts
        sizes = np.array([len(rows) for rows in parts.values()], np.int64)
        self._ends = np.cumsum(sizes)
        self._begins = self._ends - sizes
        self._quotas = np.array(corpus.quotas, np.int64)
        # The j-th of a source's q places stands at (j + ½) / q of the period.
        owners = np.repeat(np.arange(len(self._quotas)), self._quotas)
        ranks = np.concatenate([np.arange(quota) for quota in corpus.quotas])
        order = np.argsort((ranks + 0.5) / self._quotas[owners], kind="stable")
        self._owners, self._ranks = owners[order], ranks[order]

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def parts(self) -> dict[str, Rows]:
        """The rows of each source by its name."""
        return self._parts

    def read(self, numbers: np.ndarray) -> np.ndarray:
        """The rows of these numbers (int64[n], each in [0, len(self))): int32[n, sequence_length]."""
        owners = np.searchsorted(self._ends, numbers, side="right")
        found = [
            rows.read(numbers[owners == source] - begin)
            for source, (rows, begin) in enumerate(zip(self._parts.values(), self._begins, strict=True))
        ]
        read = np.concatenate(found)
        read[np.argsort(owners, kind="stable")] = read.copy()
        return read

    def batch(self, seed: int, step: int, global_batch: int) -> tuple[np.ndarray, np.ndarray]:
        """What a step trains on, (epoch int64[B], row int64[B]); epochs are each source's own."""
        period, place = np.divmod(step * global_batch + np.arange(global_batch, dtype=np.int64), PLACES)
        owners = self._owners[place]
        taken = period * self._quotas[owners] + self._ranks[place]  # of its source, before this one
        epochs, numbers = np.empty_like(taken), np.empty_like(taken)
        for source, rows in enumerate(self._parts.values()):
            mine = owners == source
            own_seed = int(hashed(seed, SOURCE_ORDER, source)[0]) if source else seed
            epochs[mine], within = endless_rows(own_seed, len(rows), taken[mine])
            numbers[mine] = self._begins[source] + within
        return epochs, numbers
