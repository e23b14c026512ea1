"""Checkpoints: an envelope around DeepSpeed's `save_checkpoint` that is either whole or not there (DESIGN §6).

    checkpoints/step-00000120/     manifest.json · deepspeed/…
    checkpoints/latest             the newest tag, for people; --resume trusts manifests only

All ranks write into a temporary directory; rank 0 then lists every file with size and sha256 in a manifest, makes it
durable, and renames the directory. A tag without a valid manifest does not exist.
"""

from __future__ import annotations

import contextlib
import io
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from ctcd_ds.cli import RunFailure, UserError
from ctcd_ds.manifest import (
    canonical_sha256,
    file_entry,
    file_problems,
    read_manifest,
    sync_directory,
    write_atomic,
    write_manifest,
)
from ctcd_ds.peers.build import weights_sha256
from ctcd_ds.training.plan import Plan

FORMAT, VERSION = "ctcd_ds.checkpoint", 1
_INSIDE = "deepspeed"  # DeepSpeed's own tag


def tag_of(step: int) -> str:
    """The directory name of a checkpoint after `step` steps."""
    return f"step-{step:08d}"


def save(engine: Any, plan: Plan, directory: Path, step: int) -> Path:
    """Saves the state after `step` steps. Called by all ranks; returns the checkpoint's path."""
    final = directory / tag_of(step)
    temporary = directory / f".{tag_of(step)}.tmp"
    first = dist.get_rank() == 0
    if first:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    dist.barrier()
    engine.save_checkpoint(str(temporary), tag=_INSIDE, save_latest=False, exclude_frozen_parameters=True)
    dist.barrier()
    if first:
        write_manifest(temporary / "manifest.json", _content(engine, plan, temporary, step))
        if final.exists():
            shutil.rmtree(final)
        temporary.rename(final)
        sync_directory(directory)
        write_atomic(directory / "latest", final.name + "\n")
        _prune(directory, plan.recipe.training.keep_checkpoints)
    dist.barrier()
    return final


def _content(engine: Any, plan: Plan, temporary: Path, step: int) -> dict[str, Any]:
    files = {}
    for path in sorted(p for p in temporary.rglob("*") if p.is_file()):
        files[path.relative_to(temporary).as_posix()] = file_entry(path)
    frozen = {
        name: weights_sha256(engine.module.peers[name]) for name, section in plan.recipe.peers.items() if section.frozen
    }
    return {
        "format": FORMAT,
        "version": VERSION,
        "step": step,
        "world": plan.world,
        "recipe": canonical_sha256(plan.recipe.resolved()),
        "corpus": plan.corpus.fingerprint,
        "tokenizer": plan.corpus.tokenizer_fingerprint,
        "vocab_size": plan.corpus.vocab_size,
        "frozen": frozen,
        "files": files,
    }


def verify(checkpoint: Path) -> dict[str, Any]:
    """Reads the manifest and every file it lists. Raises UserError with every file that is not as it says."""
    manifest = read_manifest(checkpoint / "manifest.json")
    if manifest.get("format") != FORMAT or manifest.get("version") != VERSION:
        raise UserError(
            f"{checkpoint} is no checkpoint of this version: {manifest.get('format')} {manifest.get('version')}"
        )
    if problems := list(file_problems(checkpoint, manifest["files"])):
        raise UserError(f"{checkpoint} is damaged:\n  " + "\n  ".join(problems))
    return manifest


def newest(directory: Path, say: Any = print) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint that verifies, and its manifest; says which were skipped and why."""
    for checkpoint in sorted(directory.glob("step-*"), reverse=True):
        try:
            return checkpoint, verify(checkpoint)
        except UserError as problem:  # noqa: PERF203 - the next one is tried because this one failed
            say(f"skipping checkpoint {checkpoint.name}: {problem}")
    return None


def refuse_another_run(manifest: dict[str, Any], plan: Plan) -> None:
    """Raises UserError where a checkpoint does not belong to this corpus."""
    if manifest["corpus"] != plan.corpus.fingerprint:
        raise UserError(
            f"corpus.path = {plan.corpus.path}: the run was started on another corpus (fingerprint "
            f"{manifest['corpus'][:12]}, this one {plan.corpus.fingerprint[:12]})"
        )


def load(engine: Any, checkpoint: Path, manifest: dict[str, Any]) -> int:
    """Puts a verified checkpoint into the engine, which was built for its number of ranks or as `universal`.

    Called by all ranks; returns the step. Raises UserError where a frozen peer is not what it was.
    """
    for name, stated in manifest["frozen"].items():
        if (found := weights_sha256(engine.module.peers[name])) != stated:
            raise UserError(
                f"peers.{name}.pretrained: its weights are not those of the run's start ({found} ≠ {stated})"
            )
    same_ranks = manifest["world"] == dist.get_world_size()
    with nullcontext(checkpoint) if same_ranks else _universal(checkpoint) as place:
        path, _ = engine.load_checkpoint(str(place), tag=_INSIDE, load_module_strict=not manifest["frozen"])
    assert path is not None
    return int(manifest["step"])


@contextlib.contextmanager
def _universal(checkpoint: Path) -> Iterator[Path]:
    """The checkpoint in DeepSpeed's universal form, which any number of ranks loads; gone after use.

    Rank 0 converts, beside the checkpoint, where all ranks can read.
    """
    place = checkpoint.with_name(f".{checkpoint.name}.universal")
    if dist.get_rank() == 0:
        shutil.rmtree(place, ignore_errors=True)
        folders = ("--input_folder", checkpoint / _INSIDE, "--output_folder", place / _INSIDE)
        line = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", *map(str, folders)]
        done = subprocess.run([*line, "--inject_missing_state"], capture_output=True, text=True, check=False)
        if done.returncode:
            raise RunFailure(f"{checkpoint} could not be converted for another number of ranks:\n{done.stderr[-2000:]}")
    dist.barrier()
    yield place
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(place)


def consolidated(checkpoint: Path) -> dict[str, dict[str, Tensor]]:
    """The fp32 master weights of every trained peer, put together from all ranks' shards: peer → name → tensor."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    with contextlib.redirect_stdout(io.StringIO()):  # it reports every shard
        state = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint), tag=_INSIDE)
    peers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        _, peer, name = key.split(".", 2)  # peers.<name>.…: the container's own prefix
        peers.setdefault(peer, {})[name] = tensor
    return peers


def _prune(directory: Path, keep: int) -> None:
    for old in sorted(directory.glob("step-*"))[:-keep]:
        shutil.rmtree(old)
