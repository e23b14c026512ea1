"""What co-training promises, shown on real runs: peers meet in the soft losses only, and nothing else decides bits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from runs import BF16, FP16, FP32, Job, bert, chain_corpus, drop_checkpoint, final_weights, metrics, run_jobs

PEERS = {
    "teacher": {"model": bert(48, 3), "soft": {"student": 1.0}},
    "student": {"model": bert(32, 2), "soft": {"teacher": 4.0}, "optimizer": {"lr": 2e-3}},
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chain_corpus(tmp_path_factory.mktemp("corpus") / "chain")


def recipe(corpus: Path, peers: dict[str, Any], steps: int = 8, **training: Any) -> dict[str, Any]:
    return {
        "corpus": {"path": str(corpus), "sequence_length": 32},
        "peers": peers,
        "optimizer": {"lr": 1e-3, "max_grad_norm": 1.0},
        "training": {"global_batch_rows": 16, "steps": steps, "log_every": 1, "valid_every": 4, **training},
    }


def without_soft(peers: dict[str, Any]) -> dict[str, Any]:
    return {name: {**peer, "soft": {}} for name, peer in peers.items()}


def without_dropout(peers: dict[str, Any]) -> dict[str, Any]:
    none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return {name: {**peer, "model": {**peer["model"], **none}} for name, peer in peers.items()}


def equal_states(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture(scope="module")
def together_and_alone(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both peers with soft weights 0 in one run, and each in a run of its own: dropout 0.1, clipping, 2 ranks."""
    folder, peers = tmp_path_factory.mktemp("coupling"), without_soft(PEERS)
    kinds = {
        "fp32": FP32,
        "zero1": {"zero_optimization": {"stage": 1}},
        "bf16": {**BF16, "gradient_accumulation_steps": 2},
    }
    jobs = []
    for kind, config in kinds.items():
        jobs.append(Job(recipe(corpus, peers), folder / f"{kind}-together", config))
        jobs += [Job(recipe(corpus, {n: p}), folder / f"{kind}-{n}", config) for n, p in peers.items()]
    run_jobs(jobs, 2, folder)
    return folder


@pytest.mark.parametrize("kind", ["fp32", "zero1", "bf16"])
@pytest.mark.parametrize("peer", ["teacher", "student"])
def test_without_soft_weights_a_peer_trains_as_if_alone_bit_for_bit(
    together_and_alone: Path, kind: str, peer: str
) -> None:
    together, alone = together_and_alone / f"{kind}-together", together_and_alone / f"{kind}-{peer}"
    ours, theirs = metrics(together), metrics(alone)
    assert len(ours) == len(theirs) == 8
    for step in ours:
        for key in (f"loss/{peer}/hard", f"grad_norm/{peer}", f"lr/{peer}"):
            assert ours[step][key] == theirs[step][key], (step, key)
    assert ours[8][f"valid/{peer}/loss"] == theirs[8][f"valid/{peer}/loss"]
    assert equal_states(final_weights(together)[peer], final_weights(alone)[peer])
    assert any(row[f"grad_norm/{peer}"] > 1.0 for row in ours.values()), "clipping was never at work"


