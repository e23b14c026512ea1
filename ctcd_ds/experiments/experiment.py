"""One experiment from its file to its cells: data, checks, plan; then they are run here, queued, or collected."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ctcd_ds.cli import EXIT_DONE, RunFailure, UserError, as_typed, count, names, typed
from ctcd_ds.cluster.owner import owned
from ctcd_ds.cluster.slurm import SlurmSettings, require_sbatch
from ctcd_ds.demo.data import data_commands
from ctcd_ds.ending import is_finished
from ctcd_ds.experiments.grid import expand
from ctcd_ds.experiments.local import as_they_stand, collect_only, run_here
from ctcd_ds.experiments.planning import ExperimentPlan, plan_cells, structural_mistakes
from ctcd_ds.experiments.queueing import queue_cells, refuse_while_queued
from ctcd_ds.experiments.results import write_results
from ctcd_ds.experiments.running import places, recipe_place
from ctcd_ds.experiments.specification import FULL, Experiment, base_recipe, load_experiment, only
from ctcd_ds.manifest import write_atomic
from ctcd_ds.recipe.schema import Mistakes
from ctcd_ds.training.engine import device_type
from ctcd_ds.training.run_directory import git_commit


@dataclass(frozen=True)
class Slurm:
    """Where cells are queued; `collecting`: the words that collect this experiment, after `python`."""

    cluster: SlurmSettings
    nodes: int
    collecting: Sequence[str]


@dataclass(frozen=True)
class Request:
    """What a command asks for.

    overrides: KEY=VALUE for the base recipe. data_dir, cells, seeds, max_parallel: None leaves them to the experiment
    and the machine. slurm: the cells are queued, and nothing is waited for. only_collect: nothing is run, results.json
    is written from what is there.
    """

    path: Path
    directory: Path
    size: str = FULL
    overrides: Sequence[str] = ()
    data_dir: str | None = None
    cells: list[str] | None = None
    seeds: list[int] | None = None
    max_parallel: int | None = None
    resume: bool = False
    dry_run: bool = False
    only_collect: bool = False
    slurm: Slurm | None = None


def run_experiment(request: Request) -> int:
    """Runs all cells of an experiment file that are not finished yet, and writes DIR/results.json after each.

    Raises UserError before anything starts where file, recipes, data or directory cannot serve. Returns the exit code:
    0 all cells are finished (or queued), 1 some are not, 85 stopped with all saved.
    """
    fresh, gpus = not request.directory.exists(), _gpus()
    plan = _prepared(request, gpus)
    print(describe(plan), flush=True)
    if request.dry_run:
        return EXIT_DONE
    if request.only_collect:  # beside whatever runs
        _write_recipes(plan)
        return collect_only(plan)
    with owned(plan.directory):
        return _run(plan, request, gpus, fresh)


def _run(plan: ExperimentPlan, request: Request, gpus: int, fresh: bool) -> int:
    _write_recipes(plan)
    if request.slurm is not None:
        write_results(plan.directory, as_they_stand(plan))
        try:
            print(queue_cells(plan, request.slurm.cluster, request.slurm.nodes, request.slurm.collecting))
        except UserError:
            if fresh:
                shutil.rmtree(plan.directory)
            raise
        return EXIT_DONE
    cores = len(os.sched_getaffinity(0))
    return run_here(plan, places(plan.experiment.ranks, request.max_parallel, gpus, cores))


def _prepared(request: Request, gpus: int) -> ExperimentPlan:
    """Everything checked and counted. Nothing is written but the demo's data, where the experiment is on them."""
    experiment, directory, slurm = load_experiment(request.path, request.size), request.directory, request.slurm
    if request.cells is not None:
        experiment = only(experiment, request.cells)
    if request.seeds is not None:
        experiment = experiment.model_copy(update={"seeds": request.seeds})
    _refuse_or_resume(directory, request.resume or request.only_collect)
    device, world = device_type(), experiment.ranks or max(1, gpus)
    if slurm is not None:
        device, world = slurm.cluster.device, slurm.nodes * slurm.cluster.ranks_per_node
        if not request.dry_run:
            require_sbatch()
            refuse_while_queued(directory)
    with tempfile.TemporaryDirectory() as passing:
        place = Path(passing) / "data" if request.dry_run else directory / "data"
        experiment, overrides = with_data(experiment, place, request.overrides, request.data_dir)
        cells = expand(experiment, base_recipe(experiment, overrides), directory)
        if mistakes := structural_mistakes(cells):  # before data is made, which takes a while
            raise Mistakes("the cells' recipes", mistakes)
        tasks = {cell.name: cell.recipe.get("objective", {}).get("task", "mlm") for cell in cells}
        _check_lm_eval(experiment, tasks)
        if experiment.demo_data:
            make_demo_data(place, sentinels=32 if "span" in tasks.values() else 0)
        planned = plan_cells(experiment, cells, directory, world, device)
        _check_glue(experiment)
    about = {
        "experiment": request.path.stem,
        "size": request.size,
        "recipe": experiment.recipe,
        "corpus": planned[0].recipe.corpus.path or planned[0].recipe.corpus.title,
        "command": typed(),
        "git_commit": git_commit(),
    }
    return ExperimentPlan(experiment, planned, directory, about)


