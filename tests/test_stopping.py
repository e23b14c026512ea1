"""Stopping early: whatever asks for it, all ranks finish the step, save, exit with 85, and can go on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster.hosts import Network, skip_without
from commands import PATIENCE_S, busy, deepspeed_line, environment, forked_deepspeed
from runs import ROOT, Process, bert, chain_corpus, final_weights, metrics, start_ranks

pytestmark = pytest.mark.faults
STEPS = 4000  # more than any test waits for


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chain_corpus(tmp_path_factory.mktemp("corpus") / "chain")


def pretrain(corpus: Path, folder: Path, *changes: str, resume: bool = False) -> list[object]:
    """The command line of a long run of one small pair."""
    recipe = {
        "corpus": {"path": str(corpus), "sequence_length": 32},
        "peers": {
            "teacher": {"model": bert(32, 2), "soft": {"student": 1.0}},
            "student": {"model": bert(16, 1), "soft": {"teacher": 4.0}},
        },
        "training": {"global_batch_rows": 8, "steps": STEPS, "log_every": 1, "valid_every": STEPS},
    }
    (folder / "recipe.json").write_text(json.dumps(recipe))
    (folder / "d.json").write_text('{"zero_optimization": {"stage": 2}}')
    line: list[object] = [ROOT / "launchers" / "pretrain.py", "--recipe", folder / "recipe.json"]
    line += ["--deepspeed_config", folder / "d.json", "--output_dir", folder / "run"]
    return [*line, *(["--resume"] if resume else []), *(["--set", *changes] if changes else [])]


def wait_for(condition: Callable[[], Any], processes: list[Process], seconds: float = PATIENCE_S) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end and all(p.poll() is None for p in processes), "the run never got there"
        time.sleep(0.05)


def logged(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def exit_state(run: Path) -> dict[str, Any]:
    return json.loads((run / "exit.json").read_text())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT], ids=lambda n: n.name)
def test_a_signal_to_any_one_rank_saves_the_whole_run(corpus: Path, tmp_path: Path, number: signal.Signals) -> None:
    run = tmp_path / "run"
    ranks = start_ranks(pretrain(corpus, tmp_path), 2, tmp_path / "first")
    wait_for(lambda: logged(run) > 3, ranks)
    ranks[1].send_signal(number)
    assert [rank.wait(PATIENCE_S) for rank in ranks] == [85, 85]
    state = exit_state(run)
    assert state["state"] == "saved" and state["reason"] == number.name
    assert logged(run) == state["step"], "the step was finished"
    assert (run / "checkpoints" / f"step-{state['step']:08d}" / "manifest.json").exists()


def test_a_stopped_run_goes_on_to_the_weights_of_an_uninterrupted_one(corpus: Path, tmp_path: Path) -> None:
    """Twice stopped by signals and once by its time limit, in four parts: equal bits."""
    (tmp_path / "whole").mkdir()
    whole = start_ranks(pretrain(corpus, tmp_path / "whole", "training.steps=60"), 1, tmp_path / "whole" / "log")
    assert [rank.wait(PATIENCE_S) for rank in whole] == [0]
    run = tmp_path / "run"
    for part, wish in enumerate((signal.SIGUSR1, signal.SIGTERM, "training.time_limit_minutes=0.001")):
        changes = ["training.steps=60", *([wish] if isinstance(wish, str) else [])]
        before = logged(run)
        ranks = start_ranks(pretrain(corpus, tmp_path, *changes, resume=part > 0), 1, tmp_path / f"part{part}")
        if isinstance(wish, signal.Signals):
            wait_for(lambda before=before: logged(run) > before, ranks)
            ranks[0].send_signal(wish)
        assert [rank.wait(PATIENCE_S) for rank in ranks] == [85]
    assert "time_limit" in exit_state(run)["reason"]
    last = start_ranks(pretrain(corpus, tmp_path, "training.steps=60", resume=True), 1, tmp_path / "last")
    assert [rank.wait(PATIENCE_S) for rank in last] == [0]
    assert exit_state(run)["state"] == "finished"
    a, b = final_weights(tmp_path / "whole" / "run"), final_weights(run)
    assert all(bool((a[peer][key] == b[peer][key]).all()) for peer in a for key in a[peer])
    assert metrics(run)[60]["loss/student/hard"] == metrics(tmp_path / "whole" / "run")[60]["loss/student/hard"]


def test_a_rank_whose_launcher_died_saves_and_ends(corpus: Path, tmp_path: Path) -> None:
    """kill -9 of the parent: nobody is left to end the ranks, so they do it themselves."""
    run = tmp_path / "run"
    line = [str(word) for word in pretrain(corpus, tmp_path)]
    parent = f"""
