"""Whether peers copy each other's mistakes: counted by hand, and on a real run against what the run itself measured."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from ctcd_ds.cli import UserError
from ctcd_ds.experiments.report.agreement import Agreement, compare_answers, held_out_answers
from ctcd_ds.export.hf import export
from ctcd_ds.training.run_directory import RunDirectory
from runs import Job, bert, chain_corpus, metrics, run_jobs


def test_every_position_is_of_one_kind() -> None:
    #          both right  first  second  same wrong  different wrong
    targets = np.array([7, 7, 7,  5, 5,    9,         4, 4, 4])  # fmt: skip
    first = np.array(  [7, 7, 7,  5, 5,    1,         8, 2, 0])  # fmt: skip
    second = np.array( [7, 7, 7,  6, 1,    9,         8, 2, 3])  # fmt: skip
    found = compare_answers(first, second, targets)
    assert found == Agreement(both_right=3, only_first_right=2, only_second_right=1, same_wrong=2, different_wrong=1)
    assert found.positions == len(targets)
    assert found.common_mistakes == pytest.approx(2 / 3)


def test_it_is_the_same_from_the_other_side() -> None:
    random = np.random.default_rng(0)
    first, second, targets = random.integers(0, 4, (3, 1000))
    there, back = compare_answers(first, second, targets), compare_answers(second, first, targets)
    assert (there.only_first_right, there.only_second_right) == (back.only_second_right, back.only_first_right)
    assert (there.both_right, there.same_wrong) == (back.both_right, back.same_wrong)
    assert there.positions == 1000


def test_without_common_mistakes_there_is_no_share() -> None:
    right = np.array([1, 2, 3])
    assert compare_answers(right, right, right).common_mistakes is None


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("agreement")
    recipe = {
        "corpus": {"path": str(chain_corpus(place / "corpus")), "sequence_length": 32},
        "peers": {
            "teacher": {"model": bert(32, 2), "soft": {"student": 1.0}},
            "student": {"model": bert(16, 1), "soft": {"teacher": 4.0}},
        },
        "optimizer": {"lr": 3e-3},
        "training": {"global_batch_rows": 16, "steps": 60, "valid_rows": 48},
    }
    run_jobs([Job(recipe, place / "run")], 1, place)
    return place / "run"


def test_counts_are_those_of_held_out_evaluation(finished: Path) -> None:
    """The run's own last evaluation: the same rows, masks and weights, counted by another program."""
    answers = held_out_answers(RunDirectory(finished), rows=48)
    found = compare_answers(answers.peers["teacher"], answers.peers["student"], answers.targets)
    stated = metrics(finished)[60]
    assert found.positions == len(answers.targets) > 100
    share = {
        "valid/teacher/accuracy": found.both_right + found.only_first_right,
        "valid/student/accuracy": found.both_right + found.only_second_right,
        "valid/agreement/teacher/student": found.both_right + found.same_wrong,
    }
    for key, count in share.items():
        assert count / found.positions == pytest.approx(stated[key], abs=1e-6), key
    assert 0 < stated["valid/teacher/accuracy"] < 1, "a model that answers nothing would agree with itself"


def test_exports_answer_as_checkpoints_do(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    before = held_out_answers(RunDirectory(run), rows=16)
    export(run, "all", run / "hf")
    shutil.rmtree(run / "checkpoints")
    after = held_out_answers(RunDirectory(run), rows=16)
    for name, answers in before.peers.items():
        assert np.array_equal(answers, after.peers[name]), name
    shutil.rmtree(run / "hf")
    with pytest.raises(UserError, match="no weights of teacher, student"):
        held_out_answers(RunDirectory(run), rows=16)
