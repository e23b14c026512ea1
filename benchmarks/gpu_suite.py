"""Everything worth knowing about one GPU in at most 8 minutes, on the packages found there, as one JSON.

Each part writes its result as soon as it is there. A part whose packages are missing, or that would begin after
--minutes, is skipped with the reason; a part that fails says so, the others go on, and the exit code is 1.
"""

from __future__ import annotations

import importlib.util
import json
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import common
import loader
import objective
import step
import torch
import workload
from torch.nn.attention import SDPBackend, sdpa_kernel
from workload import Shape, Size

from ctcd_ds import cli

BACKENDS = ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH")


@dataclass(frozen=True)
class Scale:
    """How large the parts are."""

    shape: Shape
    dtype: str
    batches: tuple[int, ...]
    tokens: tuple[int, ...]
    far: int
    repetitions: int
    run_steps: int
    run_rows: int
    loader_seconds: float


FULL = Scale(
    shape=Shape((Size(6, 768), Size(4, 768)), 128, 128, 30528),
    dtype="bfloat16",
    batches=(16, 32, 64, 128, 256, 512, 1024),
    tokens=(2048, 4096, 16384),
    far=16384,
    repetitions=5,
    run_steps=300,
    run_rows=128,
    loader_seconds=2.0,
)
TINY = Scale(Shape((Size(2, 32), Size(1, 32)), 32, 4, 512), "float32", (2, 4), (256, 512), 1024, 1, 30, 16, 0.1)


class Skipped(Exception):
    """Why a part has no result here."""


