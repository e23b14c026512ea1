"""What a rank finds out about itself and its host, alone: versions, GPU, the output directory."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import time
from contextlib import suppress
from importlib import metadata
from pathlib import Path

import ctcd_ds

PACKAGES = ("torch", "deepspeed", "transformers", "megatron-core")
GIB = 2**30
_OTHERS_ON_GPU_BYTES = 2 * GIB  # what is in use there beyond it belongs to somebody else: a context takes about half
_SEEN_S = 3.0  # what a network file system may take to show another host's file


def versions() -> dict[str, str]:
    """Versions of what is installed; of our own code also a hash, for a checkout changes without a new version."""
    source = hashlib.sha256()
    root = Path(ctcd_ds.__file__).parent
    for file in sorted(root.rglob("*.py")):
        source.update(file.relative_to(root).as_posix().encode() + file.read_bytes())
    found = {"python": platform.python_version(), "ctcd_ds": f"{ctcd_ds.__version__} ({source.hexdigest()[:12]})"}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def gpu(number: int) -> tuple[str | None, str | None]:
    """A GPU that this process is to use: its name, and what is wrong with it."""
    import torch

    if (count := torch.cuda.device_count()) <= number:
        return None, f"needs GPU number {number}, and its host shows {count} GPUs"
    name = torch.cuda.get_device_name(number)
    try:
        free, total = torch.cuda.mem_get_info(number)
    except RuntimeError as problem:
        return name, str(problem).splitlines()[0]
    used = total - free
    busy = used > _OTHERS_ON_GPU_BYTES
    return name, f"{used / GIB:.1f} of {total / GIB:.1f} GiB are in use before the job" if busy else None


class OutputProbe:
    """Shows whether hosts share a directory: each writes a file of its own there, and reads rank 0's.

    It leaves nothing behind, the directory itself neither where it was not there before. `token` is rank 0's secret of
    this preflight: old files prove nothing.
    """

    def __init__(self, directory: Path, rank: int, token: str) -> None:
        self._directory, self._rank, self._token = directory, rank, token
        self._made: list[Path] = []
        self._problem: str | None = None

    def begin(self) -> None:
        """Rank 0's part, before the others look: makes the directory and writes its file."""
        try:
            self._made = [path for path in (self._directory, *self._directory.parents) if not path.exists()]
            self._directory.mkdir(parents=True, exist_ok=True)
            self._write()
        except OSError as problem:
            self._problem = self._refusal(problem)

    def look(self, write: bool) -> str | None:
        """Why the directory is not good here, None where it is. `write`: one rank of a host tries that too."""
        if self._rank == 0 or self._problem:
            return self._problem
        end = time.monotonic() + _SEEN_S
        while not self._shows_rank_0():
            if time.monotonic() > end:
                return f"{self._directory} is not the one that rank 0 sees: rank 0's file is not in it"
            time.sleep(0.1)
        try:
            if write:
                self._write()
        except OSError as problem:
            return self._refusal(problem)
        return None

    def sees(self, rank: int) -> bool:
        """Whether a rank's file is here."""
        return self._file(rank).exists()

    def free_bytes(self) -> int | None:
        """Free space of the file system; None where the directory is not there."""
        with suppress(OSError):
            return shutil.disk_usage(self._directory).free
        return None

    def end(self) -> None:
        """Removes what it made, as far as nobody else uses it."""
        with suppress(OSError):
            self._file(self._rank).unlink(missing_ok=True)
            for path in self._made:
                path.rmdir()

    def _shows_rank_0(self) -> bool:
        with suppress(OSError):
            list(self._directory.iterdir())  # makes NFS look again instead of in its memory
            return self._file(0).read_text() == self._token
        return False

    def _refusal(self, problem: OSError) -> str:
        return f"cannot write to {self._directory}: {problem.strerror}"

    def _file(self, rank: int) -> Path:
        return self._directory / f".preflight-{self._token[:8]}-{rank}"

    def _write(self) -> None:
        with self._file(self._rank).open("w") as file:
            file.write(self._token)
            file.flush()
            os.fsync(file.fileno())
