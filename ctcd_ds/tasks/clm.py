"""Causal language modelling: at every position of a row, the token that comes next.

Row r is S[r·L : r·L + L + 1] of the stream S of all documents, as Megatron's and nanoGPT's are: the models see its
first L tokens and are asked for its last L, so that an epoch asks for every token but the first once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch

from ctcd_ds.corpus.rows import Corpus, Role, Rows
from ctcd_ds.objective.batch import Batch, View
from ctcd_ds.peers.reading import keeps_apart, sees_the_future
from ctcd_ds.recipe import Recipe
from ctcd_ds.tasks.noise import LabelNoise
from ctcd_ds.tasks.task import Task, Words


@dataclass(frozen=True)
class CausalLM(Task):
    """`noise`: by peer, in the graph's order. `apart`: no position sees a document before its own."""

    words: ClassVar[Words] = Words(
        model="causal language model",
        pipeline="text-generation",
        example="""write = pipeline("text-generation", model=model, tokenizer=tokenizer)
print(write("A piece of", max_new_tokens=40)[0]["generated_text"])""",
        target="next tokens",
        aim="to say which word comes next",
        limit="It goes on with a text, token by token. What it writes need not be true",
    )
    roles: ClassVar[tuple[Role, ...]] = ()

    corpus: Corpus
    sequence_length: int
    noise: dict[str, LabelNoise | None]
    apart: bool
    distils: bool

    @classmethod
    def of(cls, recipe: Recipe, corpus: Corpus) -> CausalLM:
        """The recipe's rows, with each peer's label noise."""
        noise = {name: LabelNoise.of(name, peer, corpus) for name, peer in recipe.peers.items()}
        apart = recipe.corpus.documents == "apart"
        return cls(corpus, recipe.corpus.sequence_length, noise, apart, bool(recipe.graph().distilling()))

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
        seen, targets = tokens[:, :-1], tokens[:, 1:]
        places = np.arange(targets.shape[1])
        labels = {
            own: targets if own is None else own.apply(targets, places, seed, epochs, rows)
            for own in dict.fromkeys(self.noise.values())
        }
        for start in range(0, len(rows), micro_batch):
            part = slice(start, start + micro_batch)
            inputs = self._inputs(seen[part])
            views = {own: View(inputs, None, _int64(y[part].ravel()), y[part].size) for own, y in labels.items()}
            asked = targets[part].size
            shared = asked if self.distils else 0
            yield Batch(
                tuple(views[own] for own in self.noise.values()), shared, torch.tensor(float(asked)), rows[part]
            )

    def _inputs(self, seen: np.ndarray) -> dict[str, torch.Tensor]:
        inputs = {"input_ids": _int64(seen)}
        if self.apart:
            inputs["position_ids"] = _int64(positions_by_document(seen, self.corpus.special.end))
        return inputs

    def held_out(self) -> CausalLM:
        """Without any peer's noise."""
        return replace(self, noise=dict.fromkeys(self.noise))

    @property
    def soft_count_varies(self) -> bool:
        """It is the number of tokens, always."""
        return False

    @staticmethod
    def asked(recipe: Recipe, peer: str) -> int:
        """All positions."""
        return recipe.corpus.sequence_length

    def describe(self) -> str:
        """What is asked of all peers."""
        return (
            f"the next token at all {self.sequence_length} positions, documents {'apart' if self.apart else 'joined'}"
        )

    def exceptions(self) -> Iterator[tuple[str, str]]:
        """(peer, what only it is asked)."""
        for name, own in self.noise.items():
            if own is not None:
                yield name, own.describe()


def positions_by_document(tokens: np.ndarray, end: int) -> np.ndarray:
    """Places in the document that each token [n, L] is in, from 0 on: int64 [n, L]. A row's start begins one too."""
    places = np.arange(tokens.shape[1], dtype=np.int64)
    starts = np.zeros(tokens.shape, np.int64)
    starts[:, 1:] = np.where(tokens[:, :-1] == end, places[1:], 0)
    return places - np.maximum.accumulate(starts, axis=1)


def _int64(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array.astype(np.int64))