def _refuse_or_resume(directory: Path, resume: bool) -> None:
    if directory.is_file():
        raise UserError(f"output_dir {directory} is a file")
    if not directory.exists() or not any(directory.iterdir()):
        return
    if not (directory / "recipes").is_dir() and not (directory / "data").is_dir():
        raise UserError(f"output_dir {directory} holds other files: give the experiment a directory of its own")
    if not resume:
        raise UserError(
            f"output_dir {directory} holds an experiment already: go on with it (--resume), or name another directory"
        )


def with_data(
    experiment: Experiment, place: Path, overrides: Sequence[str], data_dir: str | None
) -> tuple[Experiment, list[str]]:
    """Where the corpus and the tasks' files are: the demo's own, at `place`, unless others are given."""
    given = any(override.split("=")[0].strip() == "corpus.path" for override in overrides)
    changes: dict[str, Any] = {}
    if experiment.demo_data and given:
        changes["demo_data"] = False
    elif experiment.demo_data:
        overrides = [f"corpus.path={place / 'corpus'}", *overrides]
    for name, asked in experiment.scoring.items():
        demo = name == "glue" and experiment.demo_data and data_dir is None
        where = data_dir or (str(place / "glue") if demo else asked.data_dir)
        if demo and given:  # a stand-in made from the demo's text says nothing about models of another text
            changes[name] = None
        else:
            found = where if where == "hub" else str(Path(where).resolve())  # --resume may be said from anywhere
            changes[name] = asked.model_copy(update={"data_dir": found})
    return experiment.model_copy(update=changes), list(overrides)


def make_demo_data(place: Path, sentinels: int = 0) -> None:
    """The demo's text, tokenizer and corpus, by the commands that `make demo` runs; nothing where they are there."""
    if (place / "corpus" / "manifest.json").exists():
        return
    place.mkdir(parents=True, exist_ok=True)
    for line in data_commands(place, place, sentinels=sentinels):
        print(f"$ {as_typed(line)}", flush=True)
        if (code := subprocess.run(line, check=False).returncode) != 0:
            raise RunFailure(f"the demo's data could not be made: {line[2]} ended with {code}")


def _check_glue(experiment: Experiment) -> None:
    """Looks at the GLUE files as `ctcd glue` will, before hours of training. Raises its UserError."""
    if experiment.glue is not None:
        from ctcd_ds.evaluation.glue import load

        load(tuple(experiment.glue.tasks.split(",")), experiment.glue.data_dir)


def _check_lm_eval(experiment: Experiment, tasks: Mapping[str, str]) -> None:
    """The same for `ctcd lm-eval`; `tasks`: objective.task of each cell."""
    if (asked := experiment.lm_eval) is None:
        return
    if other := [name for name, task in tasks.items() if task != "clm"]:
        raise UserError(
            f"lm_eval: the harness asks causal language models, and {other[0]} has objective.task: {tasks[other[0]]}; "
            "remove the experiment's lm_eval (glue scores other models by fine-tuning)"
        )
    from ctcd_ds.evaluation import harness

    with tempfile.TemporaryDirectory() as scratch:
        harness.require()
        harness.load(names(asked.tasks), Path(asked.data_dir), Path(scratch))


def _gpus() -> int:
    import torch

    return torch.cuda.device_count() if device_type() == "cuda" else 0


def _write_recipes(plan: ExperimentPlan) -> None:
    """DIR/recipes/CELL.yaml. Raises Mistakes where a finished cell was run with another recipe."""
    different, directory = [], plan.directory
    for cell in plan.cells:
        place, text = recipe_place(directory, cell.name), cell.recipe.to_yaml()
        if place.exists() and place.read_text(encoding="utf-8") != text and is_finished(cell.run):
            different.append(f"{cell.name} is finished with another recipe ({place}): name another --output_dir")
    if different:
        raise Mistakes(f"--resume of {directory}", different)
    (directory / "recipes").mkdir(parents=True, exist_ok=True)
    for cell in plan.cells:
        write_atomic(recipe_place(directory, cell.name), cell.recipe.to_yaml())


def describe(plan: ExperimentPlan) -> str:
    """What will be run: conditions, steps, cost."""
    experiment, planned, about = plan.experiment, plan.cells, plan.about
    lines = [f"{about['experiment']}, size {about['size']}: {experiment.question}"]
    lines += [experiment.note] if experiment.note else []
    lines += ["", f"{'condition':<44}{'steps':>8}{'FLOPs':>10}{'in all':>10}  peers"]
    for cell in planned:
        if cell.cell.seed != experiment.seeds[0]:
            continue
        peers = ", ".join(f"{peer}{' (frozen)' if known.frozen else ''}" for peer, known in cell.peers.items())
        same = "" if cell.owner == cell.name else f", same run as {cell.owner}"
        costs = f"{cell.flops:>10.2g}{cell.total_flops:>10.2g}"
        lines.append(f"{cell.cell.point.name:<44}{cell.steps:>8}{costs}  {peers}{same}")
    total = sum(cell.flops for cell in plan.runs)
    cells, seeds = count(len(planned), "cell"), count(len(experiment.seeds), "seed")
    lines.append(f"{cells} ({seeds}), {count(len(plan.runs), 'run')}, {total:.3g} FLOPs")
    return "\n".join(lines)
