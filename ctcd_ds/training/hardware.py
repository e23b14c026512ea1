"""What the hardware could do at best, so that a run can say what share of it was used; and what memory it took."""

from __future__ import annotations

import resource
import time
from statistics import median

import torch
import torch.distributed as dist

from ctcd_ds.cluster.peaks import stated_peak


def peak_flops(device: torch.device, precision: str) -> float | None:
    """FLOP/s of all ranks together; None for a GPU that is not in the table. Called by all ranks.

    On the CPU it is measured: the rate of large fp32 GEMMs on this rank's threads while all ranks do the same.
    """
    if device.type == "cuda":
        peak = stated_peak(torch.cuda.get_device_name(device), precision)
        return None if peak is None else peak * dist.get_world_size()
    if device.type != "cpu":
        return None
    dist.barrier()
    rate = torch.tensor([gemm_rate()], dtype=torch.float64)
    dist.all_reduce(rate)
    return float(rate)


def gemm_rate(size: int = 1024, repetitions: int = 5) -> float:
    """Median FLOP/s of fp32 products of square matrices on this process's CPU threads (takes about 0.1 s)."""
    a, b = torch.rand(size, size), torch.rand(size, size)
    torch.mm(a, b)
    seconds = []
    for _ in range(repetitions):
        started = time.perf_counter()
        torch.mm(a, b)
        seconds.append(time.perf_counter() - started)
    return 2.0 * size**3 / median(seconds)


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory this rank has held: allocated on the GPU, or resident on the CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
