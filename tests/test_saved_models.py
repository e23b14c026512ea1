"""What is saved answers as it was scored: transformers' own pipeline on a kept model gives results.json's accuracy."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    pipeline,
)

from ctcd_ds.corpus.tokenizer import SPECIAL_TOKENS, bring_tokenizer, load_tokenizer, save_tokenizer
from ctcd_ds.corpus.tokenizer_training import train_tokenizer
from ctcd_ds.evaluation import finetune, glue
from ctcd_ds.peers.reading import fit_tokenizer

WORDS = ["red", "green", "blue", "black", "white", "brown", "amber", "grey"]


def pairs(count: int, seed: int) -> list[tuple[str, str, str]]:
    """The same word at the same end means the same words: which sentence is which cannot be seen without segments."""
    draw = random.Random(seed)
    rows = []
    for number in range(count):
        first, second = " ".join(draw.choices(WORDS, k=3)), " ".join(draw.choices(WORDS, k=draw.randrange(1, 4)))
        rows.append((f"{first} sun", second, "low") if number % 2 else (first, f"sun {second}", "high"))
    return rows


def sentences(caption: str) -> Iterator[str]:
    for first, second, _ in pairs(600, 1):
        yield from (first, second)


def byte_level() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE(unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=list(SPECIAL_TOKENS), show_progress=False)
    backend.train_from_iterator(sentences(""), trainer)
    ends = [("[CLS]", 2), ("[SEP]", 3)]
    backend.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", ends)
    roles = {f"{name[1:-1].lower()}_token": name for name in SPECIAL_TOKENS}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **roles)


def end_only() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=["<|end|>"], show_progress=False)
    backend.train_from_iterator(sentences(""), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")


def brought(kind: str, folder: Path) -> Any:
    if kind in ("byte-level", "end only"):
        return byte_level() if kind == "byte-level" else end_only()
    size = {"wordpiece": 60, "unigram": 32}[kind]
    train_tokenizer(kind, sentences, size, lowercase=True, output_dir=folder)
    if kind == "unigram":
        return bring_tokenizer(str(folder / "spiece.model"), sample=lambda: list(sentences("")))
    return load_tokenizer(folder)


@pytest.mark.parametrize(
    "kind, model_type",
    [
        ("wordpiece", "bert"),
        ("unigram", "bert"),
        ("byte-level", "bert"),
        ("byte-level", "roberta"),
        ("end only", "gpt2"),
    ],
)
def test_a_kept_model_answers_in_a_pipeline_as_it_was_scored(kind: str, model_type: str, tmp_path: Path) -> None:
    tokenizer = brought(kind, tmp_path / "tokenizer")
    config = AutoConfig.for_model(
        model_type,
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=40,
        pad_token_id=tokenizer.pad_token_id,
        **({"type_vocab_size": 1} if model_type == "roberta" else {}),
    )
    torch.manual_seed(0)
    auto = AutoModelForCausalLM if model_type == "gpt2" else AutoModelForMaskedLM
    auto.from_config(config).save_pretrained(tmp_path / "model")
    save_tokenizer(tokenizer, tmp_path / "model")
    for name, rows in (("train", pairs(96, 2)), ("dev", pairs(60, 3))):
        lines = ["first\tsecond\tlabel", *("\t".join(row) for row in rows)]
        (tmp_path / f"{name}.tsv").write_text("\n".join(lines) + "\n\n\n")  # blank lines at the end are no rows
    (tmp_path / "task.yaml").write_text(
        "name: order\ntext: [first, second]\nlabels: [low, high]\nmetrics: accuracy\ntrain: train.tsv\ndev: dev.tsv\n"
    )
    settings = finetune.FinetuneSettings(epochs=2, learning_rate=5e-3, batch_size=16, max_length=16)
    where = {"data_dir": None, "output_dir": tmp_path / "out", "task_files": [tmp_path]}
    content = glue.run([tmp_path / "model"], ("all",), settings=settings, keep_models=True, **where)
    scored = content["models"]["model"]["tasks"]["order"]["seeds"]["1"]["metrics"]["accuracy"]
    kept = tmp_path / "out/models/model/order/seed-1"
    saved = AutoTokenizer.from_pretrained(kept)
    assert saved.pad_token_id is not None and ("token_type_ids" in saved("a", "b")) == (model_type == "bert")
    assert saved.model_max_length == 16
    answer = pipeline("text-classification", str(kept))
    found = [answer({"text": a, "text_pair": b}, truncation=True)["label"] == label for a, b, label in pairs(60, 3)]
    assert sum(found) / len(found) == pytest.approx(scored)


def test_a_tokenizer_takes_inputs_and_length_from_its_model(tmp_path: Path) -> None:
    for model_type, sizes, inputs, length in (
        ("bert", {}, ["input_ids", "token_type_ids", "attention_mask"], 40),
        ("bert", {"type_vocab_size": 1}, ["input_ids", "attention_mask"], 40),
        ("roberta", {"type_vocab_size": 1, "pad_token_id": 0}, ["input_ids", "attention_mask"], 39),
        ("distilbert", {}, ["input_ids", "attention_mask"], 40),
        ("fnet", {"type_vocab_size": 4}, ["input_ids", "token_type_ids"], 40),
    ):
        config = AutoConfig.for_model(
            model_type,
            vocab_size=320,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            max_position_embeddings=40,
            **sizes,
        )
        tokenizer = byte_level()
        fit_tokenizer(tokenizer, AutoModelForMaskedLM.from_config(config))
        save_tokenizer(tokenizer, tmp_path / model_type)
        saved = AutoTokenizer.from_pretrained(tmp_path / model_type)
        assert (saved.model_input_names, saved.model_max_length) == (inputs, length), model_type
