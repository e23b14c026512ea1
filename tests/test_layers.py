"""A student that begins as some layers of a model: every architecture in its own words, every weight in its place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

from corpora import random_documents, write_corpus
from ctcd_ds.cli import UserError
from ctcd_ds.corpus.rows import Corpus
from ctcd_ds.peers.build import build_peers, config_mistakes, weights_sha256
from ctcd_ds.peers.layers import from_layers, with_layers
from ctcd_ds.recipe.mistakes import recipe_mistakes
from ctcd_ds.recipe.sections import PeerSection
from runs import bert

DEPTH = 6
SIZES = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": DEPTH, "intermediate_size": 48}
ENDS = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3}
MODELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "bert": (AutoModelForMaskedLM, SIZES),
    "distilbert": (AutoModelForMaskedLM, {"dim": 32, "n_layers": DEPTH, "n_heads": 4, "hidden_dim": 48}),
    "modernbert": (AutoModelForMaskedLM, {**SIZES, **ENDS}),
    "gpt2": (AutoModelForCausalLM, {"n_embd": 32, "n_layer": DEPTH, "n_head": 4, "bos_token_id": 2, "eos_token_id": 3}),
    "llama": (AutoModelForCausalLM, {**SIZES, "num_key_value_heads": 2}),
    "gemma3_text": (AutoModelForCausalLM, {**SIZES, "num_key_value_heads": 2, "head_dim": 8}),  # lists kinds of layers
    "t5": (AutoModelForSeq2SeqLM, {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": DEPTH, "num_heads": 4}),
    "bart": (AutoModelForSeq2SeqLM, {"d_model": 32, "encoder_layers": DEPTH, "decoder_layers": DEPTH,
                                     "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "encoder_attention_heads": 4,
                                     "decoder_attention_heads": 4}),
}  # fmt: skip


def built(kind: str) -> tuple[Any, Any]:
    """(Auto class, a model of six layers, no weight of which is like another)."""
    auto, settings = MODELS[kind]
    torch.manual_seed(0)
    model = auto.from_config(AutoConfig.for_model(kind, vocab_size=64, **settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.empty_like(parameter).uniform_(-0.1, 0.1))
    return auto, model


def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(5, 45).view(2, 20)
    with torch.no_grad():
        return model.eval()(
            input_ids=ids, **({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})
        ).logits


@pytest.mark.parametrize("kind", MODELS)
def test_all_layers_are_the_model_and_half_of_them_a_smaller_one(kind: str, tmp_path: Path) -> None:
    auto, source = built(kind)
    assert torch.equal(logits(from_layers(source, range(DEPTH), auto)), logits(source))
    student = from_layers(source, (0, 2, 5), auto)
    numbers = sum(p.numel() for p in source.parameters())
    assert student.config.num_hidden_layers == 3 and sum(p.numel() for p in student.parameters()) < numbers
    student.save_pretrained(tmp_path)
    reloaded = auto.from_pretrained(tmp_path)
    assert reloaded.config.num_hidden_layers == 3
    assert torch.equal(logits(reloaded), logits(student)) and not torch.equal(logits(student), logits(source))


def test_each_layer_is_the_one_that_was_named_and_all_else_stays() -> None:
    auto, source = built("bert")
    theirs, ours = source.state_dict(), from_layers(source, (1, 4), auto).state_dict()
    for name, tensor in ours.items():
        there = name.replace("layer.0.", "layer.one.").replace("layer.1.", "layer.4.").replace("layer.one.", "layer.1.")
        assert torch.equal(tensor, theirs[there]), name
    assert {name for name in theirs if "layer." not in name} == {name for name in ours if "layer." not in name}


def test_the_kinds_of_layers_are_those_of_the_layers() -> None:
    config = AutoConfig.for_model("gemma3_text", **MODELS["gemma3_text"][1])
    assert set(config.layer_types) == {"sliding_attention", "full_attention"}
    assert with_layers(config, (1, 5)).layer_types == [config.layer_types[1], config.layer_types[5]]


@pytest.mark.parametrize(
    ("kind", "layers", "said"),
    [
        ("bert", (0, 6), "layer 6: there are 6 layers, 0 to 5"),
        ("t5", (1, 2), "relative_attention_bias"),  # only the first layer has it
        ("modernbert", (2, 4), "has no place"),  # the first layer has no norm before its attention
        ("albert", (0, 2), "cannot be told"),  # all layers are one
        ("funnel", (0, 1), "not its own to set"),  # computed from the sizes of its blocks
    ],
)
def test_layers_that_cannot_be_taken_are_named(kind: str, layers: tuple[int, ...], said: str) -> None:
    if kind in MODELS:
        auto, source = built(kind)
    else:
        sizes = {"d_model": 32, "d_head": 8, "n_head": 4, "d_inner": 48} if kind == "funnel" else SIZES
        auto = AutoModelForMaskedLM
        source = auto.from_config(AutoConfig.for_model(kind, vocab_size=64, **sizes))
    with pytest.raises(UserError, match=said):
        from_layers(source, layers, auto)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    folder = tmp_path_factory.mktemp("layers") / "corpus"
    return Corpus.open(write_corpus(folder, random_documents(20, 300), vocab_size=300))


def sections(**peers: dict[str, Any]) -> dict[str, PeerSection]:
    return {name: PeerSection.model_validate(peer) for name, peer in peers.items()}


def test_a_peer_gives_its_own_start_and_its_student_may_give_it_on(corpus: Corpus) -> None:
    source = {"model": bert(32, 4)}
    run = sections(
        grandchild={"init_from": {"peer": "student", "layers": [1]}},
        student={"init_from": {"peer": "teacher", "layers": [0, 3]}},
        teacher=source,
    )
    found = build_peers(run, corpus, 1, AutoModelForMaskedLM)
    assert list(found) == list(run)
    alone = build_peers(sections(teacher=source), corpus, 1, AutoModelForMaskedLM)["teacher"]
    assert weights_sha256(found["teacher"]) == weights_sha256(alone)
    layer = "bert.encoder.layer.{}.output.dense.weight"
    last = alone.state_dict()[layer.format(3)]
    assert torch.equal(found["student"].state_dict()[layer.format(1)], last)
    assert torch.equal(found["grandchild"].state_dict()[layer.format(0)], last)
    assert found["student"].state_dict()[layer.format(1)].data_ptr() != last.data_ptr()


@pytest.mark.parametrize(
    ("student", "said"),
    [
        ({"init_from": {"peer": "teacher", "layers": [0, 2]}}, ()),
        ({"init_from": {"peer": "teacher", "layers": [0, 2]}, "model": bert(32, 2)}, ()),
        (
            {"init_from": {"peer": "teacher", "layers": [0, 2]}, "model": bert(64, 2)},
            ("model.hidden_size = 64: 32 where its layers come from", "model.intermediate_size = 128: 64 where"),
        ),
        (
            {"init_from": {"peer": "teacher", "layers": [0, 4]}},
            ("init_from.layers = [0, 4]: layer 4: there are 4 layers",),
        ),
        ({"init_from": {"pretrained": "/no/such/place", "layers": [0]}}, ("init_from.pretrained = '/no/such/place'",)),
        ({"init_from": {"peer": "albert", "layers": [0]}}, ("init_from.layers = [0]: its layers cannot be told",)),
    ],
)
def test_what_does_not_fit_the_source_is_said(corpus: Corpus, student: dict[str, Any], said: tuple[str, ...]) -> None:
    run = sections(
        teacher={"model": bert(32, 4)},
        albert={"model": {**bert(32, 4), "model_type": "albert", "embedding_size": 16}},
        student=student,
    )
    found = [*config_mistakes(run["student"], corpus, 24, AutoModelForMaskedLM, run)]
    assert [fragment in mistake for fragment, mistake in zip(said, found, strict=True)] == [True] * len(said), found


@pytest.mark.parametrize(
    ("peers", "said"),
    [
        ({"a": {"init_from": {"peer": "x", "layers": [0]}}}, "peers.a.init_from.peer = 'x': no peer has this name"),
        (
            {"a": {"init_from": {"peer": "b", "layers": [0]}}, "b": {"init_from": {"peer": "a", "layers": [0]}}},
            "a circle (a from b from a)",
        ),
        ({"a": {"init_from": {"peer": "a", "layers": [0]}}}, "a circle (a from a)"),
        ({"a": {"init_from": {"layers": [0]}}}, "peers.a.init_from: exactly one of peer"),
        ({"a": {"init_from": {"pretrained": "d", "peer": "b", "layers": [0]}}, "b": {}}, "exactly one of peer"),
        ({"a": {"init_from": {"pretrained": "d", "layers": []}}}, "peers.a.init_from.layers = []"),
        (
            {"a": {"init_from": {"pretrained": "d", "layers": [2, 0]}}},
            "name each layer once, from the first to the last",
        ),
        ({"a": {"init_from": {"pretrained": "d", "layers": [-1]}}}, "greater than or equal to 0"),
        ({"a": {"init_from": {"pretrained": "d"}}}, "peers.a.init_from.layers: missing"),
        ({"a": {"init_from": {"pretrained": "d", "layers": [0], "layer": 1}}}, "did you mean 'layers'?"),
        (
            {"a": {"pretrained": "d", "init_from": {"pretrained": "d", "layers": [0]}}},
            "given: pretrained and init_from",
        ),
        (
            {"a": {"frozen": True, "init_from": {"pretrained": "d", "layers": [0]}}, "b": {}},
            "say which with pretrained",
        ),
    ],
)
def test_a_mistake_in_the_recipe_is_one_message(peers: dict[str, Any], said: str) -> None:
    peers = {name: peer or {"model": bert(32, 4)} for name, peer in peers.items()}
    found = recipe_mistakes({"corpus": {"path": "x"}, "training": {"steps": 1}, "peers": peers})
    assert [said in mistake for mistake in found] == [True], found