import json, os, subprocess, sys, time
env = dict(os.environ, RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
child = subprocess.Popen([sys.executable, *{line!r}], env=env)
print(child.pid, flush=True)
time.sleep(600)
"""
    launcher = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert launcher.stdout is not None
    child = int(launcher.stdout.readline())
    wait_for(lambda: logged(run) > 3, [launcher])
    launcher.kill()
    launcher.wait()
    wait_for((run / "exit.json").exists, [])
    assert exit_state(run) | {"step": 0} == {"state": "saved", "step": 0, "reason": "the launcher died"}
    wait_for(lambda: not Path(f"/proc/{child}").exists(), [])


def test_a_second_interrupt_after_a_second_ends_at_once() -> None:
    """Stopped in the middle of everything by a person who insists: no checkpoint, exit code 130."""
    from ctcd_ds.training.signals import StopSignals

    program = (
        "import os, signal, time\n"
        "from ctcd_ds.training.signals import StopSignals\n"
        "stop = StopSignals(has_launcher=False)\n"
        "for pause in (0.01, 0.01, 1.1):\n"
        "    os.kill(os.getpid(), signal.SIGTERM); os.kill(os.getpid(), signal.SIGINT); time.sleep(pause)\n"
        "assert stop.reason == 'SIGTERM'; print('still here', flush=True)\n"
        "os.kill(os.getpid(), signal.SIGINT); time.sleep(5)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=PATIENCE_S)
    assert done.stdout == "still here\n" and done.returncode == 130, done.stderr
    before = signal.getsignal(signal.SIGTERM)
    StopSignals(has_launcher=False).restore()
    assert signal.getsignal(signal.SIGTERM) is before


def test_no_collective_gives_up_before_the_watchdog_which_leaves_no_thread() -> None:
    """One inside the store's C++ at the interpreter's end aborted a rank that had done all its work (exit code -6)."""
    program = (
        "import threading, time, torch\n"
        "import torch.distributed as dist\n"
        "from ctcd_ds.training.watchdog import Watchdog\n"
        "dist.init_process_group('gloo', init_method='tcp://127.0.0.1:0', rank=0, world_size=1)\n"
        "before = threading.active_count()\n"
        "watchdog = Watchdog(7200, print)\n"
        "groups = [dist.group.WORLD, dist.new_group([0])]  # as ZeRO makes one: half an hour, whatever the first has\n"
        "watchdog.outlast_collectives()\n"
        "for group in groups:\n"
        "    assert group._get_backend(torch.device('cpu')).options._timeout.total_seconds() > 7200\n"
        "time.sleep(1.2)\n"
        "assert threading.active_count() == before + 2\n"
        "watchdog.stop()\n"
        "assert threading.active_count() == before\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_hangs_ends_the_run_and_is_named(corpus: Path, tmp_path: Path, victim: int) -> None:
    """SIGSTOP: the other rank leaves within the time + 5 s, names it, and dumps its stacks."""
    limit = 4.0
    line = pretrain(corpus, tmp_path, f"training.step_timeout_s={limit}")
    ranks = start_ranks(line, 2, tmp_path / "log")
    wait_for(lambda: logged(tmp_path / "run") > 3, ranks)
    ranks[victim].send_signal(signal.SIGSTOP)
    stopped = time.monotonic()
    other = ranks[1 - victim]
    try:
        assert other.wait(PATIENCE_S) == 1
        assert time.monotonic() - stopped < limit + busy(5)
    finally:
        ranks[victim].kill()
        ranks[victim].wait()
    said = (tmp_path / f"log-rank{1 - victim}.log").read_text()
    named = "rank 1 did not arrive" if victim else "rank 0, which holds the store, does not answer"
    assert f"took more than {limit:g} s: {named}" in said
    assert "Current thread" in said and "trainer.py" in said
    assert exit_state(tmp_path / "run")["state"] == "failed"


@pytest.mark.parametrize("phase", ["validation", "saving"])
def test_a_signal_in_validation_or_saving_is_heard(corpus: Path, tmp_path: Path, phase: str) -> None:
    """The signal to a rank while it does something else than a step, once under `deepspeed`: saved, exit.json."""
    run = tmp_path / "run"
    if phase == "validation":
        slow = ["training.valid_every=1", "peers.teacher.model.num_hidden_layers=8"]
        line = deepspeed_line(2, *pretrain(corpus, tmp_path, *slow))
        with (tmp_path / "log").open("w") as file:
            where = {"env": environment(), "cwd": ROOT, "stdout": file, "stderr": file}
            launcher = subprocess.Popen(line, start_new_session=True, **where)
        try:
            wait_for(lambda: logged(run) > 1, [launcher])
            [rank, *_] = ranks_of(launcher.pid)
            os.kill(rank, signal.SIGUSR1)
            launcher.wait(PATIENCE_S)
        finally:
            for pid in ranks_of(launcher.pid):
                os.kill(pid, signal.SIGKILL)
    else:
        slow = ["training.checkpoint_every=1", "peers.teacher.model.hidden_size=256"]
        ranks = start_ranks(pretrain(corpus, tmp_path, *slow), 2, tmp_path / "log")
        wait_for(lambda: logged(run) > 1 and list(run.glob("checkpoints/.step-*.tmp")), ranks)
        ranks[0].send_signal(signal.SIGUSR1)
        assert [rank.wait(PATIENCE_S) for rank in ranks] == [85, 85]
    state = exit_state(run)
    assert state["state"] == "saved" and state["reason"] == "SIGUSR1"
    assert (run / "checkpoints" / f"step-{state['step']:08d}" / "manifest.json").exists()
    assert not list(run.glob("checkpoints/.step-*.tmp"))


def test_a_cut_link_ends_the_run_on_both_sides(corpus: Path, tmp_path: Path, tmp_path_factory: Any) -> None:
    skip_without()
    limit = 4.0
    line = pretrain(corpus, tmp_path, f"training.step_timeout_s={limit}")
    with Network(tmp_path_factory.getbasetemp(), ["a", "b"]) as network:
        where = {"MASTER_ADDR": "a", "LOCAL_SIZE": 1, "LOCAL_RANK": 0, "GLOO_SOCKET_IFNAME": "eth0"}
        ranks = start_ranks(line, 2, tmp_path / "log", before=[network[name].enter for name in "ab"], **where)
        wait_for(lambda: logged(tmp_path / "run") > 3, ranks)
        network["b"].cut()
        begun = time.monotonic()
        assert [rank.wait(PATIENCE_S) for rank in ranks] == [1, 1]
        assert time.monotonic() - begun < limit + busy(5)
    said = [(tmp_path / f"log-rank{rank}.log").read_text() for rank in (0, 1)]
    assert "rank 1 did not arrive" in said[0]
    assert "rank 0, which holds the store, does not answer" in said[1]
    assert all("Current thread" in text for text in said)


def ranks_of(session: int) -> list[int]:
    """The rank processes of a launcher's session: those with RANK in their environment."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and os.getsid(int(entry.name)) == session:
                words = (entry / "environ").read_bytes().split(b"\0")
                if any(word.startswith(b"RANK=") for word in words):
                    found.append(int(entry.name))
        except OSError:
            continue
    return sorted(found)


@pytest.mark.parametrize("kills", [1, pytest.param(4, marks=pytest.mark.nightly)])
def test_kills_at_random_moments_change_nothing(tmp_path: Path, kills: int) -> None:
    """One or a handful; `python tests/soak/kill_resume.py --kills 100` is the long form."""
    from soak.kill_resume import soak

    how = {"ranks": 2, "steps": 24, "precision": "bf16", "seed": 3, "folder": tmp_path}
    assert soak(kills=kills, undisturbed=forked_deepspeed, **how) == kills


def test_sigterm_to_deepspeed_itself_saves_though_it_tells_nobody(corpus: Path, tmp_path: Path) -> None:
    """`deepspeed` is a runner and its launch.py; the signal ends the first, and the second goes on."""
    run = tmp_path / "run"
    line = deepspeed_line(1, *pretrain(corpus, tmp_path))
    with (tmp_path / "log").open("w") as file:
        runner = subprocess.Popen(line, env=environment(), cwd=ROOT, stdout=file, stderr=file, start_new_session=True)
    try:
        wait_for(lambda: logged(run) > 1, [runner])
        runner.terminate()
        runner.wait(PATIENCE_S)
        wait_for(lambda: not ranks_of(runner.pid), [])
    finally:
        for pid in ranks_of(runner.pid):
            os.kill(pid, signal.SIGKILL)
    state = exit_state(run)
    assert state["state"] == "saved" and state["reason"] == "the launcher died"
    assert (run / "checkpoints" / f"step-{state['step']:08d}" / "manifest.json").exists()
