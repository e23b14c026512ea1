"""What co-training promises holds for every task: real runs of two different architectures each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ctcd_ds.corpus.rows import Corpus
from ctcd_ds.export.hf import export
from ctcd_ds.objective.graph import DistillationGraph
from ctcd_ds.objective.reference import reference_objective
from ctcd_ds.peers.build import build_peer
from ctcd_ds.peers.cotrain import CoTraining
from ctcd_ds.recipe.sections import PeerSection, Recipe
from ctcd_ds.tasks import TASKS
from ctcd_ds.tasks.loader import Cut
from runs import BF16, FP32, Job, chain_corpus, drop_checkpoint, final_weights, finish, metrics, run_jobs

ACCUMULATED = {**FP32, "gradient_accumulation_steps": 2}
LLAMA = {
    "model_type": "llama", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
    "max_position_embeddings": 64,
}  # fmt: skip
GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 64}
T5 = {
    "model_type": "t5", "d_model": 32, "num_layers": 2, "num_heads": 4, "d_kv": 8, "d_ff": 64, "dropout_rate": 0.0,
}  # fmt: skip
BART = {
    "model_type": "bart", "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 64,
}  # fmt: skip
PEERS: dict[str, dict[str, dict[str, Any]]] = {
    "clm": {"teacher": LLAMA, "student": GPT2},
    "span": {"teacher": T5, "student": BART},
}


def peers_of(task: str, soft: bool = True, **settings: Any) -> dict[str, Any]:
    """Both peers of a task, the student with dropout unless `settings` say otherwise; with their soft losses or not."""
    teacher, student = PEERS[task].values()
    weights = ({"student": 1.0}, {"teacher": 4.0}) if soft else ({}, {})
    return {
        "teacher": {"model": teacher, "soft": weights[0]},
        "student": {"model": {**student, **settings}, "soft": weights[1], "optimizer": {"lr": 2e-3}},
    }


def recipe(corpus: Path, task: str, peers: dict[str, Any], steps: int = 6, **training: Any) -> dict[str, Any]:
    return {
        "corpus": {"path": str(corpus), "sequence_length": 32},
        "objective": {"task": task},
        "peers": peers,
        "optimizer": {"lr": 1e-3, "max_grad_norm": 1.0},
        "training": {"global_batch_rows": 16, "steps": steps, "log_every": 1, "valid_every": 3, **training},
    }


STILL: dict[str, dict[str, Any]] = {  # the student's dropout off
    "clm": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "span": {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0},
}


def finished(corpus: Path, place: Path) -> Path:
    """A causal model that knows something else than what it would be initialised with."""
    torch.manual_seed(5)
    model = build_peer("teacher", PeerSection(model=LLAMA), Corpus.open(corpus), 3, AutoModelForCausalLM)
    return finish(model, corpus, place)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of every task: both peers without soft losses, together and each alone, and CTCD cut in several ways.

    And students of a finished causal model that is frozen, in bf16.
    """
    folder = tmp_path_factory.mktemp("tasks")
    corpus = chain_corpus(folder / "corpus", sentinels=16)
    students = {
        "teacher": {"pretrained": str(finished(corpus, folder / "teacher")), "frozen": True},
        "same": {"init_from": {"peer": "teacher", "layers": [0, 1]}, "soft": {"teacher": 4.0}},
        "half": {"init_from": {"peer": "teacher", "layers": [1]}, "soft": {"teacher": 4.0}},
    }
    frozen = recipe(corpus, "clm", students, checkpoint_every=2)
    one = [Job(frozen, folder / "frozen-one", BF16)]
    two = [Job(frozen, folder / f"frozen-{name}", BF16) for name in ("whole", "cut")]
    for task in PEERS:
        alone = peers_of(task, soft=False)
        two.append(Job(recipe(corpus, task, alone), folder / f"{task}-together", ACCUMULATED))
        two += [Job(recipe(corpus, task, {n: p}), folder / f"{task}-{n}", ACCUMULATED) for n, p in alone.items()]
        whole = recipe(corpus, task, peers_of(task), checkpoint_every=2)
        two += [Job(whole, folder / f"{task}-{name}", ACCUMULATED) for name in ("whole", "cut")]
        still = recipe(corpus, task, peers_of(task, **STILL[task]), checkpoint_every=3)
        two.append(Job(still, folder / f"{task}-2x1"))
        one += [Job(still, folder / f"{task}-1x2", ACCUMULATED), Job(still, folder / f"{task}-moved")]
    run_jobs(two, 2, folder)
    run_jobs(one, 1, folder)
    drop_checkpoint(folder / "frozen-cut", 6)
    again = [Job(frozen, folder / "frozen-cut", BF16, resume=True)]
    for task in PEERS:
        for step, name in ((6, "cut"), (4, "cut"), (6, "moved")):
            drop_checkpoint(folder / f"{task}-{name}", step)
        again.append(Job(recipe(corpus, task, peers_of(task), checkpoint_every=2), folder / f"{task}-cut", ACCUMULATED,
                         resume=True))  # fmt: skip
        still = recipe(corpus, task, peers_of(task, **STILL[task]), checkpoint_every=3)
        again.append(Job(still, folder / f"{task}-moved", resume=True))
    run_jobs(again, 2, folder)
    return folder


