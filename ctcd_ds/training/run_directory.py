"""The run directory: all that one run writes, and who it was. Rank 0 writes."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ctcd_ds.cli import Damage, UserError, typed
from ctcd_ds.cluster.ranks import Ranks
from ctcd_ds.ending import ending
from ctcd_ds.manifest import write_atomic
from ctcd_ds.recipe import Mistakes, load_recipe
from ctcd_ds.training import checkpoint
from ctcd_ds.training.identity import changes, identity
from ctcd_ds.training.plan import Plan


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

    def logged(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl in the order of steps; of a step that was run again the later row counts.

        A half-written last line is left out: the run may still go on. Raises Damage where a line is none of training's.
        """
        lines = self.metrics.read_text(encoding="utf-8").splitlines() if self.metrics.exists() else []
        rows: dict[int, dict[str, Any]] = {}
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
                rows[int(row["step"])] = {key: value for key, value in row.items() if isinstance(value, int | float)}
            except (ValueError, KeyError, TypeError, AttributeError):
                if number < len(lines):
                    raise Damage(f"{self.metrics}:{number} is no row of metrics: {line[:80]!r}") from None
        return [rows[step] for step in sorted(rows)]

    def refuse_or_resume(self, plan: Plan, resume: bool) -> list[str]:
        """What is different from the run that is here, and harmless, one line each.

        Raises UserError where the directory and the wish do not fit: another run, a file, or Mistakes with all that
        would make this another run than the one it is to go on with.
        """
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"output_dir {self.path} is a file")
        if not self.holds_a_run():
            # slurm/ is what `ctcd submit` and the job's script leave here before the run begins.
            others = (p.name for p in self.path.iterdir()) if self.path.is_dir() else ()
            if any(not name.startswith(".") and name != "slurm" for name in others):
                raise UserError(f"output_dir {self.path} holds other files: give the run a directory of its own")
            return []
        if not resume:
            raise UserError(
                f"output_dir {self.path} holds a run already: go on with it (--resume), or name another directory"
            )
        then, step = self._saved_identity(plan)
        refused, allowed = changes(then, plan, step)
        if refused:
            raise Mistakes(f"--resume of {self.path} (what the run is against what is asked for)", refused)
        return allowed

    def _saved_identity(self, plan: Plan) -> tuple[dict[str, Any], int]:
        """The identity of the run here and its step: the newest checkpoint's, or recipe.yaml's before the first one."""
        newest = checkpoint.newest(self.checkpoints, judge=checkpoint.read, say=lambda text: None)
        if newest is not None:
            return newest[1], newest[1]["step"]
        return {**identity(plan), "recipe": load_recipe(self.recipe).resolved()}, 0

    def is_finished(self, plan: Plan) -> bool:
        """Whether the run here has done all steps of the plan."""
        ended = ending(self.path)
        return ended is not None and ended.state == "finished" and ended.step >= plan.steps

    def create(self, plan: Plan, ranks: Ranks, device: str) -> None:
        """Writes who this run is. The recipe comes first: with it, the directory holds a run that --resume begins."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_atomic(self.recipe, plan.recipe.to_yaml())
        (self.path / "exit.json").unlink(missing_ok=True)
        self.write_json("ds_config.json", plan.deepspeed.values)
        self.write_json("environment.json", environment(ranks, device))
        # Export needs the tokenizer and the configs, and the corpus may be gone by then.
        shutil.copytree(plan.corpus.tokenizer_path, self.tokenizer, dirs_exist_ok=True)
        for name, config in plan.configs.items():
            config.save_pretrained(self.peers / name)

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        """Writes RUN/name, atomically."""
        write_atomic(self.path / name, json.dumps(content, indent=1, allow_nan=False) + "\n")

    def write_exit(self, state: str, step: int, reason: str) -> None:
        """What scripts trust: exit codes do not survive every launcher."""
        # A full disk must not hide what filled it.
        with contextlib.suppress(OSError):
            self.write_json("exit.json", {"state": state, "step": step, "reason": reason})

    def write_failure(self, reason: str) -> None:
        """exit.json of a run that failed. The first reason stands: what other ranks then see are its consequences."""
        if not (self.path / "exit.json").exists():
            self.write_exit("failed", -1, reason)


def environment(ranks: Ranks, device: str) -> dict[str, Any]:
    """Versions, commit and hardware of this process, and who told it its rank."""
    packages = ("ctcd-ds", "torch", "deepspeed", "transformers", "datasets", "megatron-core", "numpy", "tokenizers")
    return {
        "command": typed(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in packages},
        "git_commit": git_commit(),
        "world": ranks.world,
        "ranks": ranks.describe(),
        "threads_per_rank": torch.get_num_threads(),
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


def git_commit() -> str | None:
    """The commit of this code, with -dirty where it was changed since; None outside a checkout."""
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
