"""The user's DeepSpeed JSON, checked against the recipe and resolved: what DeepSpeed gets holds no "auto".

The recipe owns batch size, learning rate, clipping and steps; the JSON owns precision, ZeRO stage, buckets,
monitors and one of micro-batch and accumulation. DeepSpeed itself ignores unknown keys and reads "auto" as a
string or as False, so both are settled here.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, ValidationError

from ctcd_ds.cli import UserError, count, did_you_mean
from ctcd_ds.plain import read_file
from ctcd_ds.recipe.schema import Count, Section, explained
from ctcd_ds.recipe.sections import Recipe

_ALLOWED = {
    *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"),
    *("bf16", "fp16", "zero_optimization", "data_types", "communication_data_type", "steps_per_print"),
    *("wall_clock_breakdown", "dump_state", "memory_breakdown", "disable_python_gc", "tensorboard", "wandb"),
    *("csv_monitor", "comet", "flops_profiler", "comms_logger", "timers", "zero_allow_untested_optimizer", "log_level"),
}
_REFUSED = {
    "optimizer": "the recipe's section optimizer owns it, per peer; remove the block",
    "scheduler": "the recipe's section schedule owns it; remove the block",
    "amp": "use bf16 or fp16",
    "torch_autocast": "use bf16 or fp16",
    "checkpoint": "checkpoints are written by CTCD-DS (recipe: training.checkpoint_every); remove the block",
    "elasticity": "the global batch is the recipe's; remove the block",
    "curriculum_learning": "the data order is the recipe's; remove the block",
    "data_efficiency": "the data order is the recipe's; remove the block",
    "pipeline": "peers are small models: they train data-parallel",
    "tensor_parallel": "peers are small models: they train data-parallel",
    "activation_checkpointing": "it does nothing for these models; the recipe's training.activation_checkpointing does",
    "prescale_gradients": "ZeRO does not do it here; against overflow write communication_data_type fp32",
    "gradient_predivide_factor": "ZeRO does not do it here; against overflow write communication_data_type fp32",
    "disable_allgather": "DeepSpeed reads it and does nothing; remove it",
}
_AS_IF_NOT_THERE: dict[str, Any] = {
    "prescale_gradients": False,
    "gradient_predivide_factor": 1.0,
    "disable_allgather": False,
}
_PACKAGES = {"wandb": "wandb", "comet": "comet_ml"}  # monitor → what it needs and is not one of our own
_STAGES = {
    0: "stage 0 keeps bf16 weights without fp32 masters, which drifts; use 1 or 2",
    3: (
        "stage 3 cuts up the weights, and the losses read each peer's output embedding whole, outside its layer. With "
        "stage 2 in bf16 one of 8 GPUs holds 3.75 bytes a parameter: 10 billion take 37.5 GB; use 2"
    ),
}
_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}


@dataclass(frozen=True)
class DeepSpeedConfig:
    """The resolved JSON and what training reads off it."""

    values: dict[str, Any]
    micro_batch: int
    accumulation: int

    @property
    def precision(self) -> str:
        """'bf16', 'fp16' or 'fp32'."""
        return next((p for p in ("bf16", "fp16") if self.values.get(p, {}).get("enabled")), "fp32")

    @property
    def stage(self) -> int:
        """ZeRO's stage, 1 or 2."""
        return int(self.values["zero_optimization"]["stage"])

    @property
    def zero(self) -> Any:
        """DeepSpeed's own reading of zero_optimization, with all its defaults."""
        from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

        return DeepSpeedZeroConfig(**self.values["zero_optimization"])

    @property
    def weight_bytes(self) -> int:
        """Bytes of a weight in the model."""
        return _BYTES[self.precision]

    @property
    def wire_bytes(self) -> int:
        """Bytes of a gradient in communication."""
        return _BYTES[self.values.get("communication_data_type", self.precision)]

    @property
    def gradient_bytes(self) -> int:
        """Bytes of a gradient that is accumulated."""
        return _BYTES[self.values.get("data_types", {}).get("grad_accum_dtype", self.precision)]


