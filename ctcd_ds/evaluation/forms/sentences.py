"""A label, or a number in a range, for each text or pair of texts: GLUE and tasks like it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ctcd_ds.evaluation import metrics as official
from ctcd_ds.evaluation.forms.form import Array, Encoded, Form, labels_of
from ctcd_ds.evaluation.tables import SUFFIXES, TaskRows, read_table
from ctcd_ds.evaluation.tasks import Table, Task


class Sentences(Form):
    """Rows longer than the model reads are cut."""

    metrics, suffixes, called = official.METRICS, SUFFIXES, "text-classification"

    @staticmethod
    def auto_class() -> Any:
        from transformers import AutoModelForSequenceClassification

        return AutoModelForSequenceClassification

    def head(self, task: Task) -> dict[str, Any]:
        if not task.labels:
            return {"num_labels": 1, "problem_type": "regression"}
        return {**labels_of(task), "problem_type": "single_label_classification"}

    def collator(self, tokenizer: Any) -> Any:
        from transformers import DataCollatorWithPadding

        return DataCollatorWithPadding(tokenizer)

    def read(self, path: Path, table: Table, task: Task) -> tuple[TaskRows, int]:
        return read_table(path, table, task)

    def encode(self, rows: TaskRows, tokenizer: Any, length: int) -> Encoded:
        encoded = tokenizer(
            *(list(sentences) for sentences in zip(*rows.texts, strict=True)),
            truncation=True,
            max_length=length,
            return_attention_mask=False,  # all ones; padding makes it
        )
        features = [{name: values[row] for name, values in encoded.items()} for row in range(len(rows))]
        for feature, label in zip(features, rows.labels or (), strict=rows.labels is not None):
            feature["labels"] = label
        return Encoded(rows, features)

    def scores(self, task: Task, logits: Array, encoded: Encoded) -> dict[str, float]:
        assert encoded.rows.labels is not None
        return official.scores(task, official.predictions(task, logits), encoded.rows.labels)
