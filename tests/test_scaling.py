"""The model of step time: what must hold whatever the numbers are, and the sums that can be done by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from ctcd_ds.cluster.peaks import PEAKS, stated_peak
from ctcd_ds.cluster.scaling import Cluster, Work, predict, state_bytes
from ctcd_ds.cluster.scaling_table import COLUMNS, ENOUGH, improve, step_table
from ctcd_ds.recipe.sections import Recipe
from ctcd_ds.training.plan import make_plan, memory_per_rank
from runs import bert, chain_corpus

WORK = Work(
    micro_batch=16, accumulation=2, sequence_length=128, flops_per_token=480e6, trained=120_000_000, bucket=30_000_000
)
CLUSTER = Cluster(nodes=8, gpus=8, flops=400e12, link=50e9)


def test_the_sums_of_a_small_case() -> None:
    """Four GPUs of one node, no latency: every figure by hand."""
    work = Work(micro_batch=2, accumulation=3, sequence_length=10, flops_per_token=1e6, trained=1000, bucket=1000)
    step = predict(work, Cluster(1, 4, flops=1e6, link=1.0, node_link=100.0, memory=1e6, node_latency=0.0))
    assert step.compute_s == 2 * 3 * 10
    assert step.reduce_s == pytest.approx(3 * 2 * 3 / 4 * 2000 / 100)  # each micro-step: 2 (n − 1)/n · bytes/β
    assert step.gather_s == pytest.approx(3 / 4 * 2000 / 100)
    assert step.memory_s == pytest.approx((3 * 6 * 2 * 1000 + 30 * 1000 / 4) / 1e6)
    assert step.step_s == pytest.approx(step.compute_s + step.reduce_s + step.gather_s + step.memory_s)
    assert step.tokens_per_s == pytest.approx(2 * 3 * 10 * 4 / step.step_s) and step.rows == 24


def test_zero_1_reduces_once_a_step_and_zero_2_at_each_micro_step() -> None:
    one, two = (predict(replace(WORK, stage=stage, accumulation=4), CLUSTER) for stage in (1, 2))
    assert two.reduce_s == pytest.approx(4 * one.reduce_s)
    assert two.gather_s == one.gather_s
    assert two.state_bytes < one.state_bytes


def test_memory_of_the_states_is_zeros_own() -> None:
    """The table of ZeRO's paper: 7.5 B parameters on 64 GPUs, in decimal GB (figure 1)."""
    paper = replace(WORK, trained=7_500_000_000)
    assert state_bytes(replace(paper, stage=1), 64) / 1e9 == pytest.approx(31.4, abs=0.05)
    assert state_bytes(replace(paper, stage=2), 64) / 1e9 == pytest.approx(16.6, abs=0.05)
    assert state_bytes(replace(paper, stage=2), 8) / paper.trained == 3.75, "what the refusal of stage 3 says"


@pytest.mark.parametrize("stage", [1, 2])
def test_more_gpus_are_faster_together_and_slower_each(stage: int) -> None:
    steps = [predict(replace(WORK, stage=stage), replace(CLUSTER, nodes=nodes)) for nodes in (1, 8, 64, 512)]
    paces = [step.tokens_per_s for step in steps]
    shares = [step.efficiency for step in steps]
    assert paces == sorted(paces) and shares == sorted(shares, reverse=True)
    assert predict(replace(WORK, stage=1), Cluster(1, 1, 1e12, 1.0)).efficiency == 1.0


def test_one_gpu_does_not_communicate() -> None:
    step = predict(WORK, Cluster(1, 1, flops=1e12, link=1.0, node_link=1.0))
    assert step.communication_s == 0.0


def test_backward_hides_all_but_the_last_bucket_where_the_json_says_so() -> None:
    plain, hidden = (predict(replace(WORK, overlap=overlap), CLUSTER) for overlap in (False, True))
    assert plain.hidden_s == 0.0 and hidden.reduce_s == plain.reduce_s
    slow = predict(replace(WORK, overlap=True), replace(CLUSTER, flops=1e12))
    assert slow.hidden_s == pytest.approx(3 / 4 * slow.reduce_s), "four buckets: three hide behind a long backward"
    one_bucket = replace(WORK, overlap=True, bucket=500_000_000)
    assert predict(one_bucket, CLUSTER).hidden_s == 0.0, "DeepSpeed's default bucket holds all: nothing is hidden"
    assert predict(one_bucket, CLUSTER).bucket_bytes > hidden.bucket_bytes
    flattened = replace(one_bucket, contiguous=False)
    assert predict(flattened, CLUSTER).bucket_bytes == 2 * WORK.trained, "no more than there is"


def test_a_bucket_never_cuts_a_weight() -> None:
    assert replace(WORK, bucket=1_000, largest=60_000_000).buckets == 2


