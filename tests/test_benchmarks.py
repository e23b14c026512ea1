"""Every benchmark runs at a tiny size and writes the row it promises; ways that differ in their maths are not timed."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import forks
from commands import ROOT, command
from runs import bert, chain_corpus

pytestmark = pytest.mark.benchmarks

TINY = ["--device", "cpu", "--threads", "1", "--repetitions", "1"]
SHAPE = ["--peers", "2x32,1x32", "--sequence_length", "32", "--rows", "4", "--vocab_size", "500"]


@pytest.fixture(autouse=True)
def _as_a_script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Benchmarks import each other as scripts of one folder do; their threads are theirs alone."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def row(monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path) -> Any:
    """Runs a benchmark and gives its row, printed and written alike."""

    def run(name: str, *arguments: object) -> dict[str, Any]:
        output = tmp_path / "row.json"
        code, out, err = command(monkeypatch, capsys, f"benchmarks/{name}.py", *arguments, *TINY, "--output", output)
        assert code == 0, out + err
        found = json.loads(output.read_text())
        assert out.endswith(output.read_text()) or name == "gpu_suite"
        assert {"cores", "device", "load_before"} <= set(found["hardware"])
        assert {"torch", "transformers", "python"} <= set(found["versions"])
        assert found["threads"] == 1 and "commit" in found and found["command"].startswith(f"{name}.py ")
        return found

    return run


def assert_positive(row: dict[str, Any], *keys: str) -> None:
    for key in keys:
        assert math.isfinite(row[key]) and row[key] > 0, (key, row[key])


def test_step_times_all_ways(row: Any) -> None:
    found = row("step", *SHAPE, "--ways", "naive,naive_kept,naive_selected,ours,alone")
    assert_positive(found, "naive_s", "ours_s", "alone_s", "naive_over_ours", "naive_kept_over_ours")
    assert_positive(found, "ours_over_alone", "peak_bytes", "naive_peak_bytes", "gemm_share", "tokens_per_s")
    assert found["peak_bytes"] < found["naive_peak_bytes"]
    assert found["loss_difference"] < 1e-4 and found["gradient_difference"] < 1e-4
    assert set(found["rounds"]) >= {"naive", "ours", "alone"} and len(found["rounds"]["ours"]) == 1


def test_step_with_three_peers_and_in_bf16(row: Any) -> None:
    three = ["--peers", "2x32,1x32,1x64", *SHAPE[2:], "--ways", "ours,alone", "--dtype", "bfloat16"]
    found = row("step", *three)
    assert_positive(found, "ours_s", "alone_s", "ours_over_alone", "peak_bytes")
    assert sum(key.startswith("alone/peer") for key in found) == 3
    assert "naive_s" not in found


@pytest.mark.parametrize("task", ["mlm", "clm"])
def test_keys_cost_who_has_them_and_a_step_without_them_is_what_it_would_be_by_hand(row: Any, task: str) -> None:
    found = row("step", "--task", task, *SHAPE, "--ways", "bare,ours,hidden,relations")
    assert_positive(found, "ours_over_bare", "hidden_over_ours", "relations_over_ours", "hidden_peak_bytes")
    assert found["ours_calls_what_bare_calls"] and found["ours_operations"] == found["bare_operations"]
    assert min(found["hidden_operations"], found["relations_operations"]) > found["ours_operations"]
    assert found["peak_bytes"] == found["bare_peak_bytes"]


@pytest.mark.parametrize("task", ["mlm", "clm"])
def test_different_maths_is_not_timed(task: str) -> None:
    """The check sees a wrong weight (in the loss) and a target that is not detached (in the gradients only)."""
    import step
    import workload

    from ctcd_ds.cli import RunFailure

    shape = workload.Shape((workload.Size(2, 32), workload.Size(1, 32)), 32, 4, 512, task)
    graph = workload.full_graph(shape.names)
    module = workload.co_training(workload.build_models(shape), graph, shape.vocab_size)
    batch, collated = workload.random_batch(shape, torch.device("cpu"))
    assert max(step.same_maths(module, graph, batch, collated).values()) < 1e-5
    with torch.no_grad():  # at initialisation peers know nothing and hardly differ: teach the check with ones that do
        for parameter in module.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    step.same_maths(module, graph, batch, collated)

    mirrored = workload.DistillationGraph(graph.names, graph.hard, ((0.0, 4.0), (1.0, 0.0)), graph.trained)
    with pytest.raises(RunFailure, match="do not compute the same"):
        step.same_maths(module, mirrored, batch, collated)
    shifted = {**collated, "labels": collated["labels"].roll(1, dims=1)}
    with pytest.raises(RunFailure, match="do not compute the same"):
        step.same_maths(module, graph, batch, shifted)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "detach", lambda tensor: tensor)
        with pytest.raises(RunFailure, match="gradient_difference"):
            step.same_maths(module, graph, batch, collated)


def test_what_a_step_must_do_is_counted_like_training_counts_it() -> None:
    import workload
    from transformers import AutoModelForMaskedLM

    from ctcd_ds.peers.accounting import cost

    shape = workload.Shape((workload.Size(2, 32), workload.Size(1, 64)), 32, 4, 512)
    models = workload.build_models(shape).values()
    asked = round(0.15 * 30)
    assert (
        shape.flops() == sum(3 * cost(m.config, 32, asked, AutoModelForMaskedLM).forward_flops for m in models) * 4 * 32
    )


def test_peak_bytes_counts_what_is_held_at_one_time() -> None:
    import common

    def step() -> None:
        first = torch.ones(1000, 250)
        second = first + 1
        del first
        torch.ones(1000, 100)
        del second

    found = common.peak_bytes(step, torch.device("cpu"))
    assert found == pytest.approx(2_000_000, rel=0.01)
    assert common.peak_flops("NVIDIA H200", "bfloat16") == 989e12


def test_objective(row: Any) -> None:
    shape = ["--width", "32", "--vocab_size", "500", "--tokens", "256,512", "--extrapolate_to", "2048"]
    found = row("objective", *shape)
    assert_positive(found, "memory_ratio", "gradient_error", "naive_s", "ours_s", "naive_over_ours")
    assert found["memory_ratio"] < 1 / 4
    assert found["gradient_error"] < 1e-5
    assert found["gradient_errors"]["bfloat16"]["soft_naive"] > 1e-3  # what fp32 logits are for
    assert ("liger_over_ours" in found) != ("liger_skipped" in found)
    small, large = found["memory"]["naive_bytes_per_token"]
    assert small == pytest.approx(large, rel=0.02), "the naive way's memory is a straight line"


def test_loader(row: Any) -> None:
    found = row("loader", *SHAPE, "--seconds", "0.2", "--steps", "3")
    assert_positive(found, "rows_per_s", "step_s")
    assert 0 <= found["wait_share"] < 1


@pytest.mark.parametrize("kind", ["wordpiece", "model"])
def test_corpus(row: Any, tmp_path: Path, kind: str) -> None:
    words = ["the", "a", "peer", "model", "learns", "from", "another", "teacher", "student", "and", "both", "grow"]
    text, tokenizer = tmp_path / "text.txt", tmp_path / "vocab.txt"
    lines = [" ".join(words[(k * step) % len(words)] for k in range(9)) for step in range(1, 400)]
    text.write_text("\n\n".join(lines))
    tokenizer.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *dict.fromkeys(words)]) + "\n")
    if kind == "model":
        import sentencepiece

        tokenizer = tmp_path / "m.model"
        sentencepiece.SentencePieceTrainer.train(
            input=str(text), model_prefix=str(tmp_path / "m"), vocab_size=30, minloglevel=2
        )
    found = row("corpus", "--input", text, "--tokenizer", tokenizer, "--workers", "1")
    assert_positive(found, "ratio_to_tokenizer", "tokens_per_s", "tokenizer_tokens_per_s")
    assert found["documents"] == 399


def test_overhead_of_deepspeed_and_our_loop(row: Any) -> None:
    found = row("overhead", *SHAPE, "--steps", "3")
    assert_positive(found, "deepspeed_over_bare", "bare_s", "deepspeed_s")
    assert_positive(found["host_ms"], "bare", "deepspeed")


def test_saving(row: Any) -> None:
    found = row("saving", *SHAPE)
    assert found["save_s"] > 0 and found["checkpoint_bytes"] > 0
    assert found["share_at_15_minutes"] < found["share_at_90_seconds"] < 1


def test_startup(row: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its launches are forked here: that they go the whole way, not how long they take."""
    monkeypatch.setattr(subprocess, "Popen", forks.popen)
    found = row("startup", *SHAPE, "--warm_up", "0")
    assert_positive(found, "ours_s", "empty_s")
    assert found["ours_minus_empty_s"] == pytest.approx(found["ours_s"] - found["empty_s"])


