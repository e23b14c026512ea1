"""Runs that begin from finished models: a frozen teacher, students of its layers, checkpoints of another vocabulary."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForMaskedLM, BertConfig, BertForMaskedLM

from ctcd_ds.corpus.rows import Corpus
from ctcd_ds.corpus.tokenizer import load_tokenizer
from ctcd_ds.export.hf import export
from ctcd_ds.measuring import peak_bytes
from ctcd_ds.peers.build import build_peer, build_peers
from ctcd_ds.recipe.schema import Mistakes
from ctcd_ds.recipe.sections import PeerSection, Recipe
from ctcd_ds.training.plan import describe, make_plan
from runs import BF16, FP32, Job, bert, chain_corpus, drop_checkpoint, final_weights, finish, metrics, run_jobs

AUTO = AutoModelForMaskedLM
ROWS = 352  # of the finished models' tables, for 300 tokens
STEPS = 6


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chain_corpus(tmp_path_factory.mktemp("finished") / "corpus")


def finished(corpus: Path, place: Path, layers: int = 4, width: int = 32, rows: int = ROWS) -> Path:
    """A finished model with the corpus's tokenizer and `rows` rows of the vocabulary."""
    settings = {key: value for key, value in bert(width, layers).items() if key != "model_type"}
    torch.manual_seed(5)
    model = BertForMaskedLM(BertConfig(vocab_size=rows, **settings))
    return finish(model, corpus, place)


def recipe(corpus: Path, peers: dict[str, Any], **training: Any) -> dict[str, Any]:
    return {
        "corpus": {"path": str(corpus), "sequence_length": 32},
        "peers": peers,
        "optimizer": {"lr": 1e-3},
        "training": {"global_batch_rows": 8, "steps": STEPS, "valid_every": 3, "valid_rows": 16, "log_every": 1,
                     "checkpoint_every": 3, **training},
    }  # fmt: skip


@pytest.fixture(scope="module")
def runs(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One frozen teacher with three students, each with another beginning; the same with activation checkpointing."""
    folder = tmp_path_factory.mktemp("runs")
    finished(corpus, folder / "teacher"), finished(corpus, folder / "origin")
    peers = {
        "few": {"init_from": {"peer": "teacher", "layers": [0, 3]}, "soft": {"teacher": 2.0}},
        "teacher": {"pretrained": str(folder / "teacher"), "frozen": True},
        "other": {"init_from": {"pretrained": str(folder / "origin"), "layers": [1, 2]}, "soft": {"teacher": 2.0}},
        "whole": {"pretrained": str(folder / "origin"), "soft": {"few": 1.0}},
    }
    jobs = [
        Job(recipe(corpus, peers), folder / "plain"),
        Job(recipe(corpus, peers, activation_checkpointing=True), folder / "checkpointing"),
        Job(recipe(corpus, peers, activation_checkpointing=True), folder / "half", BF16),
    ]
    run_jobs(jobs, 1, folder)
    # As if the run had been cut off, and what its trained peers began from had gone since.
    shutil.copytree(folder / "plain", folder / "again")
    drop_checkpoint(folder / "again", STEPS)
    shutil.rmtree(folder / "origin")
    run_jobs([Job(recipe(corpus, peers), folder / "again", resume=True)], 1, folder)
    return folder


def test_the_losses_of_a_run_are_the_same_with_activation_checkpointing(runs: Path) -> None:
    computed = re.compile("loss|grad_norm|accuracy")
    rows = [
        {step: {key: value for key, value in row.items() if computed.search(key)} for step, row in found.items()}
        for found in map(metrics, (runs / "plain", runs / "checkpointing"))
    ]
    assert rows[0] == rows[1] and len(rows[0]) == STEPS and len(rows[0][3]) >= 15


def test_all_students_learn_in_bf16_from_one_frozen_teacher(runs: Path) -> None:
    rows = metrics(runs / "half")
    for name in ("few", "other", "whole"):
        assert rows[STEPS][f"valid/{name}/loss"] < rows[3][f"valid/{name}/loss"]


def test_a_run_goes_on_where_what_it_began_from_is_gone(runs: Path) -> None:
    assert not (runs / "origin").exists()
    there, again = final_weights(runs / "plain"), final_weights(runs / "again")
    assert there.keys() == again.keys() == {"few", "other", "whole"}
    assert all(torch.equal(t, again[peer][name]) for peer, state in there.items() for name, t in state.items())


def test_an_export_has_the_rows_that_the_checkpoint_had(runs: Path, tmp_path: Path) -> None:
    for source in ("plain", "again"):
        places = export(runs / source, "all", tmp_path / source)
        for name, layers in (("few", 2), ("other", 2), ("whole", 4)):
            model = AUTO.from_pretrained(places[name])
            assert (model.config.vocab_size, model.config.num_hidden_layers) == (ROWS, layers)
            assert model.get_output_embeddings().weight.shape == (ROWS, 32)
            assert "exported_vocab_size" not in (places[name] / "config.json").read_text()
            assert len(load_tokenizer(places[name])) == 300
    assert "layers 0, 3 of teacher" in (tmp_path / "plain" / "few" / "README.md").read_text()


@pytest.mark.parametrize("rows", [300, 320, 352])
def test_a_frozen_peer_is_read_once_in_the_dtype_of_the_run(
    corpus: Path, tmp_path: Path, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of it is in memory beside its weights, but one table that grows: all other models of it have none."""
    place = finished(corpus, tmp_path / "teacher", layers=6, width=128, rows=rows)
    AUTO.from_pretrained(place, dtype=torch.bfloat16).save_pretrained(place)  # as large teachers are published
    made, plain, built = [], BertForMaskedLM.__init__, []

    def noting(model: Any, *arguments: Any, **named: Any) -> None:
        made.append(torch.empty(0).device.type)
        plain(model, *arguments, **named)

    def build() -> None:
        section = PeerSection(pretrained=str(place), frozen=True)
        built.append(build_peer("t", section, Corpus.open(corpus), 1, AUTO, torch.bfloat16))

    monkeypatch.setattr(BertForMaskedLM, "__init__", noting)
    peak = peak_bytes(build, torch.device("cpu"))
    (model,) = built
    assert made and set(made) == {"meta"}
    assert {(p.dtype, p.requires_grad) for p in model.parameters()} == {(torch.bfloat16, False)}
    assert peak < 1.25 * 2 * sum(p.numel() for p in model.parameters())
    before = AUTO.from_pretrained(place).state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor[tuple(slice(size) for size in before[name].shape)], before[name]), name


