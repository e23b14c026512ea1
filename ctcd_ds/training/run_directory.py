"""The run directory: all that one run writes, and who it was (DESIGN §4). Rank 0 writes."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ctcd_ds.cli import UserError
from ctcd_ds.manifest import write_atomic
from ctcd_ds.recipe import Mistakes, Recipe, load_recipe
from ctcd_ds.training.plan import Plan

# What may differ between a run and its continuation: how often it speaks and saves, not what it computes.
_FREE = (
    "log_every",
    "valid_every",
    "valid_rows",
    "checkpoint_every",
    "checkpoint_every_minutes",
    "keep_checkpoints",
    "time_limit_minutes",
    "step_timeout_s",
)


class RunDirectory:
    """Paths of a run. Making the object touches nothing."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.recipe = path / "recipe.yaml"
        self.checkpoints = path / "checkpoints"
        self.metrics = path / "metrics.jsonl"
        self.tokenizer = path / "tokenizer"
        self.peers = path / "peers"

    def holds_a_run(self) -> bool:
        """Whether a run was started here."""
        return self.recipe.exists() or self.checkpoints.exists() or self.metrics.exists()

    def state(self) -> str | None:
        """'finished', 'saved' or 'failed' as exit.json says; None while a run goes on or was killed."""
        try:
            return str(json.loads((self.path / "exit.json").read_text())["state"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def refuse_or_resume(self, recipe: Recipe, resume: bool) -> None:
        """Raises UserError where the directory and the wish do not fit: another run, or another recipe."""
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"output_dir {self.path} is a file")
        if not self.holds_a_run():
            if self.path.is_dir() and any(self.path.iterdir()):
                raise UserError(f"output_dir {self.path} holds other files: give the run a directory of its own")
            return
        if not resume:
            raise UserError(
                f"output_dir {self.path} holds a run already: go on with it (--resume), or name another directory"
            )
        if self.recipe.exists() and (differences := _differences(load_recipe(self.recipe), recipe)):
            raise Mistakes(f"--resume of {self.path} (the run's recipe against the given one)", differences)

    def create(self, plan: Plan, threads: int, device: str) -> None:
        """Writes who this run is. The recipe comes last: a directory without one holds no run."""
        self.path.mkdir(parents=True, exist_ok=True)
        (self.path / "exit.json").unlink(missing_ok=True)
        self.write_json("ds_config.json", plan.deepspeed.values)
        self.write_json("environment.json", environment(plan.world, threads, device))
        # Export needs the tokenizer and the configs, and the corpus may be gone by then.
        shutil.copytree(plan.corpus.tokenizer_path, self.tokenizer, dirs_exist_ok=True)
        for name, config in plan.configs.items():
            config.save_pretrained(self.peers / name)
        write_atomic(self.recipe, plan.recipe.to_yaml())

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        """Writes RUN/name, atomically."""
        write_atomic(self.path / name, json.dumps(content, indent=1, allow_nan=False) + "\n")

    def write_exit(self, state: str, step: int, reason: str) -> None:
        """What scripts trust: exit codes do not survive every launcher."""
        if self.path.is_dir():
            self.write_json("exit.json", {"state": state, "step": step, "reason": reason})


def _differences(then: Recipe, now: Recipe) -> list[str]:
    old, new = _flat(then.resolved()), _flat(now.resolved())
    return [
        f"{key}: the run has {old.get(key)!r}, the given recipe {new.get(key)!r}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and key not in {f"training.{name}" for name in _FREE}
    ]


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def environment(world: int, threads: int, device: str) -> dict[str, Any]:
    """Versions, commit and hardware of this process."""
    packages = ("ctcd-ds", "torch", "deepspeed", "transformers", "datasets", "megatron-core", "numpy", "tokenizers")
    return {
        "command": [sys.executable, *sys.argv],
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in packages},
        "git_commit": _git_commit(),
        "world": world,
        "threads_per_rank": threads,
        "device": torch.cuda.get_device_name() if device == "cuda" else f"cpu: {_cpu_name()}",
        "cores": os.cpu_count(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "host": platform.node(),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    here = Path(__file__).parent
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=40"], cwd=here, capture_output=True, text=True, check=False
    )
    return found.stdout.strip() or None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
