"""Files as the GLUE server takes them: one TSV of predictions a table, all of one model in one zip."""

from __future__ import annotations

import zipfile
from pathlib import Path

from ctcd_ds.evaluation.metrics import Array
from ctcd_ds.evaluation.tables import TaskRows
from ctcd_ds.evaluation.tasks import Task
from ctcd_ds.manifest import write_atomic


def write_predictions(path: Path, task: Task, rows: TaskRows, predictions: Array) -> None:
    """Writes `index<TAB>prediction`, labels as the task spells them, scores with three decimals."""
    answers = [task.labels[answer] if task.labels else f"{answer:.3f}" for answer in predictions]
    lines = [f"{index}\t{answer}" for index, answer in zip(rows.index, answers, strict=True)]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, "\n".join(["index\tprediction", *lines]) + "\n")


def write_zip(folder: Path) -> Path | None:
    """Packs the prediction files of `folder` into `folder`.zip; None where there are none."""
    files = sorted(folder.glob("*.tsv"))
    if not files:
        return None
    target = folder.with_name(folder.name + ".zip")
    temporary = target.with_name(f".{target.name}.tmp")
    with zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in files:
            archive.write(file, file.name)
    temporary.replace(target)
    return target
