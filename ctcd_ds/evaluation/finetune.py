"""One model on one task with one seed: fine-tuned with Hugging Face's Trainer, measured on dev, predicting test."""

from __future__ import annotations

import contextlib
import math
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ctcd_ds.cli import UserError
from ctcd_ds.evaluation import metrics
from ctcd_ds.evaluation.data import TaskData
from ctcd_ds.evaluation.metrics import Array
from ctcd_ds.evaluation.tables import TaskRows
from ctcd_ds.evaluation.tasks import Task
from ctcd_ds.manifest import file_entry
from ctcd_ds.memory import keep_freed_memory
from ctcd_ds.peers.build import quiet_transformers
from ctcd_ds.peers.reading import fit_tokenizer, row_limit

Feature = dict[str, Any]

NO_LIMIT = 1 << 30  # tokens of a row, of a model whose config states none


@dataclass(frozen=True)
class FinetuneSettings:
    """How every model is fine-tuned. The defaults are BERT's (3 epochs of batches of 32, Adam, linear decay)."""

    epochs: float = 3.0
    learning_rate: float = 5e-5
    batch_size: int = 32
    max_length: int = 128  # tokens of a row; fewer where a model has fewer positions
    weight_decay: float = 0.01
    warmup_fraction: float = 0.1
    max_train_samples: int | None = None
    max_eval_samples: int | None = None

    def __post_init__(self) -> None:
        for name in ("epochs", "learning_rate", "batch_size", "max_length", "max_train_samples", "max_eval_samples"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"--{name}: {value} is not above 0")


@dataclass(frozen=True)
class Checkpoint:
    """A model directory that can be fine-tuned."""

    path: Path
    name: str  # in tables
    sha256: str  # of its weights
    positions: int  # tokens of the longest row it can read
    tokenizer: Any  # gives what the model takes


def open_checkpoint(path: Path, name: str) -> Checkpoint:
    """Loads a model directory once, to see that it can be fine-tuned. Raises UserError where it cannot."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    weights = sorted([*path.glob("*.safetensors"), *path.glob("pytorch_model*.bin")])
    if not weights:
        raise UserError(f"--model: {path} has no weights (model.safetensors)")
    try:
        model, loading = AutoModelForSequenceClassification.from_pretrained(
            path, local_files_only=True, trust_remote_code=False, output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as problem:  # transformers, safetensors and json have many, with no common base
        reason = " ".join(str(problem).split())
        raise UserError(f"--model: {path} cannot be opened for fine-tuning: {reason}") from None
    if unfit := [key for key in loading["missing_keys"] if _is_of_the_body(key, model)]:
        raise UserError(f"--model: the weights in {path} do not fit its config.json: {sorted(unfit)[0]} is missing")
    if tokenizer.pad_token_id is None:
        raise UserError(f"--model: {path}: its tokenizer has no padding token")
    fit_tokenizer(tokenizer, model)
    return Checkpoint(
        path=path,
        name=name,
        sha256="+".join(file_entry(file)["sha256"] for file in weights),
        positions=row_limit(model) or NO_LIMIT,
        tokenizer=tokenizer,
    )


def _is_of_the_body(key: str, model: Any) -> bool:
    """Whether a weight belongs to what was pretrained; heads are new, and so is BERT's pooler after masked LM."""
    return key.startswith(f"{model.base_model_prefix}.") and ".pooler." not in key


def encode(rows: TaskRows, checkpoint: Checkpoint, max_length: int) -> list[Feature]:
    """Token ids of each row, cut to `max_length`, not padded yet, with `labels` where there are any."""
    encoded = checkpoint.tokenizer(
        *(list(sentences) for sentences in zip(*rows.texts, strict=True)),
        truncation=True,
        max_length=min(max_length, checkpoint.positions),
        return_attention_mask=False,  # all ones; padding makes it
    )
    features: list[Feature] = [{name: values[row] for name, values in encoded.items()} for row in range(len(rows))]
    if rows.labels is not None:
        for feature, label in zip(features, rows.labels, strict=True):
            feature["labels"] = label
    return features


def subset(rows: TaskRows, size: int | None) -> TaskRows:
    """`size` rows drawn at random, the same ones every time, in their order; all rows where there are fewer."""
    if size is None or size >= len(rows):
        return rows
    chosen = sorted(np.random.default_rng(0).permutation(len(rows))[:size].tolist())
    return TaskRows(
        [rows.texts[row] for row in chosen],
        None if rows.labels is None else [rows.labels[row] for row in chosen],
        [rows.index[row] for row in chosen],
    )


@dataclass(frozen=True)
class TokenisedTask:
    """A task's rows as one model reads them, with the answers. Shared by all seeds."""

    train: list[Feature]
    dev: dict[str, list[Feature]]


