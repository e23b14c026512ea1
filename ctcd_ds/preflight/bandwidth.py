"""How fast the ranks of a job sum a tensor, measured, and what that makes of a recipe's step."""

from __future__ import annotations

import socket
import time
from dataclasses import dataclass, replace
from datetime import timedelta
from math import ceil, log2
from typing import Any

import torch
import torch.distributed as dist

from ctcd_ds import cli
from ctcd_ds.cluster.network import set_interface
from ctcd_ds.cluster.ranks import Ranks
from ctcd_ds.cluster.scaling import Cluster, Work, predict
from ctcd_ds.preflight.meeting import Meeting
from ctcd_ds.training.engine import communication_backend, device_number, device_type
from ctcd_ds.training.hardware import peak_flops
from ctcd_ds.training.plan import Plan

ACHIEVED = {"cuda": 0.4, "cpu": 0.9}  # of the peak, alone; of a CPU's measured GEMM rate (docs/performance.md)
_SMALL, _LARGEST = 2**20, 2**28  # bytes
_MEASURE_S = 0.7
_LIMIT_S = 20.0
_COLUMNS = "{:<6}{:>14}{:>16}{:>13}"


@dataclass(frozen=True)
class AllReduce:
    """An all-reduce over `world` ranks: seconds that 4 bytes take, and that `size` bytes take.

    flops: FLOP/s of a rank in practice, None where nobody knows its GPU. memory: bytes/s of its memory.
    """

    world: int
    latency_s: float
    size: int
    seconds: float
    flops: float | None
    memory: float

    @property
    def bus_bytes_per_s(self) -> float:
        """What each rank sends: 2 (n − 1)/n of the tensor (the "bus bandwidth" of nccl-tests)."""
        return 2 * (self.world - 1) / self.world * self.size / self.seconds


def all_reduce(ranks: Ranks, plan: Plan, meeting: Meeting) -> int:
    """Sums tensors over all ranks as training will; rank 0 says what came out. Exit code, the same on all ranks."""
    set_interface(ranks)
    problem, measured = None, None
    try:
        measured = _in_a_group(ranks, plan, meeting)
    except (RuntimeError, ValueError) as failure:
        problem = f"{socket.gethostname()}: rank {ranks.rank}: {str(failure).splitlines()[0]}"
    problems = meeting.gather("all-reduce", problem, _LIMIT_S)
    return int(meeting.tell("all-reduced", lambda: _say(plan, ranks.world, problems, measured)))


def _in_a_group(ranks: Ranks, plan: Plan, meeting: Meeting) -> AllReduce:
    device = torch.device("cpu")
    if device_type() == "cuda":
        device = torch.device("cuda", device_number(ranks))
        torch.cuda.set_device(device)
    limit = timedelta(seconds=_LIMIT_S)
    dist.init_process_group(communication_backend(), None, limit, ranks.world, ranks.rank, meeting.store)
    try:
        best = peak_flops(device, plan.deepspeed.precision)
        return measure_all_reduce(device, best and best / ranks.world * ACHIEVED[device.type])
    finally:
        dist.destroy_process_group()


def measure_all_reduce(device: torch.device, flops: float | None) -> AllReduce:
    """Called by all ranks of the default group, takes about 2 s. All get the numbers of the slowest rank."""
    latency = _seconds(torch.zeros(1, device=device), 20)
    quick = _seconds(torch.zeros(_SMALL // 4, device=device), 3)
    size = int(min(max(_MEASURE_S / 3 / quick, 1), _LARGEST / _SMALL)) * _SMALL
    seconds = _seconds(torch.zeros(size // 4, device=device), 3)
    return AllReduce(dist.get_world_size(), latency, size, seconds, flops, _memory_rate(device))


def _seconds(tensor: torch.Tensor, repetitions: int) -> float:
    """Mean seconds of an all-reduce of the tensor, on the slowest rank."""
    dist.all_reduce(tensor)  # connections are made at first use
    _finish(tensor.device)
    dist.barrier()
    started = time.perf_counter()
    for _ in range(repetitions):
        dist.all_reduce(tensor)
    _finish(tensor.device)
    spent = torch.tensor([(time.perf_counter() - started) / repetitions], dtype=torch.float64, device=tensor.device)
    dist.all_reduce(spent, op=dist.ReduceOp.MAX)
    return float(spent)


def _memory_rate(device: torch.device) -> float:
    """Bytes per second that a copy reads and writes."""
    tensor = torch.zeros(_LARGEST // 16, device=device)
    copied = tensor.clone()
    _finish(device)
    started = time.perf_counter()
    for _ in range(4):
        copied.copy_(tensor)
    _finish(device)
    return 4 * 2 * tensor.nbytes / (time.perf_counter() - started)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _say(plan: Plan, world: int, problems: dict[int, Any], measured: AllReduce | None) -> int:
    failed = [said for _, said in sorted(problems.items()) if said]
    failed += [f"rank {rank}: no answer within {_LIMIT_S:g} s" for rank in range(world) if rank not in problems]
    if failed or measured is None:
        print("\nall-reduce failed, though all ranks reach each other:", *failed, sep="\n  ", flush=True)
        return cli.EXIT_FAILED
    print(
        f"\nall-reduce of {measured.size / 2**20:.0f} MiB over {world} ranks ({communication_backend()}): "
        f"{measured.bus_bytes_per_s / 1e9:.2f} GB/s sent by each, {measured.latency_s * 1e6:.0f} µs for one number"
    )
    if measured.flops is None:
        print("what it means for a step is not known: the peak of this GPU is not in training/hardware.py")
    else:
        print(meaning(measured, plan.work, measured.flops), flush=True)
    return cli.EXIT_DONE


def as_cluster(measured: AllReduce, flops: float) -> Cluster:
    """The ranks as equal machines around one switch, whose all-reduce takes the measured time."""
    latency = measured.latency_s / (2 * ceil(log2(measured.world)))
    share = measured.seconds / max(measured.seconds - measured.latency_s, 1e-9)
    link = measured.bus_bytes_per_s * share
    return Cluster(measured.world, 1, flops, link, memory=measured.memory, latency=latency)


def meaning(measured: AllReduce, work: Work, flops: float) -> str:
    """A step of this recipe at either ZeRO stage: computation, communication, share of perfect scaling."""
    cluster = as_cluster(measured, flops)
    lines = [
        f"a step of this recipe ({work.micro_batch} rows × {work.accumulation} accumulation a rank, a model: "
        f"docs/scaling.md)",
        _COLUMNS.format("ZeRO", "computation s", "communication s", "efficiency"),
    ]
    for stage in (1, 2):
        step = predict(replace(work, stage=stage), cluster)
        line = _COLUMNS.format(
            stage, f"{step.compute_s + step.memory_s:.3g}", f"{step.communication_s:.3g}", f"{step.efficiency:.0%}"
        )
        lines.append(f"{line}  (this one)" if stage == work.stage else line)
    return "\n".join(lines)
