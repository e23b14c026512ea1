"""Span corruption: nothing is lost, shapes are static, spans are a function of the row, and the whole way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from corpora import SPECIAL, random_documents, write_corpus
from ctcd_ds.cli import UserError
from ctcd_ds.corpus.rows import Corpus, SpecialIds
from ctcd_ds.corpus.tokenizer import load_tokenizer, special_ids
from ctcd_ds.export.hf import export
from ctcd_ds.recipe.sections import CorpusSection, Recipe
from ctcd_ds.tasks.span import SpanCorruption, Spans
from runs import Job, metrics, run_jobs
from test_clm import LINES, run_tool
from test_tasks import BART, T5

SENTINELS = tuple(range(1000, 1100))
IDS = SpecialIds(cls=2, sep=3, mask=4, pad=0, unk=1, sentinels=SENTINELS)


def section(length: int, **settings: Any) -> CorpusSection:
    return CorpusSection.model_validate({"path": "x", "sequence_length": length, **settings})


def task(length: int, **settings: Any) -> SpanCorruption:
    corpus = Corpus(Path(), "", IDS, 1100, "", "", "uint16", {}, ((), ()))
    return SpanCorruption(corpus, {"a": None}, True, Spans.of(section(length, **settings)))


def put_back(question: np.ndarray, answer: np.ndarray) -> list[int]:
    """The row that a question and its answer were made of; each sentinel in the order of its number."""
    spans: dict[int, list[int]] = {}
    for token in answer[:-1].tolist():
        if token in SENTINELS:
            spans[token] = []
        else:
            spans[list(spans)[-1]].append(token)
    assert list(spans) == list(SENTINELS[: len(spans)]) and all(spans.values())
    return [t for token in question[:-1].tolist() for t in spans.get(token, [token])]


def test_the_counts_are_t5s_own() -> None:
    spans = Spans.of(section(512))
    assert (spans.row, spans.encoder, spans.decoder, spans.noise, spans.count) == (568, 512, 114, 85, 28)


@given(st.integers(8, 200), st.floats(0.05, 0.6), st.floats(1, 8), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_spans_put_back_are_the_row(length: int, fraction: float, mean: float, seed: int) -> None:
    asked = task(length, mask_fraction=fraction, mean_span=mean)
    spans, random = asked.spans, np.random.default_rng(seed)
    assert spans.encoder <= length
    tokens = random.integers(5, 1000, (6, spans.row)).astype(np.int32)
    tokens[random.random(tokens.shape) < 0.05] = IDS.end
    epochs, rows = np.zeros(6, np.int64), np.arange(6)
    question, answer = asked.corrupted(tokens, seed, epochs, rows)
    assert question.shape == (6, spans.encoder) and answer.shape == (6, spans.decoder)
    if spans.count <= len(SENTINELS):
        assert [put_back(q, a) for q, a in zip(question, answer, strict=True)] == tokens.tolist()
    again = asked.corrupted(tokens[3:5], seed, epochs[3:5], rows[3:5])
    assert np.array_equal(again[0], question[3:5]) and np.array_equal(again[1], answer[3:5])


def test_spans_seldom_hold_a_documents_end() -> None:
    asked, random = task(512), np.random.default_rng(0)
    tokens = random.integers(5, 1000, (2000, asked.spans.row)).astype(np.int32)
    tokens[random.random(tokens.shape) < 1 / 400] = IDS.end
    numbers = np.arange(2000)
    _, answer = asked.corrupted(tokens, 1, np.zeros_like(numbers), numbers)
    _, other = asked.corrupted(tokens, 1, np.ones_like(numbers), numbers)
    assert (answer != other).any(axis=1).all(), "each epoch has spans of its own"
    assert (answer[:, :-1] == IDS.end).any(axis=1).mean() < 0.01


def test_a_tokenizer_without_enough_sentinels_is_refused(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "c", random_documents(200), special=SPECIAL)
    raw = {
        "corpus": {"path": str(corpus), "sequence_length": 64},
        "objective": {"task": "span"},
        "peers": {"a": {"model": T5}},
        "training": {"steps": 1},
    }
    with pytest.raises(UserError, match=r"3 spans of a row need as many sentinels .*has 0: train one with"):
        SpanCorruption.of(Recipe.model_validate(raw), Corpus.open(corpus))


def test_text_becomes_a_model_that_fills_spans(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("\n\n".join(LINES))
    for kind in ("byte_bpe", "unigram"):
        run_tool("tokenizer", "--input", tmp_path / "text.txt", "--type", kind, "--vocab_size", 320, "--sentinels", 20,
                 "--output_dir", tmp_path / kind)  # fmt: skip
        tokenizer = load_tokenizer(tmp_path / kind)
        special = special_ids(tokenizer)
        assert len(tokenizer) == 320 and special.sentinels == tuple(range(300, 320)) and special.pad >= 0
    run_tool("corpus", "--input", tmp_path / "text.txt", "--tokenizer", tmp_path / "unigram", "--output_dir",
             tmp_path / "corpus", "--valid_fraction", 0.1)  # fmt: skip
    raw = {
        "corpus": {"path": str(tmp_path / "corpus"), "sequence_length": 32},
        "objective": {"task": "span"},
        "peers": {"a": {"model": T5, "soft": {"b": 1.0}}, "b": {"model": BART, "soft": {"a": 1.0}}},
        "optimizer": {"lr": 3e-3},
        "training": {"global_batch_rows": 8, "steps": 20, "valid_every": 20},
    }
    run_jobs([Job(raw, tmp_path / "run")], 1, tmp_path)
    assert metrics(tmp_path / "run")[20]["valid/a/loss"] < np.log(320)
    for name, place in export(tmp_path / "run", "all", tmp_path / "hf").items():
        model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(place), AutoTokenizer.from_pretrained(place)
        question = tokenizer("Line 7: the naïve <extra_id_0> of street", return_tensors="pt")
        assert 300 in question["input_ids"]
        assert model.generate(**question, max_new_tokens=8).shape[1] > 2
        assert model.config.decoder_start_token_id == tokenizer.pad_token_id
        card = (place / "README.md").read_text()
        program = card.split("```python\n")[1].split("```")[0].replace('"."', repr(str(place)))
        with torch.random.fork_rng():
            exec(program, {})
        assert "sequence-to-sequence language model" in card, name
