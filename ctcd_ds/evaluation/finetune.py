"""One model on one task with one seed: fine-tuned with Hugging Face's Trainer, measured on dev, predicting test."""

from __future__ import annotations

import contextlib
import math
import os
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers.processors import TemplateProcessing

from ctcd_ds.cli import UserError
from ctcd_ds.corpus.tokenizer import load_tokenizer
from ctcd_ds.evaluation.data import TaskData
from ctcd_ds.evaluation.forms import SENTENCES, form_of
from ctcd_ds.evaluation.forms.form import Array, Encoded, Feature, Form
from ctcd_ds.evaluation.tables import TaskRows
from ctcd_ds.evaluation.tasks import Task
from ctcd_ds.kinds import weights_in
from ctcd_ds.manifest import file_entry
from ctcd_ds.memory import keep_freed_memory
from ctcd_ds.peers.build import quiet_transformers
from ctcd_ds.peers.reading import fit_tokenizer, refuse_foreign, row_limit

NO_LIMIT = 1 << 30  # tokens of a row, of a model whose config states none
FEW_STEPS = 100  # at least, of fine-tuning on a few examples: three passes over 16 of them teach nothing


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
    """A model that can be fine-tuned."""

    path: Path  # a directory
    name: str  # in tables
    sha256: str  # of its weights
    positions: int  # tokens of the longest row it can read
    tokenizer: Any  # gives what the model takes, pads, and keeps two texts apart


def open_checkpoint(path: Path, name: str, forms: Sequence[Form] = (SENTENCES,)) -> Checkpoint:
    """Loads a model directory once, to see that it can be fine-tuned for these forms. Raises UserError where not."""
    from transformers import AutoConfig

    sha256 = weights_sha256(path)
    local = {"local_files_only": True, "trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(path, **local)
        for form in forms:
            if type(config) not in form.auto_class()._model_mapping:
                raise UserError(
                    f"--model: {path}: transformers has no head for {form.called} on {config.model_type}; "
                    f"leave out the tasks that are measured by {' or '.join(form.metrics)}, or this model"
                )
        tokenizer = load_tokenizer(path)
        _complete(tokenizer, path)
        missing: list[str] = []
        for form in forms:
            model, unfit = load(form, path, tokenizer)
            missing += unfit
    except UserError:
        raise
    except Exception as problem:  # transformers, safetensors and json have many, with no common base
        reason = " ".join(str(problem).split())
        raise UserError(f"--model: {path} cannot be opened for fine-tuning: {reason}") from None
    if missing:
        raise UserError(f"--model: the weights in {path} do not fit its config.json: {missing[0]} is missing")
    refuse_foreign(tokenizer, model, path)
    fit_tokenizer(tokenizer, model)
    return Checkpoint(
        path=path,
        name=name,
        sha256=sha256,
        positions=row_limit(model) or NO_LIMIT,
        tokenizer=tokenizer,
    )


def weights_sha256(path: Path) -> str:
    """The hashes of a model's weight files. Raises UserError where it has none."""
    weights = weights_in(path)
    if not weights:
        raise UserError(f"--model: {path} has no weights (model.safetensors)")
    return "+".join(file_entry(file)["sha256"] for file in weights)


def load(form: Form, path: Path, tokenizer: Any, **kind: Any) -> tuple[Any, list[str]]:
    """A pretrained model under a new head, and the weights of its body that `path` does not have.

    Its config names the tokenizer's padding: by it a causal classifier finds the last token of a row.
    The head's class may call the body otherwise than the checkpoint does, as Llama's does for answers: then nothing of
    it arrives, and it is loaded by itself.
    """
    from transformers import AutoModel

    how = {"local_files_only": True, "trust_remote_code": False, "output_loading_info": True, **kind}
    model, loading = form.auto_class().from_pretrained(path, **how)
    prefix = model.base_model_prefix
    missing = _of_the_body(key for key in loading["missing_keys"] if key.startswith(f"{prefix}."))
    if missing:
        body, loading = AutoModel.from_pretrained(path, **how)
        if type(body) is type(getattr(model, prefix)):
            setattr(model, prefix, body)
            missing = _of_the_body(loading["missing_keys"])
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    return model, missing


def _of_the_body(keys: Iterable[str]) -> list[str]:
    """Of missing weights those that were pretrained; heads are new, and so is BERT's pooler after masked LM."""
    return sorted(key for key in keys if "pooler." not in key)


def _complete(tokenizer: Any, path: Path) -> None:
    """Gives a causal model's tokenizer what fine-tuning needs: a padding token, and an end after each text of a pair.

    GPT-2's, which knows one special token and puts it nowhere, would run two sentences into one.
    """
    end = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        if end is None:
            raise UserError(f"--model: {path}: its tokenizer has no padding token, and no end token to take for it")
        tokenizer.pad_token = end
    tokenizer.padding_side = "right"  # where a row's tokens are counted from
    if end is not None and not tokenizer.num_special_tokens_to_add(pair=True):
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"$A {end}", pair=f"$A {end} $B {end}", special_tokens=[(end, tokenizer.eos_token_id)]
        )