@pytest.mark.parametrize("task", PEERS)
@pytest.mark.parametrize("peer", ["teacher", "student"])
def test_without_soft_weights_a_peer_trains_as_if_alone_bit_for_bit(runs: Path, task: str, peer: str) -> None:
    together, alone = metrics(runs / f"{task}-together"), metrics(runs / f"{task}-{peer}")
    for step, row in together.items():
        for key in (f"loss/{peer}/hard", f"grad_norm/{peer}", f"valid/{peer}/loss"):
            assert row.get(key) == alone[step].get(key), (step, key)
    ours, theirs = (final_weights(runs / f"{task}-{name}")[peer] for name in ("together", peer))
    assert all(torch.equal(ours[key], theirs[key]) for key in ours | theirs)


@pytest.mark.parametrize("task", [*PEERS, "frozen"])
def test_a_killed_run_goes_on_bit_for_bit(runs: Path, task: str) -> None:
    whole, cut = metrics(runs / f"{task}-whole"), metrics(runs / f"{task}-cut")
    for step, row in whole.items():
        for key in (k for k in row if k.startswith(("loss/", "grad_norm/", "valid/"))):
            assert cut[step][key] == row[key], (step, key)
    ours, theirs = final_weights(runs / f"{task}-whole"), final_weights(runs / f"{task}-cut")
    assert all(torch.equal(ours[peer][key], theirs[peer][key]) for peer in ours for key in ours[peer])


@pytest.mark.parametrize("task", PEERS)
@pytest.mark.parametrize("other", ["1x2", "moved"])
def test_losses_do_not_depend_on_ranks_accumulation_and_a_move_to_other_ranks(
    runs: Path, task: str, other: str
) -> None:
    """`moved` began with one rank and went on with two."""
    for step, row in metrics(runs / f"{task}-2x1").items():
        for key in (k for k in row if k.startswith(("loss/", "valid/"))):
            assert metrics(runs / f"{task}-{other}")[step][key] == pytest.approx(row[key], rel=1e-5, abs=1e-5)


def test_a_causal_student_begins_as_layers_of_its_frozen_teacher_at_any_number_of_ranks(
    runs: Path, tmp_path: Path
) -> None:
    whole, one = metrics(runs / "frozen-whole"), metrics(runs / "frozen-one")
    assert whole[1]["loss/same/soft/teacher"] < 1e-6 < whole[1]["loss/half/soft/teacher"], "one is the teacher itself"
    assert whole[6]["loss/half/soft/teacher"] < whole[1]["loss/half/soft/teacher"]
    for key in (key for key in whole[1] if key.startswith("loss/")):
        assert whole[1][key] == pytest.approx(one[1][key], rel=1e-5, abs=1e-6), "of weights that are the same yet"
        assert whole[6][key] == pytest.approx(one[6][key], rel=0.02, abs=1e-3), key
    assert final_weights(runs / "frozen-cut").keys() == {"same", "half"}
    places = export(runs / "frozen-cut", "all", tmp_path)
    layers = {name: AutoConfig.from_pretrained(place).num_hidden_layers for name, place in places.items()}
    assert layers == {"same": 2, "half": 1}


@pytest.mark.parametrize("task", PEERS)
def test_a_step_agrees_with_the_formulas_and_no_gradient_crosses_over(runs: Path, task: str) -> None:
    """The whole module against plain forwards in fp32 and the objective in fp64; peers meet in detached targets."""
    raw = Recipe.model_validate(recipe(runs / "corpus", task, peers_of(task)))
    corpus = Corpus.open(runs / "corpus")
    asked = TASKS[task].of(raw, corpus)
    [batch] = Cut(4).batches(asked.rows("train"), asked, 1, 0)
    models = {name: build_peer(name, p, corpus, 1, asked.auto_class()).eval() for name, p in raw.peers.items()}
    graph = raw.graph()
    module = CoTraining(models, graph, corpus.vocab_size).eval()
    losses = module(batch, 0)
    losses.total.backward()
    found = {key: p.grad.clone() for key, p in module.named_parameters() if p.grad is not None}
    module.zero_grad(set_to_none=True)

    logits = [
        model(**view.inputs).logits.flatten(0, 1) for model, view in zip(models.values(), batch.views, strict=True)
    ]
    logits = [z if v.positions is None else z[v.positions] for z, v in zip(logits, batch.views, strict=True)]
    expected, hard, soft = reference_objective(
        [z[:, : corpus.vocab_size].double() for z in logits], batch.views[0].targets, graph
    )
    assert losses.total.item() == pytest.approx(expected.item(), rel=1e-6)
    assert losses.terms["loss/student/soft/teacher"].item() == pytest.approx(soft[1, 0].item(), rel=1e-5)
    assert losses.terms["loss/teacher/hard"].item() == pytest.approx(hard[0].item(), rel=1e-6)
    expected.backward()
    for key, parameter in module.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(found[key], parameter.grad, rtol=1e-4, atol=1e-6)

    module.zero_grad(set_to_none=True)
    only_soft = DistillationGraph.of({"teacher": {}, "student": {"teacher": 4.0}}, {"teacher": 0.0, "student": 0.0})
    module(batch, 0, graph=only_soft).total.backward()
    assert any(p.grad is not None and p.grad.any() for p in models["student"].parameters())
    assert all(p.grad is None or not p.grad.any() for p in models["teacher"].parameters())
