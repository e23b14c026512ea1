"""The DeepSpeed JSON: "auto" is resolved, the recipe keeps what it owns, and nothing is ignored silently."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ctcd_ds.cli import UserError
from ctcd_ds.recipe import Recipe
from ctcd_ds.training.deepspeed_config import read_config, resolve

RECIPE = Recipe.model_validate(
    {
        "corpus": {"path": "x"},
        "peers": {"a": {"model": {"model_type": "bert"}}},
        "training": {"steps": 1, "global_batch_rows": 48},
    }
)
ZERO = {"zero_optimization": {"stage": 2}}


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
        ({"zero_optimization": {"stage": 3}}, "stage 3 cuts up"),
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
    ],
)
def test_contradictions_and_unknown_keys_are_errors_that_name_both_places(given: dict[str, Any], said: str) -> None:
    assert said in mistakes({**ZERO, **given})


def test_a_missing_zero_block_is_stage_0_and_refused() -> None:
    assert "zero_optimization" in mistakes({})


@pytest.mark.parametrize("text", ["{", "[1]", '{"bf16": {}, "bf16": {}}'])
def test_a_file_that_is_no_json_object_is_one_message(tmp_path: Path, text: str) -> None:
    (tmp_path / "d.json").write_text(text)
    with pytest.raises(UserError, match=r"d\.json"):
        read_config(tmp_path / "d.json")
