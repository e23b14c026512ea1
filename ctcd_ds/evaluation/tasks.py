"""The tasks of GLUE as plain data: where their files lie, which columns count, how labels are spelt, what is measured.

A task of one's own is one more `Task` (task_file.py makes it from YAML, advglue.py from AdvGLUE's file); nothing here
is looked up by magic.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ctcd_ds.cli import UserError


@dataclass(frozen=True)
class Table:
    """One file of tab-separated values or JSON, and the split of the hub's data set that holds the same rows."""

    file: str  # relative to the folder of all tasks, or absolute
    text: tuple[str, ...]  # the columns of the one or two sentences
    hub_split: str = ""
    label: str | None = None
    index: str | None = None  # the column that numbers the rows; None: they are counted from 0
    columns: tuple[str, ...] | None = None  # of a file without a header line
    other_files: tuple[str, ...] = ()  # where else the same file is found
    renamed: Mapping[str, str] = field(default_factory=dict)  # other spellings of its columns
    broken_lines: int = 0  # lines with a wrong number of columns that the official file is known to hold
    key: str | None = None  # of a .json file that holds several lists of rows: which one


@dataclass(frozen=True, kw_only=True)
class Task:
    """One task. `dev` and `test` are keyed by the suffix of the metrics and by the official submission file."""

    name: str
    labels: tuple[str, ...]  # as the files and submissions spell them, in the order of the ids; (): a number
    metrics: tuple[str, ...]  # all of one form (ctcd_ds.evaluation.forms), which they name; the score is their mean
    train: Table | None
    dev: Mapping[str, Table]
    test: Mapping[str, Table] = field(default_factory=dict)
    range: tuple[float, float] = (0.0, 5.0)  # of the numbers, where there are no labels
    base: str | None = None  # a diagnostic: no training, it is predicted by the model that was fine-tuned on that task
    of_base: tuple[int, ...] = ()  # the label that each class of the base's model means here; (): the same ones
    examples: int | None = None  # it is fine-tuned on so many of its training rows, drawn by the seed; None: on all
    in_average: bool = True
    folder: str = ""
    hub: str | None = (
        "nyu-mll/glue"  # the hub's data set that holds the same rows; its configuration has the task's name
    )
    hub_text: tuple[str, ...] = ()  # the sentences' columns there


def _pair_task(
    name: str, folder: str, labels: tuple[str, ...], text: tuple[str, ...], metrics: tuple[str, ...] = ("accuracy",)
) -> Task:
    """A task whose train, dev and test files have a header with `index`, the two sentences and `label`."""
    return Task(
        name=name,
        folder=folder,
        labels=labels,
        metrics=metrics,
        hub_text=text,
        train=Table(f"{folder}/train.tsv", text, "train", "label", "index"),
        dev={"": Table(f"{folder}/dev.tsv", text, "validation", "label", "index")},
        test={f"{folder}.tsv": Table(f"{folder}/test.tsv", text, "test", index="index")},
    )


_BINARY = ("0", "1")
_INFERENCE = ("entailment", "neutral", "contradiction")
_ENTAILMENT = ("entailment", "not_entailment")
_PAIR = ("sentence1", "sentence2")

_COLA_COLUMNS = ("source", "label", "original_label", "sentence")
COLA = Task(
    name="cola",
    folder="CoLA",
    labels=_BINARY,
    metrics=("matthews",),
    hub_text=("sentence",),
    train=Table("CoLA/train.tsv", ("sentence",), "train", "label", columns=_COLA_COLUMNS),
    dev={"": Table("CoLA/dev.tsv", ("sentence",), "validation", "label", columns=_COLA_COLUMNS)},
    test={"CoLA.tsv": Table("CoLA/test.tsv", ("sentence",), "test", index="index")},
)

SST2 = Task(
    name="sst2",
    folder="SST-2",
    labels=_BINARY,
    metrics=("accuracy",),
    hub_text=("sentence",),
    train=Table("SST-2/train.tsv", ("sentence",), "train", "label"),
    dev={"": Table("SST-2/dev.tsv", ("sentence",), "validation", "label")},
    test={"SST-2.tsv": Table("SST-2/test.tsv", ("sentence",), "test", index="index")},
)

