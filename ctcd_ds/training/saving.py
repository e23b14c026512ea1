"""Writing a checkpoint: all ranks into a temporary directory, then a manifest, then one rename.

At every moment, the directory holds the old checkpoints whole, and of the new one everything or nothing. Where a rank
cannot write, all ranks hear of it before any of them leaves: one that left alone would leave the others in a barrier.
"""

from __future__ import annotations

import copyreg
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.distributed as dist

from ctcd_ds.cli import RunFailure
from ctcd_ds.manifest import file_entry, sync_directory, write_atomic, write_manifest
from ctcd_ds.peers.build import frozen_sha256
from ctcd_ds.training.checkpoint import FORMAT, INSIDE, VERSION, prune, tag_of
from ctcd_ds.training.identity import identity
from ctcd_ds.training.plan import Plan, checkpoint_bytes


def save(engine: Any, plan: Plan, directory: Path, step: int, valid: Mapping[str, float]) -> Path:
    """Saves the state after `step` steps. Called by all ranks; returns the checkpoint's path.

    `valid`: the held-out loss of each peer at this step, where it was measured. Raises RunFailure on all ranks where a
    rank cannot write; what was there before is untouched then.
    """
    final, temporary = directory / tag_of(step), directory / f".{tag_of(step)}.tmp"
    attempt = _Attempt(plan, directory, step)
    first = dist.get_rank() == 0
    with attempt:
        if first:
            shutil.rmtree(temporary, ignore_errors=True)
            attempt.look_for_room()
            temporary.mkdir(parents=True)
    attempt.settle(temporary)
    _save_shards(engine, attempt, temporary)
    files = attempt.settle(temporary)
    with attempt:
        if first:
            write_manifest(temporary / "manifest.json", _content(engine, plan, step, valid, files))
            if final.exists():
                shutil.rmtree(final)
            temporary.rename(final)
            sync_directory(directory)
            write_atomic(directory / "latest", final.name + "\n")
            prune(directory, plan.recipe.training)
    attempt.settle(temporary)
    return final


def _save_shards(engine: Any, attempt: _Attempt, temporary: Path) -> None:
    """DeepSpeed's own files, each written by its rank, forced to the disk, and described."""
    writer = engine.checkpoint_engine
    engine.checkpoint_engine = _Recorder(writer, attempt, temporary)
    stage_as_number()
    # It would put a script of its own beside the files, after which nobody here asks.
    engine._copy_recovery_script = lambda save_path: None
    try:
        engine.save_checkpoint(str(temporary), tag=INSIDE, save_latest=False, exclude_frozen_parameters=True)
    finally:
        engine.checkpoint_engine = writer


def stage_as_number() -> None:
    """Has DeepSpeed's ZeRO stage pickled as most versions of Python do it by themselves.

    3.11.2, which is Debian 12's, would write a call of getattr, and `loading.refuse_code` lets no file ask for that.
    """
    from deepspeed.runtime.zero.config import ZeroStageEnum

    copyreg.pickle(ZeroStageEnum, lambda stage: (ZeroStageEnum, (int(stage),)))


def _content(
    engine: Any, plan: Plan, step: int, valid: Mapping[str, float], files: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    peers = plan.recipe.peers
    return {
        "format": FORMAT,
        "version": VERSION,
        "step": step,
        "world": plan.world,
        **identity(plan),
        "frozen": {name: frozen_sha256(engine.module.peers[name]) for name in peers if peers[name].frozen},
        "valid": dict(valid),
        "files": dict(sorted(files.items())),
    }


class _Attempt:
    """What went wrong on this rank and what it wrote. As a context it keeps the first problem of writing to itself."""

    def __init__(self, plan: Plan, directory: Path, step: int) -> None:
        self._directory, self._step = directory, step
        self._needed = checkpoint_bytes(plan)
        self._problem: str | None = None
        self.files: dict[str, dict[str, Any]] = {}

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> bool:
        # torch's writer says RuntimeError where the system said "no space left" or "quota exceeded".
        if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError):
            error = error.__context__
        if not isinstance(error, OSError | RuntimeError):
            return False
        self._problem = self._problem or f"[rank {dist.get_rank()}] {error}"
        return True

    def look_for_room(self) -> None:
        """Raises OSError where the file system has less free space than the checkpoint needs."""
        self._directory.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(self._directory).free < self._needed:
            raise OSError("not enough free space")

    def settle(self, temporary: Path) -> dict[str, dict[str, Any]]:
        """Meets the other ranks: all files written so far, or RunFailure everywhere where one had a problem."""
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, (self._problem, self.files))
        if problems := [problem for problem, _ in everyone if problem]:
            if dist.get_rank() == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            raise RunFailure(f"the checkpoint of step {self._step} was not written: {self._said(problems)}")
        return {name: entry for _, files in everyone for name, entry in files.items()}

    def _said(self, problems: list[str]) -> str:
        try:
            free = f"{shutil.disk_usage(self._directory).free:,} bytes are free"
        except OSError as error:
            free = f"the free space cannot be read ({error})"
        kept = sorted(path.name for path in self._directory.glob("step-*"))
        then = f"The checkpoint {kept[-1]} is as it was" if kept else "There is no earlier checkpoint"
        return (
            f"{'; '.join(problems)}. It needs about {self._needed:,} bytes in {self._directory}, where {free}. "
            f"{then}; make room and go on with --resume"
        )


class _Recorder:
    """DeepSpeed's checkpoint writer, which then forces each file to the disk and notes its size and sha256."""

    def __init__(self, writer: Any, attempt: _Attempt, root: Path) -> None:
        self._writer, self._attempt, self._root = writer, attempt, root

    def save(self, state_dict: Any, path: str) -> None:
        with self._attempt:
            # A file, not its path: torch's own writer to paths does not tell why the system refused.
            with open(path, "wb") as file:  # noqa: PTH123 - DeepSpeed's path is a string
                self._writer.save(state_dict, file)
                file.flush()
                os.fsync(file.fileno())
            self._attempt.files[Path(path).relative_to(self._root).as_posix()] = file_entry(Path(path))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._writer, name)
