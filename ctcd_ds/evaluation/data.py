"""Rows of the tasks, from a folder of the official files or from the hub."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ctcd_ds.cli import UserError
from ctcd_ds.evaluation.forms import form_of
from ctcd_ds.evaluation.tables import TaskRows
from ctcd_ds.evaluation.tasks import GLUE, Table, Task
from ctcd_ds.hub import settle_hub

HUB = "hub"


@dataclass(frozen=True)
class TaskData:
    """All rows of one task, keyed as in `Task`; `test` holds only what is there."""

    task: Task
    train: TaskRows | None
    dev: dict[str, TaskRows]
    test: dict[str, TaskRows]
    left_out: int = 0  # broken lines of the training file

    def sha256(self) -> str:
        """One hash of every sentence and label, by which a later run knows the same data again."""
        digest = hashlib.sha256()
        for key, rows in [("train", self.train), *self.dev.items(), *self.test.items()]:
            digest.update(repr((key, rows and (rows.texts, rows.labels))).encode())
        return digest.hexdigest()


def tasks_in(folder: Path, tasks: Sequence[Task] = GLUE) -> tuple[list[Task], list[Task]]:
    """The tasks that `folder` holds files of, and those that it does not. A diagnostic needs its task beside it."""

    def has_files(task: Task) -> bool:
        tables = [*([task.train] if task.train else []), *task.dev.values(), *task.test.values()]
        return any(_existing(folder, table) for table in tables)

    there = [task for task in tasks if has_files(task)]
    names = {task.name for task in there}
    there = [task for task in there if task.base is None or task.base in names]
    return there, [task for task in tasks if task not in there]


def from_folder(folder: Path, task: Task) -> TaskData:
    """Reads the official files of one task. Raises UserError for a missing or malformed file."""

    def required(table: Table) -> tuple[TaskRows, int]:
        path = _existing(folder, table)
        if path is None:
            raise UserError(f"--data_dir: task {task.name} needs {folder / table.file}, which does not exist")
        rows, left_out = form_of(task).read(path, table, task)
        if rows.labels is None:
            raise UserError(f"{path}: no column {table.label!r}, which task {task.name} is trained and scored on")
        return rows, left_out

    train, left_out = required(task.train) if task.train else (None, 0)
    dev = {key: required(table)[0] for key, table in task.dev.items()}
    test = {
        key: form_of(task).read(path, table, task)[0]
        for key, table in task.test.items()
        if (path := _existing(folder, table)) is not None
    }
    if not dev and not test:
        known = [file for table in task.test.values() for file in (table.file, *table.other_files)]
        raise UserError(f"--data_dir: task {task.name} has none of {', '.join(known)} in {folder}")
    return TaskData(task, train, dev, test, left_out)


def _existing(folder: Path, table: Table) -> Path | None:
    return next((folder / file for file in (table.file, *table.other_files) if (folder / file).is_file()), None)


def from_hub(task: Task, repository: str | None = None) -> TaskData:
    """Loads one task through `datasets`: from its cache, or over the network."""
    settle_hub()
    import datasets

    repository = repository or task.hub
    bars_were_on = datasets.utils.logging.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        splits = datasets.load_dataset(repository, task.name)
    except Exception as problem:  # datasets, huggingface_hub and httpx each have their own, with no common base
        reason = str(problem).strip().splitlines()[0] if str(problem).strip() else type(problem).__name__
        raise UserError(
            f"--data_dir hub: {repository} ({task.name}) cannot be loaded: {reason}. Without a network, "
            f"give --data_dir the folder that holds {task.folder}/train.tsv and the other official files"
        ) from None
    finally:
        if bars_were_on:
            datasets.enable_progress_bars()

    def rows(table: Table) -> TaskRows:
        split: Any = splits[table.hub_split]
        labels = list(split["label"])
        return TaskRows(
            texts=list(zip(*(split[column] for column in task.hub_text), strict=True)),
            labels=None if all(label == -1 for label in labels) else labels,
            index=[str(row) for row in range(len(labels))],
        )

    return TaskData(
        task,
        rows(task.train) if task.train else None,
        {key: rows(table) for key, table in task.dev.items()},
        {key: rows(table) for key, table in task.test.items() if table.hub_split in splits},
    )
