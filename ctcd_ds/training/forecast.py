"""`--dry_run --nodes N …`: how long the recipe's step would take on a cluster, at sizes around it, and what to change.

No process of that cluster is needed: everything comes from the recipe, the DeepSpeed JSON and stated rates.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from math import isfinite
from pathlib import Path
from typing import Any

from ctcd_ds.cli import count
from ctcd_ds.cluster.peaks import stated_peak
from ctcd_ds.cluster.scaling import Cluster, Work, predict
from ctcd_ds.cluster.scaling_table import improve, step_table
from ctcd_ds.recipe.sections import Recipe
from ctcd_ds.training.deepspeed_config import resolve
from ctcd_ds.training.plan import Plan, describe, make_plan
from ctcd_ds.training.run_directory import duration

DEVICE = "cuda"  # what "auto" precision means there, whatever this machine is


def forecast(arguments: argparse.Namespace, cluster: Cluster, recipe: Recipe, deepspeed_json: dict[str, Any]) -> str:
    """The plan at the cluster's size, the table of sizes around it, and what to change.

    `arguments`: those of cluster/options.py. Raises Mistakes as a run there would.
    """
    plan = make_plan(recipe, deepspeed_json, cluster.world, DEVICE, arguments.output_dir)
    peak = stated_peak(arguments.gpu, plan.deepspeed.precision)
    assert peak is not None  # the options were read with the same table
    cluster = replace(cluster, flops=arguments.mfu * peak)
    sizes, left_out = around(plan, cluster, deepspeed_json, arguments.output_dir)
    named = count(cluster.world, "GPU")
    said = improve(plan.work, cluster)[1] if cluster.world > 1 else []
    links = [f"{arguments.node_link_gbps:g} Gbit/s a GPU within a node"] if cluster.gpus > 1 else []
    links += [f"{arguments.link_gbps:g} between nodes"] if arguments.link_gbps else []
    rates = ", ".join([f"{arguments.gpu} at {arguments.mfu:.0%} of {peak / 1e12:g} TFLOP/s", *links])
    return "\n".join(
        [
            describe(plan),
            "",
            f"how long a step takes (a model, docs/scaling.md): {rates}",
            step_table(sizes),
            *left_out,
            run_time(plan.steps, sizes),
            "",
            f"what to change at {named}, one after the other" if said else "nothing worth changing",
            *(f"  - {change}" for change in said),
        ]
    )


def run_time(steps: int, sizes: Sequence[tuple[Work, Cluster]]) -> str:
    """The time of all steps at each size, in words."""
    times = [f"{duration(steps * predict(work, there).step_s)} on {count(there.world, 'GPU')}" for work, there in sizes]
    return f"all {steps:,} steps (start, validation and saving come on top): {', '.join(times)}"


def around(
    plan: Plan, cluster: Cluster, deepspeed_json: dict[str, Any], output_dir: Path
) -> tuple[list[tuple[Work, Cluster]], list[str]]:
    """(work and cluster at a quarter to four times the nodes, which sizes the batch does not divide by and why)."""
    sizes, left_out = [], []
    factors = (0.25, 0.5, 1, 2, 4) if isfinite(cluster.link) else (1,)  # without links there is one machine
    for nodes in sorted({max(1, int(cluster.nodes * factor)) for factor in factors}):
        there = replace(cluster, nodes=nodes)
        config, mistakes = resolve(deepspeed_json, plan.recipe, there.world, DEVICE, output_dir)
        if config is None:
            left_out.append(f"not on {there.world:,} GPUs: {'; '.join(mistakes)}")
        else:
            sizes.append((replace(plan, world=there.world, deepspeed=config).work, there))
    return sizes, left_out
