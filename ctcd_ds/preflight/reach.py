"""Whether every rank reaches every other, and by how much their clocks differ."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

ANSWER_S = 3.0  # what a host may take to answer a connection
_AT_ONCE = 128


class Listener:
    """Answers every connection with this rank and its clock, until closed."""

    def __init__(self, rank: int, address: str) -> None:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._rank = rank
        self._socket = socket.create_server((address, 0), family=family, backlog=4096)
        self.port = int(self._socket.getsockname()[1])
        threading.Thread(target=self._answer, daemon=True).start()

    def _answer(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            with connection:
                connection.sendall(json.dumps([self._rank, time.time()]).encode())

    def close(self) -> None:
        self._socket.close()


@dataclass(frozen=True)
class Reached:
    """Which ranks did not answer this one, each with the reason, and how far its clock is ahead of rank 0's (seconds).

    `ahead_s` is exact to half of `trip_s`, the time of the question and its answer; both are None where rank 0 did not
    answer.
    """

    failures: dict[int, str]
    ahead_s: float | None
    trip_s: float | None


def reach(there: Mapping[int, tuple[str, int]]) -> Reached:
    """Asks the listeners of all ranks (rank → address, port), many at once."""
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        answers = dict(zip(there, pool.map(lambda rank: _ask(rank, *there[rank]), there), strict=True))
    failures = {rank: answer for rank, answer in answers.items() if isinstance(answer, str)}
    first = answers.get(0)
    ahead, trip = first if isinstance(first, tuple) else (None, None)
    return Reached(failures, ahead, trip)


def _ask(rank: int, address: str, port: int) -> tuple[float, float] | str:
    """(how far this clock is ahead of theirs, the time it took), or why there was no answer."""
    try:
        with socket.create_connection((address, port), timeout=ANSWER_S) as connection:
            asked = time.time()
            told = json.loads(connection.recv(1024) or b"[null, 0]")
            heard = time.time()
    except (OSError, ValueError) as problem:
        return f"{address}:{port} {problem}"
    if told[0] != rank:
        return f"{address}:{port} is not rank {rank}: another host has its address"
    return (asked + heard) / 2 - told[1], heard - asked
