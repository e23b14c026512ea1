"""Checks all hosts of a job before it starts, in seconds. Start it as you will start the training.

deepspeed --hostfile H --module ctcd_ds.commands.preflight --recipe R.yaml --deepspeed_config D.json --output_dir RUN

Exit code 0: all good. 1: a host is not fit; the table names it and the cure. 2: a mistake in recipe or config.
"""

from __future__ import annotations

import os

from ctcd_ds import cli
from ctcd_ds.cluster.ranks import find_ranks


def main() -> int:
    parser = cli.parser(__doc__)
    cli.add_run_options(parser)
    parser.add_argument("--patience_s", type=float, default=15.0, help="seconds that a host may take to start")
    arguments = parser.parse_args()

    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # before torch: a host that does not answer is ours to report
    ranks = find_ranks()
    ranks.announce()

    import torch

    torch.set_num_threads(ranks.threads())
    from ctcd_ds.preflight.run import preflight

    return preflight(ranks, arguments)


if __name__ == "__main__":
    cli.run(main)
