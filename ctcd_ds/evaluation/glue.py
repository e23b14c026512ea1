"""GLUE and tasks like it, for one or several models side by side: every model, task and seed is one cell, done once.

results.json is whole after every cell, so a run that was cut off goes on where it stopped.
"""

from __future__ import annotations

import gc
import platform
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ctcd_ds.cli import UserError, count, one_folder
from ctcd_ds.corpus.tokenizer import save_tokenizer
from ctcd_ds.evaluation import metrics
from ctcd_ds.evaluation.card import write_cards
from ctcd_ds.evaluation.data import HUB, TaskData, from_folder, from_hub, tasks_in
from ctcd_ds.evaluation.finetune import (
    Checkpoint,
    Finetuned,
    FinetuneSettings,
    encode,
    encode_dev,
    finetune,
    open_checkpoint,
    precision,
    quiet_libraries,
    steps,
    subset,
    training_rows,
)
from ctcd_ds.evaluation.forms import SENTENCES, form_of
from ctcd_ds.evaluation.forms.form import Form
from ctcd_ds.evaluation.results import Cell, Grid, best_seed, make_directory, report, resume, save
from ctcd_ds.evaluation.submission import write_predictions, write_zip
from ctcd_ds.evaluation.task_file import own_tasks
from ctcd_ds.evaluation.tasks import GLUE, Task, named
from ctcd_ds.hub import settle_hub
from ctcd_ds.kinds import instead
from ctcd_ds.kinds import missing as absent
from ctcd_ds.peers.reading import fit_tokenizer

ALL = ("all",)
_NAME = re.compile(r"([\w.-]+/)?[\w-][\w.-]*")  # of a model on the hub


def run(
    models: Sequence[str | Path],
    tasks: Sequence[str],
    data_dir: Path | str | None,
    output_dir: Path,
    seeds: Sequence[int] = (1,),
    settings: FinetuneSettings | None = None,
    keep_models: bool = False,
    task_files: Sequence[Path] = (),
    no_finetune_on: Sequence[str] = (),
    train_examples: Sequence[int] = (),
) -> dict[str, Any]:
    """Fine-tunes and measures every model on every task with every seed; returns the content of results.json.

    `tasks` are names or ("all",): those that `data_dir` holds; `data_dir` is a folder of official files or "hub".
    `task_files` bring further tasks (task_file.py, advglue.py), `no_finetune_on` names those of them that are scored by
    their base's models only. `train_examples`: every task is done once for each number, fine-tuned on so many of its
    rows. `models` are directories, or names on the hub. Writes results.json and submissions/MODEL.zip into
    `output_dir`, the fine-tuned models if `keep_models`, and the scores into the cards of models that `ctcd export`
    wrote.
    Raises UserError, before anything is written, for models, tasks, data or an output directory that cannot serve.
    """
    settings = settings or FinetuneSettings()
    if not seeds:
        raise UserError("--seeds names no seed")
    if wrong := [seed for seed in seeds if not 0 <= seed < 2**32]:
        raise UserError(f"--seeds: {wrong[0]} is not in 0 … 4294967295")
    data = load(tasks, data_dir, task_files, no_finetune_on, settings.max_eval_samples)
    data = in_sizes(data, train_examples, settings.max_train_samples) if train_examples else data
    with quiet_libraries():
        checkpoints = open_checkpoints(models, list({form_of(read.task): None for read in data.values()}))
        _refuse_short_rows(checkpoints, settings)
        grid, cells = resume(output_dir / "results.json", _grid(checkpoints, data, settings))
        make_directory(output_dir)
        lanes = plan(checkpoints, data, list(dict.fromkeys(seeds)), settings, cells)
        total = sum(lane.steps * len(lane.seeds) for lane in lanes)
        often = 0.1 if sys.stderr.isatty() else 30.0  # seconds; a log file wants few lines
        with tqdm(total=total, unit="step", disable=total == 0, mininterval=often, dynamic_ncols=True) as bar:
            for lane in lanes:
                do_lane(lane, settings, keep_models, output_dir, grid, cells, bar)
        gc.unfreeze()
        for checkpoint in checkpoints:
            write_zip(submission_folder(output_dir, checkpoint))
    content = report(grid, cells)
    save(output_dir / "results.json", content)
    write_cards(content, [read.task for read in data.values()])
    return content


