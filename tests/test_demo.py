"""The demo's own parts; what it runs are the project's commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ctcd_ds.cli import RunFailure
from ctcd_ds.commands import demo
from ctcd_ds.commands.recipes import SHIPPED
from ctcd_ds.recipe.reading import load_recipe


def logged(run: Path, rows: list[dict[str, Any]]) -> None:
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("task", demo.RECIPES)
def test_each_demo_has_a_pair_and_each_of_its_peers_alone(task: str) -> None:
    recipe = SHIPPED / "recipes" / demo.RECIPES[task]
    found = {name: list(load_recipe(recipe, changes).peers) for name, changes in demo.RUNS.items()}
    assert found == {"teacher_alone": ["teacher"], "student_alone": ["student"], "together": ["teacher", "student"]}
    pair = load_recipe(recipe)
    assert pair.objective.task == task and pair.graph().soft == ((0.0, 1.0), (4.0, 0.0))
    assert pair.training.steps is not None and pair.training.steps // pair.training.valid_every >= 4, "a curve"


def test_the_proof_holds_to_the_last_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "pretrain", lambda *_, **__: None)  # the runs are there
    values = {"loss/student/hard": 2.5, "grad_norm/student": 0.1, "valid/student/loss": 3.0}
    alone = [{"step": step, "seconds": 1.0, **values} for step in (1, 2)]
    beside = [{**row, "seconds": 2.0, "loss/teacher/hard": 2.0} for row in alone]
    logged(tmp_path / "proof" / "alone", alone)
    logged(tmp_path / "proof" / "beside", beside)
    assert demo.proof(tmp_path, "clm", 2) == 6
    beside[1]["grad_norm/student"] = 0.1 + 2**-56
    logged(tmp_path / "other" / "proof" / "alone", alone)
    logged(tmp_path / "other" / "proof" / "beside", beside)
    with pytest.raises(RunFailure, match="grad_norm/student at step 2"):
        demo.proof(tmp_path / "other", "clm", 2)


def test_the_table_has_where_each_ended_and_its_lowest_look(tmp_path: Path) -> None:
    ends = {"teacher_alone": 3.5, "student_alone": 4.0, "together": 3.0}
    for run, end in ends.items():
        keys = [f"valid/{peer}/loss" for peer in demo.PEERS]
        logged(
            tmp_path / run, [{"step": n, **dict.fromkeys(keys, end + away)} for n, away in enumerate((2, 1, -0.5, 0))]
        )
        (tmp_path / run / "summary.json").write_text(json.dumps(dict.fromkeys(keys, end)))
    table = demo.measured(tmp_path)
    assert table["alone"] == {
        "teacher": {"valid_loss": 3.5, "lowest_loss": 3.0},
        "student": {"valid_loss": 4.0, "lowest_loss": 3.5},
    }
    assert table["together"] == {peer: {"valid_loss": 3.0, "lowest_loss": 2.5} for peer in demo.PEERS}
