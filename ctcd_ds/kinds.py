"""What a file or folder is that was given for another kind, so that a message can say so and name what was meant."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from ctcd_ds.manifest import read_json

# Kind of file → keys of which it has one and the kinds after it have none, what it is called, and what takes it.
_FILES = {
    "experiment": ({"cells", "question"}, "an experiment", "`ctcd experiment --experiment` takes it"),
    "recipe": ({"peers"}, "a recipe", "`ctcd pretrain --recipe` takes it"),
    "task file": ({"metrics", "dev"}, "a task file", "`ctcd glue --task_files` takes it"),
    "DeepSpeed config": (
        {"zero_optimization", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "bf16", "fp16"},
        "a DeepSpeed config",
        "`ctcd pretrain --deepspeed_config` takes it",
    ),
}
_TABLES = (".tsv", ".csv", ".jsonl", ".parquet")

# Kind of folder → what it is called, and which command makes it.
_FOLDERS = {
    "run": ("a run directory", "`ctcd pretrain` makes one"),
    "experiment": ("an experiment's directory", "`ctcd experiment` makes one"),
    "GLUE results": ("a directory of scores", "`ctcd glue` and `ctcd lm-eval` make one"),
    "corpus": ("a corpus", "`ctcd corpus` makes one"),
    "cache": ("a cache of a teacher's predictions", "`ctcd cache-logits` makes one"),
    "checkpoint": ("a checkpoint of a run", "`ctcd pretrain` makes one"),
    "model": ("a Hugging Face model", "`ctcd export` makes models of a run"),
    "tokenizer": ("a tokenizer", "`ctcd tokenizer` makes one"),
}


def other_file(path: Path, content: Any, wanted: str) -> str | None:
    """'this is an experiment (cells, question): `ctcd …` takes it' for a file that is of another kind than `wanted`.

    `content`: what was read from it, None before that. `wanted`: a key of the table above. None where the file may be
    what is wanted.
    """
    if path.is_dir():
        return f"this is {called(path)}, not a file"
    if path.suffix in _TABLES and wanted == "task file":
        return "this is a table: give the YAML file that describes it, with its name under train or dev"
    keys = set(content) if isinstance(content, dict) else set()
    if wanted in _FILES and keys & _FILES[wanted][0]:
        return None
    for kind, (marks, name, taker) in _FILES.items():
        if kind != wanted and (found := sorted(keys & marks)):
            return f"this is {name} ({', '.join(found)}): {taker}"
    return None


def folder_kind(path: Path) -> str | None:
    """The kind of a folder, a key of the table above; None for any other."""
    if (path / "recipe.yaml").is_file():
        return "run"
    if (path / "results.json").is_file():
        return "experiment" if "cells" in read_json(path / "results.json") else "GLUE results"
    stated = str(read_json(path / "manifest.json").get("format"))
    if stated in ("ctcd_ds.corpus", "ctcd_ds.checkpoint", "ctcd_ds.cache"):
        return stated.removeprefix("ctcd_ds.")
    if (path / "config.json").is_file() and any(weights_in(path)):
        return "model"
    return "tokenizer" if any((path / name).is_file() for name in ("tokenizer.json", "vocab.txt")) else None


def missing(path: Path) -> str:
    """'no such file or directory; did you mean …?': of a path that is not there, with one under a like name that is."""
    meant = Path(path.anchor)
    for part in path.parts[len(meant.parts) :]:
        known = [part] if (meant / part).exists() else sorted(entry.name for entry in meant.glob("*"))
        if not (near := difflib.get_close_matches(part, known, n=1)):
            return "no such file or directory"
        meant /= near[0]
    return f"no such file or directory; did you mean {meant}?"


def weights_in(path: Path) -> list[Path]:
    """The weight files of a model's directory. (A run's peers/ hold configs alone.)"""
    return sorted([*path.glob("*.safetensors"), *path.glob("pytorch_model*.bin")])


def called(path: Path) -> str:
    """A folder in words: 'a run directory'."""
    if kind := folder_kind(path):
        return _FOLDERS[kind][0]
    inside = next((kind for place in sorted(path.iterdir()) if (kind := folder_kind(place))), None)
    return f"a folder with {_FOLDERS[inside][0]} in it" if inside else "a folder"


def instead(path: Path, *wanted: str) -> str:
    """'it is a run directory; give …/hf/teacher …/hf/student': of a path that is no folder of a `wanted` kind.

    Names what is wanted and lies up to two folders below; where nothing does, the command that makes it.
    """
    if not path.exists():
        return missing(path)
    below = [place for pattern in ("*", "*/*") for place in sorted(path.glob(pattern)) if folder_kind(place) in wanted]
    said = f"it is {called(path) if path.is_dir() else 'a file'}"
    if below:
        more = f" (and {len(below) - 4} more)" if len(below) > 4 else ""
        return f"{said}; give {' '.join(map(str, below[:4]))}{more}"
    return f"{said}; {_FOLDERS[wanted[0]][1]}"