def read_config(path: Path) -> dict[str, Any]:
    """The user's file as it is. Raises UserError where it is no JSON object or a key stands in it twice."""

    if path.suffix in (".yaml", ".yml"):
        read_file(path, "DeepSpeed config")  # says what else it is; if nothing else, it is no JSON
    values = read_file(path, "DeepSpeed config", json_only=True)
    if not isinstance(values, dict):
        raise UserError(f"DeepSpeed config {path} must be a JSON object, found {type(values).__name__}")
    return values


def resolve(
    given: dict[str, Any], recipe: Recipe, world: int, device: str, output_dir: Path
) -> tuple[DeepSpeedConfig | None, list[str]]:
    """The config that DeepSpeed gets, and what is wrong with the given one (then the config is None).

    Args:
        world: number of ranks. device: 'cpu' or 'cuda', for "auto" precision.
        output_dir: the run directory; TensorBoard's files go there unless the JSON says otherwise.
    """
    mistakes = [*_key_mistakes(given), *_contradictions(given, recipe), *_precision_mistakes(given, device)]
    mistakes += [*_dtype_mistakes(given), *_monitor_mistakes(given), *_block_mistakes(given)]
    batch, said = _split_batch(given, recipe.training.global_batch_rows, world)
    mistakes += said
    mistakes += _zero_mistakes(given.get("zero_optimization"))
    if mistakes or batch is None:
        return None, mistakes
    values = _without_auto(given)
    for precision in ("bf16", "fp16"):
        block = given.get(precision)
        if isinstance(block, dict) and block.get("enabled") == "auto":
            values[precision]["enabled"] = precision == "bf16" and device == "cuda"
    micro_batch, accumulation = batch
    values["zero_optimization"] = {"stage": 2, **values.get("zero_optimization", {})}
    values |= _sums_in_fp32(given, world, accumulation, values["zero_optimization"]["stage"])
    values["zero_optimization"]["compute_grad_norm"] = False  # norms are per peer, ours
    if values["zero_optimization"]["stage"] == 1 and _bf16_into_fp32(values):
        return None, [
            'deepspeed_config data_types.grad_accum_dtype = "fp32" with bf16 and zero_optimization.stage = 1: '
            "DeepSpeed then clips all peers together; write stage 2, or leave grad_accum_dtype out"
        ]
    values.update(
        train_batch_size=recipe.training.global_batch_rows,
        train_micro_batch_size_per_gpu=micro_batch,
        gradient_accumulation_steps=accumulation,
        gradient_clipping=0.0,  # DeepSpeed's default is 1.0, over all peers together
        steps_per_print=values.get("steps_per_print", 10**9),
        tensorboard={"enabled": True, **_place("tensorboard", values, output_dir)},
    )
    if "csv_monitor" in values:
        values["csv_monitor"] = _place("csv_monitor", values, output_dir)
    if "comet" in values:  # by default it takes one event in 100
        values["comet"] = {"samples_log_interval": 1, **values["comet"]}
    return DeepSpeedConfig(values, micro_batch, accumulation), []


def _place(monitor: str, values: dict[str, Any], output_dir: Path) -> dict[str, Any]:
    """A monitor's block, which writes into the run directory unless it says otherwise."""
    return {"output_path": str(output_dir), "job_name": monitor, **values.get(monitor, {})}


def _sums_in_fp32(given: dict[str, Any], world: int, accumulation: int, stage: int) -> dict[str, Any]:
    """fp32 for gradients whose dtype is "auto", where they are summed: over ranks, and in ZeRO 2 over micro-batches.

    Where there is one of both, the 16 bits that backward gives are all there is, and fp32 would only be longer. ZeRO 1
    has micro-batches summed by autograd, in the weights' dtype; DeepSpeed has no other way with norms that are ours.
    """
    found: dict[str, Any] = {}
    if given.get("communication_data_type") == "auto" and world > 1:
        found["communication_data_type"] = "fp32"
    accumulated = given.get("data_types", {}).get("grad_accum_dtype") == "auto"
    if accumulated and stage == 2 and max(world, accumulation) > 1:
        found["data_types"] = {"grad_accum_dtype": "fp32"}
    return found