def test_the_gpu_suite_is_ready(row: Any, tmp_path: Path) -> None:
    """All its parts run on the CPU, only what needs a GPU says so, and what has a result is not done again."""
    parts = row("gpu_suite", "--size", "tiny")["parts"]
    assert {name: part for name, part in parts.items() if "failed" in part} == {}
    skipped = [name for name, part in parts.items() if "skipped" in part]
    assert skipped == ["run_fp16", "run_bf16_compiled", "profile"]
    assert parts["gradient_error"]["result"]["gradient_error"] < 1e-3
    run = parts["run_bf16"]["result"]
    assert run["steps"] == 30 and run["last_loss"] < run["first_loss"]
    assert set(parts["batch_sizes"]["result"]) == {"2", "4"}
    assert "| run_bf16 | steps | 30 |" in (tmp_path / "row.md").read_text()
    assert row("gpu_suite", "--size", "tiny", "--parts", "run_bf16")["parts"]["run_bf16"] == parts["run_bf16"]


@pytest.mark.nightly
def test_a_bare_machine_gets_its_packages_from_a_folder(tmp_path: Path) -> None:
    """Wheels are made where pip works, and used by a Python that has none of them."""
    suite = [sys.executable, ROOT / "benchmarks" / "gpu_suite.py"]
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    subprocess.run([*suite, "--make_wheels", tmp_path / "wheels", "--python", python], check=True)
    use = "import pathlib, sys, wheels\nwheels.use(pathlib.Path(sys.argv[1]))\n"
    (tmp_path / "bare.py").write_text(use + "import pydantic\nprint(pydantic.__file__)\n")
    environment = os.environ | {"PYTHONPATH": str(ROOT / "benchmarks")}
    said = subprocess.run(
        [sys.executable, tmp_path / "bare.py", tmp_path / "wheels"], env=environment, check=True, capture_output=True
    )
    assert b"ctcd-wheels-" in said.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--peers", "6-768"], "write LAYERSxWIDTH"),
        (["--ways", "ours,fast"], "the ways are naive, naive_kept, naive_selected, ours, alone"),
        (["--output", "nowhere/row.json"], "there is no directory"),
        (["--rows", "0"], "not a whole number from 1"),
    ],
)
def test_mistakes_are_said_before_anything_is_built(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, arguments: list[str], said: str
) -> None:
    code, _, err = command(monkeypatch, capsys, "benchmarks/step.py", "--device", "cpu", *arguments)
    assert code == 2 and said in err


