"""Numbers that are not finite: the optimizer does not move, and what happened has a name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from corpora import framed, write_corpus
from ctcd_ds.corpus.rows import Corpus
from runs import BF16, FP16, FP32, Job, bert, chain_corpus, metrics, run_jobs

STEPS = 12


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chain_corpus(tmp_path_factory.mktemp("corpus") / "chain")


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus where few rows hold the token 299, and a model whose embedding of it is infinite."""
    from transformers import AutoTokenizer, BertConfig, BertForMaskedLM

    from ctcd_ds.corpus.tokenizer import load_tokenizer, tokenizer_identity
    from ctcd_ds.manifest import read_manifest, write_manifest

    folder = tmp_path_factory.mktemp("poisoned")
    random = np.random.default_rng(1)
    documents = [random.integers(5, 299, 60).tolist() for _ in range(120)]
    for document in documents[::30]:
        document[30] = 299
    write_corpus(folder / "corpus", documents, documents[:5], vocab_size=300)
    manifest = read_manifest(folder / "corpus" / "manifest.json")
    del manifest["sha256"]
    manifest["tokenizer"] = tokenizer_identity(load_tokenizer(folder / "corpus" / "tokenizer"))
    write_manifest(folder / "corpus" / "manifest.json", manifest)

    torch.manual_seed(0)
    sizes = {key: value for key, value in bert(32, 1).items() if key != "model_type"}
    model = BertForMaskedLM(BertConfig(vocab_size=300, tie_word_embeddings=False, **sizes))
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight[299] = float("inf")
    model.save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(folder / "corpus" / "tokenizer").save_pretrained(folder / "model")
    return folder


def recipe(poisoned: Path, **training: Any) -> dict[str, Any]:
    return {
        "corpus": {"path": str(poisoned / "corpus"), "sequence_length": 32},
        "peers": {
            "teacher": {"model": bert(16, 1), "soft": {"student": 1.0}},
            "student": {"pretrained": str(poisoned / "model"), "soft": {"teacher": 4.0}},
        },
        "training": {"global_batch_rows": 4, "steps": STEPS, "log_every": 1, "valid_every": STEPS, **training},
    }


KINDS: dict[str, tuple[dict[str, Any], int]] = {
    "fp32": (FP32, 2),
    "zero1": ({"zero_optimization": {"stage": 1}, "gradient_accumulation_steps": 2}, 2),
    "bf16": (BF16, 1),
}


@pytest.mark.parametrize("kind", KINDS)
def test_skipping_leaves_the_weights_alone_and_goes_on(poisoned: Path, tmp_path: Path, kind: str) -> None:
    """Steps that read the token are skipped, and only those; their checkpoints equal the ones before them."""
    config, world = KINDS[kind]
    plan = recipe(poisoned, on_nonfinite="skip", checkpoint_every=1, keep_checkpoints=STEPS)
    run_jobs([Job(plan, tmp_path / "run", config)], world, tmp_path)
    rows = metrics(tmp_path / "run")
    bad = [step for step, row in rows.items() if row["loss/student/hard"] is None]
    assert bad and len(bad) < STEPS
    assert [rows[step]["skipped_steps"] for step in sorted(rows)] == [sum(b <= s for b in bad) for s in sorted(rows)]
    assert all(rows[step]["grad_norm/teacher"] is None for step in bad), "the teacher learns from the student"
    from ctcd_ds.training.loading import consolidated

    def weights(step: int) -> dict[str, torch.Tensor]:
        return consolidated(tmp_path / "run" / "checkpoints" / f"step-{step:08d}")["teacher"]

    for step in range(2, STEPS + 1):
        before, after = weights(step - 1), weights(step)
        moved = any(not torch.equal(before[key], after[key]) for key in before)
        assert moved == (step not in bad)
    assert all(torch.isfinite(tensor).all() for tensor in weights(STEPS).values())


def test_stopping_names_peer_term_step_and_rows(poisoned: Path, tmp_path: Path) -> None:
    with pytest.raises(AssertionError) as failed:
        run_jobs([Job(recipe(poisoned), tmp_path / "run")], 2, tmp_path)
    said = next(line for line in str(failed.value).splitlines() if "RunFailure: step" in line)
    step = int(said.split("step ")[1].split(":")[0])
    assert "loss/student/hard = nan" in said and "loss/teacher/soft/student = nan" in said
    named = {int(number) for number in said.split("rows ")[1].split(")")[0].split(", ")}
    rows = framed(Corpus.open(poisoned / "corpus"), "train", 32)
    holding = {number for number in range(len(rows)) if 299 in rows.read(np.array([number]))[0]}
    assert named & holding, "the row that did it is among those named"
    assert len(metrics(tmp_path / "run")) == step - 1
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_too_many_in_a_row_end_the_run(corpus: Path, tmp_path: Path) -> None:
    plan = {
        "corpus": {"path": str(corpus), "sequence_length": 32},
        "peers": {"only": {"model": bert(16, 1)}},
        "optimizer": {"lr": 1e30, "max_grad_norm": 0.0},
        "schedule": {"warmup_fraction": 0.0},
        "training": {"global_batch_rows": 8, "steps": 40, "log_every": 1, "on_nonfinite": "skip"},
    }
    with pytest.raises(AssertionError, match="10 steps in a row were skipped: the weights are past mending"):
        run_jobs([Job(plan, tmp_path / "run")], 1, tmp_path)
    assert len(metrics(tmp_path / "run")) < 15


def test_fp16_at_the_floor_of_its_scale_ends_with_a_diagnosis(corpus: Path, tmp_path: Path) -> None:
    plan = {
        "corpus": {"path": str(corpus), "sequence_length": 32},
        "peers": {"big": {"model": bert(16, 1)}, "small": {"model": bert(16, 1)}},
        "optimizer": {"lr": 1e4, "max_grad_norm": 0.0},
        "schedule": {"warmup_fraction": 0.0},
        "training": {"global_batch_rows": 8, "steps": 60, "log_every": 1},
    }
    config = {**FP16, "fp16": {"enabled": True, "initial_scale_power": 4, "hysteresis": 1}}
    with pytest.raises(AssertionError, match=r"loss scale is at its floor \(1, fp16.min_loss_scale\)") as failed:
        run_jobs([Job(plan, tmp_path / "run", config)], 1, tmp_path)
    assert "skipped at loss scale" in str(failed.value), "each overflow was said, with its peers"