@dataclass(frozen=True)
class Suite:
    """The parts, each a method that gives its result as plain data."""

    scale: Scale
    device: torch.device

    def gradient_error(self) -> Any:
        """Errors of the gradients against fp64, in fp32 and bf16."""
        shape, found = self.scale.shape, {}
        for name, dtype in common.DTYPES.items():
            width, tokens = shape.peers[0].width, self.scale.tokens[0]
            heads = objective.Heads.make(width, shape.vocab_size, tokens, self.device, dtype)
            found[name] = objective.gradient_errors(heads)
        return {"gradient_error": max(errors["ours"] for errors in found.values()), **found}

    def memory(self) -> Any:
        """Peak memory of heads and objective, naive against ours; the naive one measured wherever it fits."""
        scale, shape = self.scale, self.scale.shape
        sizes = (shape.peers[0].width, shape.vocab_size, scale.tokens, scale.far)
        return objective.memory(*sizes, self.device, common.DTYPES[scale.dtype])

    def step_ways(self) -> Any:
        """naive, ours and alone, interleaved."""
        ways = ["naive", "naive_selected", "ours", "alone"]  # naive_kept is the CPU's
        return step.measure(self.scale.shape, ways, self.scale.repetitions, self.device, self.scale.dtype)

    def three_peers(self) -> Any:
        """The full graph of three against the sum of three alone."""
        shape = replace(self.scale.shape, peers=(*self.scale.shape.peers, self.scale.shape.peers[-1]))
        return step.measure(shape, ["ours", "alone"], self.scale.repetitions, self.device, self.scale.dtype)

    def batch_sizes(self) -> Any:
        """tokens/s, MFU and memory of our step by rows in a step."""
        found = {}
        for rows in self.scale.batches:
            shape = replace(self.scale.shape, rows=rows)
            values = step.measure(shape, ["ours"], self.scale.repetitions, self.device, self.scale.dtype)
            keys = ("ours_s", "tokens_per_s", "mfu", "gemm_share", "peak_bytes")
            found[rows] = {key: values[key] for key in keys if key in values}
        return found

    def compile(self) -> Any:
        """Our step as it is and with compiled encoders, interleaved; the seconds that compiling took."""
        eager, compiled = self._our_step(), self._our_step(compiled=True)
        started = time.perf_counter()
        compiled()
        common.synchronise(self.device)
        took = time.perf_counter() - started
        seconds = common.interleaved({"eager": eager, "compiled": compiled}, self.scale.repetitions, self.device)
        values = {f"{name}_s": median(rounds) for name, rounds in seconds.items()}
        return {**values, "eager_over_compiled": common.ratio(*seconds.values()), "first_compiled_step_s": took}

    def attention(self) -> Any:
        """Our step with each SDPA backend, interleaved; why, where one does not run."""
        ours, works, refused = self._our_step(), {}, {}
        for name in BACKENDS:

            def with_backend(name: str = name) -> None:
                with sdpa_kernel(getattr(SDPBackend, name)):
                    ours()

            try:
                with_backend()
                works[name] = with_backend
            except RuntimeError as problem:
                refused[name] = str(problem).splitlines()[0]
        seconds = common.interleaved({"default": ours, **works}, self.scale.repetitions, self.device)
        return {**{f"{name}_s": median(rounds) for name, rounds in seconds.items()}, "refused": refused}

    def loader(self) -> Any:
        """The loader's pace and the step's waiting."""
        scale = self.scale
        return loader.measure(
            scale.shape, 1024, scale.loader_seconds, 5 * scale.repetitions, scale.repetitions, self.device, scale.dtype
        )

    def run_bf16(self) -> Any:
        """A co-training run under DeepSpeed ZeRO-2 in bf16."""
        return self._run("bf16")

    def run_fp16(self) -> Any:
        """The same in fp16, with its loss scale."""
        if self.device.type == "cpu":
            raise Skipped("DeepSpeed has no fp16 on the CPU")
        return self._run("fp16")

    def _our_step(self, compiled: bool = False) -> common.Step:
        shape, models = self.scale.shape, workload.build_models(self.scale.shape)
        module = workload.co_training(models, workload.full_graph(shape.names), shape.vocab_size)
        module.to(self.device, common.DTYPES[self.scale.dtype])
        if compiled:
            module.compile_parts()
        return step.our_step(module, workload.random_batch(shape, self.device)[0])

    def _run(self, precision: str) -> dict[str, Any]:
        if importlib.util.find_spec("deepspeed") is None:
            raise Skipped("deepspeed is not installed here")
        from overhead import run_block, total_loss

        from ctcd_ds.recipe import load_recipe

        scale = self.scale
        shape = replace(scale.shape, rows=scale.run_rows)
        config = json.loads((common.ROOT / "ds_configs" / f"zero2_{precision}.json").read_text())
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            corpus = workload.write_corpus(folder / "corpus", shape.vocab_size, 4000, shape.length)
            path = workload.recipe(folder, shape, corpus, scale.run_steps, valid_rows=shape.rows)
            recipe = load_recipe(path, ["schedule.warmup_fraction=0.1"])
            rows = run_block(recipe, folder / "run", config)
        losses = [total_loss(recipe, row) for row in rows]
        first, last = losses[0], median(losses[-10:])
        if not last < first:
            raise cli.RunFailure(f"the loss did not fall: {first} at the first step, {last} at the end")
        pace = median(row["tokens_per_s"] for row in rows[len(rows) // 2 :])
        return {"steps": len(rows), "first_loss": first, "last_loss": last, "tokens_per_s": pace}


PARTS = ("gradient_error", "step_ways", "batch_sizes", "run_bf16", "run_fp16", "compile", "attention", "loader")
PARTS += ("memory", "three_peers")


def attempt(part: Callable[[], Any], began: float, minutes: float) -> dict[str, Any]:
    """One part's result with its seconds, or why there is none."""
    started = time.monotonic()
    if started - began > 60 * minutes:
        return {"skipped": f"the {minutes:g} minutes were over"}
    try:
        result = {"result": part()}
    except Skipped as reason:
        return {"skipped": str(reason)}
    except Exception as problem:  # a part must not take the others' results with it
        result = {"failed": f"{type(problem).__name__}: {problem}", "traceback": traceback.format_exc()[-2000:]}
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return {**result, "seconds": round(time.monotonic() - started, 1)}


def main() -> int:
    parser = common.parser(__doc__)
    parser.add_argument("--size", choices=("full", "tiny"), default="full", help="tiny: whether it runs at all")
    parser.add_argument("--minutes", type=float, default=8.0, help="no part begins later than this")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    arguments = parser.parse_args()
    device, began = common.begin(arguments), time.monotonic()
    suite = Suite(FULL if arguments.size == "full" else TINY, device)
    found: dict[str, Any] = {}
    for name in arguments.parts:
        found[name] = attempt(getattr(suite, name), began, arguments.minutes)
        common.write_row(arguments, {"parts": found, "seconds": round(time.monotonic() - began, 1)}, show=False)
        what = next(key for key in ("result", "skipped", "failed") if key in found[name])
        print(f"{name}: {'done' if what == 'result' else found[name]}", flush=True)
    return cli.EXIT_FAILED if any("failed" in part for part in found.values()) else cli.EXIT_DONE


if __name__ == "__main__":
    cli.run(main)
