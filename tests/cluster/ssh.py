"""Bare hosts: each of a network's hosts with a real sshd, and keys that let them in to one another."""

from __future__ import annotations

import subprocess
from pathlib import Path

from cluster.hosts import Network, wait_for

SSHD = "/usr/sbin/sshd"  # by its whole name, as it insists
_CONFIG = """
Port 22
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/id.pub
PermitRootLogin yes
StrictModes no
UsePAM no
PidFile none
ClientAliveInterval 5
ClientAliveCountMax 2
"""

# As docs/clusters.md tells users to write it: a host that went away is noticed, and a new one is no question.
CLIENT = """
Host *
    ServerAliveInterval 5
    ServerAliveCountMax 2
    StrictHostKeyChecking accept-new
"""


def start_sshd(network: Network, folder: Path) -> None:
    """Starts sshd on all hosts; root of each may log in to each. Nothing of it is seen outside of them."""
    folder.mkdir()
    for name in ("host_key", "id"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    (folder / "sshd_config").write_text(_CONFIG.format(folder=folder))
    (folder / "config").write_text(f"{CLIENT}    IdentityFile {folder / 'id'}\n")
    for host in network.hosts.values():
        host.run("mkdir", "-p", "/root/.ssh", "/run/sshd")
        host.run("mount", "-t", "tmpfs", "-o", "mode=700", "ssh", "/root/.ssh")
        host.run("cp", folder / "config", "/root/.ssh/config")
        host.run(SSHD, "-f", folder / "sshd_config", "-E", folder / f"{host.name}.log")
    first = next(iter(network.hosts.values()))
    for name in network.hosts:
        wait_for(lambda name=name: first.run("ssh", name, "hostname", check=False).strip() == name, 20, f"ssh {name}")
