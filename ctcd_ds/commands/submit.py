"""Queues a run on SLURM, after checking all of it. The scripts lie in the run directory.

ctcd submit --recipe R.yaml --deepspeed_config D.json --output_dir RUN --nodes 4 --gpus_per_node 8

Several recipes or seeds are a job array, one run directory each below output_dir. A job saves and is requeued
before its time limit, when it is preempted and when a node is lost, and goes on from its newest checkpoint.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from ctcd_ds import cli
from ctcd_ds.cluster.slurm import DEFAULTS, Run, Scoring, SlurmSettings, Submission, load_cluster
from ctcd_ds.recipe.reading import load_recipe
from ctcd_ds.recipe.sections import Recipe

STAGES = ("export", "glue")


def options() -> argparse.Namespace:
    """The command line, with what the cluster's file says in the place of what is not given."""
    parser = cli.parser(__doc__)
    add = parser.add_argument
    add("--recipe", type=Path, nargs="+", required=True, help="the recipe; several are an array")
    add("--deepspeed_config", type=Path, required=True, help='DeepSpeed\'s JSON file; "auto" is filled in')
    add("--output_dir", type=Path, required=True, help="the run directory; for an array, the folder of all runs")
    add("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="change these keys of every recipe")
    add("--seeds", type=cli.whole_numbers, help="an array of one run for each")
    add("--nodes", type=cli.positive, default=1, help="machines")
    add("--gpus_per_node", type=int, help="GPUs of each node; one task each")
    add("--tasks_per_node", type=int, help="tasks of each node without GPUs; left out: 1")
    add("--cpus_per_task", type=int, help="cores of each task")
    add("--partition", help="as sbatch takes it")
    add("--account", help="as sbatch takes it")
    add("--qos", help="as sbatch takes it")
    add("--time", help="as sbatch takes it, e.g. 24:00:00; before it is over, the run saves and is requeued")
    add("--resume", action="store_true", help="go on with the run in --output_dir")
    add("--then", type=cli.names, default="", metavar="export,glue", help="jobs that follow when the run is finished")
    add("--chain", action="store_true", help="the same as --then export,glue")
    add("--glue_data", metavar="DIR|hub", help="GLUE's folders, for --then glue")
    add("--glue_tasks", type=cli.names, default="all", help="as `ctcd glue --tasks`")
    add("--glue_seeds", type=cli.whole_numbers, default="1", help="one fine-tuning for each")
    add("--cluster", type=Path, metavar="FILE", help=f"defaults for this cluster; left out: {DEFAULTS}, if there")
    add("--print", action="store_true", dest="show", help="show the scripts; write and submit nothing (needs no SLURM)")
    return parser.parse_args()


def main() -> int:
    given = options()
    cluster = _overridden(load_cluster(given.cluster), given)
    then = _stages(given)
    runs = _checked(given, cluster, list(_recipes(given)))
    submission = Submission(
        cluster=cluster,
        folder=given.output_dir.resolve(),
        runs=runs,
        nodes=given.nodes,
        deepspeed=given.deepspeed_config.read_text(),
        resume=given.resume,
        export="export" in then,
        scoring=[Scoring("glue", _checked_glue(given))] if "glue" in then else [],
    )
    if given.show:
        for name, text in submission.scripts().items():
            print(f"##### {submission.folder / 'slurm' / name}.sbatch\n{text}")
        return cli.EXIT_DONE
    print(submission.how_to_watch(submission.queue()))
    return cli.EXIT_DONE


def _overridden(cluster: SlurmSettings, given: argparse.Namespace) -> SlurmSettings:
    """The cluster with the command line's values in place."""
    keys = ("gpus_per_node", "tasks_per_node", "cpus_per_task", "partition", "account", "qos", "time")
    values = {key: getattr(given, key) for key in keys if getattr(given, key) is not None}
    for key in ("gpus_per_node", "tasks_per_node", "cpus_per_task"):
        if values.get(key, 1) < (key == "tasks_per_node") or values.get(key, 1) < 0:
            raise cli.UserError(f"--{key} {values[key]}: a number of them")
    if given.gpus_per_node and given.tasks_per_node not in (None, given.gpus_per_node):
        raise cli.UserError(
            f"--tasks_per_node {given.tasks_per_node} with --gpus_per_node {given.gpus_per_node}: there is one task "
            "per GPU; leave --tasks_per_node away"
        )
    return cluster.model_copy(update=values)


def _stages(given: argparse.Namespace) -> list[str]:
    then = list(STAGES) if given.chain else given.then
    for word in then:
        if word not in STAGES:
            raise cli.UserError(f"--then: {word!r} is no stage; {cli.did_you_mean(word, STAGES)}")
    if "glue" in then and "export" not in then:
        raise cli.UserError("--then glue: GLUE needs the exported models; write --then export,glue")
    if "glue" in then and given.glue_data is None:
        raise cli.UserError("--then glue: say where GLUE's folders are: --glue_data DIR (or hub)")
    return then


def _recipes(given: argparse.Namespace) -> Iterator[tuple[Path, Recipe]]:
    """(run directory, recipe) of every run."""
    folder = given.output_dir.resolve()
    paths: list[Path] = []
    for path in given.recipe:
        for seed in given.seeds or [None]:
            changes = [*given.set, *([f"seed={seed}"] if seed is not None else [])]
            name = "-".join(
                [*([path.stem] if len(given.recipe) > 1 else []), *([f"seed-{seed}"] if seed is not None else [])]
            )
            paths.append(folder / name if name else folder)
            yield paths[-1], load_recipe(path, changes)
    if len(set(paths)) < len(paths):
        raise cli.UserError("two of the runs would be in one directory: give recipes different names, and seeds once")


def _checked(given: argparse.Namespace, cluster: SlurmSettings, recipes: list[tuple[Path, Recipe]]) -> list[Run]:
    """Every run as it will be queued. Raises UserError with what is wrong with all of them."""
    from ctcd_ds.training.deepspeed_config import read_config
    from ctcd_ds.training.plan import make_plan
    from ctcd_ds.training.run_directory import RunDirectory

    config, world = read_config(given.deepspeed_config), given.nodes * cluster.ranks_per_node
    runs, mistakes = [], []
    for path, recipe in recipes:
        try:
            plan = make_plan(recipe, config, world, cluster.device, path)
            RunDirectory(path).refuse_or_resume(plan, given.resume)
        except cli.UserError as mistake:
            mistakes.append(str(mistake) if len(recipes) == 1 else f"{path.name}: {mistake}")
            continue
        trained = [name for name, section in recipe.peers.items() if not section.frozen]
        runs.append(Run(path, recipe.to_yaml(), trained))
        if not given.show:
            rows = recipe.training.global_batch_rows
            print(f"{path}: {plan.steps:,} steps of {rows} rows on {cli.count(world, 'rank')}")
    if mistakes:
        raise cli.UserError("\n".join(dict.fromkeys(mistakes)))
    return runs


def _checked_glue(given: argparse.Namespace) -> dict[str, str]:
    """GLUE's options, with the data looked at where it is a folder."""
    data, tasks = given.glue_data, given.glue_tasks
    if data != "hub":
        from ctcd_ds.evaluation.glue import load

        data = str(Path(data).resolve())
        load(tuple(tasks), data)
    elif tasks != ["all"]:
        from ctcd_ds.evaluation.tasks import named

        named(tasks)
    return {"data_dir": data, "tasks": ",".join(tasks), "seeds": ",".join(map(str, given.glue_seeds))}


if __name__ == "__main__":
    cli.run(main)
