"""What a score may be called: GLUE's only where the rows were GLUE's, and all of them were used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ctcd_ds.evaluation.tasks import GLUE

# Training and dev rows of GLUE's published files; other numbers are other data under GLUE's names.
_ROWS = {
    "cola": (8_551, 1_043),
    "sst2": (67_349, 872),
    "mrpc": (3_668, 408),
    "stsb": (5_749, 1_500),
    "qqp": (363_846, 40_430),
    "mnli": (392_702, 9_815 + 9_832),
    "qnli": (104_743, 5_463),
    "rte": (2_490, 277),
    "wnli": (635, 71),
}


def reservation(name: str, task: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """Why a score is not what its task's name promises, in words; "" where it is.

    `task` and `settings` as results.json of a GLUE run has them.
    """
    said, examples, of = [], task.get("examples"), name.partition("@")[0]
    rows = (task["train_rows"], task["dev_rows"])
    if of in _ROWS and "shots" not in task and rows != _ROWS[of]:
        ours, theirs = ("{:,} training and {:,} dev rows".format(*counts) for counts in (rows, _ROWS[of]))
        said.append(f"a stand-in of {ours}; GLUE's {of} has {theirs}")
    if examples:
        said.append(f"fine-tuned on {examples:,} of {rows[0]:,} training rows, drawn by the seed")
    elif (limit := settings.get("max_train_samples")) and limit < rows[0]:
        said.append(f"fine-tuned on {limit:,} of {rows[0]:,} training rows")
    if (limit := settings.get("max_eval_samples")) and limit < rows[1]:
        said.append(f"scored on {limit:,} of {rows[1]:,} dev rows")
    return "; ".join(said)


def called(name: str, task: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """The name under which a score may stand beside others: a stand-in or a part is not the task."""
    said, examples = reservation(name, task, settings), task.get("examples")
    few = f" {examples} examples" if examples else f" {task['shots']}-shot" if "shots" in task else ""
    part = " stand-in" if "stand-in" in said else " in part" if said and not examples else ""
    return name.partition("@")[0] + part + few


def title(name: str) -> str:
    """A task as a reader knows it: GLUE's own by that name, whatever else by its own."""
    return f"GLUE {name}" if name in {task.name for task in GLUE} | {"average"} else name
