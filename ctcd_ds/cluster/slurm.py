"""Batch scripts for SLURM: pretraining, then export, then scores; what the cluster wants of them; how they are queued.

A script is written once, into the run directory, beside a copy of the recipe it means: what waits in the queue does not
change when a file is edited. Its body is that of pretrain.sbatch beside this file.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError

from ctcd_ds.cli import UserError, count
from ctcd_ds.cluster.owner import note_queued, owned
from ctcd_ds.plain import read_file
from ctcd_ds.recipe.schema import Count, Mistakes, Section, explained

DEFAULTS = Path("~/.config/ctcd_ds/cluster.yaml")
_MARK = "# --- the job ---\n"
_OF_EACH = ("pretrain", "export")  # jobs of one run; those that score are of all


class SlurmSettings(Section):
    """What is the same for all jobs of a user on a cluster; the command line has the last word.

    partition, account, qos, constraint, memory, time: as sbatch takes them; null is the cluster's default.
    gpu: the GPU's name as a generic resource, e.g. gpu:a100. sbatch, srun: further options, one string each.
    signal_seconds: how long before its time limit a job saves and is requeued.
    setup: shell lines at the head of every script (module load …). environment: variables for all of them.
    python: how Python is called, e.g. in a container; the default is the interpreter that submits.
    preflight: whether a job looks at its nodes before it trains.
    """

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    time: str | Count | None = None
    memory: str | None = None
    gpus_per_node: Annotated[int, Field(ge=0)] = 0
    tasks_per_node: Count | None = None
    cpus_per_task: Count | None = None
    gpu: str = "gpu"
    signal_seconds: Count = 300
    sbatch: list[str] = Field(default_factory=list)
    srun: list[str] = Field(default_factory=list)
    setup: list[str] = Field(default_factory=list)
    environment: dict[str, str] = Field(default_factory=dict)
    python: str | None = None
    preflight: bool = True

    @property
    def device(self) -> str:
        """'cuda' or 'cpu': what its jobs train on."""
        return "cuda" if self.gpus_per_node and self.environment.get("DS_ACCELERATOR") != "cpu" else "cpu"

    @property
    def ranks_per_node(self) -> int:
        """One task per GPU; where there are none, as many as asked for."""
        return self.tasks_per_node or self.gpus_per_node or 1


def load_cluster(path: Path | None) -> SlurmSettings:
    """Reads the cluster's file; without a path, the user's own where there is one. Raises UserError or Mistakes."""
    found = DEFAULTS.expanduser() if path is None else path
    if path is None and not found.exists():
        return SlurmSettings()
    raw = read_file(found, "cluster file")
    try:
        cluster = SlurmSettings.model_validate({} if raw is None else raw)
    except ValidationError as problem:
        raise Mistakes(f"cluster file {found}", explained(problem, SlurmSettings)) from None
    if cluster.tasks_per_node and cluster.gpus_per_node and cluster.tasks_per_node != cluster.gpus_per_node:
        raise UserError(
            f"cluster file {found}: tasks_per_node = {cluster.tasks_per_node} and gpus_per_node = "
            f"{cluster.gpus_per_node}: there is one task per GPU; remove tasks_per_node"
        )
    return cluster


def head(cluster: SlurmSettings, folder: Path, name: str, options: Mapping[str, object], log: str) -> list[str]:
    """Everything above a script's own work; the script stands in `folder`/slurm, and so does its log."""
    options = {
        "job-name": f"{name}-{folder.name}",
        "output": str(folder / "slurm").replace("%", "%%") + f"/{log}",  # its own signs are in `log` only
        "open-mode": "append",
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "constraint": cluster.constraint,
        "mem": cluster.memory,
        "cpus-per-task": cluster.cpus_per_task,
        **options,
    }
    given = [f"#SBATCH --{key}={shlex.quote(str(value))}" for key, value in options.items() if value is not None]
    variables = [f"export {key}={shlex.quote(value)}" for key, value in cluster.environment.items()]
    if cluster.python is None:
        variables.insert(0, f'export PATH={shlex.quote(str(Path(sys.executable).parent))}:"$PATH"')
    return [
        "#!/usr/bin/env bash",
        *given,
        "#SBATCH --requeue",
        *(f"#SBATCH {option}" for option in cluster.sbatch),
        "# Written by ctcd_ds/cluster/slurm.py.",
        f"cd {shlex.quote(str(Path.cwd()))} || exit",  # paths mean what they meant where they were typed
        *cluster.setup,
        *variables,
        f"export PYTHON={shlex.quote(cluster.python or 'python')}",
    ]


