"""The run directory: all that one run writes, and who it was. Rank 0 writes."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ctcd_ds.cli import Damage, UserError, next_command, typed
from ctcd_ds.cluster.ranks import Ranks
from ctcd_ds.ending import ending
from ctcd_ds.manifest import file_entries, file_problems, read_json, read_manifest, write_atomic, write_manifest
from ctcd_ds.recipe.reading import load_recipe
from ctcd_ds.recipe.schema import Mistakes
from ctcd_ds.training import checkpoint
from ctcd_ds.training.identity import changes, identity
from ctcd_ds.training.metrics import held_out_values
from ctcd_ds.training.plan import Plan

FORMAT = "ctcd_ds.run"
_LEARNED = 0.2  # nats below the loss of word frequencies: who uses the words around is soon further than that


def at_word_frequencies(losses: Mapping[str, float], unigram_loss: float | None) -> str:
    """Which models (name → held-out loss) have learned no more than how often each word occurs; "" where none."""
    there = [name for name, loss in losses.items() if unigram_loss is not None and loss > unigram_loss - _LEARNED]
    if not there:
        return ""
    are = f"{' and '.join(there)} {'is' if len(there) == 1 else 'are'}"
    return f"{are} still at word frequencies, which alone give {unigram_loss:.3f} nats: train longer"


def duration(seconds: float) -> str:
    """'1 h 02 min', '3 min 20 s', '12.3 s'."""
    minutes, rest = divmod(seconds, 60)
    if minutes >= 60:
        return f"{minutes // 60:.0f} h {minutes % 60:02.0f} min"
    return f"{minutes:.0f} min {rest:02.0f} s" if minutes else f"{rest:.1f} s"


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
        return self.recipe.exists() or self.metrics.exists() or any(self.checkpoints.glob("step-*"))

    @property
    def saved_configs(self) -> Path | None:
        """Where its peers' configs are, once it has a checkpoint: then nobody asks any more what they began from."""
        return self.peers if any(self.checkpoints.glob("step-*")) else None

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
        """What is to be said of going on: what is different from the run that is here, and harmless, one line each.

        Raises UserError where the directory and the wish do not fit: another run, a file, or Mistakes with all that
        would make this another run than the one it is to go on with.
        """
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"output_dir {self.path} is a file")
        if any("\udc80" <= character <= "\udcff" for character in str(self.path)):
            raise UserError(f"output_dir {self.path} is no UTF-8, which TensorBoard's files need: name another")
        if not self.holds_a_run():
            if self.checkpoints.is_symlink() and not self.checkpoints.is_dir():
                raise UserError(f"{self.checkpoints} points to {self.checkpoints.readlink()}, which is no directory")
            # slurm/ is left here before the run begins; checkpoints/, empty, may be a link to where there is room.
            others = (p.name for p in self.path.iterdir()) if self.path.is_dir() else ()
            if any(not name.startswith(".") and name not in ("slurm", "checkpoints") for name in others):
                raise UserError(f"output_dir {self.path} holds other files: give the run a directory of its own")
            return [f"--resume: there is no run in {self.path}; this one begins at step 0"] if resume else []
        if not resume:
            raise UserError(
                f"output_dir {self.path} holds a run already: go on with it (--resume), or name another directory"
            )
        then, step = self._saved_identity(plan)
        refused, allowed = changes(then, plan, step)
        if refused:
            raise Mistakes(f"--resume of {self.path} (what the run is against what is asked for)", refused)
        return [f"changed since: {line}" for line in allowed]

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
        self.prove()

    def prove(self, ended: bool = False) -> None:
        """Writes RUN/manifest.json over what says who the run is; over what it measured too, once it has ended."""
        names = ["recipe.yaml", "ds_config.json", "environment.json", "tokenizer", "peers"]
        files = file_entries(self.path, [*names, *(["metrics.jsonl", "summary.json"] if ended else [])])
        write_manifest(self.path / "manifest.json", {"format": FORMAT, "version": 1, "files": files})

    def problems(self) -> Iterator[str]:
        """What is not as the run wrote it, beside its checkpoints: a line for each file, with both hashes."""
        stated = read_manifest(self.path / "manifest.json")["files"]
        ours = {name.split("/")[0] for name in stated}
        yield from file_problems(self.path, stated, tuple(p.name for p in self.path.iterdir() if p.name not in ours))
        latest, tags = self.checkpoints / "latest", sorted(p.name for p in self.checkpoints.glob("step-*"))
        if tags and (said := latest.read_bytes() if latest.exists() else b"") != f"{tags[-1]}\n".encode():
            yield f"{latest}: says {said!r}, and the newest checkpoint is {tags[-1]}"

    def summed_up(self) -> str:
        """What a finished run came to, and the command that goes on from it."""
        summary = read_json(self.path / "summary.json")
        recipe = load_recipe(self.recipe)
        trained = [name for name, section in recipe.peers.items() if not section.frozen]
        measured = {name: held_out_values(summary, name) for name in trained}
        lines = [f"finished: {summary['steps']:,} steps in {duration(summary['seconds'])}, {self.path}"]
        for name in trained:
            for of, values in measured[name].items():
                loss = f"{values['loss']:.3f} nats" if "loss" in values else "not finite"
                on = f" on {of}" if of else ""
                lines.append(f"  {name}{on}: held-out loss {loss}, accuracy {values['accuracy']:.1%}")
        known = {name: values[""]["loss"] for name, values in measured.items() if "loss" in values.get("", {})}
        if said := at_word_frequencies(known, summary.get("unigram_loss")):
            lines.append(f"  {said}")
        return "\n".join([*lines, next_command("export", "--checkpoint", self.path, "--output_dir", self.path / "hf")])

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
        "command": _repeating(ranks),
        "folder": str(Path.cwd()),
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


def _repeating(ranks: Ranks) -> list[str]:
    """The words that do this run again: with its launcher, and without what a launcher or a resumption added."""
    words = [word for word in typed() if word != "--resume" and not word.startswith("--local_rank")]
    nodes = max(1, ranks.world // ranks.local_world)
    match words:
        case ["python", "-m", *module]:  # launchers write it in full
            script = ["--module", *module]
        case [_, *script]:
            pass
    match ranks.source:
        case "deepspeed":
            several = ["--num_nodes", str(nodes)] if nodes > 1 else []
            return ["deepspeed", *several, "--num_accelerators", str(ranks.local_world), *script]
        case "torchrun":
            return ["torchrun", "--nnodes", str(nodes), "--nproc-per-node", str(ranks.local_world), *script]
        case "srun" | "mpirun":
            return [ranks.source, "-n", str(ranks.world), *words]
    return words


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def git_commit() -> str | None:
    """The commit of this code, with -dirty where it was changed since; None outside a checkout, or without git."""
    here, line = Path(__file__).parent, ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        found = subprocess.run(line, cwd=here, capture_output=True, text=True, check=False)
    except OSError:  # no git, as in many containers
        return None
    return found.stdout.strip() or None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
