"""A result is there whole or not at all, also where its directory is there before it and cannot be replaced."""

from __future__ import annotations

import errno
import subprocess
from pathlib import Path

import pytest

from ctcd_ds.cli import UserError
from ctcd_ds.manifest import built


@pytest.mark.parametrize("there_before", [False, True])
def test_a_result_is_whole_or_not_there(tmp_path: Path, there_before: bool) -> None:
    place = tmp_path / "result"
    if there_before:
        place.mkdir()
    with pytest.raises(ZeroDivisionError), built(place) as folder:
        (folder / "half").touch()
        raise ZeroDivisionError
    assert list(tmp_path.rglob("*")) == [place] * there_before
    with built(place) as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "weights").touch(mode=0o600)
        assert not (place / "inner").exists()
    assert [path.name for path in place.iterdir()] == ["inner"] and [p.name for p in tmp_path.iterdir()] == ["result"]
    (tmp_path / "other").touch()
    assert (place / "inner" / "weights").stat().st_mode == (tmp_path / "other").stat().st_mode, "readable as others are"
    with pytest.raises(UserError, match="is not empty"), built(place):
        pass


def test_a_mount_point_is_filled(tmp_path: Path) -> None:
    """As a container's volume: it can be neither removed nor renamed."""
    place = tmp_path / "volume"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", place], capture_output=True, check=False).returncode:
        pytest.skip("needs root: mount")
    try:
        with built(place) as folder:
            (folder / "result").write_text("all of it")
        assert (place / "result").read_text() == "all of it" and len(list(place.iterdir())) == 1
    finally:
        subprocess.run(["umount", place], check=True)


@pytest.mark.parametrize(("place", "said"), [("/proc/result", "/proc"), ("file/result", "Not a directory")])
def test_a_place_that_cannot_be_written_is_named_with_the_reason(tmp_path: Path, place: str, said: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=f"cannot be written.*{said}"), built(tmp_path / place):
        pass


@pytest.mark.parametrize(
    "problem", [OSError(errno.EDQUOT, "Disk quota exceeded"), RuntimeError("No space left on device (os error 28)")]
)
def test_a_disk_that_fills_while_a_result_is_made_is_a_message(tmp_path: Path, problem: Exception) -> None:
    """Python's own writing says so by a number, safetensors and tokenizers in their text."""
    said = r"--output_dir \S*result cannot be written: .*(quota|space)"
    with pytest.raises(UserError, match=said), built(tmp_path / "result"):
        raise problem
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file is a file: name another"), built(tmp_path / "file"):
        pass
