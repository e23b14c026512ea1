"""The parts of gpu_suite.py: each gives its result as plain data, raises Skipped with a reason, or fails."""

from __future__ import annotations

import importlib.util
import json
import tempfile
import time
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
from torch.autograd import DeviceType
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
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
            try:
                values = step.measure(shape, ["ours"], self.scale.repetitions, self.device, self.scale.dtype)
            except torch.OutOfMemoryError as problem:
                found[rows] = {"does_not_fit": str(problem).splitlines()[0][:200]}
                torch.cuda.empty_cache()
                continue
            keys = ("ours_s", "tokens_per_s", "mfu", "gemm_share", "peak_bytes")
            found[rows] = {key: values[key] for key in keys if key in values}
        return found

    def profile(self) -> Any:
        """Kernels, GPU, host and wall time of our step, eager and compiled, by rows; the kernels that take longest."""
        if self.device.type == "cpu":
            raise Skipped("there are no kernels on the CPU")
        found = {}
        for rows in (self.scale.shape.rows, 4 * self.scale.shape.rows):
            for compiled in (False, True):
                torch._dynamo.reset()
                shape = replace(self.scale.shape, rows=rows)
                seen = _profile(self._our_step(compiled, shape))
                flops_per_s = shape.flops() / seen["wall_ms"] * 1e3
                if peak := common.peak_flops(torch.cuda.get_device_name(self.device), self.scale.dtype):
                    seen["mfu"] = flops_per_s / peak
                seen["tokens_per_s"] = rows * shape.length / seen["wall_ms"] * 1e3
                found[f"{rows} rows, {'compiled' if compiled else 'eager'}"] = seen
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
        return self._run("zero2_bf16")

    def run_bf16_compiled(self) -> Any:
        """The same with training.compile."""
        if self.device.type == "cpu":
            raise Skipped("the part compile has it")
        return self._run("zero2_bf16", "training.compile=true")

    def run_zero1(self) -> Any:
        """The same under ZeRO-1."""
        return self._run("zero1_bf16")

    def run_fp16(self) -> Any:
        """The same in fp16, with its loss scale."""
        if self.device.type == "cpu":
            raise Skipped("DeepSpeed has no fp16 on the CPU")
        return self._run("zero2_fp16")

    def _our_step(self, compiled: bool = False, shape: Shape | None = None) -> common.Step:
        shape = shape or self.scale.shape
        models = workload.build_models(shape)
        module = workload.co_training(models, workload.full_graph(shape.names), shape.vocab_size)
        module.to(self.device, common.DTYPES[self.scale.dtype])
        if compiled:
            module.compile_parts()
        return step.our_step(module, workload.random_batch(shape, self.device)[0])

    def _run(self, name: str, *sets: str) -> dict[str, Any]:
        if importlib.util.find_spec("deepspeed") is None:
            raise Skipped("deepspeed is not installed here")
        from overhead import run_block, total_loss

        from ctcd_ds.recipe.reading import load_recipe

        scale = self.scale
        shape = replace(scale.shape, rows=scale.run_rows)
        config = json.loads((common.ROOT / "ds_configs" / f"{name}.json").read_text())
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            corpus = workload.write_corpus(folder / "corpus", shape.vocab_size, 4000, shape.length)
            path = workload.recipe(folder, shape, corpus, scale.run_steps, valid_rows=shape.rows)
            recipe = load_recipe(path, ["schedule.warmup_fraction=0.1", "training.log_every=20", *sets])
            rows = run_block(recipe, folder / "run", config)
        losses = [total_loss(recipe, row) for row in rows]
        first, last = losses[0], median(losses[-3:])
        if not last < first:
            raise cli.RunFailure(f"the loss did not fall: {first} at the first step, {last} at the end")
        pace = median(row["tokens_per_s"] for row in rows[len(rows) // 2 :])
        return {"steps": rows[-1]["step"], "first_loss": first, "last_loss": last, "tokens_per_s": pace}


def _profile(ours: common.Step, steps: int = 20) -> dict[str, Any]:
    started = time.perf_counter()
    ours()
    torch.cuda.synchronize()
    first = time.perf_counter() - started
    for _ in range(3):
        ours()
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(steps):
        ours()
    host = time.perf_counter() - started
    torch.cuda.synchronize()
    wall = time.perf_counter() - started
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        ours()
        torch.cuda.synchronize()
    times: dict[str, list[float]] = {}
    for event in seen.events():
        if event.device_type == DeviceType.CUDA:
            times.setdefault(event.name, []).append(event.device_time / 1e3)
    longest = sorted(times.items(), key=lambda item: -sum(item[1]))[:15]
    return {
        "first_s": first,
        "host_ms": host / steps * 1e3,
        "wall_ms": wall / steps * 1e3,
        "gpu_busy_ms": sum(map(sum, times.values())),
        "kernels": sum(map(len, times.values())),
        "longest_kernels": [[name, len(each), sum(each)] for name, each in longest],
    }


PARTS = ("run_bf16", "run_fp16", "run_zero1", "run_bf16_compiled", "profile", "step_ways", "batch_sizes", "compile")
PARTS += ("attention", "gradient_error", "loader", "memory", "three_peers")
