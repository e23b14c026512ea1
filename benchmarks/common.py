"""What every benchmark shares: options, rows that say where they were measured, interleaved timing, peak memory."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

os.environ["KINETO_LOG_LEVEL"] = "99"  # torch.profiler speaks whenever it starts
# DeepSpeed's op is built anew whenever another ninja is found: let it always be this environment's.
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a borrowed GPU machine has nothing installed

import torch
from torch import Tensor
from tqdm import tqdm

from ctcd_ds import cli
from ctcd_ds.cluster.ranks import Ranks
from ctcd_ds.manifest import write_atomic
from ctcd_ds.training.hardware import stated_peak
from ctcd_ds.training.run_directory import environment

ROOT = Path(__file__).resolve().parents[1]
LOAD_BEFORE = os.getloadavg()[0]  # of the last minute, before this process adds to it
Step = Callable[[], Any]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def parser(description: str | None) -> argparse.ArgumentParser:
    """A command's parser with the options that all benchmarks have."""
    made = cli.parser(description)
    made.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    made.add_argument("--threads", type=positive, help="CPU threads; left out: torch's own choice")
    made.add_argument("--repetitions", type=positive, default=5, help="interleaved rounds; times are their medians")
    made.add_argument("--output", type=Path, help="writes the row there, as JSON")
    return made


def positive(text: str) -> int:
    """A whole number from 1, as an option's type."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)


def begin(arguments: argparse.Namespace) -> torch.device:
    """Sets the threads and gives the device. Raises UserError where there is none, or no place for the output."""
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise cli.UserError("--device cuda: torch sees no GPU here; use --device cpu")
    if arguments.output is not None and not arguments.output.resolve().parent.is_dir():
        raise cli.UserError(f"--output {arguments.output}: there is no directory {arguments.output.resolve().parent}")
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    return torch.device(arguments.device)


def write_row(arguments: argparse.Namespace, values: Mapping[str, Any], show: bool = True) -> None:
    """Prints a benchmark's row and writes it to --output: its command, where it was measured, and `values`."""
    command = [Path(sys.argv[0]).name, *sys.argv[1:]]
    row = {"command": " ".join(command), **values, **where(arguments.device)}
    text = "{\n" + ",\n".join(f" {json.dumps(k)}: {json.dumps(v, allow_nan=False)}" for k, v in row.items()) + "\n}\n"
    if show:
        print(text, end="", flush=True)
    if arguments.output is not None:
        write_atomic(arguments.output, text)


def where(device: str) -> dict[str, Any]:
    """Hardware, versions, commit and threads of this process, and how busy the machine was before."""
    found = environment(Ranks(0, 1, 0, 1, "alone"), device)
    return {
        "hardware": {
            "device": found["device"],
            "cores": found["cores"],
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "load_before": round(LOAD_BEFORE, 2),
        },
        "versions": {"python": found["python"], **{k: v for k, v in found["packages"].items() if v is not None}},
        "commit": found["git_commit"],
        "threads": found["threads_per_rank"],
    }


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


def total(seconds: Sequence[Sequence[float]]) -> list[float]:
    """The sum of several ways in each round."""
    return [sum(round_) for round_ in zip(*seconds, strict=True)]


def synchronise(device: torch.device) -> None:
    """Waits for the GPU, where there is one."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Gemm:
    """A large square matrix product: the rate that this machine reaches when nothing is in its way."""

    def __init__(self, device: torch.device, dtype: torch.dtype, size: int | None = None) -> None:
        self.size = size or (8192 if device.type == "cuda" else 2048)
        self._a, self._b = (torch.randn(self.size, self.size, device=device).to(dtype) for _ in range(2))

    def __call__(self) -> Tensor:
        return self._a @ self._b

    def rate(self, seconds: Sequence[float]) -> float:
        """FLOP/s by the median time."""
        return 2 * self.size**3 / median(seconds)


def peak_flops(device_name: str, dtype: str) -> float | None:
    """What MFU is a share of: the FLOP/s that a GPU's maker states, None where it is not in training's table."""
    return stated_peak(device_name, "fp32" if dtype == "float32" else dtype)


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
