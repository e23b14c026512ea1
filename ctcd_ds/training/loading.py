"""Reading a checkpoint: into an engine, at any number of ranks, or put together as plain weights.

DeepSpeed unpickles its own files without a guard. So no file reaches it before torch's restricted unpickler has read
it with a short list of allowed names: a manifest proves that nothing was changed, not who wrote it.
"""

from __future__ import annotations

import contextlib
import io
import pickle
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ctcd_ds.cli import RunFailure, UserError
from ctcd_ds.peers.build import frozen_sha256
from ctcd_ds.training.checkpoint import INSIDE, Manifest
from ctcd_ds.training.rank_zero import on_rank_zero


def load(engine: Any, checkpoint: Path, manifest: Manifest) -> int:
    """Puts a verified checkpoint into the engine, which was built for its number of ranks or as `universal`.

    Called by all ranks; returns the step. Raises UserError where a frozen peer is not what it was, RunFailure where a
    file holds more than data.
    """
    for name, stated in manifest["frozen"].items():
        if (found := frozen_sha256(engine.module.peers[name])) != stated:
            raise UserError(
                f"peers.{name}.pretrained: its weights are not those of the run's start ({found} ≠ {stated})"
            )
    refuse_code(checkpoint)
    same_ranks = manifest["world"] == dist.get_world_size()
    with nullcontext(checkpoint) if same_ranks else _universal(checkpoint) as place:
        path, _ = engine.load_checkpoint(str(place), tag=INSIDE, load_module_strict=not manifest["frozen"])
    assert path is not None
    return int(manifest["step"])


def consolidated(checkpoint: Path) -> dict[str, dict[str, Tensor]]:
    """The fp32 master weights of every trained peer, put together from all ranks' shards: peer → name → tensor.

    What else is trained (the maps of `peers/signals.py`) is part of no model.
    Raises RunFailure where a file holds more than data.
    """
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    refuse_code(checkpoint)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):  # it reports every shard
        state = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint), tag=INSIDE)
    peers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        holder, peer, name = key.split(".", 2)  # peers.<name>.…: the container's own prefix
        if holder == "peers":
            peers.setdefault(peer, {})[name] = tensor
    return peers


def refuse_code(checkpoint: Path) -> None:
    """Raises RunFailure where one of DeepSpeed's files could run code, or is nothing that torch.save wrote.

    What torch's restricted unpickler reads to the end, the unrestricted one reads to the same end: the same bytes ask
    for nothing but plain data and the few names of DeepSpeed's own that are allowed here.
    """
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    allowed = [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]
    for path in sorted((checkpoint / INSIDE).rglob("*.pt")):
        try:
            with torch.serialization.safe_globals(allowed):
                strange = torch.serialization.get_unsafe_globals_in_checkpoint(path)
                if not strange:
                    torch.load(path, map_location="meta", weights_only=True, mmap=True)
        except (ValueError, RuntimeError, pickle.UnpicklingError, EOFError, OSError) as problem:
            raise RunFailure(f"{path} is not loaded: {str(problem).splitlines()[0]}") from None
        if strange:
            raise RunFailure(
                f"{path} is not loaded: it asks for {', '.join(sorted(strange))}, which no checkpoint of DeepSpeed's "
                "does. Whoever made this file may want to run code on this machine"
            )


@contextlib.contextmanager
def _universal(checkpoint: Path) -> Iterator[Path]:
    """The checkpoint in DeepSpeed's universal form, which any number of ranks loads; gone after use.

    Rank 0 converts, beside the checkpoint, where all ranks can read.
    """
    place = checkpoint.with_name(f".{checkpoint.name}.universal")

    def convert() -> None:
        shutil.rmtree(place, ignore_errors=True)
        folders = ("--input_folder", checkpoint / INSIDE, "--output_folder", place / INSIDE)
        line = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", *map(str, folders)]
        done = subprocess.run([*line, "--inject_missing_state"], capture_output=True, text=True, check=False)
        if done.returncode:
            raise RunFailure(f"{checkpoint} could not be converted for another number of ranks:\n{done.stderr[-2000:]}")

    on_rank_zero(convert)
    yield place
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(place)
