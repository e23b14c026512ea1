"""The same bits again: on the CPU always, on a GPU with `training.deterministic`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from commands import run
from ctcd_ds.training.engine import settle_arithmetic
from runs import bert, chain_corpus, drop_checkpoint, final_weights, metrics


@pytest.fixture
def unsettled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What is set is set for the whole process: it is as it was afterwards."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr("torch._inductor.config.deterministic", False)
    yield
    settle_arithmetic(False)


def test_sums_of_16_bit_products_are_fp32_and_have_one_order_where_that_is_asked_for(unsettled: None) -> None:
    settle_arithmetic(False)
    assert not torch.are_deterministic_algorithms_enabled() and "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    settle_arithmetic(True)
    assert torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    matmul = torch.backends.cuda.matmul
    assert not matmul.allow_bf16_reduced_precision_reduction and not matmul.allow_fp16_reduced_precision_reduction


def recipe(corpus: Path) -> dict[str, Any]:
    return {
        "corpus": {"path": str(corpus), "sequence_length": 32},
        "peers": {
            "teacher": {"model": bert(48, 3), "soft": {"student": 1.0}},
            "student": {"model": bert(32, 2), "soft": {"teacher": 4.0}},
        },
        "training": {"global_batch_rows": 16, "steps": 8, "log_every": 1, "checkpoint_every": 4, "deterministic": True},
    }


def pretrain(folder: Path, name: str, *options: str, **variables: str) -> dict[int, dict[str, Any]]:
    (folder / "recipe.json").write_text(json.dumps(recipe(folder / "corpus")))
    (folder / "ds.json").write_text(json.dumps({"bf16": {"enabled": True}, "zero_optimization": {"stage": 2}}))
    line = ("--recipe", folder / "recipe.json", "--deepspeed_config", folder / "ds.json", "--output_dir", folder / name)
    done = run("launchers/pretrain.py", *line, *options, **variables)
    assert done.returncode == 0, done.stderr[-3000:]
    kept = ("loss/", "grad_norm/", "valid/")
    return {s: {k: v for k, v in row.items() if k.startswith(kept)} for s, row in metrics(folder / name).items()}


def test_the_option_changes_no_bit_on_the_cpu(tmp_path: Path) -> None:
    chain_corpus(tmp_path / "corpus")
    assert pretrain(tmp_path, "with") == pretrain(tmp_path, "without", "--set", "training.deterministic=false")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("compiled", [False, True])
def test_a_run_on_a_gpu_repeats_and_is_resumed_bit_for_bit(tmp_path: Path, compiled: bool) -> None:
    chain_corpus(tmp_path / "corpus")
    options = ("--set", f"training.compile={str(compiled).lower()}")
    rows = [pretrain(tmp_path, name, *options, DS_ACCELERATOR="cuda") for name in ("one", "two")]
    drop_checkpoint(tmp_path / "two", 8)
    rows.append(pretrain(tmp_path, "two", "--resume", *options, DS_ACCELERATOR="cuda"))
    assert rows[0] == rows[1] == rows[2]
    one, two = final_weights(tmp_path / "one"), final_weights(tmp_path / "two")
    assert all(torch.equal(one[peer][name], two[peer][name]) for peer in one for name in one[peer])
