"""EleutherAI's lm-evaluation-harness on rows that lie here: what causal models know without being fine-tuned.

Prompts, metrics and their spread are the harness's own. Each of its tasks gets a task file that includes the official
one and reads its rows from DATA_DIR/TASK/SPLIT.jsonl. results.json has the shape of `ctcd glue`'s (results.py): a task
is called hellaswag@0-shot there, its only seed is 0, and a cell has `stderr` beside `metrics`.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from ctcd_ds.cli import UserError, aligned
from ctcd_ds.corpus.tokenizer import begin_role, load_tokenizer, special_ids
from ctcd_ds.evaluation.card import add_to_cards
from ctcd_ds.evaluation.claims import called, reservation
from ctcd_ds.evaluation.finetune import quiet_libraries, weights_sha256
from ctcd_ds.evaluation.glue import model_names
from ctcd_ds.evaluation.results import Grid, make_directory, report, resume, save
from ctcd_ds.peers.reading import refuse_foreign

FRACTIONS = ("acc_norm", "acc", "exact_match", "f1", "mcc")  # from 0 to 1; the first that a task has is its score
SEED = 0  # of every cell: nothing is drawn
FEWSHOT_SEED = 1234  # the harness's own: draws the solved rows
RULES = {"score": "acc_norm times 100, or acc where there is none; perplexities and bits are no score"}


@dataclass(frozen=True)
class HarnessSettings:
    """How models are asked. num_fewshot: solved rows before each question; max_eval_samples: rows of a task."""

    num_fewshot: int = 0
    batch_size: int = 8
    max_eval_samples: int | None = None


@dataclass(frozen=True)
class LoadedTask:
    """A task of the harness with its rows."""

    name: str
    task: Any  # the harness's own
    rows: int
    sha256: str  # of the rows that are asked


def run(
    models: Sequence[str | Path],
    tasks: Sequence[str],
    data_dir: Path | None,
    output_dir: Path,
    settings: HarnessSettings | None = None,
) -> dict[str, Any]:
    """Asks every model every task, each once; returns the content of results.json and adds the scores to cards.

    `models`: directories or names on the hub. `tasks`: names of the harness's tasks, whose rows are in `data_dir`, or
    paths of task files. Raises UserError, before anything is written, for what cannot serve.
    """
    settings = settings or HarnessSettings()
    if settings.num_fewshot < 0:
        raise UserError(f"--num_fewshot: {settings.num_fewshot} is below 0")
    require()
    named = model_names(models)
    for path, _ in named:
        _refuse_other_than_causal(path)
    with quiet_libraries(), tempfile.TemporaryDirectory(prefix="lm-eval-") as scratch:
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        loaded = {f"{one.name}@{settings.num_fewshot}-shot": one for one in load(tasks, data_dir, Path(scratch))}
        grid, cells = resume(output_dir / "results.json", _grid(named, loaded, settings))
        make_directory(output_dir)
        for path, name in named:
            todo = [key for key in loaded if (name, key, SEED) not in cells]
            model = _opened(path, settings) if todo else None
            for key in todo:
                print(f"{name}: {key}, {loaded[key].rows:,} rows", file=sys.stderr)
                cells[name, key, SEED] = _cell(model, loaded[key], settings)
                save(output_dir / "results.json", report(grid, cells))
    content = report(grid, cells)
    save(output_dir / "results.json", content)
    add_to_cards(content, lambda name: list(eval_results(name, content)))
    return content


def require() -> None:
    """Raises UserError where the harness is not installed."""
    if find_spec("lm_eval") is None:
        raise UserError("lm-evaluation-harness is not installed: pip install 'ctcd-ds[lm-eval]'")


def _refuse_other_than_causal(path: Path) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    known = json.loads((path / "config.json").read_text(encoding="utf-8"))
    found = (known.get("architectures") or ["no architecture"])[0]
    if found not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        masked = "it predicts hidden words from both sides, and " if found.endswith("ForMaskedLM") else ""
        raise UserError(
            f"--model: {path} is no causal language model ({found}): {masked}the harness asks for the probability of a "
            "text from left to right; `ctcd glue` scores it by fine-tuning"
        )


# ---- tasks


def load(tasks: Sequence[str], data_dir: Path | None, scratch: Path) -> list[LoadedTask]:
    """The harness's tasks with rows from DATA_DIR, or from where a task file says. `scratch`: an empty folder.

    A tag stands for those of its tasks whose folders are there (lambada for lambada_openai). Raises UserError for an
    unknown task, missing rows, and rows that are not the task's.
    """
    own = [Path(task) for task in tasks if task.endswith((".yaml", ".yml"))]
    official = [task for task in tasks if Path(task) not in own]
    if missing := [path for path in own if not path.is_file()]:
        raise UserError(f"--tasks: {missing[0]} does not exist")
    if official and data_dir is None:
        raise UserError(f"--tasks {','.join(official)}: say with --data_dir where their rows are")
    entries = [entry for name in official for entry in _named(name, _index_with(name), data_dir)]
    files = [*(_including(entry, Path(data_dir or "."), scratch) for entry in entries), *own]
    loaded = [_loaded(file, scratch) for file in files]
    names = [task.name for task in loaded]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"--tasks: {twice[0]} is named twice")
    return loaded


def _index_with(name: str) -> Mapping[str, Any]:
    """The harness's tasks and tags; only those of the folder that is called like `name`, if it is among them.

    To read all of its 14,000 task files takes ten seconds.
    """
    import lm_eval.tasks
    from lm_eval.tasks import TaskManager

    for folder in {Path(lm_eval.tasks.__file__).with_name(word) for word in (name, name.partition("_")[0])}:
        index = TaskManager(include_defaults=False, include_path=folder).task_index if folder.is_dir() else {}
        if name in index:
            return index
    return _whole_index()


@cache
def _whole_index() -> Mapping[str, Any]:
    from lm_eval.tasks import TaskManager

    return TaskManager().task_index


def _named(name: str, index: Mapping[str, Any], data_dir: Path | None) -> list[Any]:
    """The harness's entries of a name: one task, or those of a tag."""
    if name not in index:
        near = difflib.get_close_matches(name, index, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "`lm-eval ls tasks` lists them"
        raise UserError(f"--tasks: {name!r} is no task of lm-evaluation-harness; {hint}")
    entry = index[name]
    inside = sorted(entry.tags) if entry.kind.name == "TAG" else []
    if entry.kind.name == "GROUP":
        inside = [task if isinstance(task, str) else task.get("task", "") for task in entry.cfg["task"]]
    if not inside:
        return [entry]
    there = [task for task in inside if data_dir and (data_dir / task).is_dir()]
    if not there:
        raise UserError(f"--tasks: {name} stands for {', '.join(inside)}; {data_dir} has a folder of none of them")
    return [found for task in there for found in _named(task, index, data_dir)]


def _including(entry: Any, data_dir: Path, scratch: Path) -> Path:
    """A task file that is the official one but for where its rows are."""
    known, folder = entry.cfg, data_dir / entry.name
    if "class" in known or known.get("custom_dataset"):
        raise UserError(f"--tasks: {entry.name}: the harness makes its rows by a program, not from files")
    keys = [key for key in ("training_split", "validation_split", "test_split", "fewshot_split") if known.get(key)]
    files = {known[key]: folder / f"{known[key]}.jsonl" for key in keys}
    asked = files[known.get("test_split") or known["validation_split"]]
    if not asked.is_file():
        raise UserError(f"--data_dir: task {entry.name} needs {asked}, which does not exist")
    there = {split: str(path.resolve()) for split, path in files.items() if path.is_file()}
    content = {
        "include": str(entry.yaml_path),
        "task": entry.name,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": there, "cache_dir": str(scratch / "cache")},
        **{key: None for key in keys if known[key] not in there},
    }
    file = scratch / entry.name / "task.yaml"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(content), encoding="utf-8")  # JSON is YAML too
    return file


