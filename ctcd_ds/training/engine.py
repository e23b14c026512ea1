"""The only door to DeepSpeed's runtime: processes, the engine around the peers, and what is read off it."""

from __future__ import annotations

import io
import os
import socket
import sys
from contextlib import redirect_stdout
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ctcd_ds.cli import UserError
from ctcd_ds.cluster.network import set_interface
from ctcd_ds.cluster.ranks import Ranks
from ctcd_ds.memory import keep_freed_memory
from ctcd_ds.peers.build import DTYPES, build_peers
from ctcd_ds.peers.cotrain import CoTraining
from ctcd_ds.training.ops import load_collectives, settle_extensions
from ctcd_ds.training.plan import Plan

INITIALISATION_TIMEOUT = timedelta(minutes=30)


def device_type() -> str:
    """'cuda' or 'cpu': what DeepSpeed will run on here."""
    from deepspeed.accelerator import get_accelerator

    return str(get_accelerator().device_name()).split(":")[0]


def device_number(ranks: Ranks) -> int:
    """Which of the devices that this process sees is its own: with srun's --gpus-per-task it sees no other."""
    from deepspeed.accelerator import get_accelerator

    return 0 if ranks.source == "srun" and get_accelerator().device_count() == 1 else ranks.local_rank


def communication_backend() -> str:
    """'nccl' or 'gloo': what its process group runs on."""
    from deepspeed.accelerator import get_accelerator

    return str(get_accelerator().communication_backend_name())


def settle_arithmetic(deterministic: bool) -> None:
    """How this process's GPU adds up; `deterministic` is `training.deterministic`. Before its first operation.

    cuBLAS cuts the gradient of a weight, a sum over all tokens, into parts, which torch lets it add up in 16 bits: not
    here. Sums whose order would change from run to run are made in one order, or torch raises and names them.
    """
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    # use_deterministic_algorithms() would load the compiler, a third of a start's time: build_engine tells it.
    torch.set_deterministic_debug_mode("error" if deterministic else "default")
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it starts
        # Nothing here reads what it has not written: no pass over each new buffer.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def start_processes(ranks: Ranks) -> torch.device:
    """Joins the process group and picks this rank's device."""
    import deepspeed
    from deepspeed.accelerator import get_accelerator
    from deepspeed.utils import logger

    settle_extensions()
    ranks.announce()
    set_interface(ranks)
    # DeepSpeed builds its ops with ninja; over ssh the environment is not activated, and another ninja builds all anew.
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ.get('PATH', os.defpath)}"
    accelerator = get_accelerator()
    if device_type() == "cpu":
        keep_freed_memory()
        load_collectives()
    else:
        os.environ["LOCAL_RANK"] = str(device_number(ranks))  # DeepSpeed reads this too
        accelerator.set_device(device_number(ranks))
    try:
        with redirect_stdout(io.StringIO()) as said:  # it prints what it has built
            deepspeed.init_distributed(
                dist_backend=communication_backend(), timeout=INITIALISATION_TIMEOUT, verbose=False
            )
    except dist.DistNetworkError as problem:
        if "EADDRINUSE" not in str(problem):
            raise
        raise UserError(_port_is_taken(ranks)) from None
    logger.info(said.getvalue().strip())
    _unlink_shared_memory()
    return torch.device(accelerator.current_device_name())


def _port_is_taken(ranks: Ranks) -> str:
    """What to write where another run of this machine, or anything else, listens at the port of this one."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        free = probe.getsockname()[1]
    option = f"MASTER_PORT={free} in the environment"
    if ranks.source in ("deepspeed", "torchrun"):
        option = f"{ranks.source} --master_port {free} …"
    return f"port {os.environ['MASTER_PORT']} of {ranks.address} is taken, perhaps by another run there: write {option}"


def _unlink_shared_memory() -> None:
    """Takes the names off the shared memory of DeepSpeed's CPU collectives: 66 MiB a rank, which it never removes.

    All ranks have it mapped after the barrier; without a name it goes when they go, however they go.
    """
    dist.barrier()
    meeting = (os.environ.get(key, "") for key in ("MASTER_ADDR", "MASTER_PORT"))
    name = "_".join(("deepspeed_allreduce_buffer", str(os.getuid()), *meeting, str(dist.get_rank())))
    Path("/dev/shm", name).unlink(missing_ok=True)


def _import_muon_uncompiled() -> None:
    """DeepSpeed asks of every optimizer whether it is its Muon, which is never ours; importing that compiles functions.

    It would load all of torch's compiler for them, a third of a start's time.
    """
    from deepspeed.runtime import compiler

    compiling, compiler.compile = compiler.compile, lambda: compiler.dummy_decorator
    try:
        from deepspeed.runtime.zero.muon import muon_optimizer  # noqa: F401
    finally:
        compiler.compile = compiling


def build_engine(plan: Plan, universal: bool = False) -> Any:
    """Builds all peers and wraps their container in a DeepSpeed engine with AdamW, two groups a peer.

    `universal`: a checkpoint of another number of ranks will be loaded, in DeepSpeed's universal form.
    """
    import deepspeed

    recipe, auto = plan.recipe, plan.task.auto_class()
    dtype = DTYPES[plan.deepspeed.precision]
    peers = build_peers(plan.sections, plan.corpus, recipe.seed, auto, dtype, plan.new_tokens)
    module = CoTraining(peers, recipe.graph(), plan.corpus.vocab_size, recipe.seed)
    module.train()
    if recipe.training.activation_checkpointing:
        module.checkpoint_activations()
    if recipe.training.compile:
        import torch._inductor.config as compiler

        compiler.deterministic = recipe.training.deterministic  # chooses no kernel by what was fastest this time
        module.compile_parts()
    else:
        _import_muon_uncompiled()
    settings = {name: recipe.optimizer_of(name) for name in recipe.peers}
    # Fused AdamW touches each value once; as plain torch.optim.AdamW it needs no compiled op of DeepSpeed's.
    optimizer = torch.optim.AdamW(module.parameter_groups(settings), fused=True)
    values = plan.deepspeed.values | ({"checkpoint": {"load_universal": True}} if universal else {})
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=values)
    # Its own events (lr and timers) count samples where ours count steps, and wandb drops what goes back.
    engine.monitor.enabled = False
    return engine
