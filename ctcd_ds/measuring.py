"""Time and memory of a piece of work: several ways in turns, their ratio, the most that one holds at a time."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch.profiler speaks whenever it starts

import torch
from tqdm import tqdm

Step = Callable[[], Any]


def interleaved(ways: Mapping[str, Step], repetitions: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each way in each round. All ways take turns, A B A B, so that a slow minute hits all of them.

    One round before the first is not timed.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for round_ in tqdm(range(-1, repetitions), desc=" ".join(ways), unit="round", disable=None, leave=False):
        for name, step in ways.items():
            synchronise(device)
            started = time.perf_counter()
            step()
            synchronise(device)
            if round_ >= 0:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """The median over the rounds of above / below: what a drifting machine does to both cancels in each round."""
    return median(a / b for a, b in zip(above, below, strict=True))


def peak_bytes(step: Step, device: torch.device) -> int:
    """The most bytes of tensors that `step` holds at one time beyond what is there before it."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    allocations = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(allocations, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def synchronise(device: torch.device) -> None:
    """Waits for the GPU, where there is one."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