def _refuse_short_rows(checkpoints: Sequence[Checkpoint], settings: FinetuneSettings) -> None:
    for checkpoint in checkpoints:
        needed = checkpoint.tokenizer.num_special_tokens_to_add(pair=True) + 2
        if (length := min(settings.max_length, checkpoint.positions)) < needed:
            raise UserError(
                f"--max_length: {length} leaves no room for text beside the special tokens of {checkpoint.name}; give "
                f"{needed} or more"
            )


def in_sizes(data: dict[str, TaskData], numbers: Sequence[int], most: int | None) -> dict[str, TaskData]:
    """Every task once for each number of training examples, sst2 as sst2@16, sst2@64; `most`: rows there may be.

    Raises UserError where a task has fewer.
    """
    made = {}
    for read in data.values():
        for number in sorted(set(numbers)):
            task, rows = read.task, min(len(read.train), most or len(read.train)) if read.train else number
            if not 0 < number <= rows:
                raise UserError(
                    f"--train_examples: {number}: task {task.name} has {rows} training rows; give 1 to {rows}"
                )
            base = f"{task.base}@{number}" if task.base else None
            task = replace(task, name=f"{task.name}@{number}", base=base, examples=number, in_average=False)
            made[task.name] = replace(read, task=task)
    return made


def open_checkpoints(models: Sequence[str | Path], forms: Sequence[Form] = (SENTENCES,)) -> list[Checkpoint]:
    """The models, named by `model_names`, seen to have the heads for these forms."""
    return [open_checkpoint(path, name, forms) for path, name in model_names(models)]


def model_names(models: Sequence[str | Path]) -> list[tuple[Path, str]]:
    """Each model's absolute directory, and the shortest tail of its path that no other's has, or its name on the hub.

    Models of the hub come from its cache, or over the network. Raises UserError for what is no Hugging Face model,
    there or here, and for one that is given twice.
    """
    if not models:
        raise UserError("--model names no model")
    hub = {model: _from_hub(str(model)) for model in models if _may_be_of_the_hub(str(model))}
    local = [Path(model) for model in models if model not in hub]
    for path in local:
        if not (path / "config.json").is_file():
            raise UserError(f"--model: {path} is no Hugging Face model (no config.json): {instead(path, 'model')}")
    resolved = [hub[model] if model in hub else Path(model).resolve() for model in models]
    if twice := [path for path in resolved if resolved.count(path) > 1]:
        raise UserError(f"--model: {twice[0]} is given twice")
    short = iter(short_names([path.resolve() for path in local]))
    names = [str(model) if model in hub else next(short) for model in models]
    if same := one_folder(names, submission_name):
        raise UserError(f"--model: the submissions of {same} would be one file; give them in two commands")
    return list(zip(resolved, names, strict=True))


def _may_be_of_the_hub(name: str) -> bool:
    """Whether a name can only be meant so: it is nothing here, nor in a folder that is here."""
    path = Path(name)
    return bool(_NAME.fullmatch(name)) and not path.exists() and ("/" not in name or not path.parent.exists())


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download

    settle_hub()
    others = ["*.json", "*.txt", "*.model"]
    try:
        place = Path(snapshot_download(name, allow_patterns=[*others, "model*.safetensors"]))
        if not list(place.glob("*.safetensors")):  # an old one
            place = Path(snapshot_download(name, allow_patterns=[*others, "pytorch_model*.bin"]))
        return place
    except Exception as problem:  # huggingface_hub and httpx have many, with no common base
        reason = str(problem).strip().splitlines()[0] if str(problem).strip() else type(problem).__name__
        raise UserError(
            f"--model: {name} is neither a directory here nor a model that the hub gives: {reason}"
        ) from None


def short_names(paths: Sequence[Path]) -> list[str]:
    """The shortest tail of each of these different absolute paths that tells it from all others."""

    def tail(path: Path, length: int) -> tuple[str, ...]:
        return path.parts[-length:]

    def name(path: Path) -> str:
        others = [other for other in paths if other != path]
        length = 1
        while any(tail(path, length) == tail(other, length) for other in others):
            length += 1
        return "/".join(tail(path, length))

    return [name(path) for path in paths]