def subset(rows: TaskRows, size: int | None) -> TaskRows:
    """`size` rows drawn at random, the same ones every time, in their order; all rows where there are fewer."""
    if size is None or size >= len(rows):
        return rows
    return _only(rows, sorted(np.random.default_rng(0).permutation(len(rows))[:size].tolist()))


def _only(rows: TaskRows, chosen: Sequence[int]) -> TaskRows:
    return TaskRows(
        [rows.texts[row] for row in chosen],
        None if rows.labels is None else [rows.labels[row] for row in chosen],
        [rows.index[row] for row in chosen],
    )


def few(rows: TaskRows, number: int, seed: int) -> TaskRows:
    """`number` rows drawn by the seed, with labels as even as the rows allow; fewer are the first of more."""
    turns: Counter[Any] = Counter()
    ranks = {}
    for row in np.random.default_rng(seed).permutation(len(rows)).tolist():
        label = rows.labels[row] if rows.labels else None
        kind = label if isinstance(label, int) else None  # numbers and the labels of words are drawn as they come
        ranks[row], turns[kind] = turns[kind], turns[kind] + 1
    return _only(rows, sorted(sorted(ranks, key=ranks.__getitem__)[:number]))


def training_rows(data: TaskData, seed: int, settings: FinetuneSettings) -> TaskRows:
    """What a task is fine-tuned on with this seed: the same rows for every model."""
    assert data.train is not None
    rows = subset(data.train, settings.max_train_samples)
    return few(rows, data.task.examples, seed) if data.task.examples else rows


def encode(rows: TaskRows, task: Task, checkpoint: Checkpoint, settings: FinetuneSettings) -> Encoded:
    """Rows of a task as this model reads them."""
    return form_of(task).encode(rows, checkpoint.tokenizer, min(settings.max_length, checkpoint.positions))


def encode_dev(data: TaskData, checkpoint: Checkpoint, settings: FinetuneSettings) -> dict[str, Encoded]:
    """The dev rows of a task, by the suffix of their metrics."""
    limited = {key: subset(rows, settings.max_eval_samples) for key, rows in data.dev.items()}
    return {key: encode(rows, data.task, checkpoint, settings) for key, rows in limited.items()}


def epochs(features: int, task: Task, settings: FinetuneSettings) -> float:
    """Passes over the training features: of a few examples as many as FEW_STEPS take, if that is more."""
    passes = math.ceil(FEW_STEPS / math.ceil(features / settings.batch_size)) if task.examples else 0
    return max(settings.epochs, passes)


def steps(features: int, task: Task, settings: FinetuneSettings) -> int:
    """Optimiser steps of one fine-tuning."""
    return math.ceil(math.ceil(features / settings.batch_size) * epochs(features, task, settings))


def precision() -> str:
    """bf16 on a GPU that has it, else fp32."""
    import torch

    return "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "fp32"


@dataclass
class Finetuned:
    """A fine-tuned model."""

    trainer: Any
    train_loss: float
    seconds: float

    def predict(self, features: Sequence[Feature]) -> Array:
        """The form's logits, float32 [features, …]. Features of like length go through the model together."""
        order = np.argsort([len(feature["input_ids"]) for feature in features], kind="stable")
        logits = self.trainer.predict([features[row] for row in order]).predictions
        unsorted = np.empty_like(logits, dtype=np.float32)
        unsorted[order] = logits
        return unsorted

    def measure(self, task: Task, dev: Mapping[str, Encoded]) -> dict[str, float]:
        """The metrics of a task on its dev rows; those of several dev sets are named metric_KEY."""
        measured: dict[str, float] = {}
        for key, encoded in dev.items():
            found = form_of(task).scores(task, self.predict(encoded.features), encoded)
            measured |= {f"{name}_{key}" if key else name: value for name, value in found.items()}
        return measured


def finetune(
    checkpoint: Checkpoint, task: Task, train: Encoded, seed: int, settings: FinetuneSettings, bar: Any
) -> Finetuned:
    """Fine-tunes a fresh copy of a model; a pure function of its arguments on one device at equal threads.

    `bar`, a tqdm bar, advances with every optimiser step and shows the training loss.
    """
    import torch
    from transformers import Trainer, TrainingArguments, set_seed

    started, form = time.monotonic(), form_of(task)
    if not torch.cuda.is_available():
        keep_freed_memory()
    set_seed(seed)  # the head's initial weights
    with tempfile.TemporaryDirectory(prefix="glue-") as scratch:
        arguments = TrainingArguments(
            output_dir=scratch,
            num_train_epochs=epochs(len(train.features), task, settings),
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
        model, _ = load(form, checkpoint.path, checkpoint.tokenizer, dtype="float32", **form.head(task))
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=train.features,
            data_collator=form.collator(checkpoint.tokenizer),
            callbacks=[_progress(bar)],
            preprocess_logits_for_metrics=lambda outputs, _: form.logits(outputs),
        )
        _remove_printer(trainer)
        outcome = trainer.train()
    return Finetuned(trainer, float(outcome.training_loss), time.monotonic() - started)


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
