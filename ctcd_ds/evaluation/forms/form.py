"""What a form of question is: the head a model gets for it, how rows are read and encoded, how logits are scored."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from ctcd_ds.evaluation.tables import TaskRows
from ctcd_ds.evaluation.tasks import Table, Task

Array = npt.NDArray[Any]
Feature = dict[str, Any]  # one row of a batch, not padded: what the model takes, the answer, and what scoring needs


@dataclass(frozen=True)
class Encoded:
    """Rows as one model reads them. A form that must see a whole row makes several features of a long one."""

    rows: TaskRows
    features: list[Feature]


class Form(ABC):
    """One form of question; all that is particular to it stands in one file here."""

    metrics: ClassVar[tuple[str, ...]]  # what can be measured of its answers
    suffixes: ClassVar[tuple[str, ...]]  # of its files
    called: ClassVar[str]  # the hub's name of it

    @staticmethod
    @abstractmethod
    def auto_class() -> Any:
        """The class of transformers that puts the head onto a model."""

    @abstractmethod
    def head(self, task: Task) -> dict[str, Any]:
        """What the model's config says of the head."""

    @abstractmethod
    def collator(self, tokenizer: Any) -> Any:
        """What makes a batch of features."""

    @abstractmethod
    def read(self, path: Path, table: Table, task: Task) -> tuple[TaskRows, int]:
        """The rows of one file, and how many broken lines were left out. Raises UserError, naming file and line."""

    @abstractmethod
    def encode(self, rows: TaskRows, tokenizer: Any, length: int) -> Encoded:
        """Token ids of the rows, at most `length` in a feature, with the answers where the rows have them."""

    def logits(self, outputs: Any) -> Any:
        """What a model gives for a batch (a tensor, or several of which the first are the logits) → one tensor."""
        return outputs[0] if isinstance(outputs, tuple) else outputs

    @abstractmethod
    def scores(self, task: Task, logits: Array, encoded: Encoded) -> dict[str, float]:
        """The task's metrics, from 0 (or −1) to 1. logits: float32 [features, …] in the order of the features."""


def labels_of(task: Task) -> dict[str, Any]:
    """A classifier's config: the labels by their ids and the other way round."""
    names = dict(enumerate(task.labels))
    return {"id2label": names, "label2id": {name: label for label, name in names.items()}}


def windows(encoding: Any) -> list[Feature]:
    """The features of an encoding with overflowing tokens: what the model takes, and the `row` that each is of."""
    ours = ("overflow_to_sample_mapping", "offset_mapping", "length")
    names = [name for name in encoding if name not in ours]
    rows = encoding["overflow_to_sample_mapping"]
    return [{**{name: encoding[name][n] for name in names}, "row": row} for n, row in enumerate(rows)]


def best_of(task: Task, logits: Array) -> Array:
    """The likeliest classes [...] of logits [..., classes], as the task's own label ids."""
    classes = logits.argmax(axis=-1)
    return np.array(task.of_base)[classes] if task.of_base else classes
