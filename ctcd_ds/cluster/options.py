"""The options that describe a cluster to a dry run."""

from __future__ import annotations

import argparse

from ctcd_ds.cli import UserError, positive
from ctcd_ds.cluster.scaling import Cluster

GIGABIT = 1e9 / 8  # bytes
NEEDED = ("nodes", "gpus_per_node", "link_gbps")


def add_cluster_options(parser: argparse.ArgumentParser) -> None:
    """Adds them. The first three belong together; the others have defaults."""
    group = parser.add_argument_group("with --dry_run: how a step would scale on a cluster (docs/scaling.md)")
    group.add_argument("--nodes", type=positive, help="machines")
    group.add_argument("--gpus_per_node", type=positive, help="GPUs in each")
    group.add_argument(
        "--link_gbps",
        type=_rate,
        help="Gbit/s between nodes for each GPU, in one direction: the sum of a node's links / its GPUs",
    )
    group.add_argument(
        "--node_link_gbps",
        type=_rate,
        default=3600.0,
        help="Gbit/s within a node for each GPU, in one direction; 3600 is an H100's NVLink",
    )
    group.add_argument("--gpu", default="H100", help="the GPU's name")
    group.add_argument(
        "--mfu",
        type=_share,
        default=0.4,
        help="share of its peak FLOP/s that one GPU alone reaches ('mfu' in metrics.jsonl)",
    )


def cluster_of(arguments: argparse.Namespace) -> Cluster | None:
    """The cluster that the options describe, 1 FLOP/s a GPU; None where they describe none.

    Raises UserError where it is described in part, or to a run that is no dry run.
    """
    given = [name for name in NEEDED if getattr(arguments, name) is not None]
    if not given:
        return None
    if not arguments.dry_run:
        raise UserError(
            f"--{given[0]} describes a cluster to a dry run: add --dry_run. A run takes its size from what starts it "
            "(deepspeed, torchrun, srun)"
        )
    if missing := [f"--{name}" for name in NEEDED if name not in given]:
        raise UserError(f"--{given[0]} without {' and '.join(missing)}: a dry run for a cluster needs all three")
    return Cluster(
        nodes=arguments.nodes,
        gpus=arguments.gpus_per_node,
        flops=1.0,
        link=arguments.link_gbps * GIGABIT,
        node_link=arguments.node_link_gbps * GIGABIT,
    )


def _rate(text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = 0.0
    if not 0 < rate < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return rate


def _share(text: str) -> float:
    share = _rate(text)
    if share > 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share from 0 to 1, e.g. 0.4")
    return share