def _bf16_into_fp32(values: dict[str, Any]) -> bool:
    return (
        values.get("bf16", {}).get("enabled") is True and values.get("data_types", {}).get("grad_accum_dtype") == "fp32"
    )


def _key_mistakes(given: dict[str, Any]) -> Iterator[str]:
    for key, value in given.items():
        if key in _AS_IF_NOT_THERE and value == _AS_IF_NOT_THERE[key]:
            continue
        if key in _REFUSED:
            yield f"deepspeed_config {key}: {_REFUSED[key]}"
        elif key not in _ALLOWED:
            yield f"deepspeed_config {key} = {value!r}: unknown key; {did_you_mean(key, _ALLOWED)}"


def _contradictions(given: dict[str, Any], recipe: Recipe) -> Iterator[str]:
    rows, stated = recipe.training.global_batch_rows, given.get("train_batch_size", "auto")
    if stated not in ("auto", rows):
        yield (
            f"train_batch_size = {stated!r} in the DeepSpeed config, training.global_batch_rows = {rows} in the "
            'recipe: the recipe owns it; write "auto" or leave it out'
        )
    clipping, norm = given.get("gradient_clipping", "auto"), recipe.optimizer.max_grad_norm
    if clipping not in ("auto", 0, norm):
        yield (
            f"gradient_clipping = {clipping!r} in the DeepSpeed config, optimizer.max_grad_norm = {norm:g} in the "
            'recipe: the recipe owns it, per peer; write "auto" or leave it out'
        )


def _precision_mistakes(given: dict[str, Any], device: str) -> Iterator[str]:
    blocks = {key: block if isinstance(block := given.get(key), dict) else {} for key in ("bf16", "fp16")}
    enabled = {key: block.get("enabled") for key, block in blocks.items()}
    if enabled["bf16"] is True and enabled["fp16"] is True:
        yield "deepspeed_config bf16.enabled and fp16.enabled are both true: choose one"
    if enabled["fp16"] is True and device == "cpu":
        yield "deepspeed_config fp16.enabled = true: DeepSpeed has no fp16 on the CPU; use ds_configs/cpu.json"


def _dtype_mistakes(given: dict[str, Any]) -> Iterator[str]:
    block = given.get("data_types", {})
    if not isinstance(block, dict) or not block.keys() <= {"grad_accum_dtype"}:
        yield f'deepspeed_config data_types = {block!r}: write {{"grad_accum_dtype": "fp32"}}, which is all it may hold'
        return
    stated = {"communication_data_type": given.get("communication_data_type", "auto")}
    stated["data_types.grad_accum_dtype"] = block.get("grad_accum_dtype", "auto")
    for key, value in stated.items():
        if value not in ("auto", *_BYTES):
            yield f"deepspeed_config {key} = {value!r}: {did_you_mean(value, _BYTES)}"


def _monitor_mistakes(given: dict[str, Any]) -> Iterator[str]:
    for monitor in ("tensorboard", "csv_monitor", *_PACKAGES):
        block = given.get(monitor)
        if not isinstance(block, dict) or block.get("enabled") is not True:
            continue
        if monitor in _PACKAGES:
            try:
                import_module(_PACKAGES[monitor])
            except ImportError as problem:
                said = f"{_PACKAGES[monitor]} cannot be imported ({problem}): pip install {_PACKAGES[monitor]}"
                yield f"deepspeed_config {monitor}.enabled = true: {said}"
        if isinstance(place := block.get("output_path"), str):
            nearest = next(path for path in (Path(place), *Path(place).absolute().parents) if path.exists())
            if not nearest.is_dir() or not os.access(nearest, os.W_OK):
                yield f"deepspeed_config {monitor}.output_path = {place!r}: {nearest} cannot be written in"


class _Scalars(Section):
    """What DeepSpeed reads without looking at it."""

    steps_per_print: Count = 1
    wall_clock_breakdown: bool = False
    dump_state: bool = False
    memory_breakdown: bool = False
    disable_python_gc: bool = False
    zero_allow_untested_optimizer: bool = False
    log_level: Literal["debug", "info", "warning", "error", "critical"] = "info"