def test_a_student_of_a_frozen_peer_is_fp32_and_keeps_no_second_copy(corpus: Path, tmp_path: Path) -> None:
    place = finished(corpus, tmp_path / "teacher")
    sections = {
        "student": PeerSection.model_validate({"init_from": {"peer": "teacher", "layers": [1, 3]}}),
        "teacher": PeerSection(pretrained=str(place), frozen=True),
    }
    peers = build_peers(sections, Corpus.open(corpus), 1, AUTO, torch.bfloat16)
    layer = "bert.encoder.layer.{}.output.dense.weight"
    ours, theirs = (peers[name].state_dict() for name in ("student", "teacher"))
    assert ours[layer.format(1)].dtype == torch.float32 and all(p.requires_grad for p in peers["student"].parameters())
    assert torch.equal(ours[layer.format(1)].to(torch.bfloat16), theirs[layer.format(3)])


def plan(corpus: Path, place: Path, peers: dict[str, Any]) -> Any:
    return make_plan(Recipe.model_validate(recipe(corpus, peers)), FP32, 1, "cpu", place / "run")


def test_tokens_of_the_corpus_that_a_checkpoint_does_not_know_are_new_or_refused(corpus: Path, tmp_path: Path) -> None:
    smaller = finished(corpus, tmp_path / "finished", rows=290)  # its tables are smaller than its tokenizer
    made = plan(corpus, tmp_path, {"a": {"pretrained": str(smaller)}})
    assert made.new_tokens["a"] == list(range(290, 300))
    assert "a: 10 tokens its checkpoint does not know begin as the mean of the others" in describe(made)
    table = (
        build_peers(made.sections, made.corpus, 1, AUTO, new_tokens=made.new_tokens)["a"].get_input_embeddings().weight
    )
    assert torch.allclose(table[295], table[:290].mean(0), atol=1e-6)
    with pytest.raises(Mistakes, match="lacks 10 tokens of the corpus's, and a frozen peer teaches what it knows"):
        plan(corpus, tmp_path, {"t": {"pretrained": str(smaller), "frozen": True}, "s": {"model": bert(32, 1)}})


def test_the_plan_says_where_everyone_begins(corpus: Path, tmp_path: Path) -> None:
    place = finished(corpus, tmp_path / "finished")
    peers = {"a": {"pretrained": str(place)}, "b": {"init_from": {"peer": "a", "layers": [0, 2]}}}
    said = describe(plan(corpus, tmp_path, peers))
    assert "layers 0, 2 of a" in said and str(place) in said
    assert "a: its 352 rows of the vocabulary stay, 300 of them are tokens" in said
