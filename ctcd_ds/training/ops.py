"""Where DeepSpeed builds its ops, and its collectives for the CPU loaded so that a killed process stops nobody."""

from __future__ import annotations

import fcntl
import hashlib
import os
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import psutil
import torch

from ctcd_ds.cli import UserError

VARIABLE = "TORCH_EXTENSIONS_DIR"


def settle_extensions() -> None:
    """Sets TORCH_EXTENSIONS_DIR, unless the user has: a place for each environment, that can be written.

    torch has one place for an account; there, two environments would rebuild the same op for each other at each switch.
    Raises UserError where no place can be written.
    """
    own = hashlib.sha256(f"{sys.prefix} {torch.__version__}".encode()).hexdigest()[:12]
    temporary = Path(tempfile.gettempdir(), f"ctcd_ds-{os.getuid()}")
    places, problems = [], []
    if given := os.environ.get(VARIABLE):
        places.append(Path(given))
    else:
        with suppress(RuntimeError):  # no HOME, and no such user
            cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
            places.append(Path(cache, "torch_extensions", f"ctcd_ds-{own}"))
        places.append(temporary / own)
    for place in places:
        try:
            place.mkdir(parents=True, exist_ok=True)
            if place.parent == temporary and temporary.stat().st_uid != os.getuid():
                raise PermissionError(f"{temporary} is another user's")
            tempfile.TemporaryFile(dir=place).close()
        except OSError as problem:
            problems.append(str(problem))
        else:
            os.environ[VARIABLE] = str(place)
            return
    raise UserError(
        f"DeepSpeed has no place to build its ops in ({'; '.join(problems)}): "
        f"set {VARIABLE} to a directory that can be written"
    )


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
    try:
        ours = (folder / "ctcd_ds.lock").open("w")
    except OSError as problem:
        raise UserError(f"{VARIABLE}: {problem}. Name a directory that can be written") from None
    with ours:
        with suppress(OSError):  # a file system without locks: as DeepSpeed alone would do
            fcntl.flock(ours, fcntl.LOCK_EX)
            _remove_if_left_over(folder / "lock")
        if not any(folder.glob("*.so")):
            print("building DeepSpeed's collectives for the CPU, once for this environment: some minutes", flush=True)
        builder.load()


def _remove_if_left_over(lock: Path) -> None:
    """Removes the lock of a build that nobody is at: torch's own holder keeps the file open."""
    if lock.exists() and not any(_has_open(process, lock) for process in psutil.process_iter()):
        lock.unlink(missing_ok=True)


def _has_open(process: psutil.Process, file: Path) -> bool:
    with suppress(psutil.Error):
        return any(opened.path == str(file.resolve()) for opened in process.open_files())
    return False
