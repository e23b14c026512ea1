"""From results.json to model cards: the scores of a model as huggingface_hub's evaluation results."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, constants

from ctcd_ds.evaluation.claims import called, reservation, title
from ctcd_ds.evaluation.finetune import FEW_STEPS
from ctcd_ds.evaluation.forms import form_of
from ctcd_ds.evaluation.tasks import GLUE, Task
from ctcd_ds.export.model_card import FILE, add_scores

# The hub's names of our metrics, and a reader's.
_METRICS = {
    "accuracy": ("accuracy", "accuracy"),
    "f1": ("f1", "F1"),
    "matthews": ("matthews_correlation", "Matthews correlation"),
    "pearson": ("pearsonr", "Pearson correlation"),
    "spearman": ("spearmanr", "Spearman correlation"),
    "entity_f1": ("f1", "entity F1"),
    "token_accuracy": ("accuracy", "accuracy by word"),
    "exact_match": ("exact_match", "exact match"),
    "answer_f1": ("f1", "F1 of words"),
}


def write_cards(content: Mapping[str, Any], tasks: Iterable[Task]) -> None:
    """Puts the scores of each model into its card, where the model is an export of ours; says on stderr what it did.

    `content` is that of results.json, `tasks` those of this command (GLUE's are known anyway).
    """
    known = {task.name: task for task in (*GLUE, *tasks)}
    add_to_cards(content, lambda name: eval_results(name, content, known))


def add_to_cards(content: Mapping[str, Any], results: Callable[[str], list[EvalResult]]) -> None:
    """Puts what `results` gives for each model of results.json into its card; nothing into the hub's cache."""
    for name, model in content["models"].items():
        folder = Path(model["path"])
        if folder.is_relative_to(Path(constants.HF_HUB_CACHE).resolve()):
            continue
        try:
            replaced = add_scores(folder, results(name))
            if replaced is not None:
                print(f"{name}: scores are in its card, {folder / FILE}", file=sys.stderr)
            for line in replaced or ():
                print(f"  in place of {line}", file=sys.stderr)
        except OSError as problem:
            print(f"{name}: its card {folder / FILE} cannot be written: {problem.strerror}", file=sys.stderr)


def eval_results(model: str, content: Mapping[str, Any], tasks: Mapping[str, Task]) -> list[EvalResult]:
    """One result for each metric on each set of rows: the median over the fine-tuning seeds, as a fraction.

    `model` of `content`, that of results.json. What is not a task's own data, or not all of it, is called so.
    """
    found, settings = [], content["settings"]
    for name, entry in content["models"][model]["tasks"].items():
        if name not in tasks or "median" not in entry:
            continue
        task, cells = tasks[name], list(entry["seeds"].values())
        seeds = "one seed" if len(cells) == 1 else f"median of {len(cells)} seeds"
        said, shown = (f(name, content["tasks"][name], settings) for f in (reservation, called))
        hub = None if said else task.hub
        number = settings["epochs"]
        passes = f"{number:g} epoch{'' if number == 1 else 's'}" + (f" or {FEW_STEPS} steps" if task.examples else "")
        how = f"fine-tuned{f' on {task.base}' if task.base else ''} for {passes}"
        for key in cells[0]["metrics"]:
            metric = next(metric for metric in task.metrics if key == metric or key.startswith(f"{metric}_"))
            suffix = key.removeprefix(metric).removeprefix("_")
            kind, words = _METRICS[metric]
            table = (task.dev or task.test)[suffix] if suffix or task.dev else next(iter(task.test.values()))
            found.append(
                EvalResult(
                    task_type=form_of(task).called,
                    task_name=f"{name} {suffix}".rstrip(),
                    dataset_type=hub or name,
                    dataset_name=f"{title(shown)} {suffix}".rstrip() + (f" ({said})" if said else ""),
                    dataset_config=name if hub else None,
                    dataset_split=(table.hub_split if hub else suffix) or None,
                    metric_type=kind,
                    metric_name=f"{words}, {how}, {seeds}",
                    metric_value=round(statistics.median(cell["metrics"][key] for cell in cells), 4),
                )
            )
    return found
