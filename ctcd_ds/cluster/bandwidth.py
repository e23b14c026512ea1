"""How fast the ranks of a job sum a tensor together, measured, and what that makes of a recipe."""

from __future__ import annotations

import time
from dataclasses import dataclass
from math import ceil, log2

import torch
import torch.distributed as dist

from ctcd_ds.cluster.scaling import Cluster, Step, Work, predict

_SMALL, _LARGEST = 2**20, 2**28  # bytes
_MEASURE_S = 0.7


@dataclass(frozen=True)
class AllReduce:
    """An all-reduce over `world` ranks: seconds that 4 bytes take, and that `size` bytes take."""

    world: int
    latency_s: float
    size: int
    seconds: float

    @property
    def bus_bytes_per_s(self) -> float:
        """Bytes that each rank sends per second: 2 (n − 1)/n of the tensor (the "bus bandwidth" of nccl-tests)."""
        return 2 * (self.world - 1) / self.world * self.size / self.seconds


def measure(device: torch.device) -> AllReduce:
    """Called by all ranks of the default group, takes about 2 s. All get the numbers of the slowest rank."""
    latency = _seconds(torch.zeros(1, device=device), 20)
    quick = _seconds(torch.zeros(_SMALL // 4, device=device), 3)
    size = int(min(max(_MEASURE_S / 3 / quick, 1), _LARGEST / _SMALL)) * _SMALL
    return AllReduce(dist.get_world_size(), latency, size, _seconds(torch.zeros(size // 4, device=device), 3))


def _seconds(tensor: torch.Tensor, repetitions: int) -> float:
    """Mean seconds of an all-reduce of the tensor, on the slowest rank."""
    dist.all_reduce(tensor)  # connections are made at first use
    _finish(tensor)
    dist.barrier()
    started = time.perf_counter()
    for _ in range(repetitions):
        dist.all_reduce(tensor)
    _finish(tensor)
    spent = torch.tensor([(time.perf_counter() - started) / repetitions], dtype=torch.float64, device=tensor.device)
    dist.all_reduce(spent, op=dist.ReduceOp.MAX)
    return float(spent)


def _finish(tensor: torch.Tensor) -> None:
    if tensor.device.type == "cuda":
        torch.cuda.synchronize(tensor.device)


def as_cluster(measured: AllReduce, flops: float) -> Cluster:
    """The ranks as equal machines around one switch whose all-reduce is the measured one. `flops`: FLOP/s of a rank."""
    rounds = 2 * ceil(log2(measured.world))
    latency = measured.latency_s / rounds
    link = measured.bus_bytes_per_s * measured.seconds / max(measured.seconds - measured.latency_s, 1e-9)
    return Cluster(nodes=measured.world, gpus=1, flops=flops, link=link, latency=latency)


def meaning(measured: AllReduce, work: Work, flops: float) -> tuple[str, Step]:
    """What the bandwidth makes of a step, in words and as the model's numbers."""
    step = predict(work, as_cluster(measured, flops))
    return (
        f"ZeRO {work.stage}, {work.accumulation} accumulation: {step.compute_s + step.memory_s:.3g} s of computation "
        f"and {step.communication_s:.3g} s of communication a step: about {step.efficiency:.0%} of perfect scaling"
    ), step
