"""A score is GLUE's only where the rows were GLUE's and all were used: in cards, tables, reports and TensorBoard."""

from __future__ import annotations

from typing import Any

import pytest

from ctcd_ds.evaluation.card import eval_results
from ctcd_ds.evaluation.claims import called, reservation, title
from ctcd_ds.evaluation.tasks import GLUE

RTE = {"train_rows": 2490, "dev_rows": 277}


@pytest.mark.parametrize(
    ("task", "settings", "name", "said"),
    [
        (RTE, {}, "GLUE rte", ""),
        (RTE, {"max_train_samples": 2490, "max_eval_samples": 500}, "GLUE rte", ""),
        (RTE, {"max_train_samples": 64}, "rte in part", "fine-tuned on 64 of 2,490 training rows"),
        (RTE, {"max_eval_samples": 100}, "rte in part", "scored on 100 of 277 dev rows"),
        ({**RTE, "dev_rows": 276}, {}, "rte stand-in", "a stand-in of 2,490 training and 276 dev rows; GLUE's rte has"),
    ],
)
def test_a_score_is_called_what_it_is(task: dict[str, Any], settings: dict[str, Any], name: str, said: str) -> None:
    assert reservation("rte", task, settings).startswith(said) and bool(reservation("rte", task, settings)) == bool(
        said
    )
    assert title(called("rte", task, settings)) == name
    scores = {"rte": {"median": 50.0, "seeds": {"1": {"metrics": {"accuracy": 0.5}}}}}
    content = {"settings": {"epochs": 1.0, **settings}, "tasks": {"rte": task}, "models": {"m": {"tasks": scores}}}
    (result,) = eval_results("m", content, {t.name: t for t in GLUE})
    assert (result.dataset_type == "nyu-mll/glue") == (result.dataset_split == "validation") == (not said)
    assert said in result.dataset_name and "for 1 epoch, one seed" in str(result.metric_name)


def test_a_task_of_ones_own_keeps_its_name() -> None:
    assert title(called("mine", {"train_rows": 5, "dev_rows": 5}, {})) == "mine"
