"""DeepSpeed's compiled collectives for the CPU, loaded so that a process killed meanwhile stops nobody after it."""

from __future__ import annotations

import fcntl
from contextlib import suppress
from pathlib import Path

import psutil


def load_collectives() -> None:
    """Builds where needed and loads the op that `deepspeed.init_distributed` will ask for on the CPU.

    torch guards each load by a file `lock` in the op's build folder. A process that is killed there leaves the file,
    and every later start on that account waits for it for ever, without a word. Ours therefore wait for each other
    at a second lock, which dies with its holder; under it, a `lock` that no process has open belongs to a dead one.
    """
    from deepspeed.accelerator import get_accelerator
    from torch.utils import cpp_extension

    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    if not builder.is_compatible():  # then DeepSpeed goes without it
        return
    folder = Path(cpp_extension._get_build_directory(builder.name, verbose=False))
    with (folder / "ctcd_ds.lock").open("w") as ours:
        with suppress(OSError):  # a file system without locks: as DeepSpeed alone would do
            fcntl.flock(ours, fcntl.LOCK_EX)
            _remove_if_left_over(folder / "lock")
        builder.load()


def _remove_if_left_over(lock: Path) -> None:
    """Removes the lock of a build that nobody is at: torch's own holder keeps the file open."""
    if lock.exists() and not any(_has_open(process, lock) for process in psutil.process_iter()):
        lock.unlink(missing_ok=True)


def _has_open(process: psutil.Process, file: Path) -> bool:
    with suppress(psutil.Error):
        return any(opened.path == str(file.resolve()) for opened in process.open_files())
    return False
