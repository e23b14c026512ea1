"""A forked process is one like any other: it is held against a true start of the same script."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import forks

SCRIPT = """
import atexit, os, sys, warnings
import numpy, torch
atexit.register(print, "the end")
print(sys.argv[1:], __name__, os.path.basename(__file__), sys.path[0], os.getcwd(), os.environ.get("SAID"))
print(sys.stdin.read(), torch.get_num_threads(), sys.stdout.encoding, file=sys.stderr)
if sys.argv[1] == "hash": print(hash("a name"), numpy.random.random(), numpy.random.random())
if sys.argv[1] == "dies": os.kill(os.getpid(), 9)
if sys.argv[1] == "raises": raise ValueError("it said so")
if sys.argv[1] == "sleeps": sys.stdout.flush(); import time; time.sleep(60)
if sys.argv[1].isdigit(): sys.exit(int(sys.argv[1]))
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return path


def environment(**variables: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", **variables}


@pytest.mark.parametrize("word", ["returns", "7", "dies", "raises"])
def test_it_says_and_ends_as_a_true_start_does(script: Path, word: str) -> None:
    line, variables = [str(script), word, "a b"], environment(SAID="this")
    true = subprocess.run([sys.executable, *line], env=variables, cwd="/", input="", capture_output=True, text=True)
    forked = forks.run(line, variables, Path("/"))
    assert (forked.returncode, forked.stdout) == (true.returncode, true.stdout)
    assert forked.stderr.splitlines()[-1] == true.stderr.splitlines()[-1]


def test_signals_reach_it_and_its_end_is_seen(script: Path, tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as log:
        process = forks.start([str(script), "sleeps"], environment(), tmp_path, log, log)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == process.poll() == -signal.SIGTERM
    process.kill()  # of what has ended, like Popen's, does nothing


def test_two_ranks_hash_and_draw_differently(script: Path, tmp_path: Path) -> None:
    logs = [tmp_path / name for name in "ab"]
    for server, path in enumerate(logs):
        with path.open("w") as log:
            assert forks.start([str(script), "hash"], environment(), tmp_path, log, log, server).wait(60) == 0
    first, second = (path.read_text().splitlines()[-2].split() for path in logs)
    assert all(a != b for a, b in zip(first, second, strict=True))


def test_what_it_starts_is_forked_as_well(tmp_path: Path) -> None:
    """A module in a session of its own, and a launcher's way: `python -u SCRIPT`; with pipes it is a true start."""
    (tmp_path / "within.py").write_text(
        "import os, sys, torch; print(sys.argv[1:], __name__, os.getsid(0) == os.getpid())"
    )
    (tmp_path / "outer.py").write_text(
        "import subprocess, sys\n"
        "both = [subprocess.Popen([sys.executable, '-m', 'within', 'a b'], start_new_session=True),\n"
        "        subprocess.Popen([sys.executable, '-u', 'within.py', '7'], stdout=sys.stdout)]\n"
        "assert [one.wait() for one in both] == [0, 0], both\n"
        "assert subprocess.run([sys.executable, '-m', 'within', '8']).returncode == 0\n"
        "print(subprocess.run([sys.executable, '-c', 'print(9)'], capture_output=True, text=True).stdout)\n"
        "print({type(one).__name__ for one in both}, file=sys.stderr)\n"
    )
    done = forks.run([str(tmp_path / "outer.py")], environment(), tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.split("\n")) == [
        "",
        "",
        "9",
        "['7'] __main__ False",
        "['8'] __main__ False",
        "['a b'] __main__ True",
    ]
    assert ("Forked" in done.stderr) != ("CTCD_TRUE_STARTS" in os.environ)


@pytest.mark.skipif("CTCD_TRUE_STARTS" in os.environ, reason="a true start takes any variable")
def test_a_variable_that_was_read_while_importing_is_refused(script: Path) -> None:
    done = forks.run([str(script), "returns"], environment(DS_ACCELERATOR="cuda"), Path("/"))
    assert done.returncode == 1 and "DS_ACCELERATOR was read while importing" in done.stderr