@pytest.fixture(scope="module")
def cut_in_many_ways(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same 20 steps of CTCD at 1 and 2 ranks and with accumulation 1 and 2."""
    folder, peers = tmp_path_factory.mktemp("cuts"), without_dropout(PEERS)
    for world in (1, 2):
        run_jobs(
            [
                Job(
                    {**recipe(corpus, peers, steps=20, valid_every=20), "objective": {"soft_positions": positions}},
                    folder / f"{positions}-{world}x{accumulation}",
                    {**FP32, "gradient_accumulation_steps": accumulation},
                )
                for accumulation, positions in ((1, "targets"), (2, "targets"), (2, "all"))
            ],
            world,
            folder,
        )
    return folder


@pytest.mark.parametrize("other", ["targets-1x2", "targets-2x1", "targets-2x2"])
def test_losses_do_not_depend_on_ranks_and_accumulation(cut_in_many_ways: Path, other: str) -> None:
    assert_equal_losses(cut_in_many_ways / "targets-1x1", cut_in_many_ways / other)


def test_soft_losses_at_all_positions_are_normalised_over_ranks_and_accumulation(cut_in_many_ways: Path) -> None:
    assert_equal_losses(cut_in_many_ways / "all-1x2", cut_in_many_ways / "all-2x2")


def assert_equal_losses(one: Path, other: Path) -> None:
    a, b = metrics(one), metrics(other)
    assert len(a) == len(b) == 20
    for step, row in a.items():
        for key in (k for k in row if k.startswith("loss/")):
            assert abs(row[key] - b[step][key]) <= 1e-5 * max(1.0, abs(row[key])), (step, key)


def test_losses_fall_and_the_soft_losses_are_there(cut_in_many_ways: Path) -> None:
    rows = metrics(cut_in_many_ways / "targets-1x1")
    for peer, other in (("teacher", "student"), ("student", "teacher")):
        assert rows[20][f"loss/{peer}/hard"] < rows[1][f"loss/{peer}/hard"] - 0.02
        assert rows[20][f"loss/{peer}/soft/{other}"] > 0
        assert 0 <= rows[20][f"valid/{peer}/accuracy"] <= 1
    assert 0 <= rows[20]["valid/agreement/teacher/student"] <= 1


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(corpus: Path, tmp_path: Path) -> None:
    """With dropout and accumulation: the state is the checkpoint and the step number, nothing else."""
    plan = recipe(corpus, PEERS, steps=8, checkpoint_every=3)
    config = {**FP32, "gradient_accumulation_steps": 2}
    run_jobs([Job(plan, tmp_path / "whole", config), Job(plan, tmp_path / "cut", config)], 2, tmp_path)
    expected = metrics(tmp_path / "cut")
    drop_checkpoint(tmp_path / "cut", 8)
    drop_checkpoint(tmp_path / "cut", 6)  # as if killed after step 5: only step 3's checkpoint is there
    with (tmp_path / "cut" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "torn')
    run_jobs([Job(plan, tmp_path / "cut", config, resume=True)], 2, tmp_path)
    found = metrics(tmp_path / "cut")
    assert len((tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()) == 8, "lost steps are not there twice"
    for step, row in expected.items():
        for key in (k for k in row if k.startswith(("loss/", "grad_norm/", "lr/"))):
            assert found[step][key] == row[key]
    whole, cut = final_weights(tmp_path / "whole"), final_weights(tmp_path / "cut")
    assert all(equal_states(whole[peer], cut[peer]) for peer in PEERS)


def test_a_frozen_teacher_never_changes_and_a_resumed_run_goes_on_with_it(corpus: Path, tmp_path: Path) -> None:
    from ctcd_ds.export.hf import export

    alone = {"teacher": {"model": bert(48, 3)}}
    run_jobs([Job(recipe(corpus, alone), tmp_path / "alone")], 2, tmp_path)
    export(tmp_path / "alone", "teacher", tmp_path / "hf")
    peers = {
        "teacher": {"pretrained": str(tmp_path / "hf"), "frozen": True},
        "student": {"model": bert(32, 2), "soft": {"teacher": 4.0}},
    }
    plan = recipe(corpus, peers, steps=8, checkpoint_every=4)
    run_jobs([Job(plan, tmp_path / "whole"), Job(plan, tmp_path / "cut")], 2, tmp_path)
    drop_checkpoint(tmp_path / "cut", 8)
    run_jobs([Job(plan, tmp_path / "cut", resume=True)], 2, tmp_path)

    rows = metrics(tmp_path / "whole")
    expected = metrics(tmp_path / "alone")[8]["valid/teacher/loss"]
    assert rows[4]["valid/teacher/loss"] == rows[8]["valid/teacher/loss"] == pytest.approx(expected, abs=1e-6)
    assert not any(key.startswith(("loss/teacher", "grad_norm/teacher", "lr/teacher")) for key in rows[8])
    assert rows[8]["loss/student/soft/teacher"] > 0
    assert metrics(tmp_path / "cut")[8]["loss/student/hard"] == rows[8]["loss/student/hard"]
    whole, cut = final_weights(tmp_path / "whole"), final_weights(tmp_path / "cut")
    assert whole.keys() == {"student"} and equal_states(whole["student"], cut["student"])


def test_fp16_scales_the_loss_skips_overflows_and_learns(corpus: Path, tmp_path: Path) -> None:
    """With a first scale that is far too large: some steps are skipped, counted and said, then the loss falls."""
    plan = recipe(corpus, without_dropout(PEERS), steps=50, valid_every=50)
    run_jobs([Job(plan, tmp_path / "run", FP16)], 2, tmp_path)
    rows = metrics(tmp_path / "run")
    assert 0 < rows[50]["skipped_steps"] < 20
    assert rows[50]["loss_scale"] < 2**24
    assert rows[1]["grad_norm/teacher"] is None, "the first step overflowed"
    assert rows[50]["loss/teacher/hard"] < rows[1]["loss/teacher/hard"] - 0.1
    assert rows[50]["grad_norm/teacher"] < 100, "norms are those of the unscaled gradients"


GROWING = {"initial_scale_power": 8, "loss_scale_window": 2}


def test_a_growing_loss_scale_leaves_the_gradients_as_they_are(corpus: Path, tmp_path: Path) -> None:
    """AdamW's moments are those of a scale that never changes: powers of two, and weights that stay where they are."""
    peers = without_dropout(PEERS)
    peers["teacher"]["optimizer"] = {"max_grad_norm": 0.0}
    plan = {**recipe(corpus, peers, steps=8, checkpoint_every=8), "optimizer": {"lr": 1e-12}}
    dynamic, static = ({**FP16, "fp16": {"enabled": True, **scale}} for scale in (GROWING, {"loss_scale": 256.0}))
    run_jobs([Job(plan, tmp_path / "dynamic", dynamic), Job(plan, tmp_path / "static", static)], 1, tmp_path)
    rows = metrics(tmp_path / "dynamic")
    assert [rows[step]["loss_scale"] for step in (1, 8)] == [256.0, 2048.0] and rows[8]["skipped_steps"] == 0
    assert min(row["grad_norm/student"] for row in rows.values()) > 1.0, "the student is clipped, the teacher is not"
    found, expected = (moments(tmp_path / name / "checkpoints" / "step-00000008") for name in ("dynamic", "static"))
    assert found.keys() == expected.keys() and len(found) == 8
    for key in found:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-3, atol=1e-3 * float(expected[key].abs().max()))


