"""Trains the peers of a recipe together under DeepSpeed. Start it with `deepspeed`, `torchrun`, `srun`, or alone.

ctcd pretrain --recipe R.yaml --deepspeed_config D.json --output_dir RUN
deepspeed --module ctcd_ds.commands.pretrain --recipe R.yaml --deepspeed_config D.json --output_dir RUN
"""

from __future__ import annotations

import argparse
import time
from contextlib import ExitStack

from ctcd_ds import cli
from ctcd_ds.cluster.options import add_cluster_options, cluster_of
from ctcd_ds.cluster.owner import owned
from ctcd_ds.cluster.ranks import Ranks, find_ranks
from ctcd_ds.recipe.reading import load_recipe


def main() -> int:
    parser = cli.parser(__doc__)
    cli.add_run_options(parser)
    parser.add_argument("--resume", action="store_true", help="go on from the newest good checkpoint in --output_dir")
    parser.add_argument("--dry_run", action="store_true", help="print peers, graph, cost and length; train nothing")
    add_cluster_options(parser)
    arguments = parser.parse_args()

    ranks = find_ranks()
    try:
        with ExitStack() as held:
            return pretrain(arguments, ranks, held)
    except (cli.UserError, cli.RunFailure):
        if not ranks.first:
            time.sleep(10)  # all ranks find the same, and rank 0 says it; the launcher then ends this one
        raise


def pretrain(arguments: argparse.Namespace, ranks: Ranks, held: ExitStack) -> int:
    """Checks everything, then trains. The run directory is this job's until `held` is closed."""
    from ctcd_ds.training.library_log import library_log  # its package loads torch, which --help does not need

    libraries_write_to = held.enter_context(library_log())
    cluster = cluster_of(arguments)
    recipe = load_recipe(arguments.recipe, arguments.set)

    import torch

    torch.set_num_threads(ranks.threads())  # before the first operation: the number changes bits and speed
    from ctcd_ds.corpus.damage import refuse_damage
    from ctcd_ds.training.deepspeed_config import read_config
    from ctcd_ds.training.engine import device_type, settle_arithmetic
    from ctcd_ds.training.forecast import forecast
    from ctcd_ds.training.plan import describe, make_plan, rehearse_peers
    from ctcd_ds.training.run_directory import RunDirectory

    settle_arithmetic(recipe.training.deterministic)
    run = RunDirectory(arguments.output_dir.resolve())
    deepspeed_json = read_config(arguments.deepspeed_config)
    if cluster is not None:
        if ranks.first:
            print(forecast(arguments, cluster, recipe, deepspeed_json))
        return cli.EXIT_DONE
    saved = run.saved_configs if arguments.resume else None
    plan = make_plan(recipe, deepspeed_json, ranks.world, device_type(), run.path, saved)
    if arguments.dry_run:
        if ranks.first:
            rehearse_peers(plan, device_type())
            print(describe(plan))
        return cli.EXIT_DONE
    if ranks.first:
        held.enter_context(owned(run.path))
    different = run.refuse_or_resume(plan, arguments.resume)
    if run.is_finished(plan):
        if ranks.first:
            print(f"{run.path} is finished already: nothing to do")
            run.write_exit("finished", plan.steps, f"all {plan.steps} steps are done")  # this start says so too
        return cli.EXIT_DONE
    if ranks.local_rank == 0:  # each machine may have a copy of its own
        for corpus in plan.corpus.parts.values():
            refuse_damage(corpus.path)
        for cache in plan.teachers.caches.values() if plan.teachers is not None else ():
            cache.refuse_damage()
        rehearse_peers(plan, device_type())
    libraries_write_to(run.path, ranks.rank)
    if ranks.first:
        print(
            describe(plan),
            f"ranks          {ranks.describe()}",
            *different,
            sep="\n",
            flush=True,
        )

    from ctcd_ds.training.trainer import start

    with cli.ignore_broken_pipe():
        stopped = start(plan, ranks, run)
        if ranks.first:
            print(f"saved ({stopped}): go on with --resume" if stopped else run.summed_up(), flush=True)
    return cli.EXIT_SAVED if stopped else cli.EXIT_DONE


if __name__ == "__main__":
    cli.run(main)
