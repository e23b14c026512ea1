"""What every benchmark shares: options, and rows that say where they were measured."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

os.environ["KINETO_LOG_LEVEL"] = "99"  # torch.profiler speaks whenever it starts
# DeepSpeed's op is built anew whenever another ninja is found: let it always be this environment's.
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a borrowed GPU machine has nothing installed

import torch
from torch import Tensor

from ctcd_ds import cli
from ctcd_ds.cluster.peaks import stated_peak
from ctcd_ds.cluster.ranks import Ranks
from ctcd_ds.manifest import write_atomic
from ctcd_ds.measuring import Step as Step
from ctcd_ds.measuring import interleaved as interleaved
from ctcd_ds.measuring import peak_bytes as peak_bytes
from ctcd_ds.measuring import ratio as ratio
from ctcd_ds.measuring import synchronise as synchronise
from ctcd_ds.memory import keep_freed_memory
from ctcd_ds.training.run_directory import environment

ROOT = Path(__file__).resolve().parents[1]
LOAD_BEFORE = os.getloadavg()[0]  # of the last minute, before this process adds to it
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def parser(description: str | None) -> argparse.ArgumentParser:
    """A command's parser with the options that all benchmarks have."""
    made = cli.parser(description)
    made.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    made.add_argument("--threads", type=cli.positive, help="CPU threads; left out: torch's own choice")
    made.add_argument("--repetitions", type=cli.positive, default=5, help="interleaved rounds; times are their medians")
    made.add_argument("--output", type=Path, help="writes the row there, as JSON")
    return made


def begin(arguments: argparse.Namespace) -> torch.device:
    """Sets threads and memory as training does, and gives the device.

    Raises UserError where there is none, or no place for the output.
    """
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise cli.UserError("--device cuda: torch sees no GPU here; use --device cpu")
    if arguments.output is not None and not arguments.output.resolve().parent.is_dir():
        raise cli.UserError(f"--output {arguments.output}: there is no directory {arguments.output.resolve().parent}")
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    if arguments.device == "cpu":
        keep_freed_memory()
    return torch.device(arguments.device, 0) if arguments.device == "cuda" else torch.device("cpu")


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
    found = environment(Ranks.alone(), device)
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


def total(seconds: Sequence[Sequence[float]]) -> list[float]:
    """The sum of several ways in each round."""
    return [sum(round_) for round_ in zip(*seconds, strict=True)]


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
