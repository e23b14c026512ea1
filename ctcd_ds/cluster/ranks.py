"""Who am I among the processes of this job? Learned from the `deepspeed` launcher, torchrun, or from being alone."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from ctcd_ds.cli import UserError


@dataclass(frozen=True)
class Ranks:
    """`rank` of `world` processes; `local_rank` of `local_world` on this machine; `source` says who told."""

    rank: int
    world: int
    local_rank: int
    local_world: int
    source: str

    @property
    def first(self) -> bool:
        """Rank 0 speaks and writes."""
        return self.rank == 0

    def threads(self) -> int:
        """Threads this process may use: OMP_NUM_THREADS, else an equal share of the cores (DESIGN §5)."""
        stated = os.environ.get("OMP_NUM_THREADS")
        if stated is None:
            return max(1, len(os.sched_getaffinity(0)) // self.local_world)
        if not stated.isdigit() or int(stated) < 1:
            raise UserError(f"OMP_NUM_THREADS = {stated!r}: must be a whole number from 1")
        return int(stated)


def find_ranks(environment: Mapping[str, str] | None = None) -> Ranks:
    """Reads the launcher's variables. Raises UserError where only some of them are there."""
    env = os.environ if environment is None else environment
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    given = [name for name in names if name in env]
    if not given:
        return Ranks(0, 1, 0, 1, "alone")
    if missing := [name for name in names if name not in env]:
        raise UserError(f"{', '.join(given)} set but not {', '.join(missing)}: start with `deepspeed` or `torchrun`")
    rank, world, local_rank = (int(env[name]) for name in names)
    local_world = int(env.get("LOCAL_WORLD_SIZE", env.get("LOCAL_SIZE", world)))
    return Ranks(rank, world, local_rank, local_world, "torchrun" if "TORCHELASTIC_RUN_ID" in env else "deepspeed")


def meet_alone() -> None:
    """Gives a process without a launcher the variables that torch.distributed asks for."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
