"""The options that describe a cluster to a dry run."""

from __future__ import annotations

import argparse
import math

from ctcd_ds.cli import UserError, did_you_mean, positive
from ctcd_ds.cluster.peaks import PEAKS, stated_peak
from ctcd_ds.cluster.scaling import Cluster

GIGABIT = 1e9 / 8  # bytes
DESCRIBES = ("gpu", "nodes", "gpus_per_node", "link_gbps")


def add_cluster_options(parser: argparse.ArgumentParser) -> None:
    """Adds them. Any of the first four describes a cluster; what is left out is one H100 in one machine."""
    group = parser.add_argument_group("with --dry_run: how long the run would take elsewhere (docs/scaling.md)")
    group.add_argument("--gpu", metavar="NAME", help=f"one of {', '.join(PEAKS)}; left out: H100")
    group.add_argument("--nodes", type=positive, help="machines; left out: 1")
    group.add_argument("--gpus_per_node", type=positive, help="GPUs in each; left out: 1")
    group.add_argument(
        "--link_gbps",
        type=_rate,
        help="between machines: Gbit/s of each GPU in one direction: all of a node's links / its GPUs",
    )
    group.add_argument(
        "--node_link_gbps",
        type=_rate,
        default=3600.0,
        help="Gbit/s within a node for each GPU, in one direction; 3600 is an H100's NVLink",
    )
    group.add_argument(
        "--mfu",
        type=_share,
        default=0.4,
        help="share of its peak FLOP/s that one GPU alone reaches ('mfu' in metrics.jsonl)",
    )


def cluster_of(arguments: argparse.Namespace) -> Cluster | None:
    """The cluster that the options describe, 1 FLOP/s a GPU; None where they describe none.

    Raises UserError where its links or its GPU are not known, and for a run that is no dry run.
    """
    given = [name for name in DESCRIBES if getattr(arguments, name) is not None]
    if not given:
        return None
    if not arguments.dry_run:
        raise UserError(
            f"--{given[0]} describes a cluster to a dry run: add --dry_run. A run takes its size from what starts it "
            "(deepspeed, torchrun, srun)"
        )
    arguments.gpu = arguments.gpu or "H100"
    if stated_peak(arguments.gpu, "bf16") is None:
        raise UserError(f"--gpu {arguments.gpu}: its peak is not known; {did_you_mean(arguments.gpu, PEAKS)}")
    if (nodes := arguments.nodes or 1) > 1 and arguments.link_gbps is None:
        raise UserError(f"--nodes {nodes} without --link_gbps: say how fast the links between them are")
    return Cluster(
        nodes=nodes,
        gpus=arguments.gpus_per_node or 1,
        flops=1.0,
        link=(arguments.link_gbps or math.inf) * GIGABIT,
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
