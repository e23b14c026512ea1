"""Span corruption, as T5 has it (arXiv 1910.10683): spans of a row are cut out, and written down one after another.

A row of N tokens loses round(mask_fraction · N) of them in spans of `mean_span` on average. The encoder reads what is
left, with a sentinel in the place of each span; the decoder writes each sentinel and the span that it stands for. All
counts are constants, so shapes are static; where the spans lie is a hash of (seed, epoch, row).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ctcd_ds.cli import UserError
from ctcd_ds.corpus.hashing import SPAN_CUTS, SPAN_TURNS, extended, hashed
from ctcd_ds.corpus.rows import Corpus, Role, Rows
from ctcd_ds.objective.batch import Batch
from ctcd_ds.recipe.sections import CorpusSection, Recipe
from ctcd_ds.tasks.everywhere import AskedEverywhere
from ctcd_ds.tasks.task import Words

_PLACE = np.uint64((1 << 16) - 1)  # of a sort key's bits: where in the row; the others are a hash
_TURNS = 8


@dataclass(frozen=True)
class Spans:
    """How rows of `row` tokens become a question of `encoder` and an answer of `decoder` tokens, each the same way."""

    row: int
    noise: int  # tokens of a row that are cut out
    count: int  # spans that they make

    @classmethod
    def of(cls, section: CorpusSection) -> Spans:
        """The longest rows whose question is no longer than `sequence_length`: 568 tokens make 512, as in T5."""
        rows = (cls._cut(section, row) for row in itertools.count(2))
        return list(itertools.takewhile(lambda spans: spans.encoder <= section.sequence_length, rows))[-1]

    @classmethod
    def _cut(cls, section: CorpusSection, row: int) -> Spans:
        noise = min(max(round(section.mask_fraction * row), 1), row - 1)
        return cls(row, noise, max(1, min(round(noise / section.mean_span), noise, row - noise)))

    @property
    def encoder(self) -> int:
        """Tokens that the encoder reads: what is left, a sentinel a span, the end."""
        return self.row - self.noise + self.count + 1

    @property
    def decoder(self) -> int:
        """Tokens that the decoder writes: what is gone, a sentinel a span, the end."""
        return self.noise + self.count + 1

    def pieces(self, tokens: np.ndarray, end: int, seed: int, epochs: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Of each token [n, row] the number of its piece: 0 is left, 1 is cut out, 2 is left, … int64 [n, row].

        All divisions into spans are equally likely. A document's end inside a span would teach to stop early: of a
        few turns of the pattern, the first is taken where none is.
        """
        keys = hashed(seed, SPAN_CUTS, epochs, rows)
        left = _parts(self.row - self.noise, self.count, extended(keys, 1))
        gone = _parts(self.noise, self.count, extended(keys, 2))
        found = self._pieces(left, gone, np.zeros(len(tokens), np.int64))
        ends = tokens == end
        for turn in range(1, _TURNS):
            bad = np.flatnonzero((ends & (found % 2 == 1)).any(axis=1))
            if not len(bad):
                break
            first = hashed(seed, SPAN_TURNS + turn, epochs[bad], rows[bad]) % np.uint64(self.count)
            turned = self._pieces(left[bad], gone[bad], first.astype(np.int64))
            good = ~(ends[bad] & (turned % 2 == 1)).any(axis=1)
            found[bad[good]] = turned[good]
        return found

    def _pieces(self, left: np.ndarray, gone: np.ndarray, first: np.ndarray) -> np.ndarray:
        """Pieces of these sizes [n, count] one after another, beginning with pair number `first` [n]."""
        order = (first[:, None] + np.arange(self.count)) % self.count
        sizes = np.stack([np.take_along_axis(parts, order, axis=1) for parts in (left, gone)], axis=2)
        numbers = np.tile(np.arange(2 * self.count), len(left))
        return np.repeat(numbers, sizes.ravel()).reshape(len(left), self.row)


def _parts(total: int, parts: int, keys: np.ndarray) -> np.ndarray:
    """`parts` positive sizes that add up to `total`, by a key for each row: int64 [n, parts]."""
    if parts == 1:
        return np.full((len(keys), 1), total, np.int64)
    places = np.arange(1, total)
    order = (extended(keys[:, None], places) & ~_PLACE) | places.astype(np.uint64)
    cuts = np.sort((np.partition(order, parts - 2, axis=1)[:, : parts - 1] & _PLACE).astype(np.int64), axis=1)
    return np.diff(cuts, axis=1, prepend=0, append=total)