def moments(checkpoint: Path) -> dict[tuple[int, str], torch.Tensor]:
    """AdamW's two moments of each group, of a checkpoint of one rank."""
    (path,) = checkpoint.rglob("*optim_states.pt")
    state = torch.load(path, weights_only=False)["optimizer_state_dict"]["base_optimizer_state"]["state"]
    return {(group, name): of[name] for group, of in state.items() for name in ("exp_avg", "exp_avg_sq")}


def test_a_loss_that_is_not_finite_ends_the_run_and_says_where(corpus: Path, tmp_path: Path) -> None:
    plan = recipe(corpus, PEERS)
    plan["optimizer"] = {"lr": 1e30, "max_grad_norm": 0.0}
    plan["schedule"] = {"warmup_fraction": 0.0}
    with pytest.raises(
        AssertionError,
        match=r"RunFailure: step \d+: .* = nan.*in a micro-batch of the rows \d+, .*optimizer did not move",
    ):
        run_jobs([Job(plan, tmp_path / "run")], 2, tmp_path)


@pytest.mark.nightly
def test_compiled_encoders_learn_the_same(corpus: Path, tmp_path: Path) -> None:
    """`training.compile`: losses as without it (dropout 0), weights under the same names."""
    peers = without_dropout({"teacher": {"model": bert(32, 1)}})
    plan, compiled = recipe(corpus, peers, steps=4), recipe(corpus, peers, steps=4, compile=True)
    run_jobs([Job(plan, tmp_path / "plain"), Job(compiled, tmp_path / "compiled")], 1, tmp_path)
    a, b = metrics(tmp_path / "plain"), metrics(tmp_path / "compiled")
    for step, row in a.items():
        for key in (k for k in row if k.startswith("loss/")):
            assert b[step][key] == pytest.approx(row[key], abs=1e-5)
    assert final_weights(tmp_path / "plain")["teacher"].keys() == final_weights(tmp_path / "compiled")["teacher"].keys()
    assert all(0 < row["mfu"] < 1 and row["memory_gib"] > 0 for row in a.values())


