"""A real run on real text: Wikipedia, the 30,522-token vocabulary, small peers, some hundred steps on 2 ranks."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from commands import deepspeed, run
from runs import bert, metrics

pytestmark = pytest.mark.data
STEPS = 120


@pytest.fixture(scope="module")
def corpus(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("wiki") / "corpus"
    files = ("--input", shared_data / "corpus" / "wiki_en.txt.xz")
    files += ("--tokenizer", shared_data / "vocab" / "bert-base-uncased-vocab.txt", "--output_dir", place)
    done = run("tools/prepare_corpus.py", *files, "--fraction", 0.1, "--valid_fraction", 0.02)
    assert done.returncode == 0, done.stderr
    return place


def test_both_losses_fall_on_wikipedia(corpus: Path, tmp_path: Path) -> None:
    recipe = {
        "corpus": {"path": str(corpus), "sequence_length": 64},
        "peers": {
            "teacher": {"model": bert(64, 3), "soft": {"student": 1.0}},
            "student": {"model": bert(64, 1), "soft": {"teacher": 4.0}},
        },
        "optimizer": {"lr": 3e-3},
        "training": {"global_batch_rows": 16, "steps": STEPS, "log_every": 10, "valid_every": 40, "valid_rows": 128},
    }
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    files = ("--recipe", tmp_path / "recipe.json", "--deepspeed_config", "ds_configs/cpu.json")
    done = deepspeed(2, "launchers/pretrain.py", *files, "--output_dir", tmp_path / "run")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = metrics(tmp_path / "run")
    for peer, other in (("teacher", "student"), ("student", "teacher")):
        assert rows[1][f"loss/{peer}/hard"] == pytest.approx(math.log(30522), rel=0.05), "untrained: uniform"
        valid = [rows[step][f"valid/{peer}/loss"] for step in (40, 80, 120)]
        assert valid[0] > valid[-1] and valid[-1] < 8.0, valid
        assert rows[STEPS][f"loss/{peer}/soft/{other}"] > 0
