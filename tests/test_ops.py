"""DeepSpeed's compiled collectives: each environment's own, and a killed process stops nobody after it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from commands import PATIENCE_S, environment
from ctcd_ds.cli import UserError
from ctcd_ds.training.ops import VARIABLE, load_collectives, settle_extensions

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
    """A build folder of its own, with the op built in it: by a test run before this one, or now."""
    folder = tmp_path_factory.mktemp("extensions")
    with pytest.MonkeyPatch.context() as monkeypatch:
        built = settled(monkeypatch, HOME=Path.home())
    shutil.copytree(built, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("lock", "*.lock"))
    assert load(folder).wait(timeout=PATIENCE_S) == 0
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


@pytest.mark.faults
def test_a_killed_build_stops_nobody_after_it(place: Path, builder: subprocess.Popen[str]) -> None:
    builder.kill()
    builder.wait()
    assert list(place.glob("**/lock")), "the killed process left torch's lock"
    ranks = [load(place), load(place)]
    assert [rank.wait(timeout=PATIENCE_S) for rank in ranks] == [0, 0]
    assert not list(place.glob("**/lock"))


@pytest.mark.faults
def test_a_living_build_is_waited_for(place: Path, builder: subprocess.Popen[str]) -> None:
    rank = load(place)
    time.sleep(6)  # a load of what is built takes two seconds, most of them imports
    assert rank.poll() is None and list(place.glob("**/lock"))
    builder.communicate("\n")
    assert rank.wait(timeout=PATIENCE_S) == 0


def settled(monkeypatch: pytest.MonkeyPatch, **variables: object) -> Path:
    """What settle_extensions sets with these variables in the place of this process's own."""
    for name in (VARIABLE, "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
    settle_extensions()
    return Path(os.environ[VARIABLE])


def test_a_build_is_said_and_what_is_built_is_loaded_without_a_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from deepspeed.accelerator import get_accelerator

    monkeypatch.setenv(VARIABLE, str(tmp_path))
    kind = type(get_accelerator().create_op_builder("ShareMemCommBuilder"))
    monkeypatch.setattr(kind, "load", lambda self: (tmp_path / self.name / "op.so").touch())
    load_collectives()
    assert "once for this environment" in capsys.readouterr().out
    load_collectives()
    assert capsys.readouterr().out == ""


def test_each_environment_has_a_place_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = settled(monkeypatch, HOME=tmp_path)
    assert here.is_relative_to(tmp_path / ".cache") and here == settled(monkeypatch, HOME=tmp_path)
    assert settled(monkeypatch, XDG_CACHE_HOME=tmp_path / "c") == tmp_path / "c" / here.relative_to(tmp_path / ".cache")
    monkeypatch.setattr(sys, "prefix", "/another/environment")
    assert settled(monkeypatch, HOME=tmp_path) != here
    assert settled(monkeypatch, **{VARIABLE: tmp_path / "mine"}) == tmp_path / "mine"


def test_without_a_home_to_write_to_another_place_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("nobody can make a directory in here, not even root")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert settled(monkeypatch, HOME=tmp_path / "file").parent == tmp_path / f"ctcd_ds-{os.getuid()}"
    with pytest.raises(UserError, match=r"no place to build its ops .*file.*set TORCH_EXTENSIONS_DIR"):
        settled(monkeypatch, **{VARIABLE: tmp_path / "file" / "in"})
    if os.getuid():
        return
    os.chown(tmp_path / f"ctcd_ds-{os.getuid()}", 12345, -1)  # as an intruder would have made it
    with pytest.raises(UserError, match="another user's"):
        settled(monkeypatch, HOME=tmp_path / "file")
