"""Several hosts on this one machine: each with its own network, processes, name, /dev/shm, /tmp and power switch.

A host is a set of Linux namespaces around an init process; a cable (veth) leads from it to a switch (a bridge in a
network namespace of its own), so that no address of a test exists outside of it. Hosts share the file system, except
for /tmp and /dev/shm; of /tmp they see what tests and project have there.

    with Network(tmp_path, ["node1", "node2"]) as network:
        network["node1"].run("ping", "-c1", "node2")

Each init ends when its standard input does: whatever kills the tests kills the hosts, and with them all they run.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
NAMESPACES = ("--mount", "--net", "--pid", "--uts", "--ipc")

# bash collects the orphans that the kernel hands to process 1, also while it reads.
_INIT = "echo up; while read -r; do :; done"

# Of the old /tmp only the kept folders come back: a node's /tmp is its own.
_FURNISH = """
hostname "$NAME"
echo 1 > /proc/sys/net/ipv6/conf/all/disable_ipv6
ip link set lo up
ip addr add "$ADDRESS/24" dev eth0
ip link set eth0 up
mount --bind "$ETC/hosts" /etc/hosts
mount --bind "$ETC/nsswitch.conf" /etc/nsswitch.conf
mount -t tmpfs shm /dev/shm
mount --bind /tmp /mnt
mount -t tmpfs -o mode=1777 tmp /tmp
for folder in $KEPT; do
    mkdir -p "/tmp/$folder"
    mount --bind "/mnt/$folder" "/tmp/$folder"
done
umount --lazy /mnt
"""


def skip_without(*programs: str) -> None:
    """Skips the test where hosts cannot be made here, or one of the programs is missing; says why."""
    search = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    missing = [p for p in ("unshare", "nsenter", "ip", "bash", *programs) if shutil.which(p, path=search) is None]
    if os.geteuid() != 0 or sys.platform != "linux":
        pytest.skip("hosts of their own need root on Linux (make test-cluster)")
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)} (make test-cluster installs them as root)")
    tried = subprocess.run(["unshare", *NAMESPACES, "--fork", "true"], capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"no namespaces here: {tried.stderr.strip()}")


def wait_for(condition: Callable[[], Any], seconds: float = 60, what: str = "") -> Any:
    """What the condition gives as soon as it is true. Fails after the time, and says for what it waited."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, f"{what or 'the condition'}: not within {seconds:g} s"
        time.sleep(0.05)
    return found


