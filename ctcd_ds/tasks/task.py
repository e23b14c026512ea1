"""What a task is: how rows are framed, what is asked where, which Auto class its models have, and its words."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple

import numpy as np

from ctcd_ds.corpus.rows import Corpus, Role, Rows
from ctcd_ds.objective.batch import Batch
from ctcd_ds.recipe.sections import Recipe

VALID_SEED = 0x7A11D  # held-out rows are asked the same at every step, in every run, whatever its seed


class Words(NamedTuple):
    """How cards speak of a task's models."""

    model: str  # masked language model
    pipeline: str  # the hub's name of what it does
    example: str  # program lines that show `model` and `tokenizer` at work
    target: str  # what it is scored on
    aim: str  # what it is trained for, after "a model was trained on text"
    limit: str  # what it does, and what it does not


class Task(ABC):
    """One way of asking language models about rows of text; all that is particular to it stands in one file here.

    A task is made for one recipe and one corpus, and hands every peer what it sees and is asked.
    """

    words: ClassVar[Words]
    roles: ClassVar[tuple[Role, ...]]  # special tokens that the corpus's tokenizer must have

    @classmethod
    @abstractmethod
    def of(cls, recipe: Recipe, corpus: Corpus) -> Task:
        """The recipe's task on this corpus."""

    @staticmethod
    @abstractmethod
    def auto_class() -> Any:
        """The class of transformers that builds, loads and exports a peer."""

    def unfit(self, model: Any) -> str | None:
        """Why a model of the Auto class, which gives logits, could not learn this all the same; None where it can."""
        return None

    def bytes_per_target(self, split: str) -> float | None:
        """UTF-8 bytes of text that a target stands for, where the targets are the text; else None."""
        return None

    @classmethod
    def decoder_length(cls, recipe: Recipe) -> int:
        """Tokens of a row that a decoder reads, behind an encoder that reads `sequence_length`."""
        return recipe.corpus.sequence_length

    @classmethod
    @abstractmethod
    def asked(cls, recipe: Recipe, peer: str) -> int:
        """At how many positions of a row this peer gives logits, at most."""

    @abstractmethod
    def rows(self, split: str) -> Rows:
        """The corpus's rows of a split, framed as this task's models read them. UserError where there are none."""

    @abstractmethod
    def batches(
        self, tokens: np.ndarray, seed: int, epochs: np.ndarray, rows: np.ndarray, micro_batch: int
    ) -> Iterator[Batch]:
        """Micro-batches of tokens int32 [n, …], as `rows` reads them, of these epochs and row numbers (int64 [n])."""

    @abstractmethod
    def held_out(self) -> Task:
        """The same task without what single peers have of their own: held-out rows are asked the same of all."""

    @property
    @abstractmethod
    def soft_count_varies(self) -> bool:
        """Whether batches differ in the number of soft positions: it must then be counted over all ranks."""

    @abstractmethod
    def describe(self) -> str:
        """What is asked of all peers, in words for --dry_run."""

    @abstractmethod
    def exceptions(self) -> Iterator[tuple[str, str]]:
        """(peer, what only it sees or is asked, in words) for all that differ."""
