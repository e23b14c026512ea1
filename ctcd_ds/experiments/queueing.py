"""An experiment on SLURM: every run a chain of jobs behind the runs it needs, and one job at the end that collects."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from ctcd_ds.cli import UserError
from ctcd_ds.cluster.owner import still_queued
from ctcd_ds.cluster.slurm import Run, Scoring, SlurmSettings, Submission, cancel, head, sbatch
from ctcd_ds.experiments.planning import ExperimentPlan, PlannedCell
from ctcd_ds.experiments.running import REQUEST, is_done, request, scoring_options
from ctcd_ds.experiments.specification import Experiment, Glue, LmEval
from ctcd_ds.manifest import read_json, write_atomic

JOBS = Path("slurm", "jobs.json")  # in the experiment's directory: run or 'collect' → stage → job id


def refuse_while_queued(directory: Path) -> None:
    """Raises UserError where jobs of this experiment still wait or run: two of them must not share a run."""
    queued = [number for jobs in read_json(directory / JOBS).values() for number in jobs.values()]
    if queued and (there := still_queued(queued)):
        raise UserError(
            f"output_dir {directory}: jobs {', '.join(there)} of this experiment are still in the queue: "
            f"wait for them, or `scancel {' '.join(there)}`"
        )


def queue_cells(plan: ExperimentPlan, cluster: SlurmSettings, nodes: int, collecting: Sequence[str]) -> str:
    """Queues all runs that are not done, and the command `collecting` behind the last of them. Returns what to say.

    A run's first job waits for the exports that it needs; where one of those fails, SLURM takes the run from the queue
    and the others go on. The collecting job runs whatever became of them. Raises UserError where SLURM refuses
    one: then none is queued.
    """
    experiment, directory = plan.experiment, plan.directory
    owner_of = {cell.name: cell.owner for cell in plan.cells}
    deepspeed = Path(experiment.deepspeed_config).read_text(encoding="utf-8")
    queued: dict[str, dict[str, str]] = {}
    try:
        for cell in plan.runs:
            if not is_done(cell, experiment):
                needed = [queued[owner] for name in cell.cell.needs if (owner := owner_of[name]) in queued]
                needs = [jobs.get("export", jobs["pretrain"]) for jobs in needed]
                queued[cell.name] = submission(cell, experiment, cluster, nodes, deepspeed, needs).queue()
        last = [list(jobs.values())[-1] for jobs in queued.values()]
        queued["collect"] = {"collect": _collect(directory, cluster, collecting, last)}
    except (UserError, OSError) as problem:
        cancel(number for jobs in queued.values() for number in jobs.values())
        raise UserError(f"{problem}; nothing is queued") from None
    write_atomic(directory / JOBS, json.dumps(queued, indent=1) + "\n")
    return _how_to_watch(queued, directory)


def submission(
    cell: PlannedCell, experiment: Experiment, cluster: SlurmSettings, nodes: int, deepspeed: str, after: Sequence[str]
) -> Submission:
    """The jobs of a run that is not done, behind those it needs."""
    return Submission(
        cluster=cluster,
        folder=cell.run,
        runs=[Run(cell.run, cell.recipe.to_yaml(), cell.exports)],
        nodes=nodes,
        deepspeed=deepspeed,
        resume=True,
        export=not (cell.run / "hf").exists(),
        scoring=[_scoring(cell.run, name, asked) for name, asked in experiment.scoring.items()],
        after=after,
    )


def _scoring(run: Path, name: str, asked: Glue | LmEval) -> Scoring:
    """A command that scores, and leaves what was asked where it went well."""
    there = shlex.quote(str(run / name / REQUEST))
    return Scoring(name, scoring_options(asked), f"[ $? = 0 ] && printf %s {shlex.quote(request(asked))} > {there}")


def _collect(directory: Path, cluster: SlurmSettings, words: Sequence[str], last: Sequence[str]) -> str:
    lines = [
        *head(cluster, directory, "collect", {"ntasks": 1}, "collect-%j.log"),
        f"$PYTHON {shlex.join(words)}",
    ]
    script = directory / "slurm" / "collect.sbatch"
    script.parent.mkdir(exist_ok=True)
    script.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return sbatch(script, last, "afterany")


def _how_to_watch(queued: Mapping[str, Mapping[str, str]], directory: Path) -> str:
    numbers = [number for jobs in queued.values() for number in jobs.values()]
    width = max(map(len, queued))
    lines = [
        f"{name:<{width}}  {', '.join(f'{stage} {number}' for stage, number in jobs.items())}"
        for name, jobs in queued.items()
    ]
    lines += [
        "",
        f"queue     squeue --jobs={','.join(numbers)}",
        f"curves    tensorboard --logdir {directory / 'cells'}",
        f"so far    the command again with --collect in place of --slurm writes {directory / 'results.json'}",
        f"stop      scancel {' '.join(numbers)}     (runs save; --slurm --resume goes on)",
    ]
    return "\n".join(lines)