@dataclass(frozen=True)
class SpanCorruption(AskedEverywhere):
    """Every peer reads the same rows without their spans, and is asked for these."""

    words: ClassVar[Words] = Words(
        model="sequence-to-sequence language model",
        pipeline="text2text-generation",
        example="""question = tokenizer("A <extra_id_0> of text.", return_tensors="pt")
print(tokenizer.decode(model.generate(**question, max_new_tokens=20)[0]))""",
        target="spans",
        aim="to fill in what was cut out",
        limit="It fills in spans that were cut out of a text. Other tasks want fine-tuning",
    )
    roles: ClassVar[tuple[Role, ...]] = ("pad",)

    spans: Spans

    @classmethod
    def of(cls, recipe: Recipe, corpus: Corpus) -> SpanCorruption:
        """The recipe's spans. Raises UserError where the tokenizer has too few sentinels for them."""
        spans, there = Spans.of(recipe.corpus), len(corpus.special.sentinels)
        if there < spans.count:
            raise UserError(
                f"objective.task = span: {spans.count} spans of a row need as many sentinels (<extra_id_0>, …), the "
                f"corpus's tokenizer has {there}: train one with `ctcd tokenizer --sentinels {spans.count}`"
            )
        return cls(corpus, cls.noise_of(recipe, corpus), bool(recipe.graph().distilling()), spans)

    @staticmethod
    def auto_class() -> Any:
        """The class of transformers that builds, loads and exports a peer."""
        from transformers import AutoModelForSeq2SeqLM

        return AutoModelForSeq2SeqLM

    def unfit(self, model: Any) -> str | None:
        """Why a model that gives logits could not learn this all the same: transformers lists models of speech here."""
        if not model.config.is_encoder_decoder:
            return "it has no encoder and decoder, so nothing reads a question and writes an answer"
        return None

    def rows(self, split: str) -> Rows:
        """Rows as they are stored. Raises UserError where the split has none."""
        return self.corpus.rows(split, self.spans.row)

    def batches(
        self, tokens: np.ndarray, seed: int, epochs: np.ndarray, rows: np.ndarray, micro_batch: int
    ) -> Iterator[Batch]:
        """tokens: int32 [n, row]. All peers see the same; their labels differ where they have noise."""
        question, answer = self.corrupted(tokens, seed, epochs, rows)
        start = np.full((len(rows), 1), self.corpus.special.pad, np.int32)
        shown = np.concatenate([start, answer[:, :-1]], axis=1)
        inputs = {"input_ids": question, "decoder_input_ids": shown}
        return self.cut(inputs, answer, seed, epochs, rows, micro_batch)

    def corrupted(
        self, tokens: np.ndarray, seed: int, epochs: np.ndarray, rows: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """(what the encoder reads int32 [n, encoder], what the decoder shall write int32 [n, decoder])."""
        special, spans = self.corpus.special, self.spans
        pieces = spans.pieces(tokens, special.end, seed, epochs, rows)
        gone = pieces % 2 == 1
        begins = np.diff(pieces, axis=1, prepend=0) != 0
        sentinels = np.array(special.sentinels, np.int32)[pieces // 2]
        end = np.full((len(tokens), 1), special.end, np.int32)
        left = np.where(gone, sentinels, tokens)[~gone | begins].reshape(len(tokens), -1)
        # A span's first token comes with its sentinel before it: two places of the answer.
        pairs = np.stack([sentinels, tokens], axis=2)
        written = pairs[np.stack([gone & begins, gone], axis=2)].reshape(len(tokens), -1)
        return np.concatenate([left, end], axis=1), np.concatenate([written, end], axis=1)

    @classmethod
    def decoder_length(cls, recipe: Recipe) -> int:
        """A sentinel a span, what it stands for, the end."""
        return Spans.of(recipe.corpus).decoder

    def describe(self) -> str:
        """What is asked of all peers."""
        spans = self.spans
        shape = f"the encoder reads {spans.encoder} tokens, the decoder writes {spans.decoder}"
        return f"{spans.count} spans of {spans.row} tokens a row; {shape}"
