"""How the ranks of a job speak before there is a process group: through one store, and nobody waits for ever.

A process group begins when all are there, and hangs until then. Here, rank 0 goes on with those that came and knows
which did not.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from torch._C._distributed_c10d import PrefixStore, Store, TCPStore
from torch.distributed import DistError

from ctcd_ds.cli import RunFailure
from ctcd_ds.cluster.ranks import Ranks

HEAR_S = 120.0  # how long a rank that was heard waits for rank 0's next word


class Meeting:
    """All ranks around the store, which rank 0 holds (under torchrun, its agent)."""

    def __init__(self, ranks: Ranks, patience_s: float) -> None:
        """Raises RunFailure, saying where and why, where the store is not reached within `patience_s` seconds."""
        self._ranks, self._present = ranks, set(range(ranks.world))
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        holds = ranks.first and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        if not holds:
            _wait_for(address, port, patience_s)
        try:
            self.store: Store = TCPStore(
                address, port, ranks.world, holds, timedelta(seconds=patience_s), wait_for_workers=False
            )
        except (DistError, RuntimeError) as problem:
            said = str(problem).splitlines()[0]
            raise RunFailure(
                f"{_me(ranks)}: no store at {address}:{port}: {said}. Is it taken by another run (--master_port), or "
                "is the address not this host's (--master_addr)?"
            ) from None
        self._mine = PrefixStore("ctcd_ds/preflight", self.store)

    def gather(self, name: str, value: Any, limit_s: float) -> dict[int, Any]:
        """What every rank says under `name`, by rank, on rank 0; ranks silent for `limit_s` seconds are left out.

        They are left out for good: nobody waits for them again. Nothing, at once, on the other ranks. Values are plain
        JSON data.
        """
        self._mine.set(f"{name}/{self._ranks.rank}", json.dumps(value))
        if not self._ranks.first:
            return {}
        end, waiting, heard = time.monotonic() + limit_s, set(self._present), {}
        while waiting and time.monotonic() < end:
            for rank in sorted(rank for rank in waiting if self._mine.check([f"{name}/{rank}"])):
                heard[rank] = json.loads(self._mine.get(f"{name}/{rank}"))
                waiting.remove(rank)
            time.sleep(0.02)
        self._present -= waiting
        return heard

    def tell(self, name: str, value: Callable[[], Any]) -> Any:
        """Rank 0's `value()` on all ranks. Raises RunFailure on those where it does not come."""
        if self._ranks.first:
            said = value()
            self._mine.set(name, json.dumps(said))
            return said
        try:
            self._mine.wait([name], timedelta(seconds=HEAR_S))
            return json.loads(self._mine.get(name))
        except (DistError, RuntimeError):
            raise RunFailure(f"{_me(self._ranks)}: rank 0 went away; its own output says why") from None


def _me(ranks: Ranks) -> str:
    return f"[rank {ranks.rank} on {socket.gethostname()}]"


def _wait_for(address: str, port: int, patience_s: float) -> None:
    """Returns when somebody listens there. Raises RunFailure with the reason of the last attempt."""
    end = time.monotonic() + patience_s
    while True:
        try:
            socket.create_connection((address, port), timeout=max(0.1, min(3.0, end - time.monotonic()))).close()
            return
        except OSError as problem:
            if time.monotonic() >= end:
                raise RunFailure(_unreached(address, port, patience_s, problem)) from None
        time.sleep(0.1)


def _unreached(address: str, port: int, patience_s: float, problem: OSError) -> str:
    try:
        means = sorted({str(entry[4][0]) for entry in socket.getaddrinfo(address, port)})
    except OSError:
        means = []
    named = "" if means == [address] else f" (here: {', '.join(means) or 'a name that is not known'})"
    return (
        f"[rank {os.environ.get('RANK', '?')} on {socket.gethostname()}]: rank 0 at {address}{named}, port {port}, not "
        f"reached within {patience_s:g} s: {problem}. Is it the first host's address (--master_addr), does a firewall "
        "let the hosts' TCP ports through, and did rank 0 start?"
    )