def test_scaling_is_predicted_and_measured(row: Any) -> None:
    found = row("scaling", *SHAPE, "--processes", "2", "--elements", "100000")
    ways = [(step["processes"], step["stage"], step["accumulation"]) for step in found["steps"]]
    assert ways == [(n, stage, accumulation) for n in (1, 2) for stage in (1, 2) for accumulation in (1, 4)]
    for step in found["steps"]:
        assert_positive(step, "measured_s", "predicted_s", "compute_s", "memory_s")
        assert (step["communication_s"] > 0) == (step["processes"] > 1)
    assert found["steps"][0]["compute_s"] == pytest.approx(found["micro_step_s"]), "it calibrates"
    assert_positive(found["rates"]["2"], "flops", "memory", "link", "latency")
    assert 0 <= found["median_error"] <= found["largest_error"]


def test_the_tables_of_the_scaling_page_are_the_models(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    code, out, err = command(monkeypatch, capsys, "benchmarks/scaling_tables.py", "--check")
    assert code == 0, out + err
    import scaling_tables

    page = scaling_tables.PAGE.read_text()
    assert page.count("<!-- end -->") == len(scaling_tables.parts()) == 7
    step = json.loads(scaling_tables.RESULTS.read_text())["steps"][-1]
    assert f"| {step['measured_s']:.2f} | {step['predicted_s']:.2f} |" in page
    wrong = page.replace(f"| {step['measured_s']:.2f} | {step['predicted_s']:.2f} |", "| 0.01 | 0.01 |")
    assert scaling_tables.filled(wrong, scaling_tables.parts()) == page


def test_drawn_tokens_lose_less_than_the_largest(row: Any, tmp_path: Path) -> None:
    """Chance averages out over rounds, a bias does not; the whole vocabulary as the largest few is no loss."""
    from transformers import BertConfig, BertForMaskedLM

    from ctcd_ds.corpus.tokenizer import load_tokenizer

    corpus = chain_corpus(tmp_path / "corpus")
    for seed, name in enumerate(("teacher", "student")):
        torch.manual_seed(seed)
        settings = {key: value for key, value in bert(16, 1).items() if key != "model_type"}
        BertForMaskedLM(BertConfig(vocab_size=320, initializer_range=0.3, **settings)).save_pretrained(tmp_path / name)
        load_tokenizer(corpus / "tokenizer").save_pretrained(tmp_path / name)
    places = ["--teacher", tmp_path / "teacher", "--student", tmp_path / "student", "--corpus", corpus]
    found = row("cached_teacher", *places, "--sequence_length", "32", "--rows", "8", "--draws", "8,600")
    few, all_of_it = found["by_draws"]
    assert (few["bytes_a_position"], few["bytes_a_token"]) == (20, 2.5)  # at 4 of 32 tokens
    assert few["drawn"]["once"] > 2 * all_of_it["drawn"]["once"] > 0
    assert few["drawn"]["once"] < few["independent"]["once"]
    assert few["largest"]["once"] > 0 and all_of_it["largest"]["once"] < 1e-6