def load(
    tasks: Sequence[str],
    data_dir: Path | str | None,
    task_files: Sequence[Path] = (),
    no_finetune_on: Sequence[str] = (),
    most: int | None = None,
) -> dict[str, TaskData]:
    """The data of all tasks by name, GLUE's first; says on stderr which tasks of `all` are not there.

    `most`: rows of a dev set that are measured. Raises UserError where a metric has no value for so few.
    """
    chosen = _chosen(tasks, data_dir, bool(task_files))
    own = own_tasks(task_files, chosen, no_finetune_on)
    folder = Path(data_dir or ".")
    data = {task.name: from_hub(task) if str(data_dir) == HUB else from_folder(folder, task) for task in chosen}
    data |= {task.name: from_folder(folder, task) for task in own}  # the paths of its tables are absolute
    for name, read in data.items():
        _refuse_unmeasurable(read, most)
        if read.left_out:
            print(f"{name}: {read.left_out} broken lines of the training file are left out", file=sys.stderr)
    return data


def _refuse_unmeasurable(data: TaskData, most: int | None) -> None:
    """Raises UserError where a dev set is what is trained on, or a metric has no value on it."""
    for key, rows in {**data.dev, **{key: rows for key, rows in data.test.items() if rows.labels is not None}}.items():
        where = f"task {data.task.name}: its set {key!r}" if key else f"task {data.task.name}: its dev set"
        if data.train is not None and rows.texts == data.train.texts:
            raise UserError(f"{where} is its training set: what is trained on is not held out; give other rows")
        measured = subset(rows, most) if key in data.dev else rows
        odd = [metric for metric in data.task.metrics if metric in metrics.OF_DIFFERENT]
        if odd and len(set(measured.labels or ())) < 2:
            raise UserError(
                f"{where} has one label in all of its {count(len(measured), 'row')}: {', '.join(odd)} cannot be "
                f"measured on that; give rows with others too{' (--max_eval_samples)' if most else ''}"
            )


def _chosen(tasks: Sequence[str], data_dir: Path | str | None, others: bool) -> list[Task]:
    """The tasks of GLUE that are to be done; without a data_dir none, if there are `others`."""
    if data_dir is None:
        if tuple(tasks) != ALL:
            raise UserError(f"--tasks {','.join(tasks)}: GLUE's files are needed; say where they are with --data_dir")
        if not others:
            raise UserError("neither --data_dir (GLUE) nor --task_files: there is nothing to do")
        return []
    if str(data_dir) == HUB:
        return list(GLUE) if tuple(tasks) == ALL else named(tasks)
    folder = Path(data_dir)
    if not folder.is_dir():
        found = "a file" if folder.exists() else absent(folder)
        raise UserError(f"--data_dir {folder}: {found}; give the folder of GLUE's files (CoLA/train.tsv …), or 'hub'")
    if tuple(tasks) != ALL:
        return named(tasks)
    there, missing = tasks_in(folder)
    if not there:
        folders = " ".join(task.folder for task in GLUE)
        raise UserError(f"--data_dir: {folder} holds no task; looked for the folders {folders}")
    if missing:
        print(f"not in {folder}: {', '.join(task.name for task in missing)}", file=sys.stderr)
    return there


def _grid(checkpoints: Sequence[Checkpoint], data: dict[str, TaskData], settings: FinetuneSettings) -> Grid:
    libraries = ("torch", "transformers", "accelerate", "tokenizers", "scikit-learn", "scipy")
    return Grid(
        settings={**asdict(settings), "precision": precision()},
        versions={"python": platform.python_version(), **{name: version(name) for name in libraries}},
        models={
            checkpoint.name: {
                "path": str(checkpoint.path),
                "sha256": checkpoint.sha256,
                "max_length": min(settings.max_length, checkpoint.positions),
            }
            for checkpoint in checkpoints
        },
        tasks={
            name: {
                "metrics": list(read.task.metrics),
                "base": read.task.base,
                "of_base": list(read.task.of_base),
                "examples": read.task.examples,
                "train_rows": len(read.train) if read.train else 0,
                "dev_rows": sum(len(rows) for rows in read.dev.values()),
                "sha256": read.sha256(),
            }
            for name, read in data.items()
        },
    )


@dataclass(frozen=True)
class Lane:
    """The cells of one model on one task that are still to do, and the diagnostics its models are tested on too."""

    checkpoint: Checkpoint
    data: TaskData
    diagnostics: list[TaskData]
    seeds: list[int]
    steps: int  # of one cell, about