def test_between_nodes_each_gpu_carries_its_share() -> None:
    """A node of 8 GPUs with a link each moves data as fast as 8 links; latency grows with log2 of the nodes."""
    ideal = Cluster(4096, 8, flops=1.0, link=50e9, node_link=1e30, latency=0.0, node_latency=0.0)
    assert ideal.all_reduce_s(1e9) == pytest.approx(2 * 1e9 / 8 / 50e9, rel=1e-3)
    small = [Cluster(nodes, 8, 1.0, 50e9, node_latency=0.0).all_reduce_s(0) for nodes in (2, 4, 512)]
    assert small == pytest.approx([2 * rounds * 14e-6 for rounds in (1, 2, 9)])


def test_a_plan_says_what_its_step_asks_for(tmp_path: Path) -> None:
    """Through the real plan: shapes from the recipe, bytes and buckets from the DeepSpeed JSON."""
    recipe = Recipe.model_validate(
        {
            "corpus": {"path": str(chain_corpus(tmp_path / "corpus")), "sequence_length": 32},
            "peers": {"a": {"model": bert(48, 3)}, "b": {"model": bert(32, 2)}},
            "training": {"global_batch_rows": 64, "steps": 1},
        }
    )
    config = {
        "bf16": {"enabled": True},
        "communication_data_type": "fp32",
        "gradient_accumulation_steps": 2,
        "zero_optimization": {"stage": 1, "overlap_comm": True, "reduce_bucket_size": 1000},
    }
    plan = make_plan(recipe, config, 8, "cuda", tmp_path / "run")
    work = plan.work
    assert (work.micro_batch, work.accumulation, work.stage, work.overlap) == (4, 2, 1, True)
    assert (work.weight_bytes, work.wire_bytes, work.gradient_bytes) == (2, 4, 2)
    assert work.trained == sum(c.parameters for c in plan.costs.values()) and work.frozen == 0
    assert work.bucket == 1000 and work.largest == 320 * 48  # 300 words, padded to a multiple of 64
    step = predict(work, replace(CLUSTER, nodes=1))
    assert step.compute_s == pytest.approx(plan.tokens_per_step / 8 * plan.flops_per_token / CLUSTER.flops)
    assert (step.state_bytes, step.activation_bytes) == pytest.approx(memory_per_rank(plan))


def test_what_is_changed_helps_and_is_said() -> None:
    """From a bad start: accumulation under ZeRO 2, one bucket, fp32 gradients on the wire."""
    bad = replace(WORK, accumulation=8, wire_bytes=4, bucket=500_000_000, largest=23_000_000)
    better, said = improve(bad, CLUSTER)
    assert (better.stage, better.overlap, better.wire_bytes, better.bucket) == (1, True, 2, 23_000_000)
    assert all(word in " ".join(said) for word in ('"reduce_bucket_size": 23000000', '"stage": 1', '"bf16"'))
    assert predict(better, CLUSTER).efficiency > 1.2 * predict(bad, CLUSTER).efficiency
    assert improve(better, CLUSTER) == (better, []), "nothing is proposed twice"


def test_the_batch_grows_only_where_communication_alone_is_not_enough() -> None:
    small = replace(WORK, accumulation=1, micro_batch=8)
    better, said = improve(small, CLUSTER)
    growth = better.micro_batch // small.micro_batch
    assert growth > 1 and f"training.global_batch_rows = {8 * growth * 64} (× {growth})" in " ".join(said)
    less = replace(better, micro_batch=better.micro_batch // 2)
    assert predict(less, CLUSTER).efficiency < ENOUGH <= predict(better, CLUSTER).efficiency
    _, hopeless = improve(replace(small, micro_batch=1), replace(CLUSTER, nodes=4096, link=1e9))
    assert "take fewer for a run" in hopeless[-1]


def test_a_table_has_a_line_for_each_size() -> None:
    head, rule, *lines = step_table([(WORK, replace(CLUSTER, nodes=nodes)) for nodes in (1, 512)]).splitlines()
    assert len({len(line) for line in (head, rule, *lines)}) == 1
    cells = [cell.strip() for cell in lines[1].strip("|").split("|")]
    step = predict(WORK, replace(CLUSTER, nodes=512))
    found = dict(zip(COLUMNS, cells, strict=True))
    assert found["GPUs"] == "4,096" and found["rows"] == "131,072" and found["a GPU"] == "16 × 2"
    assert found["efficiency"] == f"{step.efficiency:.0%}"
    assert float(found["step ms"]) == pytest.approx(1000 * step.step_s, rel=0.01)


@pytest.mark.parametrize(
    ("device", "known_as"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H100 NVL", "H100 NVL"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA A10G", "A10G"),
        ("NVIDIA RTX A6000", "A6000"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("Tesla T4", "T4"),
        *((name, name) for name in PEAKS),
        ("NVIDIA RTX A4000", None),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA L40", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
    ],
)
def test_a_gpu_has_the_peak_of_its_own_name_or_none(device: str, known_as: str | None) -> None:
    for precision, column in (("bf16", 0), ("fp16", 0), ("fp32", 1)):
        assert stated_peak(device, precision) == (None if known_as is None else PEAKS[known_as][column])