def test_a_run_goes_on_with_any_number_of_ranks(corpus: Path, tmp_path: Path) -> None:
    """1 → 2 → 1 → 4 ranks, dropout 0, a frozen teacher among the peers: the losses of the uninterrupted run."""
    from transformers import AutoTokenizer, BertConfig, BertForMaskedLM

    peers = without_dropout(PEERS)
    finished = {key: value for key, value in peers["teacher"]["model"].items() if key != "model_type"}
    torch.manual_seed(0)
    BertForMaskedLM(BertConfig(vocab_size=300, **finished)).save_pretrained(tmp_path / "finished")
    AutoTokenizer.from_pretrained(corpus / "tokenizer").save_pretrained(tmp_path / "finished")
    peers["master"] = {"pretrained": str(tmp_path / "finished"), "frozen": True}
    peers["student"] |= {"soft": {"teacher": 2.0, "master": 2.0}}
    plan = recipe(corpus, peers, steps=8, checkpoint_every=2, keep_checkpoints=9)
    run_jobs([Job(plan, tmp_path / "whole"), Job(plan, tmp_path / "cut")], 1, tmp_path)
    for step, world in ((2, 2), (4, 1), (6, 4)):
        for later in range(step + 2, 9, 2):
            drop_checkpoint(tmp_path / "cut", later)
        run_jobs([Job(plan, tmp_path / "cut", resume=True)], world, tmp_path)
    whole, cut = metrics(tmp_path / "whole"), metrics(tmp_path / "cut")
    for step, row in whole.items():
        for key in (k for k in row if k.startswith(("loss/", "valid/"))):
            assert cut[step][key] == pytest.approx(row[key], rel=1e-5, abs=1e-5), (step, key)
    assert not list((tmp_path / "cut" / "checkpoints").glob(".*")), "the converted checkpoint is gone after use"


def test_weights_that_change_are_no_edge_where_they_are_0_and_resume_bit_for_bit(corpus: Path, tmp_path: Path) -> None:
    """One edge begins late and ends early, the other rises from 0: before, each peer is as without soft losses."""
    courses = {
        "teacher": {**PEERS["teacher"], "soft": {"student": {"first": 1, "then": 0, "after": 0.75}}},
        "student": {**PEERS["student"], "soft": {"teacher": {"then": 4, "after": 0.125, "over": 0.5}}},
        "second": {**PEERS["student"], "soft": {"teacher": {"then": 4, "after": 0.5}}},
    }
    plan = recipe(corpus, courses, checkpoint_every=3)
    alone = {name: peer for name, peer in without_soft(courses).items() if name != "teacher"}
    run_jobs([Job(plan, tmp_path / "run"), Job(recipe(corpus, alone), tmp_path / "never")], 2, tmp_path)
    ours, never, weights = metrics(tmp_path / "run"), metrics(tmp_path / "never"), final_weights(tmp_path / "run")
    seen = {(one, other): [step for step in ours if f"loss/{one}/soft/{other}" in ours[step]]
            for one, other in (("teacher", "student"), ("student", "teacher"), ("second", "teacher"))}  # fmt: skip
    assert list(seen.values()) == [[1, 2, 3, 4, 5, 6], [3, 4, 5, 6, 7, 8], [5, 6, 7, 8]]
    for peer, last in (("student", 2), ("second", 4)):
        same = [step for step in ours if ours[step][f"grad_norm/{peer}"] == never[step][f"grad_norm/{peer}"]]
        assert same == list(range(1, last + 1)), peer

    for step in (6, 8):
        drop_checkpoint(tmp_path / "run", step)
    run_jobs([Job(plan, tmp_path / "run", resume=True)], 2, tmp_path)
    again = metrics(tmp_path / "run")
    for step, row in ours.items():
        for key in (k for k in row if k.startswith(("loss/", "grad_norm/", "valid/"))):
            assert again[step][key] == row[key], (step, key)
    for peer, state in final_weights(tmp_path / "run").items():
        assert equal_states(state, weights[peer])


