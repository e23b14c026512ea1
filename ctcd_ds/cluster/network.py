"""Which way this host goes to the others."""

from __future__ import annotations

import ipaddress
import os
import socket

import psutil

from ctcd_ds.cluster.ranks import Ranks

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
