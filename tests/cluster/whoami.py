"""One rank: says who it is, and meets the others: `python whoami.py OUT` writes OUT/rank-N.json."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

from ctcd_ds import cli
from ctcd_ds.cluster.network import set_interface
from ctcd_ds.cluster.ranks import find_ranks


def main() -> None:
    ranks = find_ranks()
    ranks.announce()
    import torch
    import torch.distributed as dist

    set_interface(ranks)
    dist.init_process_group("gloo")
    everyone = torch.tensor([ranks.rank + 1.0])
    dist.all_reduce(everyone)
    found = {**asdict(ranks), "sum": everyone.item(), "threads": ranks.threads()}
    (Path(sys.argv[1]) / f"rank-{ranks.rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    cli.run(main)  # type: ignore[arg-type]