def encode_task(data: TaskData, checkpoint: Checkpoint, settings: FinetuneSettings) -> TokenisedTask:
    """Tokenises the training and dev rows of a task; a diagnostic has no training rows."""
    train = subset(data.train, settings.max_train_samples) if data.train else None
    return TokenisedTask(
        encode(train, checkpoint, settings.max_length) if train else [],
        {
            key: encode(subset(rows, settings.max_eval_samples), checkpoint, settings.max_length)
            for key, rows in data.dev.items()
        },
    )


def steps(rows: int, settings: FinetuneSettings) -> int:
    """Optimiser steps of one fine-tuning."""
    per_epoch = math.ceil(min(rows, settings.max_train_samples or rows) / settings.batch_size)
    return math.ceil(per_epoch * settings.epochs)


def precision() -> str:
    """bf16 on a GPU that has it, else fp32."""
    import torch

    return "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "fp32"


@dataclass
class Finetuned:
    """A fine-tuned model, with what was measured on dev."""

    trainer: Any
    metrics: dict[str, float]
    train_loss: float
    seconds: float

    def predict(self, features: Sequence[Feature]) -> Array:
        """Logits [rows, classes], float32. Rows of like length go through the model together."""
        order = np.argsort([len(feature["input_ids"]) for feature in features], kind="stable")
        logits = self.trainer.predict([features[row] for row in order]).predictions
        unsorted = np.empty_like(logits, dtype=np.float32)
        unsorted[order] = logits
        return unsorted

    def measure(self, task: Task, encoded: TokenisedTask) -> dict[str, float]:
        """The metrics of a task on its dev rows; those of several dev sets are named metric_KEY."""
        measured: dict[str, float] = {}
        for key, features in encoded.dev.items():
            answers = metrics.predictions(task, self.predict(features))
            found = metrics.scores(task, answers, [feature["labels"] for feature in features])
            measured |= {f"{name}_{key}" if key else name: value for name, value in found.items()}
        return measured


def finetune(
    checkpoint: Checkpoint, task: Task, encoded: TokenisedTask, seed: int, settings: FinetuneSettings, bar: Any
) -> Finetuned:
    """Fine-tunes a fresh copy of a model; a pure function of its arguments on one device at equal threads.

    `bar`, a tqdm bar, advances with every optimiser step and shows the training loss.
    """
    import torch
    from transformers import (
        AutoModelForSequenceClassification,
        DataCollatorWithPadding,
        Trainer,
        TrainingArguments,
        set_seed,
    )

    started = time.monotonic()
    if not torch.cuda.is_available():
        keep_freed_memory()
    set_seed(seed)  # the head's initial weights
    kind: dict[str, Any] = {"num_labels": 1, "problem_type": "regression"}
    if task.labels:
        names = dict(enumerate(task.labels))
        kind = {"id2label": names, "label2id": {name: label for label, name in names.items()}}
        kind["problem_type"] = "single_label_classification"
    with tempfile.TemporaryDirectory(prefix="glue-") as scratch:
        arguments = TrainingArguments(
            output_dir=scratch,
            num_train_epochs=settings.epochs,
            learning_rate=settings.learning_rate,
            per_device_train_batch_size=settings.batch_size,
            per_device_eval_batch_size=64,
            weight_decay=settings.weight_decay,
            warmup_steps=settings.warmup_fraction,
            lr_scheduler_type="linear",
            bf16=precision() == "bf16",
            seed=seed,
            save_strategy="no",
            logging_steps=10,
            disable_tqdm=True,
            report_to=[],
            dataloader_pin_memory=precision() == "bf16",
        )
        model = AutoModelForSequenceClassification.from_pretrained(
            checkpoint.path, dtype="float32", local_files_only=True, trust_remote_code=False, **kind
        )
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=encoded.train,
            data_collator=DataCollatorWithPadding(checkpoint.tokenizer),
            callbacks=[_progress(bar)],
        )
        _remove_printer(trainer)
        outcome = trainer.train()
        finetuned = Finetuned(trainer, {}, float(outcome.training_loss), 0.0)
        finetuned.metrics = finetuned.measure(task, encoded)
    finetuned.seconds = time.monotonic() - started
    return finetuned


def _progress(bar: Any) -> Any:
    """A Trainer callback that moves a tqdm bar."""
    from transformers import TrainerCallback

    class Progress(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            bar.update()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if "loss" in (logs or {}):
                bar.set_postfix(loss=f"{float(logs['loss']):.3f}", refresh=False)

    return Progress()


def _remove_printer(trainer: Any) -> None:
    from transformers.trainer_callback import PrinterCallback

    trainer.remove_callback(PrinterCallback)  # prints every log where the Trainer's own bar is off


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keeps transformers from telling, for every fine-tuning, that the head is new, and from its own bars."""
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # accelerate imports deepspeed, which else warns of no GPU
    with quiet_transformers():
        yield
