"""One file of a task's rows: tab-separated values, JSON lines, or a list in a JSON file → sentences and labels."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ctcd_ds.cli import UserError, did_you_mean
from ctcd_ds.corpus.sources import unicode_text
from ctcd_ds.evaluation.tasks import Table, Task
from ctcd_ds.plain import from_json

Label = int | float | tuple[Any, ...]  # a label's id; a number; what stands for each word; the answers to a question
SUFFIXES = (".tsv", ".jsonl", ".json")


@dataclass(frozen=True)
class TaskRows:
    """Rows of one table: its texts, and their labels, None where the table has none."""

    texts: list[tuple[str, ...]]
    labels: list[Label] | None
    index: list[str]

    def __len__(self) -> int:
        return len(self.texts)


@dataclass(frozen=True)
class _Columns:
    """The columns of a file that a task needs and the file has: name → cells, and where each row stands in the file."""

    cells: dict[str, list[str]]
    places: list[int]
    place: str  # in words, before the row's number
    broken: int = 0


def read_table(path: Path, table: Table, task: Task) -> tuple[TaskRows, int]:
    """Reads one file; returns its rows and how many broken lines were left out.

    Raises UserError, with file and line, for what cannot be read, a missing column, and a label that the task has not.
    """
    columns = _tab_separated(path, table) if path.suffix == ".tsv" else _json(path, table)
    if not columns.places:
        raise UserError(f"{path} holds no rows")
    labels = None
    if table.label is not None and table.label in columns.cells:
        written = zip(columns.cells[table.label], columns.places, strict=True)
        labels = [label_id(text, task, f"{columns.place}{number}") for text, number in written]
    index = columns.cells.get(table.index) if table.index else None
    return TaskRows(
        texts=list(zip(*(columns.cells[name] for name in table.text), strict=True)),
        labels=labels,
        index=[str(row) for row in range(len(columns.places))] if index is None else index,
    ), columns.broken


def _needed(table: Table) -> list[str]:
    return [*table.text, *(name for name in (table.label, table.index) if name is not None)]


def lines_of(path: Path) -> list[str]:
    """The lines of a text file. Raises UserError where it cannot be read or is no UTF-8."""
    try:
        with path.open(encoding="utf-8-sig", newline="\n") as file:
            text = file.read()
        text = text if "\n" in text else text.replace("\r", "\n")  # as old Macs, and Excel on them, end lines
        return [line.removeprefix("\ufeff") for line in text.rstrip("\n").split("\n")]
    except UnicodeDecodeError as problem:
        raise UserError(f"{path} is not UTF-8 text: {problem.reason} at byte {problem.start}") from None
    except OSError as problem:
        raise UserError(f"{path} cannot be read: {problem.strerror}") from None


def _tab_separated(path: Path, table: Table) -> _Columns:
    """Quotes and carriage returns are text in GLUE's files, so the csv module is of no help."""
    lines = [line.removesuffix("\r") for line in lines_of(path)]
    while lines and not lines[-1]:  # blank lines at the end are no rows
        lines.pop()
    if not lines:
        raise UserError(f"{path} is empty")
    numbered = [(number, line.split("\t")) for number, line in enumerate(lines, 1)]
    header = table.columns or tuple(table.renamed.get(name, name) for name in numbered.pop(0)[1])
    if missing := [name for name in table.text if name not in header]:
        hint = did_you_mean(missing[0], header)
        raise UserError(f"{path}:1: no column {missing[0]!r}; the header names {', '.join(header)}; {hint}")
    if twice := [name for name in _needed(table) if header.count(name) > 1]:
        raise UserError(f"{path}:1: the header names {twice[0]!r} twice; which of the columns is meant?")
    broken = [(number, len(cells)) for number, cells in numbered if len(cells) != len(header)]
    if len(broken) > table.broken_lines:
        number, count = broken[0]
        wanted = f"{len(header)} ({', '.join(header)})"
        raise UserError(f"{path}:{number}: {count} columns separated by tabs, where there should be {wanted}")
    whole = [(number, cells) for number, cells in numbered if len(cells) == len(header)]
    at = {name: header.index(name) for name in _needed(table) if name in header}
    return _Columns(
        {name: [cells[column] for _, cells in whole] for name, column in at.items()},
        [number for number, _ in whole],
        f"{path}:",
        len(broken),
    )


def _json(path: Path, table: Table) -> _Columns:
    """A line for each row (.jsonl), or a list of rows (.json), in an object under the table's key."""
    if path.suffix == ".jsonl":
        place, numbered = f"{path}:", [(number, line) for number, line in enumerate(lines_of(path), 1) if line.strip()]
        rows = [(number, parse_json(line, f"{place}{number}")) for number, line in numbered]
    else:
        content = parse_json("\n".join(lines_of(path)), str(path))
        place, content = (f"{path}: {table.key} ", content[table.key]) if table.key else (f"{path}: row ", content)
        rows = list(enumerate(content))
    needed = _needed(table)
    cells: dict[str, list[str]] = {name: [] for name in needed}
    for number, row in rows:
        if not isinstance(row, dict):
            raise UserError(f"{place}{number}: a row is an object with {', '.join(needed)}, not {json.dumps(row)[:60]}")
        for name in needed:
            if name not in row:
                raise UserError(f"{place}{number}: no key {name!r}; {did_you_mean(name, row)}")
            if name in table.text and not isinstance(row[name], str):
                raise UserError(f"{place}{number}: {name} = {json.dumps(row[name])[:60]} is no text")
            cells[name].append(unicode_text(as_text(row[name]), f"{place}{number}: {name}"))
    return _Columns(cells, [number for number, _ in rows], place)


def parse_json(text: str, place: str) -> Any:
    """Plain data from JSON. Raises UserError, naming the place, for what is none."""
    try:
        return from_json(text)
    except ValueError as problem:
        raise UserError(f"{place} is not JSON: {problem}") from None


def as_text(value: Any) -> str:
    """A label as text: words as they are, 1 → "1", true → "true"."""
    return value if isinstance(value, str) else json.dumps(value, default=str)


def label_id(text: str, task: Task, place: str) -> Label:
    """The id of a label, or the number, that stands at `place`. Raises UserError for one that the task has not."""
    if task.labels:
        if text in task.labels:
            return task.labels.index(text)
        raise UserError(f"{place}: label {text!r} is none of {', '.join(task.labels)}{_near(text, task.labels)}")
    low, high = task.range
    try:
        score = float(text)
    except ValueError:
        score = math.nan
    if not low <= score <= high:
        raise UserError(f"{place}: score {text!r} is no number from {low:g} to {high:g}")
    return score


def _near(text: str, labels: Sequence[str]) -> str:
    hint = did_you_mean(text, labels)
    return f"; {hint}" if hint.startswith("did") else ""
