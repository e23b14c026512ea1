"""What the hardware could do at best, so that a run can say what share of it was used; and what memory it took."""

from __future__ import annotations

import resource
import time
from statistics import median

import torch
import torch.distributed as dist

# Dense matrix-multiply peaks in FLOP/s as the makers state them: (16-bit, fp32 without TF32). The first name that is
# part of the device's name counts.
PEAKS = {
    "H200": (989e12, 67e12),
    "H100 PCIe": (756e12, 51e12),
    "H100": (989e12, 67e12),
    "A100": (312e12, 19.5e12),
    "A10G": (70e12, 31.5e12),
    "A10": (125e12, 31.2e12),
    "A40": (150e12, 37.4e12),
    "A6000": (155e12, 38.7e12),
    "L40S": (362e12, 91.6e12),
    "L4": (121e12, 30.3e12),
    "RTX 4090": (165e12, 82.6e12),
    "RTX 3090": (71e12, 35.6e12),
    "V100": (125e12, 15.7e12),
    "T4": (65e12, 8.1e12),
}


def stated_peak(name: str, precision: str) -> float | None:
    """FLOP/s of one GPU by its name, as its maker states it; None where the table does not know it."""
    known = next((peaks for part, peaks in PEAKS.items() if part in name), None)
    return None if known is None else known[precision == "fp32"]


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
