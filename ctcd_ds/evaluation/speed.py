"""How fast and how large exported peers are on this machine: the other half of what compression is for.

A peer is measured as it is used, as a sentence classifier (`AutoModelForSequenceClassification`, as `ctcd glue`
fine-tunes it) without gradients. Rows are random tokens without padding: the time does not depend on what they say.
Models take turns, A B A B, so that a slow minute hits all of them.

speed.json is a `Speed`, written and read here; no other file knows its keys.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from ctcd_ds.cli import UserError, aligned, count
from ctcd_ds.cluster.ranks import Ranks
from ctcd_ds.evaluation.finetune import load, open_checkpoint, quiet_libraries
from ctcd_ds.evaluation.forms import SENTENCES
from ctcd_ds.evaluation.glue import model_names
from ctcd_ds.manifest import write_atomic
from ctcd_ds.measuring import Step, interleaved, peak_bytes, ratio, synchronise
from ctcd_ds.peers.accounting import cost
from ctcd_ds.peers.reading import FEW
from ctcd_ds.tasks import TASKS
from ctcd_ds.training.run_directory import environment

FILE = "speed.json"
ROUNDS, ROUNDS_FOR_P95 = 5, 20  # at least


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Timing(_Part):
    """One model at one size of batch.

    rounds: how often it was timed. latency_ms: median milliseconds of one batch; latency_p95_ms: in 19 of 20 rounds it
    took no longer (None below 20 rounds). rows_per_s, tokens_per_s: batch over median latency.
    speedup: median over the rounds of the first model's time over this one's (1 for the first).
    peak_memory_bytes: weights, and the most bytes of tensors beside them while one batch goes through.
    """

    batch_size: int
    sequence_length: int
    rounds: int
    latency_ms: float
    latency_p95_ms: float | None
    rows_per_s: float
    tokens_per_s: float
    speedup: float
    peak_memory_bytes: int


class ModelSpeed(_Part):
    """One exported peer.

    name: the shortest tail of its path that tells it from the others; path: absolute; sha256: of its weights.
    layers, hidden_size: of its config; None where the architecture does not say.
    parameters: of the exported language model, tied output embeddings once. bytes_on_disk: its weight files.
    timings: one for each size, in the order of `Speed.sizes`.
    """

    name: str
    path: str
    sha256: str
    layers: int | None
    hidden_size: int | None
    parameters: int
    bytes_on_disk: int
    timings: list[Timing]


class Speed(_Part):
    """The whole file.

    hardware: {device, cores, threads, host}; versions: package → version; git_commit: of the code.
    dtype: float32 | bfloat16, of weights and computation. sizes: (batch size, sequence length), tokens of a row.
    models: in the order of the command; the first is what `speedup` is against.
    """

    format: Literal["ctcd-ds-speed-1"] = "ctcd-ds-speed-1"
    command: list[str]
    hardware: dict[str, Any]
    versions: dict[str, str]
    git_commit: str | None
    dtype: str
    sizes: list[tuple[int, int]]
    models: list[ModelSpeed]


def write_speed(directory: Path, speed: Speed) -> Path:
    """Writes DIR/speed.json, atomically."""
    directory.mkdir(parents=True, exist_ok=True)
    write_atomic(directory / FILE, json.dumps(speed.model_dump(mode="json"), indent=1, allow_nan=False) + "\n")
    return directory / FILE


def read_speed(directory: Path) -> Speed:
    """Reads DIR/speed.json. Raises UserError, naming the path, where it is missing or no file of this format."""
    path = directory / FILE
    try:
        return Speed.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError as problem:
        raise UserError(f"{path} cannot be read: {problem.strerror}") from None
    except ValidationError as problem:
        where = ".".join(map(str, problem.errors()[0]["loc"])) or "the file"
        raise UserError(f"{path} is no speed.json of `ctcd speed`: {where}: {problem.errors()[0]['msg']}") from None


def can_classify(path: Path) -> bool:
    """Whether transformers has a classifier for this exported model, as which it is measured; Mamba has none."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    return type(AutoConfig.from_pretrained(path)) in AutoModelForSequenceClassification._model_mapping


def _auto_class(path: Path, config: Any) -> Any:
    """The Auto class that makes what was exported, with its head for words. Raises UserError where it has none."""
    for auto in (task.auto_class() for task in TASKS.values()):
        if (made := auto._model_mapping.get(type(config), None)) and made.__name__ in (config.architectures or ()):
            return auto
    raise UserError(f"--model: {path} is no language model ({', '.join(config.architectures or ())})")


class _Candidate:
    """A model in memory, ready to be timed."""

    def __init__(self, path: Path, name: str, device: torch.device, dtype: torch.dtype) -> None:
        self.checkpoint = open_checkpoint(path, name)
        model, _ = load(SENTENCES, path, self.checkpoint.tokenizer, dtype=dtype)
        self.model, self.device = model.to(device).eval(), device
        self.parameters = cost(model.config, FEW, FEW, _auto_class(path, model.config)).parameters
        self.weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())

    def step(self, batch_size: int, sequence_length: int) -> Step:
        """One batch through the model."""
        random = torch.Generator().manual_seed(0)
        size = (batch_size, sequence_length)
        ids = torch.randint(self.model.config.vocab_size, size, generator=random)
        if isinstance(end := self.model.config.eos_token_id, int):  # where BART and T5 classify, once a row
            ids[ids == end] -= 1
            ids[:, -1] = end
        ids = ids.to(self.device)
        mask = torch.ones_like(ids)

        def forward() -> Any:
            with torch.inference_mode():
                return self.model(input_ids=ids, attention_mask=mask).logits

        return forward


