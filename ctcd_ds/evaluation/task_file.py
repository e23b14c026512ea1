"""Tasks of one's own: a YAML file beside the data says what its columns are and what is measured.

    name: reviews
    text: sentence                 # or [premise, hypothesis]: the columns of one or two sentences
    label: label
    labels: [negative, positive]   # as the files spell them; or regression: [0, 5] for numbers in that range
    metrics: accuracy              # or several: the score is their mean
    train: train.tsv               # .tsv or .jsonl, beside this file
    dev: dev.tsv                   # or {seen: a.jsonl, unseen: b.jsonl}

With `base: sst2` and no `train`, the rows of `dev` are scored by the models that were fine-tuned on sst2.

What is measured says what is asked: entity_f1 and token_accuracy a label of each word (files in columns, as CoNLL's),
exact_match and answer_f1 an answer found in a text (SQuAD's files).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from ctcd_ds.cli import UserError, did_you_mean
from ctcd_ds.evaluation import advglue
from ctcd_ds.evaluation.forms import ANSWERS, METRICS, SENTENCES, WORDS, form_of, form_of_metric
from ctcd_ds.evaluation.forms.form import Form
from ctcd_ds.evaluation.forms.words import CONLLU, MARKED
from ctcd_ds.evaluation.metrics import OF_LABELS, OF_SCORES
from ctcd_ds.evaluation.tables import as_text
from ctcd_ds.evaluation.tasks import GLUE, Table, Task, plain_name
from ctcd_ds.plain import read_file
from ctcd_ds.recipe.schema import Mistakes, explained

FILE = "task.yaml"  # in a folder given instead of a file


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _spelt(value: Any) -> Any:
    if isinstance(value, list):
        return [as_text(label) for label in value]
    return {as_text(key): as_text(label) for key, label in value.items()} if isinstance(value, dict) else value


Names = Annotated[list[str], BeforeValidator(_as_list), Field(min_length=1)]
Files = Annotated[dict[str, str], BeforeValidator(lambda v: {"": v} if isinstance(v, str) else v), Field(min_length=1)]


class TaskFile(BaseModel):
    """One task.

    name: in tables and results.json; letters, digits, _ and -; none of GLUE's.
    text: one column, or two for pairs of sentences; that of the words. label: the column of the answer. SQuAD's files
        need neither.
    labels: how the files spell the labels. A list is in the order of the ids (of two, the second is F1's positive; with
        a base, in the order of the base's labels). With a base also a mapping, for each label of the base what it means
        here: HANS for mnli has {entailment: entailment, neutral: non-entailment, contradiction: non-entailment}.
    regression: lowest and highest number, instead of labels.
    metrics: accuracy, f1, matthews; pearson, spearman for numbers; entity_f1, token_accuracy for words; exact_match,
        answer_f1 for answers.
    train, dev: files relative to this one, .tsv or .jsonl (.json: one list of rows); .conll, .conllu, .iob2, .bio, .tsv
        or .txt for words; .json for answers.
    columns: the names of a file's columns where it has no header line; files of words have none.
    base: the task, of GLUE or of another task file, whose fine-tuned models are scored here. A task that has training
        rows too is trained on them, unless --no_finetune_on names it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    name: str
    text: Annotated[Names, Field(max_length=2)] | None = None
    label: str = "label"
    labels: Annotated[list[str] | dict[str, str] | None, BeforeValidator(_spelt)] = None
    regression: Annotated[tuple[float, float], Field(strict=False)] | None = None
    metrics: Names
    train: str | None = None
    dev: Files
    columns: list[str] | None = None
    base: str | None = None


def own_tasks(paths: Sequence[Path], chosen: Sequence[Task], no_finetune_on: Sequence[str] = ()) -> list[Task]:
    """The tasks of these task files, folders with a task.yaml, or AdvGLUE's dev.json.

    `chosen` are GLUE's tasks of this run; those in `no_finetune_on` are scored by their base's models only. Raises
    UserError, or Mistakes with all that is wrong in one file.
    """
    files = [(path, _read(path)) for path in map(_task_file, paths) if path.suffix != ".json"]
    untrained = _untrained(chosen, [file for _, file in files], no_finetune_on)
    trained = {plain_name(task.name): task for task in chosen if task.train}
    trained |= {plain_name(file.name): _task(path, file) for path, file in files if file.name not in untrained}
    tasks = [
        _diagnostic(path, file, _base(path, file, trained)) if file.name in untrained else _task(path, file)
        for path, file in files
    ]
    for path in paths:
        if path.suffix == ".json":
            tasks += advglue.tasks_in(path, {task.name for task in chosen})
    names = [plain_name(task.name) for task in (*chosen, *tasks)]
    if twice := [task.name for task in tasks if names.count(plain_name(task.name)) > 1]:
        raise UserError(f"--task_files: there are two tasks named {twice[0]!r}: rename one, or give the file once")
    return tasks


def _untrained(chosen: Sequence[Task], files: Sequence[TaskFile], no_finetune_on: Sequence[str]) -> set[str]:
    """The names of the task files whose rows are only scored, by the models fine-tuned on their base."""
    with_base = {file.name for file in files if file.base is not None}
    names = {*(task.name for task in chosen), *(file.name for file in files)}
    for name in no_finetune_on:
        if name not in names:
            raise UserError(f"--no_finetune_on: {name!r} is no task of this command; {did_you_mean(name, names)}")
        if name not in with_base:
            raise UserError(f"--no_finetune_on: {name} has no base whose fine-tuned models could be scored on it")
    return {file.name for file in files if file.base and (file.train is None or file.name in no_finetune_on)}


def _task_file(path: Path) -> Path:
    if path.is_dir():
        if not (path / FILE).is_file():
            raise UserError(f"--task_files: {path} holds no {FILE}; write one, or name the file")
        return path / FILE
    if not path.is_file():
        raise UserError(f"--task_files: {path} does not exist")
    return path


def _read(path: Path) -> TaskFile:
    raw = read_file(path, "task file")
    if not isinstance(raw, dict):
        raise UserError(f"task file {path}: a mapping of {', '.join(TaskFile.model_fields)} is wanted")
    try:
        file = TaskFile.model_validate(raw)
    except ValidationError as problem:
        raise Mistakes(f"task file {path}", explained(problem, TaskFile)) from None
    if mistakes := list(_mistakes(path, file)):
        raise Mistakes(f"task file {path}", mistakes)
    return file


def _mistakes(path: Path, file: TaskFile) -> Iterator[str]:
    if not re.fullmatch(r"[A-Za-z0-9_-]+", file.name):
        yield f"name = {file.name!r}: letters, digits, _ and - only"
    if plain_name(file.name) in {task.name for task in GLUE}:
        yield f"name = {file.name!r}: is GLUE's; take another (and base: {file.name}, if its models are scored here)"
    if unknown := [metric for metric in file.metrics if metric not in METRICS]:
        yield f"metrics: {unknown[0]!r} is none; {did_you_mean(unknown[0], METRICS)}"
        return  # they say what is asked, on which the rest depends
    form = form_of_metric(file.metrics[0])
    yield from _wrong_answers(file, form)
    if file.base is None and file.train is None:
        yield "neither train nor base: give training rows, or the task whose fine-tuned models are scored here"
    if file.base is None and isinstance(file.labels, dict):
        yield "labels: a mapping says what a base's labels mean here, and there is no base; write a list"
    for key, name in [("train", file.train), *((f"dev.{k}" if k else "dev", n) for k, n in file.dev.items())]:
        if name is not None and Path(name).suffix not in form.suffixes:
            yield f"{key} = {name!r}: a file ending in {', '.join(form.suffixes)}"
        elif name is not None and not (path.parent / name).is_file():
            there = [f.name for f in sorted(path.parent.iterdir()) if f.suffix in form.suffixes]
            yield f"{key} = {name!r}: {path.parent} holds no such file; {did_you_mean(name, there)}"
    yield from _wrong_columns(file, form)


def _wrong_answers(file: TaskFile, form: Form) -> Iterator[str]:
    """What is wrong with labels, and with metrics beside them."""
    if form is ANSWERS:
        if file.labels is not None or file.regression is not None:
            yield f"labels, regression: {', '.join(form.metrics)} compare words; leave them out"
    elif form is WORDS:
        if file.labels is None or file.regression is not None:
            yield f"labels: {', '.join(form.metrics)} need them, as the files spell them (and no regression)"
    elif (file.labels is None) == (file.regression is None):
        yield f"exactly one of labels and regression; {'neither is' if file.labels is None else 'both are'} given"
    kind, fitting = file.metrics[0], form.metrics
    if form is SENTENCES:
        kind, fitting = ("regression", OF_SCORES) if file.regression else ("labels", OF_LABELS)
    if unfit := [metric for metric in file.metrics if metric not in fitting]:
        yield f"metrics: {unfit[0]} does not fit {kind}; {', '.join(fitting)} do"
    own = _own_labels(file)
    if file.labels is not None and (len(own) < 2 or (isinstance(file.labels, list) and len(own) < len(file.labels))):
        yield f"labels = {file.labels}: at least two different ones"
    if "f1" in file.metrics and len(own) > 2:
        yield "metrics: f1 is for two labels; use accuracy or matthews"
    if "entity_f1" in file.metrics and (unmarked := [label for label in own if not MARKED.fullmatch(label)]):
        yield f"labels: {unmarked[0]!r} marks no entity, as O, B-NAME and I-NAME do; or measure token_accuracy"
    if file.regression and not file.regression[0] < file.regression[1]:
        yield f"regression = {list(file.regression)}: the lowest number, then the highest"


def _wrong_columns(file: TaskFile, form: Form) -> Iterator[str]:
    if form is ANSWERS:
        if file.text is not None or file.columns is not None:
            yield "text, columns: files of SQuAD have names of their own; leave them out"
        return
    if file.text is None or (form is WORDS and len(file.text) > 1):
        yield f"text: say which column holds the {'words' if form is WORDS else 'text'}"
    columns = _columns(file, form)
    if columns is None and form is WORDS:
        yield "columns: name the columns of the file, as in [word, pos, chunk, ner]"
    for name in [*(file.text or ()), file.label]:
        if columns is not None and name not in columns:
            yield f"columns: {name!r} is not among them; {did_you_mean(name, columns)}"


def _columns(file: TaskFile, form: Form) -> list[str] | None:
    """The names of columns that no header line has; .conllu has its own."""
    names = [*file.dev.values(), *([file.train] if file.train else [])]
    return [*CONLLU] if form is WORDS and all(name.endswith(".conllu") for name in names) else file.columns


def _own_labels(file: TaskFile) -> tuple[str, ...]:
    """The labels in the order of their ids; those of a mapping in the order in which it first names them."""
    return tuple(dict.fromkeys(file.labels.values() if isinstance(file.labels, dict) else file.labels or ()))


def _task(path: Path, file: TaskFile) -> Task:
    def table(name: str) -> Table:
        columns = tuple(_columns(file, form_of_metric(file.metrics[0])) or ()) or None
        return Table(str((path.parent / name).resolve()), tuple(file.text or ()), label=file.label, columns=columns)

    return Task(
        name=file.name,
        labels=_own_labels(file),
        metrics=tuple(file.metrics),
        train=table(file.train) if file.train else None,
        dev={key: table(name) for key, name in file.dev.items()},
        range=file.regression or (0.0, 5.0),
        in_average=False,
        hub=None,
    )


def _base(path: Path, file: TaskFile, trained: Mapping[str, Task]) -> Task:
    assert file.base is not None
    plain = plain_name(file.base)
    if plain in trained:
        return trained[plain]
    if any(task.name == plain and task.train for task in GLUE):
        raise UserError(f"task file {path}: base = {file.base}: no model is fine-tuned on it; add {plain} to --tasks")
    known = did_you_mean(file.base, {*trained, *(task.name for task in GLUE if task.train)})
    raise UserError(f"task file {path}: base = {file.base!r}: no task that models are fine-tuned on; {known}")


def _diagnostic(path: Path, file: TaskFile, base: Task) -> Task:
    """The task as one that is scored by the base's models, its labels set against the base's."""
    task = replace(_task(path, file), train=None, base=base.name)
    if form_of(task) is not form_of(base):
        asked, of_base = ", ".join(task.metrics), ", ".join(base.metrics)
        raise UserError(
            f"task file {path}: it measures {asked}, its base {base.name} {of_base}: another kind of answer"
        )
    if bool(task.labels) != bool(base.labels):
        kinds = ("numbers", "labels")
        raise UserError(
            f"task file {path}: it has {kinds[bool(task.labels)]}, its base {base.name} {kinds[bool(base.labels)]}"
        )
    spelt_by_base = ", ".join(base.labels)
    if isinstance(file.labels, dict):
        if set(file.labels) != set(base.labels):
            raise UserError(f"task file {path}: labels: say what each of the base's labels means here: {spelt_by_base}")
        return replace(task, of_base=tuple(task.labels.index(file.labels[label]) for label in base.labels))
    if len(task.labels) != len(base.labels):
        raise UserError(
            f"task file {path}: labels = {', '.join(task.labels)}: the base {base.name} has {len(base.labels)} "
            f"({spelt_by_base}); write a mapping from each of them to what it means here"
        )
    return task
