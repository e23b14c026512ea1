"""Which way this host goes to the others, and whether every rank reaches every other."""

from __future__ import annotations

import ipaddress
import json
import os
import socket
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import psutil

from ctcd_ds.cluster.ranks import Ranks

ANSWER_S = 3.0  # what a host may take to answer a connection
_AT_ONCE = 128
_ANYWHERE = "192.0.2.1"  # an address kept for documents: no packet goes there, only the way to it is asked for


def address_towards(host: str) -> str | None:
    """This host's own address on the way to `host`; None where there is no way. Sends nothing."""
    try:
        family, kind, protocol, _, there = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(there)
            return str(probe.getsockname()[0])
    except OSError:
        return None


def own_address(master: str, several_hosts: bool) -> str:
    """The address at which the other ranks find this one.

    With several hosts never a loopback address: on the first host its own name often stands for one (Debian writes
    127.0.1.1 into /etc/hosts), and then the way to everywhere counts.
    """
    for target in (master, _ANYWHERE):
        address = address_towards(target)
        if address is not None and not (several_hosts and ipaddress.ip_address(address.split("%")[0]).is_loopback):
            return address
    return "127.0.0.1"


def set_interface(ranks: Ranks) -> None:
    """Tells gloo which network interface to use, where nobody did and the job has several hosts.

    By itself gloo takes the address that the host's own name has, which others often cannot reach.
    """
    if ranks.world == ranks.local_world or "GLOO_SOCKET_IFNAME" in os.environ:
        return
    address = own_address(os.environ["MASTER_ADDR"], several_hosts=True)
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address == address for entry in addresses) and not address.startswith("127."):
            os.environ["GLOO_SOCKET_IFNAME"] = name


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
