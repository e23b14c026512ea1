"""--resume goes on with the same run only: what would change a loss is refused, all at once; the rest is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ctcd_ds.recipe.reading import load_recipe
from ctcd_ds.training.identity import changes, identity
from ctcd_ds.training.plan import Plan, make_plan
from runs import BF16, FP32, bert, chain_corpus

RECIPE: dict[str, Any] = {
    "peers": {
        "teacher": {"model": bert(16, 1), "soft": {"student": 1.0}},
        "student": {"model": bert(16, 1), "soft": {"teacher": 4.0}},
    },
    "schedule": {"type": "constant", "warmup_fraction": 0.0},
    "training": {"global_batch_rows": 8, "steps": 20},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("identity")
    chain_corpus(folder / "corpus")
    chain_corpus(folder / "other", vocab_size=200)
    (folder / "moved").symlink_to(folder / "corpus")
    return folder


def plan_of(folder: Path, *overrides: str, deepspeed: dict[str, Any] = FP32, world: int = 1) -> Plan:
    path = folder / "recipe.json"
    path.write_text(json.dumps({**RECIPE, "corpus": {"path": str(folder / "corpus"), "sequence_length": 32}}))
    return make_plan(load_recipe(path, overrides), deepspeed, world, "cpu", folder / "run")


@pytest.mark.parametrize(
    ("before", "now", "refused"),
    [
        ((), ("seed=2",), "seed: the run has 1, now 2"),
        ((), ("peers.student.soft.teacher=2",), "peers.student.soft.teacher: the run has 4.0, now 2.0"),
        ((), ("peers.student.model.num_hidden_layers=2",), "num_hidden_layers: the run has 1, now 2"),
        ((), ("optimizer.betas=[0.9, 0.99]",), "optimizer.betas"),
        ((), ("training.global_batch_rows=16",), "training.global_batch_rows: the run has 8, now 16"),
        ((), ("training.compile=true",), "training.compile"),
        ((), ("corpus.train_rows=8",), "corpus.train_rows: the run has none, now 8"),
        ((), ("training.steps=10",), "training.steps: the run has 20, now 10 (the learning rate of the 12 steps done"),
        (("schedule.type=linear",), ("schedule.type=linear", "training.steps=30"), "training.steps"),
        ((), ("schedule.warmup_fraction=0.5",), "schedule.warmup_fraction"),
        ((), ("schedule.type=cosine",), "schedule.type"),
        ((), ("peers.teacher.label_noise=0.1",), "peers.teacher.label_noise: the run has none, now 0.1"),
        ((), ("peers.student.mask_seed=3",), "peers.student.mask_seed"),
        ((), ("peers.student.mask_fraction=0.2",), "peers.student.mask_fraction"),
        (
            ("peers.student.soft.teacher={then: 4, over: 0.5}",),
            ("peers.student.soft.teacher={then: 4, over: 0.5}", "training.steps=30"),
            "training.steps: the run has 20, now 30",
        ),
        (
            ("objective.temperature={first: 4, then: 1, over: 1}",),
            ("objective.temperature={first: 4, then: 1, over: 1}", "training.steps=30"),
            "training.steps: the run has 20, now 30",
        ),
    ],
)
def test_what_would_change_a_loss_is_refused(
    folder: Path, before: tuple[str, ...], now: tuple[str, ...], refused: str
) -> None:
    found, allowed = changes(identity(plan_of(folder, *before)), plan_of(folder, *now), step=12)
    assert len(found) == 1 and refused in found[0] and not allowed


def test_all_differences_come_at_once(folder: Path) -> None:
    now = plan_of(folder, "seed=2", "optimizer.lr=1e-3", f"corpus.path={folder / 'other'}", deepspeed=BF16)
    refused, _ = changes(identity(plan_of(folder)), now, step=1)
    said = "\n".join(refused)
    assert all(
        word in said for word in ("seed", "optimizer.lr", "corpus: ", "tokenizer: ", "precision: the run has fp32")
    )


@pytest.mark.parametrize(
    "now",
    [
        ("training.log_every=1",),
        ("training.checkpoint_every=7", "training.keep_checkpoints=1", "training.keep_best=true"),
        ("training.time_limit_minutes=5", "training.step_timeout_s=9", "training.on_nonfinite=skip"),
        ("training.steps=40",),
        ("training.steps=12",),
        ("training.steps=null", "training.epochs=3"),
        ("corpus.path=MOVED",),
    ],
    ids=str,
)
def test_what_changes_no_loss_is_allowed_and_said(folder: Path, now: tuple[str, ...]) -> None:
    given = [change.replace("MOVED", str(folder / "moved")) for change in now]
    if "corpus.path" in now[0]:  # load_recipe resolves links: a copy stands for a corpus that has moved
        import shutil

        shutil.copytree(folder / "corpus", folder / "copy", dirs_exist_ok=True)
        given = [f"corpus.path={folder / 'copy'}"]
    refused, allowed = changes(identity(plan_of(folder)), plan_of(folder, *given, world=2), step=12)
    assert not refused and len(allowed) == len(given)
    assert all(": the run has " in line for line in allowed)


def test_before_the_first_step_the_length_is_free(folder: Path) -> None:
    then = identity(plan_of(folder, "schedule.type=linear"))
    refused, allowed = changes(then, plan_of(folder, "schedule.type=cosine", "training.steps=90"), step=0)
    assert not refused and len(allowed) == 2
