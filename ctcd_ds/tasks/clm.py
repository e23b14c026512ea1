"""Causal language modelling: at every position of a row, the token that comes next.

Row r is S[r·L : r·L + L + 1] of the stream S of all documents, as Megatron's and nanoGPT's are: the models see its
first L tokens and are asked for its last L, so that an epoch asks for every token but the first once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ctcd_ds.corpus.rows import Corpus, Role, Rows
from ctcd_ds.objective.batch import Batch
from ctcd_ds.peers.reading import keeps_apart, sees_the_future
from ctcd_ds.recipe.sections import Recipe
from ctcd_ds.tasks.everywhere import AskedEverywhere
from ctcd_ds.tasks.task import Words


@dataclass(frozen=True)
class CausalLM(AskedEverywhere):
    """`apart`: no position sees a document before its own."""

    words: ClassVar[Words] = Words(
        model="causal language model",
        pipeline="text-generation",
        example="""write = pipeline("text-generation", model=model, tokenizer=tokenizer)
# a tokenizer with [SEP] would put it behind the words, and a new text would begin
whole = {"max_new_tokens": 40, "add_special_tokens": tokenizer.sep_token is None}
print(write("A piece of", **whole)[0]["generated_text"])""",
        target="next tokens",
        aim="to say which word comes next",
        limit="It goes on with a text, token by token. What it writes need not be true",
    )
    roles: ClassVar[tuple[Role, ...]] = ()

    sequence_length: int
    apart: bool = False

    @classmethod
    def of(cls, recipe: Recipe, corpus: Corpus) -> CausalLM:
        """The recipe's rows, with each peer's label noise."""
        noise, distils = cls.noise_of(recipe, corpus), bool(recipe.graph().distilling())
        return cls(corpus, noise, distils, recipe.corpus.sequence_length, recipe.corpus.documents == "apart")

    @staticmethod
    def auto_class() -> Any:
        """The class of transformers that builds, loads and exports a peer."""
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM

    def unfit(self, model: Any) -> str | None:
        """Why a model that gives logits could not learn this all the same."""
        if sees_the_future(model):
            return "its positions see what comes after them, so it would copy the next token: it is no causal model"
        if self.apart and not keeps_apart(model):
            return (
                "corpus.documents = apart: it does not tell documents apart by position ids that begin again; use "
                "documents: joined"
            )
        return None

    def rows(self, split: str) -> Rows:
        """Rows as they are stored, each with the first token of the next. UserError where the split has none."""
        return self.corpus.rows(split, self.sequence_length, lookahead=1)

    def bytes_per_target(self, split: str) -> float | None:
        """UTF-8 bytes of text that one target stands for, on average."""
        return self.corpus.bytes_per_token(split)

    def batches(
        self, tokens: np.ndarray, seed: int, epochs: np.ndarray, rows: np.ndarray, micro_batch: int
    ) -> Iterator[Batch]:
        """tokens: int32 [n, L + 1]. All peers see the same; their labels differ where they have noise."""
        inputs = {"input_ids": tokens[:, :-1]}
        if self.apart:
            inputs["position_ids"] = positions_by_document(tokens[:, :-1], self.corpus.special.end)
        return self.cut(inputs, tokens[:, 1:], seed, epochs, rows, micro_batch)

    def describe(self) -> str:
        """What is asked of all peers."""
        return (
            f"the next token at all {self.sequence_length} positions, documents {'apart' if self.apart else 'joined'}"
        )


def positions_by_document(tokens: np.ndarray, end: int) -> np.ndarray:
    """Places in the document that each token [n, L] is in, from 0 on: int64 [n, L]. A row's start begins one too."""
    places = np.arange(tokens.shape[1], dtype=np.int64)
    starts = np.zeros(tokens.shape, np.int64)
    starts[:, 1:] = np.where(tokens[:, :-1] == end, places[1:], 0)
    return places - np.maximum.accumulate(starts, axis=1)