@pytest.fixture(scope="module")
def own_masks(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Peers with masks and noise of their own: alone and together without soft losses, and CTCD at several cuts."""
    folder, peers = tmp_path_factory.mktemp("masks"), without_dropout(PEERS)
    peers["teacher"] |= {"label_noise": 0.2}
    peers["student"] |= {"mask_seed": 7, "mask_fraction": 0.3}
    for world in (1, 2):
        jobs = [
            Job({**recipe(corpus, peers), "objective": {"soft_positions": where}}, folder / f"{where}-{world}", config)
            for where in ("targets", "all")
            for config in [{**FP32, "gradient_accumulation_steps": 4 // world}]
        ]
        if world == 2:
            config = {**FP32, "gradient_accumulation_steps": 2}
            jobs.append(Job(recipe(corpus, without_soft(peers)), folder / "together", config))
            jobs += [Job(recipe(corpus, {n: p}), folder / n, config) for n, p in without_soft(peers).items()]
            jobs.append(Job(recipe(corpus, peers, checkpoint_every=3), folder / "cut", config))
        run_jobs(jobs, world, folder)
    expected = metrics(folder / "cut")
    for step in (6, 8):
        drop_checkpoint(folder / "cut", step)
    run_jobs([Job(recipe(corpus, peers, checkpoint_every=3), folder / "cut", config, resume=True)], 2, folder)
    (folder / "expected.json").write_text(json.dumps(expected[8]))
    return folder


@pytest.mark.parametrize("peer", ["teacher", "student"])
def test_with_masks_and_noise_of_its_own_a_peer_without_soft_weights_trains_as_if_alone(
    own_masks: Path, peer: str
) -> None:
    ours, theirs = metrics(own_masks / "together"), metrics(own_masks / peer)
    for step in ours:
        for key in (f"loss/{peer}/hard", f"grad_norm/{peer}"):
            assert ours[step][key] == theirs[step][key], (step, key)
    assert equal_states(final_weights(own_masks / "together")[peer], final_weights(own_masks / peer)[peer])


@pytest.mark.parametrize("where", ["targets", "all"])
def test_two_masks_have_the_same_losses_at_any_number_of_ranks(own_masks: Path, where: str) -> None:
    """The soft positions of a batch are many or few: what counts is their number over all ranks and micro-steps."""
    one, two = metrics(own_masks / f"{where}-1"), metrics(own_masks / f"{where}-2")
    for step, row in one.items():
        for key in (k for k in row if k.startswith(("loss/", "valid/"))):
            assert row[key] == pytest.approx(two[step][key], abs=1e-5), (step, key)
    assert one[8]["loss/student/soft/teacher"] > 0


def test_a_run_with_two_masks_is_resumed_bit_for_bit(own_masks: Path) -> None:
    found, expected = metrics(own_masks / "cut")[8], json.loads((own_masks / "expected.json").read_text())
    assert all(found[key] == expected[key] for key in expected if key.startswith(("loss/", "grad_norm/", "valid/")))
