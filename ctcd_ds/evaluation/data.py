"""Rows of the tasks, from a folder of the official files or from the hub: sentences, labels, numbers of rows."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ctcd_ds.cli import UserError
from ctcd_ds.evaluation.tasks import GLUE, Table, Task

HUB = "hub"
HUB_REPOSITORY = "nyu-mll/glue"
Label = int | float


@dataclass(frozen=True)
class Rows:
    """Rows of one table. `labels` are class ids, or scores from 0 to 5; None where the table has none."""

    texts: list[tuple[str, ...]]
    labels: list[Label] | None
    index: list[str]

    def __len__(self) -> int:
        return len(self.texts)


@dataclass(frozen=True)
class TaskData:
    """All rows of one task, keyed as in `Task`; `test` holds only what is there."""

    task: Task
    train: Rows | None
    dev: dict[str, Rows]
    test: dict[str, Rows]
    left_out: int = 0  # broken lines of the training file

    def sha256(self) -> str:
        """One hash of every sentence and label, by which a later run knows the same data again."""
        digest = hashlib.sha256()
        for key, rows in [("train", self.train), *self.dev.items(), *self.test.items()]:
            digest.update(repr((key, rows and (rows.texts, rows.labels))).encode())
        return digest.hexdigest()


def found(folder: Path, tasks: Sequence[Task] = GLUE) -> tuple[list[Task], list[Task]]:
    """The tasks that `folder` holds files of, and those that it does not. A diagnostic needs its task beside it."""

    def has_files(task: Task) -> bool:
        tables = [*([task.train] if task.train else []), *task.dev.values(), *task.test.values()]
        return any(_existing(folder, table) for table in tables)

    there = [task for task in tasks if has_files(task)]
    names = {task.name for task in there}
    there = [task for task in there if task.trained_on is None or task.trained_on in names]
    return there, [task for task in tasks if task not in there]


def from_folder(folder: Path, task: Task) -> TaskData:
    """Reads the official files of one task. Raises UserError for a missing or malformed file."""

    def required(table: Table) -> tuple[Rows, int]:
        path = _existing(folder, table)
        if path is None:
            raise UserError(f"--data_dir: task {task.name} needs {folder / table.file}, which does not exist")
        rows, left_out = read_table(path, table, task)
        if rows.labels is None:
            raise UserError(f"{path}: no column {table.label!r}, which task {task.name} is trained and scored on")
        return rows, left_out

    train, left_out = required(task.train) if task.train else (None, 0)
    dev = {key: required(table)[0] for key, table in task.dev.items()}
    test = {
        key: read_table(path, table, task)[0]
        for key, table in task.test.items()
        if (path := _existing(folder, table)) is not None
    }
    if not dev and not test:
        known = [file for table in task.test.values() for file in (table.file, *table.other_files)]
        raise UserError(f"--data_dir: task {task.name} has none of {', '.join(known)} in {folder}")
    return TaskData(task, train, dev, test, left_out)


def _existing(folder: Path, table: Table) -> Path | None:
    return next((folder / file for file in (table.file, *table.other_files) if (folder / file).is_file()), None)


def read_table(path: Path, table: Table, task: Task) -> tuple[Rows, int]:
    """Reads one official file; returns its rows and how many broken lines were left out.

    Quotes and carriage returns are text in these files, so the csv module is of no help.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="\n") as file:
            lines = file.read().removesuffix("\n").split("\n")
    except UnicodeDecodeError as problem:
        raise UserError(f"{path} is not UTF-8 text: {problem.reason} at byte {problem.start}") from None
    numbered = [(number, line.removesuffix("\r").split("\t")) for number, line in enumerate(lines, 1)]
    header = table.columns or tuple(table.renamed.get(name, name) for name in numbered.pop(0)[1])
    if missing := [name for name in table.text if name not in header]:
        raise UserError(f"{path}:1: no column {missing[0]!r}; the header names {', '.join(header)}")

    broken = [(number, len(cells)) for number, cells in numbered if len(cells) != len(header)]
    if len(broken) > table.broken_lines:
        number, cells = broken[0]
        wanted = f"{len(header)} ({', '.join(header)})"
        raise UserError(f"{path}:{number}: {cells} columns separated by tabs, where there should be {wanted}")
    whole = [(number, cells) for number, cells in numbered if len(cells) == len(header)]
    if not whole:
        raise UserError(f"{path} holds no rows")

    columns = [header.index(name) for name in table.text]
    labels = None
    if table.label in header:
        at = header.index(table.label)
        labels = [_label(cells[at], task, path, number) for number, cells in whole]
    index = header.index(table.index) if table.index in header else None
    return Rows(
        texts=[tuple(cells[column] for column in columns) for _, cells in whole],
        labels=labels,
        index=[str(row) if index is None else cells[index] for row, (_, cells) in enumerate(whole)],
    ), len(broken)


def _label(text: str, task: Task, path: Path, number: int) -> Label:
    if task.labels:
        if text in task.labels:
            return task.labels.index(text)
        raise UserError(f"{path}:{number}: label {text!r} is none of {', '.join(task.labels)}")
    try:
        score = float(text)
    except ValueError:
        score = math.nan
    if not 0 <= score <= 5:
        raise UserError(f"{path}:{number}: score {text!r} is no number from 0 to 5")
    return score


def from_hub(task: Task, repository: str = HUB_REPOSITORY) -> TaskData:
    """Loads one task through `datasets`: from its cache, or over the network."""
    import datasets

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

    def rows(table: Table) -> Rows:
        split: Any = splits[table.hub_split]
        labels = list(split["label"])
        return Rows(
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
