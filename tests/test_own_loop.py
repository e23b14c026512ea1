"""docs/own_loop.md's programs, run as they stand there: the losses are those of our own trainer."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from ctcd_ds.corpus.rows import Corpus
from ctcd_ds.peers.build import build_peer
from ctcd_ds.recipe.sections import Recipe
from ctcd_ds.tasks import TASKS
from ctcd_ds.tasks.loader import Cut, TrainLoader
from runs import ROOT, Job, bert, chain_corpus, metrics, run_jobs

PLAIN, TRAINER = re.findall(r"```python\n(.*?)```", (ROOT / "docs/own_loop.md").read_text(), re.DOTALL)
STEPS, ROWS = 6, 8


def recipe(corpus: Path, max_grad_norm: float) -> dict[str, Any]:
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # dropout's seed differs, nothing else
    return {
        "corpus": {"path": str(corpus), "sequence_length": 32},
        "peers": {
            "teacher": {"model": bert(48, 3, **still), "soft": {"student": 1.0}},
            "student": {"model": bert(32, 2, **still), "soft": {"teacher": 4.0}},
        },
        "optimizer": {"lr": 1e-3, "weight_decay": 0.0, "max_grad_norm": max_grad_norm},
        "schedule": {"type": "constant", "warmup_fraction": 0.0},
        "training": {"global_batch_rows": ROWS, "steps": STEPS, "log_every": 1},
    }


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus and two runs of the trainer: clipped peer by peer, and not clipped."""
    folder = tmp_path_factory.mktemp("own-loop")
    corpus = chain_corpus(folder / "corpus")
    run_jobs([Job(recipe(corpus, norm), folder / f"norm{norm:g}") for norm in (1.0, 0.0)], 1, folder)
    return folder


def given(folder: Path) -> tuple[list[Any], list[dict[str, torch.Tensor]], int]:
    """The two models as the run began with them, and the run's batches as a collator would give them."""
    parsed = Recipe.model_validate(recipe(folder / "corpus", 1.0))
    corpus = Corpus.open(folder / "corpus")
    task = TASKS["mlm"].of(parsed, corpus)
    loader = TrainLoader(task.rows("train"), task, parsed.seed, Cut(ROWS), 0)
    collated = []
    for _ in range(STEPS):
        view = next(loader)[0].views[0]
        labels = torch.full_like(view.inputs["input_ids"], -100)
        labels.view(-1)[view.positions] = view.targets
        collated.append({"input_ids": view.inputs["input_ids"], "labels": labels})
    loader.close()
    auto = task.auto_class()
    models = [build_peer(name, peer, corpus, parsed.seed, auto) for name, peer in parsed.peers.items()]
    return models, collated, corpus.vocab_size


def assert_equal_to_the_run(found: list[dict[str, float]], run: Path) -> None:
    for step, row in metrics(run).items():
        expected = {name: value for name, value in row.items() if name.startswith("loss/")}
        assert {name: found[step - 1][name] for name in expected} == pytest.approx(expected, rel=1e-5), step
    assert len(found) == STEPS


def test_a_plain_torch_loop_gives_the_trainers_losses(runs: Path) -> None:
    program: dict[str, Any] = {}
    exec(PLAIN, program)
    models, collated, vocab_size = given(runs)
    assert_equal_to_the_run(list(program["co_train"](*models, collated, vocab_size)), runs / "norm1")


def test_the_trainer_of_transformers_gives_the_trainers_losses(runs: Path, tmp_path: Path) -> None:
    program: dict[str, Any] = {}
    exec(TRAINER, program)
    models, collated, vocab_size = given(runs)
    rows = [{key: batch[key][k] for key in batch} for batch in collated for k in range(ROWS)]
    assert_equal_to_the_run(program["co_train"](*models, rows, vocab_size, ROWS, str(tmp_path)), runs / "norm0")
