"""Stopping early: whatever asks for it, all ranks finish the step, save, exit with 85, and can go on."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runs import ROOT, bert, chain_corpus, final_weights, metrics, start_ranks

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


def wait_for(condition: Callable[[], Any], processes: list[subprocess.Popen[bytes]], seconds: float = 120) -> None:
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
    assert [rank.wait(60) for rank in ranks] == [85, 85]
    state = exit_state(run)
    assert state["state"] == "saved" and state["reason"] == number.name
    assert logged(run) == state["step"], "the step was finished"
    assert (run / "checkpoints" / f"step-{state['step']:08d}" / "manifest.json").exists()


def test_a_stopped_run_goes_on_to_the_weights_of_an_uninterrupted_one(corpus: Path, tmp_path: Path) -> None:
    """Twice stopped by signals and once by its time limit, in four parts: equal bits."""
    (tmp_path / "whole").mkdir()
    whole = start_ranks(pretrain(corpus, tmp_path / "whole", "training.steps=60"), 1, tmp_path / "whole" / "log")
    assert [rank.wait(120) for rank in whole] == [0]
    run = tmp_path / "run"
    for part, wish in enumerate((signal.SIGUSR1, signal.SIGTERM, "training.time_limit_minutes=0.001")):
        changes = ["training.steps=60", *([wish] if isinstance(wish, str) else [])]
        before = logged(run)
        ranks = start_ranks(pretrain(corpus, tmp_path, *changes, resume=part > 0), 1, tmp_path / f"part{part}")
        if isinstance(wish, signal.Signals):
            wait_for(lambda before=before: logged(run) > before, ranks)
            ranks[0].send_signal(wish)
        assert [rank.wait(120) for rank in ranks] == [85]
    assert "time_limit" in exit_state(run)["reason"]
    last = start_ranks(pretrain(corpus, tmp_path, "training.steps=60", resume=True), 1, tmp_path / "last")
    assert [rank.wait(120) for rank in last] == [0]
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
    wait_for(lambda: not Path(f"/proc/{child}").exists(), [], 30)


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
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.stdout == "still here\n" and done.returncode == 130, done.stderr
    before = signal.getsignal(signal.SIGTERM)
    StopSignals(has_launcher=False).restore()
    assert signal.getsignal(signal.SIGTERM) is before


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
        assert other.wait(60) == 1
        assert time.monotonic() - stopped < limit + 5
    finally:
        ranks[victim].kill()
        ranks[victim].wait()
    said = (tmp_path / f"log-rank{1 - victim}.log").read_text()
    named = "rank 1 did not arrive" if victim else "rank 0, which holds the store, does not answer"
    assert f"took more than {limit:g} s: {named}" in said
    assert "Current thread" in said and "trainer.py" in said
    assert exit_state(tmp_path / "run")["state"] == "failed"
