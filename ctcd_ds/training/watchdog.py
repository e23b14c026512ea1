"""Ends a rank that waits for something that will never come: a stopped rank, a cut link, a hung build.

Collectives give up after times of their own (NCCL's ten minutes, gloo's half an hour; the timeout that DeepSpeed takes
does not reach ZeRO's groups), and do not say who is missing. So one thread a rank watches how long the current phase
takes. Past its limit, it says which ranks did not arrive in this phase, dumps all stacks, and ends the process: the
launcher then ends the others.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist

_LOOK_EVERY_S = 0.5
_BEAT_EVERY_S = 1.0
_ASK_S = 3.5  # how long the store, which rank 0 holds, may take to answer

# Limits in seconds for what is no ordinary step; they end a run that hangs, and are far beyond what is normal.
LONG_PHASE_S = {"start": 3600.0, "first step": 3600.0, "validation": 3600.0, "saving": 3600.0, "loading": 3600.0}


class Watchdog:
    """Watches this rank from its making to `stop()`. Make it after the process group.

    `on_timeout` is called on a timeout, before the end, with the message.
    """

    def __init__(self, step_limit_s: float, on_timeout: Callable[[str], None]) -> None:
        self._step_limit_s, self._on_timeout = step_limit_s, on_timeout
        self._store = dist.distributed_c10d._get_default_store()
        self._phase, self._count = "start", 0
        self._deadline = time.monotonic() + LONG_PHASE_S["start"]
        self._stopped = threading.Event()
        # Two threads: the beat goes through the store, and a store that does not answer must not stop the watch.
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._watch, self._beat)]
        for thread in self._threads:
            thread.start()

    def enter(self, phase: str) -> None:
        """A new phase begins: 'step N', or one of LONG_PHASE_S. All ranks enter the same phases in the same order."""
        self._count += 1
        self._store.set(f"ctcd_ds/phase/{dist.get_rank()}", str(self._count))
        self._deadline = time.monotonic() + LONG_PHASE_S.get(phase, self._step_limit_s)
        self._phase = phase

    def outlast_collectives(self) -> None:
        """Makes every process group there is wait longer than any phase may take: it is this watch that ends a hang."""
        longest = timedelta(seconds=2 * max(self._step_limit_s, *LONG_PHASE_S.values()))
        for group in list(dist.distributed_c10d._world.pg_map):
            dist.distributed_c10d._set_pg_timeout(longest, group)

    def stop(self) -> None:
        """Ends the watch. A thread that is inside the store when the interpreter ends would abort the process."""
        self._stopped.set()
        for thread in self._threads:
            thread.join(_ASK_S)

    def _watch(self) -> None:
        while not self._stopped.wait(_LOOK_EVERY_S):
            if time.monotonic() > self._deadline:
                self._end()

    def _end(self) -> None:
        limit = LONG_PHASE_S.get(self._phase, self._step_limit_s)
        message = f"{self._phase} took more than {limit:g} s: {self._missing()}"
        print(f"[rank {dist.get_rank()}] {message}", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        self._on_timeout(message)
        os._exit(1)

    def _beat(self) -> None:
        beats = 0
        while not self._stopped.wait(_BEAT_EVERY_S):
            beats += 1
            self._store.set(f"ctcd_ds/beat/{dist.get_rank()}", str(beats))

    def _missing(self) -> str:
        """Which ranks no longer live, or live and have not entered this phase; or all have, and hang in it."""
        late: set[int] = set()

        def ask() -> None:
            everyone = range(dist.get_world_size())
            late.update(rank for rank in everyone if int(self._read("phase", rank)) < self._count)
            before = [self._read("beat", rank) for rank in everyone]
            time.sleep(2.2 * _BEAT_EVERY_S)
            late.update(rank for rank in everyone if self._read("beat", rank) == before[rank])

        asking = threading.Thread(target=ask, daemon=True)  # a stopped rank 0 does not even refuse to answer
        asking.start()
        asking.join(_ASK_S)
        if asking.is_alive():
            return "rank 0, which holds the store, does not answer"
        names = ", ".join(map(str, sorted(late)))
        return f"rank {names} did not arrive" if late else "all ranks have begun it and hang in it"

    def _read(self, what: str, rank: int) -> str:
        key = f"ctcd_ds/{what}/{rank}"
        return self._store.get(key).decode() if self._store.check([key]) else "0"