class _Namespaces:
    """An init process in namespaces of its own, and how to enter them."""

    def __init__(self, *kinds: str) -> None:
        line = ["unshare", *kinds, "--fork", "--kill-child", *(["--mount-proc"] if "--pid" in kinds else [])]
        self.outer = subprocess.Popen(
            [*line, "bash", "-c", _INIT],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        assert self.outer.stdout is not None and self.outer.stdout.readline() == b"up\n"
        children = Path(f"/proc/{self.outer.pid}/task/{self.outer.pid}/children").read_text()
        self.init = int(children.split()[0])
        self.enter = ["nsenter", "--target", str(self.init), *kinds, "--"]

    def kill(self) -> None:
        """Ends init, and with it everything in its process namespace."""
        if self.outer.poll() is None:
            os.kill(self.init, signal.SIGKILL)
        self.outer.wait()
        assert self.outer.stdin is not None and self.outer.stdout is not None
        self.outer.stdin.close()
        self.outer.stdout.close()


class Host:
    """One machine. Its processes see their own; from outside they are seen and signalled by their outer numbers."""

    def __init__(self, network: Network, name: str, address: str) -> None:
        self.network, self.name, self.address = network, name, address
        self._started: list[subprocess.Popen[str]] = []
        self.boot()

    def boot(self) -> None:
        """Switches the host on (again, after `kill`), with nothing running but its init."""
        self._inside = _Namespaces(*NAMESPACES)
        self.network.plug(self.name, self._inside.init)
        kept = sorted({str(p.relative_to("/tmp")) for p in self.network.kept if p.is_relative_to("/tmp")})
        self.run(
            *("sh", "-euc", _FURNISH),
            NAME=self.name, ADDRESS=self.address, ETC=self.network.etc, KEPT=" ".join(kept),
        )  # fmt: skip

    @property
    def enter(self) -> list[str]:
        """What to put before a command to run it here, in the project's folder."""
        return [*self._inside.enter, "env", "-C", str(ROOT)]

    def run(self, *words: object, check: bool = True, timeout: float = 60, **variables: object) -> str:
        """Runs a command here to its end; its output. Fails with both outputs where the exit code is not 0."""
        done = subprocess.run(
            [*self.enter, *map(str, words)],
            env=self._environment(variables),
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        said = f"{self.name}: {' '.join(map(str, words))}: exit code {done.returncode}\n{done.stdout}{done.stderr}"
        assert done.returncode == 0 or not check, said
        return done.stdout

    def start(self, *words: object, log: Path, **variables: object) -> subprocess.Popen[str]:
        """Starts a command here, its output appended to a file. The process given is only its doorkeeper (nsenter).

        It ends with the command's exit code; to signal the command, use `processes`.
        """
        with log.open("a") as file:
            process = subprocess.Popen(
                [*self.enter, *map(str, words)],
                env=self._environment(variables),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
        self._started.append(process)
        return process

    def _environment(self, variables: dict[str, object]) -> dict[str, str]:
        search = f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/sbin"
        return {**os.environ, "PATH": search, **{key: str(value) for key, value in variables.items()}}

    def processes(self, word: str = "") -> dict[int, str]:
        """{outer process number: command line} of what runs here and has `word` in its command line; init left out."""
        mine = Path(f"/proc/{self._inside.init}/ns/pid").readlink()
        found = {}
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and (entry / "ns/pid").readlink() == mine:
                    line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                    if line and word in line and int(entry.name) != self._inside.init:  # a zombie has no line
                        found[int(entry.name)] = line
            except OSError:
                continue  # ended meanwhile
        return found

    def kill(self) -> None:
        """A power cut: every process is gone at once, nothing said to anybody."""
        self._inside.kill()
        for process in self._started:
            process.wait()
        self._started.clear()

    def cut(self) -> None:
        """Pulls the cable out of the switch: packets vanish, connections stay open."""
        self.network.set_cable(self.name, "down")

    def restore(self) -> None:
        """Puts the cable back."""
        self.network.set_cable(self.name, "up")


class Network:
    """The switch, and the hosts plugged into it, by name. All know one another by /etc/hosts, and nobody else.

    `folder`: what the hosts shall see of /tmp, a folder or pytest's base of all folders; in it lies their /etc.
    """

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self.kept = (folder, ROOT, Path(sys.prefix), Path(sys.base_prefix))
        self.etc = Path(tempfile.mkdtemp(prefix="etc-", dir=folder))
        self.hosts: dict[str, Host] = {}
        addresses = {name: f"10.77.0.{10 + number}" for number, name in enumerate(names)}
        listed = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in addresses.items())]
        (self.etc / "hosts").write_text("\n".join(listed) + "\n")
        # No DNS in here: a look-up of an address would hang for 10 s.
        (self.etc / "nsswitch.conf").write_text("passwd: files\ngroup: files\nshadow: files\nhosts: files\n")
        self._switch = _Namespaces("--net")
        try:
            self._in_switch("ip", "link", "add", "bridge", "type", "bridge")
            self._in_switch("ip", "link", "set", "bridge", "up")
            for name, address in addresses.items():
                self.hosts[name] = Host(self, name, address)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Network:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __getitem__(self, name: str) -> Host:
        return self.hosts[name]

    def close(self) -> None:
        """Switches all hosts off; the kernel removes cables and switch with their namespaces."""
        for host in self.hosts.values():
            host.kill()
        self._switch.kill()

    def plug(self, name: str, init: int) -> None:
        """A cable from the switch to a host, whose end is called eth0."""
        self._in_switch("ip", "link", "del", "dev", name, check=False)  # the kernel takes its time after a power cut
        self._in_switch("ip", "link", "add", "name", name, "type", "veth", "peer", "name", "eth0", "netns", str(init))
        self._in_switch("ip", "link", "set", "dev", name, "master", "bridge", "up")

    def set_cable(self, name: str, state: str) -> None:
        """'up' or 'down' at the switch's end."""
        self._in_switch("ip", "link", "set", "dev", name, state)

    def _in_switch(self, *words: str, check: bool = True) -> None:
        done = subprocess.run([*self._switch.enter, *words], capture_output=True, text=True, check=False)
        assert done.returncode == 0 or not check, f"{' '.join(words)}: {done.stderr}"