_MRPC_TEXT = ("#1 String", "#2 String")
MRPC = Task(
    name="mrpc",
    folder="MRPC",
    labels=_BINARY,
    metrics=("accuracy", "f1"),
    hub_text=_PAIR,
    train=Table("MRPC/train.tsv", _MRPC_TEXT, "train", "Quality"),
    dev={"": Table("MRPC/dev.tsv", _MRPC_TEXT, "validation", "Quality")},
    test={"MRPC.tsv": Table("MRPC/test.tsv", _MRPC_TEXT, "test", index="index")},
)

STSB = Task(
    name="stsb",
    folder="STS-B",
    labels=(),
    metrics=("pearson", "spearman"),
    hub_text=_PAIR,
    train=Table("STS-B/train.tsv", _PAIR, "train", "score", "index"),
    dev={"": Table("STS-B/dev.tsv", _PAIR, "validation", "score", "index")},
    test={"STS-B.tsv": Table("STS-B/test.tsv", _PAIR, "test", index="index")},
)

_QUESTIONS = ("question1", "question2")
QQP = Task(
    name="qqp",
    folder="QQP",
    labels=_BINARY,
    metrics=("accuracy", "f1"),
    hub_text=_QUESTIONS,
    # a few questions of the official train.tsv run over the end of the line; everybody leaves them out
    train=Table("QQP/train.tsv", _QUESTIONS, "train", "is_duplicate", "id", broken_lines=10),
    dev={"": Table("QQP/dev.tsv", _QUESTIONS, "validation", "is_duplicate", "id")},
    test={"QQP.tsv": Table("QQP/test.tsv", _QUESTIONS, "test", index="id")},
)

MNLI = Task(
    name="mnli",
    folder="MNLI",
    labels=_INFERENCE,
    metrics=("accuracy",),
    hub_text=("premise", "hypothesis"),
    train=Table("MNLI/train.tsv", _PAIR, "train", "gold_label", "index"),
    dev={
        "matched": Table("MNLI/dev_matched.tsv", _PAIR, "validation_matched", "gold_label", "index"),
        "mismatched": Table("MNLI/dev_mismatched.tsv", _PAIR, "validation_mismatched", "gold_label", "index"),
    },
    test={
        "MNLI-m.tsv": Table("MNLI/test_matched.tsv", _PAIR, "test_matched", index="index"),
        "MNLI-mm.tsv": Table("MNLI/test_mismatched.tsv", _PAIR, "test_mismatched", index="index"),
    },
)

QNLI = _pair_task("qnli", "QNLI", _ENTAILMENT, ("question", "sentence"))
RTE = _pair_task("rte", "RTE", _ENTAILMENT, _PAIR)
WNLI = _pair_task("wnli", "WNLI", _BINARY, _PAIR)

AX = Task(
    name="ax",
    folder="AX",
    labels=_INFERENCE,
    metrics=("matthews",),
    hub_text=("premise", "hypothesis"),
    train=None,
    dev={},
    test={
        "AX.tsv": Table(
            "AX/diagnostic-full.tsv",
            _PAIR,
            "test",
            label="label",  # only diagnostic-full.tsv has it
            index="index",
            other_files=(
                "AX/AX.tsv",
                "AX/test.tsv",
                "AX/diagnostic.tsv",
                "diagnostic/diagnostic.tsv",
                "MNLI/diagnostic.tsv",
            ),
            renamed={"Premise": "sentence1", "Hypothesis": "sentence2", "Label": "label"},
        )
    },
    base="mnli",
    in_average=False,
)

GLUE = (COLA, SST2, MRPC, STSB, QQP, MNLI, QNLI, RTE, WNLI, AX)


def plain_name(name: str) -> str:
    """`SST-2` → `sst2`: the spelling in which names are compared."""
    return name.strip().lower().replace("-", "").replace("_", "")


def named(names: Sequence[str], tasks: Sequence[Task] = GLUE) -> list[Task]:
    """The tasks of these names, in the order of `tasks`; `SST-2` and `sst2` are the same.

    Raises UserError for a name that no task has, and for a diagnostic without the task it is trained on.
    """
    by_name = {task.name: task for task in tasks}
    plain = [plain_name(name) for name in names]
    for given, name in zip(names, plain, strict=True):
        if name not in by_name:
            close = difflib.get_close_matches(name, by_name, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise UserError(f"--tasks: {given!r} is no task; there are {', '.join(by_name)}, or 'all'{hint}")
    chosen = [task for task in tasks if task.name in plain]
    for task in chosen:
        if task.base and task.base not in plain:
            raise UserError(
                f"--tasks: {task.name} has no training rows, it is predicted by the model fine-tuned on "
                f"{task.base}; add {task.base}"
            )
    return chosen