def plan(
    checkpoints: Sequence[Checkpoint],
    data: dict[str, TaskData],
    seeds: Sequence[int],
    settings: FinetuneSettings,
    cells: dict[Cell, dict[str, Any]],
) -> list[Lane]:
    """What is still to do, task by task, so that models can be compared as early as possible."""
    lanes = []
    for read in data.values():
        if read.train is None:
            continue
        diagnostics = [other for other in data.values() if other.task.base == read.task.name]
        names = [read.task.name, *(other.task.name for other in diagnostics)]
        for checkpoint in checkpoints:
            todo = [seed for seed in seeds if any((checkpoint.name, name, seed) not in cells for name in names)]
            rows = len(training_rows(read, 0, settings))  # as a rule: a long row of some forms is several features
            lanes.append(Lane(checkpoint, read, diagnostics, todo, steps(rows, read.task, settings)))
    return lanes


def do_lane(
    lane: Lane,
    settings: FinetuneSettings,
    keep_models: bool,
    output_dir: Path,
    grid: Grid,
    cells: dict[Cell, dict[str, Any]],
    bar: Any,
) -> None:
    """Does the cells of a lane and adds them to `cells`; results.json and the submission files follow after each."""
    checkpoint, task = lane.checkpoint, lane.data.task
    if not lane.seeds:
        return
    whole = None if task.examples else encode(training_rows(lane.data, 0, settings), task, checkpoint, settings)
    dev = {read.task.name: encode_dev(read, checkpoint, settings) for read in (lane.data, *lane.diagnostics)}
    gc.freeze()  # rows and libraries stay: the collections around every fine-tuning need not look at them
    for seed in lane.seeds:
        bar.set_description(f"{checkpoint.name} {task.name} seed {seed}")
        train = whole or encode(training_rows(lane.data, seed, settings), task, checkpoint, settings)
        bar.total += steps(len(train.features), task, settings) - lane.steps
        finetuned = finetune(checkpoint, task, train, seed, settings, bar)
        measured = finetuned.measure(task, dev[task.name])
        cells[checkpoint.name, task.name, seed] = {
            "metrics": measured,
            "score": metrics.score(measured),
            "train_loss": finetuned.train_loss,
            "seconds": round(finetuned.seconds, 2),
        }
        best = best_seed(cells, checkpoint.name, task.name) == seed
        official = best and settings.max_eval_samples is None and task.examples is None
        target = submission_folder(output_dir, checkpoint) if official else None
        if target:
            test(finetuned, lane.data, checkpoint, settings, target)
        for other in lane.diagnostics:
            measured = finetuned.measure(other.task, dev[other.task.name])
            measured |= test(finetuned, other, checkpoint, settings, target)
            scored = {"score": metrics.score(measured)} if measured else {}
            cells[checkpoint.name, other.task.name, seed] = {"metrics": measured, **scored}
        if keep_models:
            kept = output_dir / "models" / checkpoint.name / task.name / f"seed-{seed}"
            finetuned.trainer.save_model(kept)
            fit_tokenizer(checkpoint.tokenizer, finetuned.trainer.model, min(settings.max_length, checkpoint.positions))
            save_tokenizer(checkpoint.tokenizer, kept)
        del finetuned
        gc.collect()  # a Trainer refers to itself, and holds the model
        save(output_dir / "results.json", report(grid, cells))


def test(
    finetuned: Finetuned, data: TaskData, checkpoint: Checkpoint, settings: FinetuneSettings, target: Path | None
) -> dict[str, float]:
    """Predicts the test rows of a task, writes them into `target`; returns metrics where the rows have labels."""
    measured: dict[str, float] = {}
    for file, rows in data.test.items():
        encoded = encode(rows, data.task, checkpoint, settings)
        answers = metrics.predictions(data.task, finetuned.predict(encoded.features))
        if target:
            write_predictions(target / file, data.task, rows, answers)
        if rows.labels is not None:
            measured |= metrics.scores(data.task, answers, rows.labels)
    return measured


def submission_folder(output_dir: Path, checkpoint: Checkpoint) -> Path:
    """Where the prediction files of a model lie; the zip of the same name beside it holds them all."""
    return output_dir / "submissions" / submission_name(checkpoint.name)


def submission_name(model: str) -> str:
    """The name of a model's submission."""
    return model.replace("/", "-")