def _loaded(file: Path, scratch: Path) -> LoadedTask:
    from lm_eval.tasks import TaskManager

    try:
        found = TaskManager(include_defaults=False).load([str(file)])["tasks"]
        if len(found) != 1:
            raise UserError(f"--tasks: {file} names {len(found)} tasks; give one file for each")
        [(name, task)] = found.items()
        rows = list(task.eval_docs)
    except UserError:
        raise
    except Exception as problem:  # the harness, datasets, jinja2 and yaml have many, with no common base
        where = f"{file.parent.name}: its rows do not fit the task" if file.is_relative_to(scratch) else f"{file}"
        raise UserError(f"--tasks: {where}: {' '.join(f'{type(problem).__name__}: {problem}'.split())}") from None
    digest = hashlib.sha256(json.dumps(rows, default=str, sort_keys=True).encode())
    return LoadedTask(name, task, len(rows), digest.hexdigest())


# ---- models


def _opened(path: Path, settings: HarnessSettings) -> Any:
    """The model as the harness has it; a text begins as documents did in training.

    Where the tokenizer begins with another token than bos, or ends with one, as BERT's does, it is told not to.
    """
    import torch
    from lm_eval.models.huggingface import HFLM

    tokenizer = load_tokenizer(path)
    how: dict[str, Any] = {"batch_size": settings.batch_size, "device": "cuda" if torch.cuda.is_available() else "cpu"}
    if begin_role(tokenizer) is None:
        how |= {"add_bos_token": False, "prefix_token_id": special_ids(tokenizer).end}
    try:
        model = HFLM(pretrained=str(path), **how)
    except Exception as problem:  # as above, and transformers' and safetensors'
        raise UserError(f"--model: {path} cannot be opened: {' '.join(str(problem).split())}") from None
    refuse_foreign(tokenizer, model.model, path)
    return model


