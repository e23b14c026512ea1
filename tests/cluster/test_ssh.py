"""On hosts with a real sshd and pdsh: `deepspeed --hostfile` starts, stops cleanly; the preflight names what is bad."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cluster.hosts import Host, Network, skip_without, wait_for
from cluster.ssh import SSHD, start_sshd
from commands import PATIENCE_S, busy
from runs import ROOT, bert, chain_corpus, final_weights, metrics, start_ranks

pytestmark = pytest.mark.cluster
# Put before the C library, it makes a host's clock 30 s fast for one process. A time namespace cannot move dates;
# libfaketime 0.9.10 breaks Python's sleep unless it moves the monotonic clock as well.
FAST_CLOCK = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <time.h>
int clock_gettime(clockid_t clock, struct timespec *now) {
    int (*real)(clockid_t, struct timespec *) = dlsym(RTLD_NEXT, "clock_gettime");
    int code = real(clock, now);
    if (clock == CLOCK_REALTIME) now->tv_sec += 30;
    return code;
}
"""
STEPS = 12
LIMIT = 4.0  # training.step_timeout_s of the faults


@dataclass(frozen=True)
class Place:
    """Two hosts, and what the user has there: recipe, DeepSpeed config, corpus, hostfile, .deepspeed_env."""

    folder: Path
    network: Network

    @property
    def hosts(self) -> list[Host]:
        return list(self.network.hosts.values())

    def arguments(self, name: str, *changes: str) -> list[object]:
        """What a run called `name` is started with, after the script."""
        words: list[object] = ["--recipe", self.folder / "recipe.json", "--deepspeed_config", self.folder / "d.json"]
        words += ["--output_dir", self.folder / name]
        return [*words, *(["--set", *changes] if changes else [])]

    def deepspeed(self, script: str, log: Path, *words: object) -> subprocess.Popen[str]:
        """`deepspeed --hostfile …` on the first host, as a user types it there."""
        line = ["deepspeed", "--hostfile", self.folder / "hostfile", f"launchers/{script}", *words]
        return self.hosts[0].start(*line, log=log, **self.environment())

    def environment(self) -> dict[str, object]:
        return {"DS_ENV_FILE": self.folder / "environment", "DS_ACCELERATOR": "cpu", "PYTHONPATH": ROOT}

    def direct(self, name: str, *words: object, **of_second: object) -> tuple[int, str]:
        """The preflight, one rank a host, started by hand: exit code of rank 0, and all that both said.

        `of_second`: environment that the second host has for itself.
        """
        log = self.folder / f"{name.replace(chr(47), chr(95))}.log"
        log.unlink(missing_ok=True)
        there = {"WORLD_SIZE": len(self.hosts), "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "OMP_NUM_THREADS": 1}
        there |= {"MASTER_ADDR": self.hosts[0].name, "MASTER_PORT": 29511, **self.environment()}
        line = [sys.executable, "launchers/preflight.py", *self.arguments(name), *words]
        ranks = [
            host.start(*line, log=log, **{**there, "RANK": rank, **(of_second if rank == 1 else {})})
            for rank, host in enumerate(self.hosts)
        ]
        codes = [rank.wait(PATIENCE_S) for rank in ranks]
        return codes[0], log.read_text()

    def running(self) -> dict[int, str]:
        """All processes on both hosts but the listening sshd's."""
        found = {pid: line for host in self.hosts for pid, line in host.processes().items()}
        return {pid: line for pid, line in found.items() if SSHD not in line}

    def end_all(self) -> None:
        for pid in self.running():
            os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    skip_without("sshd", "ssh", "ssh-keygen", "pdsh")
    folder = tmp_path_factory.mktemp("hosts")
    recipe = {
        "corpus": {"path": str(chain_corpus(folder / "corpus")), "sequence_length": 32},
        "peers": {
            "teacher": {"model": bert(32, 2), "soft": {"student": 1.0}},
            "student": {"model": bert(16, 1), "soft": {"teacher": 4.0}},
        },
        "training": {"global_batch_rows": 8, "steps": STEPS, "log_every": 1, "valid_every": 1000},
    }
    (folder / "recipe.json").write_text(json.dumps(recipe))
    (folder / "d.json").write_text('{"zero_optimization": {"stage": 2}}')
    (folder / "hostfile").write_text("node1 slots=1\nnode2 slots=1\n")
    carried = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"}
    carried |= {name: os.environ[name] for name in ("TORCH_EXTENSIONS_DIR",) if name in os.environ}
    (folder / "environment").write_text("".join(f"{name}={value}\n" for name, value in carried.items()))
    with Network(tmp_path_factory.getbasetemp(), ["node1", "node2"]) as network:
        start_sshd(network, folder / "ssh")
        yield Place(folder, network)


def bind(host: Host, source: Path, over: Path) -> None:
    """What lies at a path on this host only; `free` takes it away."""
    host.run("mount", "--bind", source, over)


def free(host: Host, *paths: Path) -> None:
    for path in paths:
        host.run("umount", path)


def exit_state(run: Path) -> dict[str, Any]:
    return json.loads((run / "exit.json").read_text())


def logged(run: Path) -> int:
    return (run / "metrics.jsonl").read_bytes().count(b"\n") if (run / "metrics.jsonl").exists() else 0


def row(said: str, host: str) -> list[str]:
    """The cells of a host in the table: host, ranks, reach, versions, recipe, corpus, output, space, clock, GPU."""
    [found] = re.findall(rf"^(?:\S+: )?({host} .*)$", said, re.M)
    return found.split()


# ---------------------------------------------------------------- starts


@pytest.fixture(scope="module")
def alone(place: Place) -> Path:
    """The run on one host with two ranks."""
    line = [ROOT / "launchers" / "pretrain.py", *place.arguments("alone")]
    ranks = start_ranks(line, 2, place.folder / "alone-log", DS_ACCELERATOR="cpu")
    try:
        assert [rank.wait(PATIENCE_S) for rank in ranks] == [0, 0], (place.folder / "alone-log-rank0.log").read_text()
    finally:
        for rank in ranks:
            rank.kill()
    return place.folder / "alone"


def assert_equal(alone: Path, run: Path) -> None:
    """The same losses at every step, and the same weights, bit for bit."""
    assert exit_state(run)["state"] == "finished"
    a, b = metrics(alone), metrics(run)
    assert len(a) == len(b) == STEPS
    assert all(a[s][key] == b[s][key] for s in a for key in a[s] if key.startswith(("loss/", "grad_norm/")))
    mine, theirs = final_weights(alone), final_weights(run)
    assert all(bool((mine[peer][key] == theirs[peer][key]).all()) for peer in mine for key in mine[peer])


def test_two_hosts_over_pdsh_equal_one_host_with_two_ranks(place: Place, alone: Path) -> None:
    log = place.folder / "pdsh.log"
    assert place.deepspeed("pretrain.py", log, *place.arguments("pdsh")).wait(PATIENCE_S) == 0, log.read_text()
    assert_equal(alone, place.folder / "pdsh")
    assert not place.running()
    assert all(host.run("ls", "/dev/shm") == "" for host in place.hosts)


def test_no_ssh_equals_it_too(place: Place, alone: Path) -> None:
    """One `deepspeed` on each host; the first host is given by name, not by address."""
    logs = [place.folder / f"no_ssh-{host.name}.log" for host in place.hosts]
    started = [
        host.start(
            *("deepspeed", "--hostfile", place.folder / "hostfile", "--no_ssh", "--node_rank", number),
            *("--master_addr", "node1", "launchers/pretrain.py", *place.arguments("no_ssh")),
            log=logs[number],
            **{**place.environment(), "OMP_NUM_THREADS": 1},
        )
        for number, host in enumerate(place.hosts)
    ]
    assert [one.wait(PATIENCE_S) for one in started] == [0, 0], "".join(log.read_text() for log in logs)
    assert_equal(alone, place.folder / "no_ssh")


# ---------------------------------------------------------------- faults


def start_long(place: Place, name: str) -> tuple[subprocess.Popen[str], Path]:
    """A run over pdsh with some steps behind it, and many to go."""
    words = place.arguments(name, "training.steps=100000", f"training.step_timeout_s={LIMIT}")
    launcher = place.deepspeed("pretrain.py", log := place.folder / f"{name}.log", *words)
    run = place.folder / name
    try:
        wait_for(lambda: logged(run) > 4 or launcher.poll() is not None, PATIENCE_S, f"steps of {name}")
        assert launcher.poll() is None, log.read_text()
    except BaseException:
        place.end_all()
        raise
    return launcher, run


def ranks_of(host: Host) -> list[int]:
    return [pid for pid, line in host.processes("--local_rank").items() if "deepspeed.launcher" not in line]


@pytest.mark.parametrize("fault", ["a killed rank on host 2", "a cut link", "SIGTERM to the launcher"])
def test_a_fault_ends_the_run_everywhere(place: Place, fault: str) -> None:
    """All ranks within the promised time, all else within 35 s, exit.json as it was."""
    first, second = place.hosts
    launcher, run = start_long(place, fault.replace(" ", "_"))
    begun = time.monotonic()
    try:
        if fault == "a killed rank on host 2":
            for pid in ranks_of(second):
                os.kill(pid, signal.SIGKILL)
        elif fault == "a cut link":
            second.cut()
        else:
            lines = first.processes("bin/deepspeed")
            [pid] = [pid for pid, line in lines.items() if "--hostfile" in line and "nsenter" not in line]
            os.kill(pid, signal.SIGTERM)
        wait_for(lambda: not ranks_of(first) and not ranks_of(second), LIMIT + busy(5), f"the ranks' end after {fault}")
        wait_for(
            lambda: not place.running(), begun + LIMIT + busy(35) - time.monotonic(), f"the end of all after {fault}"
        )
        launcher.wait(PATIENCE_S)
    finally:
        second.restore()
        place.end_all()
    state = exit_state(run)
    if fault == "SIGTERM to the launcher":
        # DeepSpeed's pkill ends ranks and their launchers at once: a rank may find its parent gone.
        assert state["state"] == "saved" and state["reason"] in ("SIGTERM", "the launcher died")
        assert (run / "checkpoints" / f"step-{state['step']:08d}" / "manifest.json").exists()
    else:
        assert state["state"] == "failed"
        assert ("rank 1 did not arrive" if fault == "a cut link" else "[rank 0]") in state["reason"]


# ---------------------------------------------------------------- preflight


def test_a_preflight_of_good_hosts_is_good_and_leaves_nothing(place: Place) -> None:
    log, before = place.folder / "good.log", sorted(place.folder.iterdir())
    begun = time.monotonic()
    assert place.deepspeed("preflight.py", log, *place.arguments("new/run")).wait(PATIENCE_S) == 0, log.read_text()
    said = log.read_text()
    assert row(said, "node1") == ["node1", "0", *["ok"] * 7, "skipped"]
    assert row(said, "node2") == ["node2", "1", *["ok"] * 7, "skipped"]
    assert re.search(r"over 2 ranks \(gloo\): [\d.]+ GB/s", said) and re.search(r"2 .*%  \(this one\)", said)
    assert sorted(place.folder.iterdir()) == sorted([*before, log])
    print(f"{time.monotonic() - begun:.1f} s")


def test_a_host_without_a_link_is_named(place: Place) -> None:
    """The launcher's own way to it is cut as well: the first host waits as long as it was told, and says who."""
    place.hosts[1].cut()
    try:
        words = [*place.arguments("unreached"), "--patience_s", 4]
        launcher = place.deepspeed("preflight.py", log := place.folder / "unreached.log", *words)
        assert launcher.wait(PATIENCE_S) != 0
    finally:
        place.hosts[1].restore()
        place.end_all()
    said = log.read_text()
    assert row(said, "node1")[2] == "ok" and row(said, "node2")[2:] == ["FAIL", *["?"] * 7]
    assert "node2: reach: nothing heard of rank 1 within 4 s" in said and "cure: is it up" in said


def test_a_host_that_is_different_is_named_with_each_difference(place: Place, tmp_path: Path) -> None:
    """Another recipe, corpus, package and code on the second host, a clock 30 s fast: each is a finding."""
    from importlib import metadata

    folder, second = place.folder, place.hosts[1]
    recipe = (folder / "recipe.json").read_text().replace('"teacher": 4.0', '"teacher": 2.0')
    (folder / "other.json").write_text(recipe)
    chain_corpus(folder / "other", vocab_size=200)
    installed = Path(str(metadata.distribution("transformers").locate_file("")))
    [facts] = installed.glob("transformers-*.dist-info/METADATA")
    (folder / "METADATA").write_text(re.sub("^Version: .*", "Version: 4.0.0", facts.read_text(), count=1, flags=re.M))
    code = ROOT / "ctcd_ds" / "manifest.py"
    (folder / "manifest.py").write_text(code.read_text() + "# changed\n")
    bound = {
        "other.json": folder / "recipe.json",
        "other": folder / "corpus",
        "METADATA": facts,
        "manifest.py": code,
    }
    (folder / "clock.c").write_text(FAST_CLOCK)
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", folder / "clock.so", folder / "clock.c", "-ldl"], check=True)
    for name, over in bound.items():
        bind(second, folder / name, over)
    try:
        code_, said = place.direct("different", LD_PRELOAD=folder / "clock.so")
    finally:
        free(second, *bound.values())
    assert code_ == 1
    assert row(said, "node1")[2:] == [*["ok"] * 7, "skipped"]
    assert row(said, "node2")[2:6] == ["ok", "FAIL", "FAIL", "FAIL"]
    assert re.search(r"node2: versions: transformers 4.0.0, elsewhere 5.*\n  cure: the same environment", said)
    assert re.search(r"node2: versions: ctcd_ds \S+ \(\w{12}\), elsewhere", said)
    assert re.search(
        r"node2: recipe: recipe.peers.student.soft.teacher = 2.0, elsewhere 4.0\n  cure: copy the recipe", said
    )
    assert re.search(r"node2: corpus: fingerprint \w{12}…, elsewhere \w{12}…\n  cure: copy the corpus", said)
    assert re.search(r"node2: clock: the clock is (29|30)\.\d s ahead of that of node1\n  cure: set it", said)


def test_output_that_is_not_shared_is_named(place: Place) -> None:
    """The second host has a directory of its own at that path."""
    (shared := place.folder / "storage").mkdir()
    place.hosts[1].run("mount", "-t", "tmpfs", "own", shared)
    try:
        code, said = place.direct("storage/run")
    finally:
        free(place.hosts[1], shared)
    assert code == 1 and row(said, "node1")[6] == "ok" and row(said, "node2")[6] == "FAIL"
    assert "storage/run is not the one that rank 0 sees" in said and "on storage that all hosts mount" in said
    assert not any(shared.iterdir())


def test_a_full_file_system_is_named_with_what_is_needed(place: Place) -> None:
    (small := place.folder / "small").mkdir()
    first = place.hosts[0]
    first.run("mount", "-t", "tmpfs", "-o", "size=4m", "small", small)
    try:
        words = ["launchers/preflight.py", *place.arguments("small/run")]
        said = first.run(sys.executable, *words, "--patience_s", 5, check=False, **place.environment())
    finally:
        free(first, small)
    assert row(said, "node1")[7] == "FAIL"
    assert re.search(r"node1: space: 0.00 GiB free, 0.0\d GiB needed for 4 checkpoints of 0.00 GiB\n  cure: make", said)


@pytest.mark.skipif(shutil.which("iptables", path=f"{os.environ['PATH']}:/usr/sbin") is None, reason="needs iptables")
def test_a_firewall_that_lets_only_the_store_through_is_named(place: Place) -> None:
    """The usual one: somebody opened MASTER_PORT, and training would hang at its first collective."""
    second = place.hosts[1]
    rule = ["INPUT", "-p", "tcp", "--syn", "-j", "REJECT", "--reject-with", "tcp-reset"]
    second.run("iptables", "-A", *rule)
    try:
        code, said = place.direct("firewall")
    finally:
        second.run("iptables", "-D", *rule)
    assert code == 1 and row(said, "node1")[2] == "ok" and row(said, "node2")[2] == "FAIL"
    assert re.search(r"node2: reach: no connection with node1: node1 asked node2 at 10\.77\.0\.11:\d+ .*refused", said)
    assert "cure: open all TCP ports between the hosts" in said


def test_a_mistake_that_all_hosts_have_is_the_users(place: Place) -> None:
    code, said = place.direct("mistake", "--set", "optimizer.weight_deca=1")
    assert code == 2 and said.count("error:") == 1
    assert "did you mean" in said and "node1  " not in said