class _FlopsProfiler(Section):
    """Likewise."""

    enabled: bool = False
    recompute_fwd_factor: float = 0.0
    profile_step: Count = 1
    module_depth: int = -1
    top_modules: Count = 1
    detailed: bool = True
    output_file: str | None = None


class _Timers(Section):
    throughput: dict[str, bool] = Field(default_factory=dict)


def _block_mistakes(given: dict[str, Any]) -> Iterator[str]:
    """What DeepSpeed would find wrong inside of blocks when the run starts, or at the step that needs it."""
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.monitor.config import CometConfig, CSVConfig, TensorBoardConfig, WandbConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config

    yield from _unfit("", {key: value for key, value in given.items() if key in _Scalars.model_fields}, _Scalars)
    for name, model in {
        "bf16": DeepSpeedBF16Config,
        "fp16": DeepSpeedFP16Config,
        "tensorboard": TensorBoardConfig,
        "csv_monitor": CSVConfig,
        "wandb": WandbConfig,
        "comet": CometConfig,
        "comms_logger": CommsLoggerConfig,
        "flops_profiler": _FlopsProfiler,
        "timers": _Timers,
    }.items():
        block = given.get(name, {})
        if not isinstance(block, dict):
            yield f'deepspeed_config {name} = {block!r}: must be a mapping; write {{"enabled": true}}'
        elif not isinstance(block.get("enabled", True), bool) and block["enabled"] != "auto":  # it takes "yes" for true
            yield f"deepspeed_config {name}.enabled = {block['enabled']!r}: must be true or false"
        else:
            yield from _unfit(f"{name}.", block, model)


def _unfit(place: str, block: dict[str, Any], model: type[BaseModel]) -> Iterator[str]:
    try:
        model(**_without_auto(block))
    except ValidationError as problem:
        yield from (f"deepspeed_config {place}{said}" for said in explained(problem, model))


def _zero_mistakes(block: Any) -> Iterator[str]:
    if not isinstance(block, dict):
        yield f'deepspeed_config zero_optimization = {block!r}: write {{"stage": 2}} (or 1)'
        return
    stage = block.get("stage", 0)
    if stage in _STAGES and not isinstance(stage, bool):
        yield f"deepspeed_config zero_optimization.stage = {stage}: {_STAGES[stage]}"
    elif stage not in (1, 2, "auto") or isinstance(stage, bool):
        yield f"deepspeed_config zero_optimization.stage = {stage!r}: must be 1 or 2"
    for key in ("offload_optimizer", "offload_param", "zenflow"):
        if block.get(key):
            yield f"deepspeed_config zero_optimization.{key}: clipping is per peer, on the device; remove it"
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    others = {key: value for key, value in block.items() if key != "stage"}
    yield from _unfit("zero_optimization.", others, DeepSpeedZeroConfig)


def _split_batch(given: dict[str, Any], rows: int, world: int) -> tuple[tuple[int, int] | None, list[str]]:
    """(micro-batch, accumulation) with micro · accumulation · world = rows: one is given, the other follows."""
    names = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    stated = {name: given[name] for name in names if given.get(name, "auto") != "auto"}
    wrong = [
        f"deepspeed_config {name} = {value!r}: must be a whole number from 1"
        for name, value in stated.items()
        if not isinstance(value, int) or isinstance(value, bool) or value < 1
    ]
    if wrong:
        return None, wrong
    product = world
    for value in stated.values():
        product *= value
    of = " × ".join([count(world, "rank"), *(f"{name} {value}" for name, value in stated.items())])
    if rows % product or (len(stated) == 2 and rows != product):
        relation = "is not" if len(stated) == 2 else "is not divisible by"
        return None, [f"training.global_batch_rows = {rows} {relation} {of} = {product}; change one of them"]
    accumulation = stated.get(names[1], rows // product if names[0] in stated else 1)
    return (stated.get(names[0], rows // world // accumulation), accumulation), []


def _without_auto(values: dict[str, Any]) -> dict[str, Any]:
    """Drops every "auto" that is left: DeepSpeed's default then holds."""
    return {
        key: _without_auto(value) if isinstance(value, dict) else value
        for key, value in values.items()
        if value != "auto"
    }
