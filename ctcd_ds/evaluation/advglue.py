"""AdvGLUE's dev.json: adversarial rows for five tasks of GLUE, each scored by models fine-tuned on the clean task.

One object, {"sst2": [{"idx": 0, "sentence": …, "label": 1}, …], "qqp": […], "mnli": […], "mnli-mm": […], "qnli": […],
"rte": […]}, from https://github.com/AI-secure/adversarial-glue (arXiv 2111.02840; CC BY-SA 4.0). Labels are the ids of
GLUE's labels. As its own evaluate.py does, QQP is scored by accuracy and F1 and MNLI by both of its sets.
"""

from __future__ import annotations

import sys
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from ctcd_ds.cli import UserError, did_you_mean
from ctcd_ds.evaluation.tables import parse_json
from ctcd_ds.evaluation.tasks import MNLI, QNLI, QQP, RTE, SST2, Table, Task

_BASES = (SST2, QQP, MNLI, QNLI, RTE)
_DEV_KEYS = {"sst2": {"": "sst2"}, "qqp": {"": "qqp"}, "mnli": {"matched": "mnli", "mismatched": "mnli-mm"}} | {
    name: {"": name} for name in ("qnli", "rte")
}
_KEYS = tuple(key for keys in _DEV_KEYS.values() for key in keys.values())


def tasks_in(path: Path, bases: Collection[str]) -> list[Task]:
    """The tasks of an AdvGLUE file whose base is one of `bases`; says on stderr which others it holds.

    Raises UserError where the file is none of AdvGLUE's, or none of its tasks has its base there.
    """
    try:
        content = parse_json(path.read_text(encoding="utf-8-sig"), str(path))
    except (OSError, UnicodeDecodeError) as problem:
        raise UserError(f"--task_files: {path} cannot be read: {problem}") from None
    if not isinstance(content, dict) or not content or not all(isinstance(rows, list) for rows in content.values()):
        raise UserError(
            f"--task_files: {path} is not AdvGLUE's dev.json, an object with a list of rows for each of "
            f"{', '.join(_KEYS)}; a task file of your own is YAML"
        )
    if unknown := [key for key in content if key not in _KEYS]:
        raise UserError(
            f"--task_files: {path}: {unknown[0]!r} is no task of AdvGLUE; {did_you_mean(unknown[0], _KEYS)}"
        )
    there = [task for base in _BASES if (task := _task(path, base, content.keys())).dev]
    chosen = [task for task in there if task.base in bases]
    others = [f"{task.name} (add {task.base})" for task in there if task not in chosen]
    if not chosen:
        raise UserError(
            f"--task_files: {path}: no model is fine-tuned on what its tasks are made from: {', '.join(others)}"
        )
    if others:
        print(f"not scored, because their clean task is not among --tasks: {', '.join(others)}", file=sys.stderr)
    return chosen


def _task(path: Path, base: Task, keys: Collection[str]) -> Task:
    dev = {
        suffix: Table(str(path.resolve()), base.hub_text, f"validation_{suffix}".rstrip("_"), "label", key=key)
        for suffix, key in _DEV_KEYS[base.name].items()
        if key in keys
    }
    numbers = tuple(str(number) for number in range(len(base.labels)))
    hub = "AI-Secure/adv_glue"
    return replace(base, name=f"adv_{base.name}", labels=numbers, base=base.name, train=None, dev=dev, test={}, hub=hub)
