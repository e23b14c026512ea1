"""DeepSpeed's compiled collectives load although a process was killed at it, and not while another one builds."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from commands import environment

pytestmark = pytest.mark.faults
LOAD = "from ctcd_ds.training.ops import load_collectives; load_collectives()"
BUILD = """import sys
from torch.utils.file_baton import FileBaton
baton = FileBaton(sys.argv[1])
assert baton.try_acquire()
print("building", flush=True)
sys.stdin.readline()
baton.release()"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A build folder of its own, with the op built in it."""
    folder = tmp_path_factory.mktemp("extensions")
    assert load(folder).wait(timeout=500) == 0
    return folder


@pytest.fixture
def builder(place: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds torch's lock of the op, as one does that builds it without us."""
    (built,) = place.glob("**/*.so")
    line = [sys.executable, "-c", BUILD, str(built.parent / "lock")]
    with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "building\n"
        yield process
        process.kill()


def load(folder: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", LOAD], env=environment() | {"TORCH_EXTENSIONS_DIR": str(folder)})


def test_a_killed_build_stops_nobody_after_it(place: Path, builder: subprocess.Popen[str]) -> None:
    builder.kill()
    builder.wait()
    assert list(place.glob("**/lock")), "the killed process left torch's lock"
    ranks = [load(place), load(place)]
    assert [rank.wait(timeout=200) for rank in ranks] == [0, 0]
    assert not list(place.glob("**/lock"))


def test_a_living_build_is_waited_for(place: Path, builder: subprocess.Popen[str]) -> None:
    rank = load(place)
    time.sleep(6)  # a load of what is built takes two seconds, most of them imports
    assert rank.poll() is None and list(place.glob("**/lock"))
    builder.communicate("\n")
    assert rank.wait(timeout=200) == 0
