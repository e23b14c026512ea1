"""A run directory has one owner at a time: a second is refused and told who; the lock dies with its holder."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from commands import ROOT
from ctcd_ds.cli import UserError
from ctcd_ds.cluster import owner
from ctcd_ds.cluster.owner import owned

HOLD = """import sys
from pathlib import Path
from ctcd_ds.cluster.owner import owned
with owned(Path(sys.argv[1]), patience_s=float(sys.argv[2])):
    print("held", flush=True)
    sys.stdin.readline()"""


def start(directory: Path, patience_s: float = 0.0, **variables: str) -> subprocess.Popen[str]:
    """A process that takes the directory and keeps it until its input ends."""
    line, pipe = [sys.executable, "-c", HOLD, str(directory), str(patience_s)], subprocess.PIPE
    return subprocess.Popen(line, env=os.environ | variables, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def held(process: subprocess.Popen[str]) -> bool:
    assert process.stdout is not None
    return process.stdout.readline() == "held\n"


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    with start(tmp_path / "run", SLURM_JOB_ID="4711") as process:
        assert held(process)
        yield process
        process.kill()


def test_a_second_is_refused_and_told_who_holds_it(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    with pytest.raises(UserError) as refused, owned(tmp_path / "run", patience_s=0):
        pass
    for word in (f"process {holder.pid} on {os.uname().nodename}", "job 4711", f"since {time.strftime('%F')}"):
        assert word in str(refused.value), refused.value
    _, error = start(tmp_path / "run").communicate("\n")
    assert "started as it started this one" in error and "mpirun" in error, "as ranks of an unknown launcher do"


def test_the_lock_dies_with_its_holder_and_not_before(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    with start(tmp_path / "run", patience_s=60) as second:
        holder.kill()
        assert held(second), "kill -9 needs nobody to clear up after it"
        assert json.loads((tmp_path / "run" / owner.FILE).read_text())["pid"] == second.pid
        second.communicate("\n")
    assert not (tmp_path / "run" / owner.FILE).exists()


def test_of_many_that_come_at_once_one_at_a_time_has_it(tmp_path: Path) -> None:
    """Each counts up what it reads: no count is lost, though each removes the file that the others wait at."""
    count = "n = Path(sys.argv[1], 'n'); v = int(n.read_text()) if n.exists() else 0; time.sleep(0.02)"
    script = HOLD.replace("import sys", "import sys, time").replace(
        'print("held", flush=True)', f"{count}; n.write_text(str(v + 1))"
    )
    line = [sys.executable, "-c", script, str(tmp_path / "run"), "60"]
    crowd = [subprocess.Popen(line, cwd=ROOT, stdin=subprocess.DEVNULL) for _ in range(8)]
    assert [process.wait(timeout=120) for process in crowd] == [0] * 8
    assert (tmp_path / "run" / "n").read_text() == "8"


def test_what_was_made_for_nothing_goes_again(tmp_path: Path) -> None:
    with owned(tmp_path / "runs" / "one"):
        assert (tmp_path / "runs" / "one" / owner.FILE).exists()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("place", "said"),
    [("file", "is a file"), ("file/run", "cannot be written: Not a directory"), ("/proc/run", "/proc")],
)
def test_a_place_that_cannot_be_one_is_named(tmp_path: Path, place: str, said: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=said), owned(tmp_path / place):
        pass


def test_a_waiting_job_has_its_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real SLURM is asked in tests/cluster; here its answer is a script's, so that the words are tried everywhere."""
    (tmp_path / "squeue").write_text("#!/bin/sh\nprintf '76\\n77_1\\n'\n")
    (tmp_path / "squeue").chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (tmp_path / "slurm").mkdir()
    for jobs, free in (({"pretrain": "77_1", "export": "78_1"}, False), ({"pretrain": "77_0"}, True)):
        owner.note_queued(tmp_path, jobs)
        if free:
            with owned(tmp_path):
                continue
        with pytest.raises(UserError, match="has job 77_1 in the queue: wait for it, or `scancel 77_1`"):
            owner.refuse_while_queued(tmp_path)
    owner.note_queued(tmp_path, {"pretrain": "77_1"})
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "77")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    owner.refuse_while_queued(tmp_path)  # it is this job's own