@dataclass(frozen=True)
class Run:
    """One run to be queued: its directory (absolute), its resolved recipe as YAML, its trained peers."""

    path: Path
    recipe: str
    peers: Sequence[str]


@dataclass(frozen=True)
class Scoring:
    """A command that scores all exports (glue, lm_eval), its options, and a shell line for the end of its script."""

    command: str
    options: Mapping[str, str]
    closing: str = ""


@dataclass(frozen=True)
class Submission:
    """What is to be queued: one run, or several as a job array, in or below `folder` (absolute).

    deepspeed: the JSON's text. export, scoring: what follows, one job after another.
    after: jobs that must end well before these runs start.
    """

    cluster: SlurmSettings
    folder: Path
    runs: Sequence[Run]
    nodes: int
    deepspeed: str
    resume: bool
    export: bool = False
    scoring: Sequence[Scoring] = ()
    after: Sequence[str] = ()

    @property
    def many(self) -> bool:
        """Whether the runs are the tasks of an array."""
        return self.runs[0].path != self.folder

    def scripts(self) -> dict[str, str]:
        """Name → text of every script, in the order in which they run."""
        made = {"pretrain": self._pretrain()}
        if self.export:
            made["export"] = self._export()
        return made | {scoring.command: self._score(scoring) for scoring in self.scoring}

    def _pretrain(self) -> str:
        cluster = self.cluster
        options = {
            "nodes": self.nodes,
            "ntasks-per-node": cluster.ranks_per_node,
            "gres": f"{cluster.gpu}:{cluster.gpus_per_node}" if cluster.gpus_per_node else None,
            "signal": f"B:USR1@{cluster.signal_seconds}",
            "time": cluster.time,
        }
        body = Path(__file__).with_name("pretrain.sbatch").read_text(encoding="utf-8").split(_MARK)[1]
        resume = " --resume" if self.resume else ""
        lines = [
            *self._head("pretrain", options, array=self.many),
            f"export PREFLIGHT={'yes' if cluster.preflight else 'no'}",
            f"export SRUN_OPTIONS={shlex.quote(' '.join(cluster.srun))}",
            *self._which_run(),
            'set -- --recipe "$run/slurm/recipe.yaml" --deepspeed_config "$run/slurm/deepspeed.json" '
            f'--output_dir "$run"{resume}',
        ]
        return "\n".join(lines) + "\n\n" + body

    def _export(self) -> str:
        lines = [
            *self._head("export", {"ntasks": 1}, array=self.many),
            *self._which_run(),
            '$PYTHON -m ctcd_ds.cluster.job finished "$run" || exit',
            '$PYTHON -m ctcd_ds.commands.export --checkpoint "$run" --peer all --output_dir "$run/hf"',
        ]
        return "\n".join(lines) + "\n"

    def _score(self, scoring: Scoring) -> str:
        name = scoring.command
        models = [shlex.quote(str(run.path / "hf" / peer)) for run in self.runs for peer in run.peers]
        gpu = f"{self.cluster.gpu}:1" if self.cluster.gpus_per_node else None
        how = {**scoring.options, "output_dir": str(self.folder / name)}
        lines = [
            *self._head(name, {"ntasks": 1, "gres": gpu, "time": self.cluster.time}, array=False),
            f"$PYTHON -m ctcd_ds.commands.{name} \\",
            *(f"    {'--model ' if n == 0 else '        '}{model} \\" for n, model in enumerate(models)),
            "    " + " ".join(f"--{key} {shlex.quote(value)}" for key, value in how.items()),
            *([scoring.closing] if scoring.closing else []),
        ]
        return "\n".join(lines) + "\n"

    def _head(self, name: str, options: Mapping[str, object], array: bool) -> list[str]:
        log = f"{name}-{'%A_%a' if array else '%j'}.log"
        tasks = f"0-{len(self.runs) - 1}" if array else None
        return head(self.cluster, self.folder, name, {"array": tasks, **options}, log)

    def _which_run(self) -> list[str]:
        paths = "".join(f"    {shlex.quote(str(run.path))}\n" for run in self.runs)
        return [f"runs=(\n{paths})", "run=${runs[${SLURM_ARRAY_TASK_ID:-0}]}"]

    def queue(self) -> dict[str, str]:
        """Writes everything the jobs need and queues them. Returns name → job id.

        Raises UserError where SLURM refuses one, or a run directory is another's: then none is queued, and nothing is
        left behind.
        """
        require_sbatch()
        with ExitStack() as held:
            for run in self.runs:
                held.enter_context(owned(run.path))
            return self._queue()

    def _queue(self) -> dict[str, str]:
        new = [path for path in (self.folder / "slurm", *(r.path / "slurm" for r in self.runs)) if not path.exists()]
        ids: dict[str, str] = {}
        try:
            self._write()
            for name in self.scripts():
                # A task of the export array follows its own run; scores are of all models, and follow all exports.
                before = list(ids.values())[-1:] or self.after
                kind = "aftercorr" if self.many and name == "export" else "afterok"
                ids[name] = sbatch(self.folder / "slurm" / f"{name}.sbatch", before, kind)
        except (UserError, OSError) as problem:
            cancel(ids.values())
            for path in new:
                shutil.rmtree(path, ignore_errors=True)
            raise UserError(str(problem)) from None
        for task, run in enumerate(self.runs):
            own = {name: number for name, number in ids.items() if name in _OF_EACH or not self.many}
            note_queued(run.path, {name: f"{n}_{task}" if self.many else n for name, n in own.items()})
        return ids

    def _write(self) -> None:
        for run in self.runs:
            (run.path / "slurm").mkdir(parents=True, exist_ok=True)
            (run.path / "slurm" / "recipe.yaml").write_text(run.recipe, encoding="utf-8")
            (run.path / "slurm" / "deepspeed.json").write_text(self.deepspeed, encoding="utf-8")
        (self.folder / "slurm").mkdir(parents=True, exist_ok=True)
        for name, text in self.scripts().items():
            (self.folder / "slurm" / f"{name}.sbatch").write_text(text, encoding="utf-8")

    def how_to_watch(self, ids: Mapping[str, str]) -> str:
        """The job ids, where their words go, how to stop them."""
        logs, first = self.folder / "slurm", ids["pretrain"]
        each = "_*" if self.many else ""
        run = self.runs[0].path
        size = f"{count(self.nodes, 'node')} × {count(self.cluster.ranks_per_node, 'rank')}"
        size += f", {len(self.runs)} runs" if self.many else ""
        lines = [f"{name:<10}job {number}{f'  ({size})' if name == 'pretrain' else ''}" for name, number in ids.items()]
        lines += [
            "",
            f"queue     squeue --jobs={','.join(ids.values())}",
            *(f"{name:<10}tail -F {logs}/{name}-{ids[name]}{each if name in _OF_EACH else ''}.log" for name in ids),
            f"ranks     tail -F {run}/slurm/logs/{'*' if self.many else first}-0/rank-0.log",
            f"curves    tensorboard --logdir {self.folder}",
            f"the end   cat {run}/exit.json",
            f"stop      scancel {' '.join(ids.values())}     (saves within SLURM's KillWait; --resume goes on)",
        ]
        return "\n".join(lines)


def require_sbatch() -> None:
    """Raises UserError where jobs cannot be queued."""
    if shutil.which("sbatch") is None:
        raise UserError("sbatch is not here: submit on a login node of the cluster")


def sbatch(script: Path, before: Sequence[str] = (), kind: str = "afterok") -> str:
    """Queues a script behind the jobs `before`; its job id. Raises UserError where SLURM refuses it."""
    wait = [f"--dependency={kind}:{':'.join(before)}", "--kill-on-invalid-dep=yes"] if before else []
    done = subprocess.run(["sbatch", "--parsable", *wait, str(script)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"sbatch refused {script.name}: {done.stderr.strip()}")
    return done.stdout.strip().split(";")[0]


def cancel(jobs: Iterable[str]) -> None:
    """Takes jobs out of the queue."""
    if listed := list(jobs):
        subprocess.run(["scancel", *listed], check=False)