def measure_speed(
    models: Sequence[Path],
    batch_sizes: Sequence[int],
    sequence_lengths: Sequence[int] | None,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    seconds: float = 20.0,
) -> Speed:
    """Measures exported peers side by side; each size of batch for about `seconds`, at least 5 rounds.

    `sequence_lengths`: None is 128, or what all can read where that is less.
    Raises UserError for what is no model, and for rows longer than a model can read.
    """
    with quiet_libraries():
        candidates = [_Candidate(path, name, device, dtype) for path, name in model_names(models)]
        readable = min(candidate.checkpoint.positions for candidate in candidates)
        lengths = [min(128, readable)] if sequence_lengths is None else sequence_lengths
        sizes = [(batch_size, length) for length in lengths for batch_size in batch_sizes]
        for candidate in candidates:
            if (longest := max(lengths)) > candidate.checkpoint.positions:
                raise UserError(
                    f"--sequence_lengths: {longest}: {candidate.checkpoint.path} reads at most "
                    f"{candidate.checkpoint.positions} tokens"
                )
        timings: list[list[Timing]] = [[] for _ in candidates]
        for size in sizes:
            for own, timing in zip(timings, _time(candidates, *size, device, seconds), strict=True):
                own.append(timing)
    found = environment(Ranks.alone(), device.type)
    return Speed(
        command=found["command"],
        hardware={
            "device": found["device"],
            "cores": found["cores"],
            "threads": found["threads_per_rank"],
            "host": found["host"],
        },
        versions={"python": found["python"], **{k: v for k, v in found["packages"].items() if v is not None}},
        git_commit=found["git_commit"],
        dtype=str(dtype).removeprefix("torch."),
        sizes=sizes,
        models=[_described(candidate, own) for candidate, own in zip(candidates, timings, strict=True)],
    )


def _time(
    candidates: Sequence[_Candidate], batch_size: int, sequence_length: int, device: torch.device, seconds: float
) -> list[Timing]:
    steps = {c.checkpoint.name: c.step(batch_size, sequence_length) for c in candidates}
    peaks = [peak_bytes(step, device) for step in steps.values()]
    started = time.perf_counter()
    for step in steps.values():
        step()
    synchronise(device)
    rounds = max(ROUNDS, math.ceil(seconds / (time.perf_counter() - started)))
    timed = list(interleaved(steps, rounds, device).values())
    return [
        Timing(
            batch_size=batch_size,
            sequence_length=sequence_length,
            rounds=rounds,
            latency_ms=1000 * median(own),
            latency_p95_ms=1000 * quantiles(own, n=20)[-1] if rounds >= ROUNDS_FOR_P95 else None,
            rows_per_s=batch_size / median(own),
            tokens_per_s=batch_size * sequence_length / median(own),
            speedup=ratio(timed[0], own),
            peak_memory_bytes=candidate.weights + peak,
        )
        for candidate, own, peak in zip(candidates, timed, peaks, strict=True)
    ]


def _described(candidate: _Candidate, timings: list[Timing]) -> ModelSpeed:
    config, path = candidate.model.config, candidate.checkpoint.path
    files = [*path.glob("*.safetensors"), *path.glob("pytorch_model*.bin")]
    return ModelSpeed(
        name=candidate.checkpoint.name,
        path=str(path),
        sha256=candidate.checkpoint.sha256,
        layers=getattr(config, "num_hidden_layers", None),
        hidden_size=getattr(config, "hidden_size", None),
        parameters=candidate.parameters,
        bytes_on_disk=sum(file.stat().st_size for file in files),
        timings=timings,
    )


def speed_table(speed: Speed) -> str:
    """The file as plain text: sizes of the models, then a line for each model and size of batch."""
    about = [
        [model.name, str(model.layers or "-"), f"{model.parameters / 1e6:.2f} M", _mib(model.bytes_on_disk)]
        for model in speed.models
    ]
    times = [["batch", "model", "latency", "p95", "rows/s", "tokens/s", "speed-up", "peak memory"]]
    for number, (batch_size, length) in enumerate(speed.sizes):
        for model in speed.models:
            timing = model.timings[number]
            p95 = "-" if timing.latency_p95_ms is None else f"{timing.latency_p95_ms:.1f} ms"
            pace = [f"{timing.rows_per_s:,.1f}", f"{timing.tokens_per_s:,.0f}", f"{timing.speedup:.2f}x"]
            latency = f"{timing.latency_ms:.1f} ms"
            times.append([f"{batch_size} x {length}", model.name, latency, p95, *pace, _mib(timing.peak_memory_bytes)])
    known = speed.hardware
    rounds = " and ".join(map(str, sorted({t.rounds for model in speed.models for t in model.timings})))
    return "\n".join(
        [
            *aligned([["model", "layers", "parameters", "on disk"], *about]),
            "",
            *aligned(times),
            "",
            f"{known['device']}, {count(known['cores'], 'core')}, {count(known['threads'], 'thread')}, {speed.dtype}",
            f"medians over {rounds} rounds, models in turns; p95 from {ROUNDS_FOR_P95} rounds on; "
            f"speed-up against {speed.models[0].name}",
        ]
    )


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"
