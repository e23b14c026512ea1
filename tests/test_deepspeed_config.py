"""The DeepSpeed JSON: "auto" is resolved, the recipe keeps what it owns, and nothing is ignored silently."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from commands import ROOT
from ctcd_ds.cli import UserError
from ctcd_ds.recipe.sections import Recipe
from ctcd_ds.training.deepspeed_config import read_config, resolve
from runs import Job, bert, chain_corpus, metrics, run_jobs

RECIPE = Recipe.model_validate(
    {
        "corpus": {"path": "x"},
        "peers": {"a": {"model": {"model_type": "bert"}}},
        "training": {"steps": 1, "global_batch_rows": 48},
    }
)
ZERO = {"zero_optimization": {"stage": 2}}
BF16_INTO_FP32 = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}


def resolved(config: dict[str, Any], world: int = 2, device: str = "cpu") -> dict[str, Any]:
    found, mistakes = resolve(config, RECIPE, world, device, Path("RUN"))
    assert not mistakes and found is not None, mistakes
    return found.values


def mistakes(config: dict[str, Any], world: int = 2, device: str = "cpu") -> str:
    found, said = resolve(config, RECIPE, world, device, Path("RUN"))
    assert found is None and said
    return "\n".join(said)


@pytest.mark.parametrize(
    ("given", "micro", "accumulation"),
    [
        ({}, 24, 1),
        ({"train_micro_batch_size_per_gpu": 8}, 8, 3),
        ({"gradient_accumulation_steps": 4}, 6, 4),
        ({"train_micro_batch_size_per_gpu": 6, "gradient_accumulation_steps": 4}, 6, 4),
        ({"train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto"}, 24, 1),
    ],
)
def test_one_of_micro_batch_and_accumulation_follows_from_the_other(
    given: dict[str, Any], micro: int, accumulation: int
) -> None:
    values = resolved({**ZERO, "train_batch_size": "auto", **given})
    assert values["train_batch_size"] == 48
    assert values["train_micro_batch_size_per_gpu"] == micro
    assert values["gradient_accumulation_steps"] == accumulation


def test_no_auto_is_left_and_clipping_is_ours() -> None:
    values = resolved(
        {
            "zero_optimization": {"stage": "auto", "reduce_bucket_size": "auto"},
            "bf16": {"enabled": "auto"},
            "fp16": {"enabled": "auto"},
            "gradient_clipping": "auto",
        }
    )
    assert "auto" not in str(values)
    assert values["gradient_clipping"] == 0.0 and values["zero_optimization"]["compute_grad_norm"] is False
    assert values["zero_optimization"]["stage"] == 2
    assert values["bf16"]["enabled"] is False
    assert resolved({**ZERO, "bf16": {"enabled": "auto"}}, device="cuda")["bf16"]["enabled"] is True
    assert values["tensorboard"]["output_path"] == "RUN"


@pytest.mark.parametrize(
    ("stage", "world", "accumulation", "wire", "accumulated"),
    [
        (2, 1, 1, None, None),  # nothing is summed: what backward gives is kept as it is
        (2, 1, 2, None, "fp32"),
        (2, 2, 1, "fp32", "fp32"),
        (1, 2, 2, "fp32", None),  # DeepSpeed has no ZeRO 1 that would, with norms that are ours
    ],
)
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_gradients_are_fp32_where_they_are_summed(
    stage: int, world: int, accumulation: int, wire: str | None, accumulated: str | None, precision: str
) -> None:
    given = {
        precision: {"enabled": True},
        "data_types": {"grad_accum_dtype": "auto"},
        "communication_data_type": "auto",
        "gradient_accumulation_steps": accumulation,
        "zero_optimization": {"stage": stage},
    }
    values = resolved(given, world, "cuda")
    assert (values.get("communication_data_type"), values["data_types"].get("grad_accum_dtype")) == (wire, accumulated)
    said = {"communication_data_type": "fp16", "data_types": {"grad_accum_dtype": "bf16"}}
    assert resolved(given | said, world, "cuda").items() >= said.items(), "what is said is done"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"train_batch_size": 64}, "training.global_batch_rows = 48"),
        ({"gradient_clipping": 0.5}, "optimizer.max_grad_norm = 1"),
        ({"train_micro_batch_size_per_gpu": 7}, "is not divisible by 2 ranks × train_micro_batch_size_per_gpu 7 = 14"),
        ({"train_micro_batch_size_per_gpu": 8, "gradient_accumulation_steps": 2}, "is not 2 ranks"),
        ({"train_micro_batch_size_per_gpu": 0}, "must be a whole number from 1"),
        ({"optimizer": {"type": "Adam"}}, "the recipe's section optimizer owns it"),
        ({"scheduler": {"type": "WarmupLR"}}, "the recipe's section schedule owns it"),
        ({"zero_optimisation": {"stage": 2}}, "did you mean 'zero_optimization'?"),
        ({"zero_optimization": {"stage": 0}}, "stage 0 keeps bf16 weights"),
        ({"zero_optimization": {"stage": 3}}, "one of 8 GPUs holds 3.75 bytes a parameter: 10 billion take 37.5 GB"),
        ({"zero_optimization": {"stage": 2.5}}, "must be 1 or 2"),
        ({"zero_optimization": {"stage": 2, "reduce_bucketsize": 5}}, "did you mean 'reduce_bucket_size'?"),
        ({"zero_optimization": {"stage": 2, "reduce_bucket_size": "big"}}, "reduce_bucket_size"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, "offload_optimizer"),
        ({"fp16": {"enabled": True}}, "no fp16 on the CPU"),
        ({"fp16": {"enabled": True}, "bf16": {"enabled": True}}, "choose one"),
        ({"bf16": True}, "bf16 = True"),
        ({"communication_data_type": "fp23"}, "did you mean 'fp32'?"),
        ({"data_types": {"grad_accum_dtype": "double"}}, "allowed: bf16, fp16, fp32"),
        ({"data_types": "fp32"}, "data_types = 'fp32'"),
        ({"data_types": {"grad_acum_dtype": "fp32"}}, "data_types = {'grad_acum_dtype': 'fp32'}"),
        ({"steps_per_print": 0}, "steps_per_print = 0: must be greater than or equal to 1"),
        ({"wall_clock_breakdown": "x"}, "wall_clock_breakdown = 'x': must be true or false"),
        ({"log_level": "loud"}, "log_level = 'loud': must be 'debug', 'info'"),
        ({"tensorboard": {"enabled": "yes"}}, "tensorboard.enabled = 'yes': must be true or false"),
        ({"tensorboard": {"outputpath": "x"}}, "outputpath = 'x': unknown key; did you mean 'output_path'?"),
        ({"tensorboard": []}, "tensorboard = []: must be a mapping"),
        (
            {"csv_monitor": {"enabled": True, "output_path": f"{__file__}/x"}},
            f"csv_monitor.output_path = '{__file__}/x': {__file__} cannot be written in",
        ),
        ({"csv_monitor": {"output_path": 3}}, "csv_monitor.output_path = 3: must be a valid string"),
        ({"fp16": {"loss_scal": 0}}, "fp16.loss_scal = 0: unknown key; did you mean 'loss_scale'?"),
        ({"flops_profiler": {"profile_step": "a"}}, "flops_profiler.profile_step = 'a': must be a valid integer"),
        ({"comms_logger": {"prof_ops": 3}}, "comms_logger.prof_ops = 3: must be a list"),
        ({"timers": {"throughput": {"enabled": "maybe"}}}, "timers.throughput.enabled = 'maybe': must be true or"),
    ],
)
def test_contradictions_and_unknown_keys_are_errors_that_name_both_places(given: dict[str, Any], said: str) -> None:
    assert said in mistakes({**ZERO, **given})


def test_a_missing_zero_block_is_stage_0_and_refused() -> None:
    assert "zero_optimization" in mistakes({})


@pytest.mark.parametrize("text", ["{", "[1]", '{"bf16": {}, "bf16": {}}', "[" * 100_000, "\xff", None])
def test_a_file_that_is_no_json_object_is_one_message(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "d.json").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=r"d\.json") as problem:
        read_config(tmp_path / "d.json")
    assert str(problem.value).count("d.json") == 1
    (tmp_path / "d.json").write_text("\ufeff{}", encoding="utf-8")  # as Notepad saves it
    assert read_config(tmp_path / "d.json") == {}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            {"activation_checkpointing": {"partition_activations": True}},
            "the recipe's training.activation_checkpointing does",
        ),
        ({"prescale_gradients": True}, "write communication_data_type fp32"),
        ({"gradient_predivide_factor": 2.0}, "write communication_data_type fp32"),
        ({"disable_allgather": True}, "remove it"),
        ({"wandb": {"enabled": True}}, "wandb cannot be imported"),
        ({"comet": {"enabled": True}}, "pip install comet_ml"),
        ({"wandb": True}, 'write {"enabled": true}'),
        ({**BF16_INTO_FP32, "zero_optimization": {"stage": 1}}, "write stage 2, or leave grad_accum_dtype out"),
    ],
)
def test_a_key_that_would_do_nothing_or_cannot_work_is_refused_with_what_to_write(
    given: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("wandb", "comet_ml"):
        monkeypatch.setitem(sys.modules, package, None)  # as where it is not installed
    assert said in mistakes({**ZERO, **given})


def test_every_shipped_config_trains_through_the_engine(tmp_path: Path) -> None:
    """The same first loss in each precision; fp16, which DeepSpeed refuses on a CPU, by the tests' own door."""
    recipe = {
        "corpus": {"path": str(chain_corpus(tmp_path / "corpus")), "sequence_length": 32},
        "peers": {"one": {"model": bert(16, 1), "soft": {"two": 1.0}}, "two": {"model": bert(16, 1)}},
        "training": {"global_batch_rows": 8, "steps": 3, "log_every": 1},
    }
    shipped = sorted((ROOT / "ds_configs").glob("*.json"))
    run_jobs([Job(recipe, tmp_path / path.stem, read_config(path)) for path in shipped], 2, tmp_path)
    losses = [metrics(tmp_path / path.stem)[1]["loss/one/hard"] for path in shipped]
    assert len(losses) >= 4 and losses == pytest.approx([losses[0]] * len(losses), rel=1e-2)


def test_what_a_key_says_by_default_is_no_mistake() -> None:
    resolved({**ZERO, "prescale_gradients": False, "gradient_predivide_factor": 1.0, "wandb": {"enabled": False}})
    resolved({**BF16_INTO_FP32, "zero_optimization": {"stage": 2}})
    auto = {**BF16_INTO_FP32, "bf16": {"enabled": "auto"}, "zero_optimization": {"stage": 1}}
    resolved(auto, device="cpu")
    assert "stage = 1" in mistakes(auto, device="cuda")


def test_monitors_write_into_the_run_directory_and_take_every_event() -> None:
    values = resolved({**ZERO, "csv_monitor": {"enabled": True}, "comet": {"enabled": False}})
    assert values["csv_monitor"] == {"enabled": True, "output_path": "RUN", "job_name": "csv_monitor"}
    assert values["comet"]["samples_log_interval"] == 1