def _cell(model: Any, loaded: LoadedTask, settings: HarnessSettings) -> dict[str, Any]:
    """What the harness measures: fractions, perplexities and bits as they are, and the score.

    Its simple_evaluate would do the same, and look for half a minute, each time, what is installed on this machine.
    """
    import lm_eval

    started = time.monotonic()
    if loaded.task.get_config("num_fewshot") != 0:  # 0 in a task file is meant so
        loaded.task.set_config(key="num_fewshot", value=settings.num_fewshot)
    loaded.task.set_fewshot_seed(seed=FEWSHOT_SEED)
    with redirect_stdout(sys.stderr):
        outcome = lm_eval.evaluate(
            lm=model,
            task_dict={"tasks": {loaded.name: loaded.task}},
            limit=settings.max_eval_samples,
            log_samples=False,
            bootstrap_iters=1000,  # of the few metrics whose spread has no formula
        )
    found: dict[str, dict[str, float]] = {"metrics": {}, "stderr": {}}
    for key, value in outcome["results"][loaded.name].items():
        metric, comma, how = key.partition(",")
        if comma and isinstance(value, int | float):
            room = "stderr" if metric.endswith("_stderr") else "metrics"
            plain = metric.removesuffix("_stderr")
            found[room][plain if how == "none" else f"{plain}_{how}"] = float(value)
    score = next((100 * found["metrics"][name] for name in FRACTIONS if name in found["metrics"]), None)
    stated = {} if score is None else {"score": score}
    return {**found, **stated, "seconds": round(time.monotonic() - started, 2)}


# ---- results


def _grid(named: Sequence[tuple[Path, str]], loaded: Mapping[str, LoadedTask], settings: HarnessSettings) -> Grid:
    libraries = ("torch", "transformers", "lm_eval", "datasets")
    return Grid(
        settings={"max_eval_samples": settings.max_eval_samples, "batch_size": settings.batch_size},
        versions={name: version(name) for name in libraries},
        models={name: {"path": str(path), "sha256": weights_sha256(path)} for path, name in named},
        tasks={
            key: {
                "metrics": sorted(task.task.aggregation()),
                "shots": settings.num_fewshot,
                "train_rows": 0,
                "dev_rows": task.rows,
                "sha256": task.sha256,
            }
            for key, task in loaded.items()
        },
        rules=RULES,
    )


def table(content: Mapping[str, Any]) -> str:
    """The results as plain text: a line for each task and metric, a column for each model."""
    lines, said = [["task", "rows", "metric", *content["models"]]], []
    for key, known in content["tasks"].items():
        tasks = [model["tasks"].get(key, {}) for model in content["models"].values()]
        cells = [entry["seeds"][str(SEED)] if entry else {} for entry in tasks]
        name = called(key, known, content["settings"])
        metrics = dict.fromkeys(metric for cell in cells for metric in cell.get("metrics", ()))
        lines += [
            [name, f"{known['dev_rows']:,}", metric, *(_shown(metric, cell) for cell in cells)] for metric in metrics
        ]
        if why := reservation(key, known, content["settings"]):
            said.append(f"{name}: {why}")
    legend = [f"± = standard error over rows; {', '.join(FRACTIONS)} in percent; score = {RULES['score']}"]
    return "\n".join([*aligned(lines), "", *said, *legend])


def _shown(metric: str, cell: Mapping[str, Any]) -> str:
    if metric not in cell.get("metrics", {}):
        return "-"
    factor, digits = (100, 1) if metric in FRACTIONS else (1, 3)
    value, error = (cell[room].get(metric) for room in ("metrics", "stderr"))
    return f"{factor * value:.{digits}f}" + ("" if error is None else f" ± {factor * error:.{digits}f}")


def eval_results(model: str, content: Mapping[str, Any]) -> Iterator[EvalResult]:
    """Each metric of each task as a card has it: fractions, perplexities and bits as they are."""
    harness = f"lm-evaluation-harness {content['versions']['lm_eval']}"
    for key, entry in content["models"][model]["tasks"].items():
        known = content["tasks"][key]
        said = reservation(key, known, content["settings"])
        for metric, value in entry["seeds"][str(SEED)]["metrics"].items():
            yield EvalResult(
                task_type="text-generation",
                dataset_type=key.partition("@")[0],
                dataset_config=f"{known['shots']}-shot",
                dataset_name=called(key, known, content["settings"]) + (f" ({said})" if said else ""),
                metric_type={"acc": "accuracy"}.get(metric, metric),
                metric_name=f"{metric}, {known['shots']}-shot, {harness}",
                metric_value=round(value, 4),
            )
