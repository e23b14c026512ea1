"""GLUE's official metrics, from scikit-learn and scipy, and what is made of them: a task's score, an average."""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ctcd_ds.evaluation.tables import Label
from ctcd_ds.evaluation.tasks import GLUE, Task

Array = npt.NDArray[Any]
OF_LABELS, OF_SCORES = ("accuracy", "f1", "matthews"), ("pearson", "spearman")
OF_DIFFERENT = ("f1", "matthews", *OF_SCORES)  # have no value where all rows have one label
METRICS = (*OF_LABELS, *OF_SCORES)  # f1 is that of the second of two labels


def scores(task: Task, predictions: Array, labels: Sequence[Label]) -> dict[str, float]:
    """The metrics of a task, each from −1 or 0 to 1. Predictions are class ids, or scores in the task's range."""
    from scipy.stats import pearsonr, spearmanr
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    functions = {
        "accuracy": lambda: accuracy_score(labels, predictions),
        "f1": lambda: f1_score(labels, predictions, zero_division=0.0),
        "matthews": lambda: matthews_corrcoef(labels, predictions),
        "pearson": lambda: pearsonr(labels, predictions).statistic,
        "spearman": lambda: spearmanr(labels, predictions).statistic,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of constant predictions, whose correlation is counted as 0
        values = {name: float(functions[name]()) for name in task.metrics}
    return {name: 0.0 if math.isnan(value) else value for name, value in values.items()}


def score(metrics: Mapping[str, float]) -> float:
    """A task's score: the mean of its metrics, times 100."""
    return 100 * statistics.fmean(metrics.values())


def predictions(task: Task, logits: Array) -> Array:
    """Logits [rows, classes] → label ids [rows]; of a scored task, logits [rows, 1] → scores in its range [rows]."""
    if not task.labels:
        return np.clip(np.nan_to_num(logits[:, 0]), *task.range)
    classes = logits.argmax(axis=1)
    return np.array(task.of_base)[classes] if task.of_base else classes


def spread(scores: Sequence[float]) -> dict[str, float]:
    """Median, min and max of the scores of several seeds."""
    return {"median": statistics.median(scores), "min": min(scores), "max": max(scores)}


def average(medians: Mapping[str, float], tasks: Sequence[Task] = GLUE) -> dict[str, Any]:
    """The mean of the tasks' median scores, with and without WNLI, over the tasks that are there.

    MNLI is one task (its score is the mean of matched and mismatched); a diagnostic (AX) never counts.
    """
    counted = [task.name for task in tasks if task.in_average]
    there = [name for name in counted if name in medians]
    others = [name for name in there if name != "wnli"]
    return {
        "with_wnli": statistics.fmean(medians[name] for name in there) if "wnli" in there else None,
        "without_wnli": statistics.fmean(medians[name] for name in others) if others else None,
        "tasks": there,
        "missing": [name for name in counted if name not in medians],
    }
