"""Runs the project's commands in tests: in this process where only the message counts, else as a user does."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import forks
from ctcd_ds.cluster.ranks import free_port

PATIENCE_S = 580  # how long a test waits for what ends by itself: this ends a hang, it does not time the machine
ROOT = Path(__file__).resolve().parents[1]


def command(monkeypatch: pytest.MonkeyPatch, capsys: Any, script: str, *arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a script run in this process (imports cost once)."""
    monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    said = capsys.readouterr()
    code = end.value.code
    return code if isinstance(code, int) else int(code is not None), said.out, said.err


def environment() -> dict[str, str]:
    """This environment with the interpreter's folder on the path (deepspeed, ninja) and no launcher's variables."""
    clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return {**clean, "PATH": f"{Path(sys.executable).parent}:{clean['PATH']}"}


def busy(seconds: float) -> float:
    """A promise of so many seconds on a machine of its own, as it stands on one that others use too."""
    return seconds * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


def run(script: str, *arguments: object, **variables: object) -> subprocess.CompletedProcess[str]:
    """A script in a process of its own, which is forked: what it does, prints and ends with."""
    line = [str(ROOT / script), *map(str, arguments)]
    return forks.run(line, environment() | {key: str(value) for key, value in variables.items()}, ROOT)


def deepspeed_line(ranks: int, *arguments: object) -> list[str]:
    """`deepspeed --num_accelerators RANKS …` as a user types it, on a free port."""
    return [str(word) for word in ("deepspeed", "--num_accelerators", ranks, "--master_port", free_port(), *arguments)]


def forked_deepspeed(ranks: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    """`deepspeed_line` to its end, where the launcher and its ranks are forked."""
    return run(str(Path(sys.executable).with_name("deepspeed")), *deepspeed_line(ranks, *arguments)[1:])


def deepspeed(ranks: int, *arguments: object, timeout: int = PATIENCE_S) -> subprocess.CompletedProcess[str]:
    """Runs `deepspeed_line` to its end."""
    line = deepspeed_line(ranks, *arguments)
    return subprocess.run(line, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=timeout)
