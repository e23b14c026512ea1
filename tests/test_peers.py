"""Peers of any architecture: the head at chosen positions equals the whole model there; the vocabulary is padded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from corpora import write_corpus
from ctcd_ds.cli import UserError
from ctcd_ds.corpus.rows import Corpus
from ctcd_ds.objective.batch import Batch
from ctcd_ds.peers.accounting import cost
from ctcd_ds.peers.build import build_peer, config_mistakes, frozen_sha256, peer_config, weights_sha256
from ctcd_ds.peers.cotrain import CoTraining
from ctcd_ds.recipe.sections import OptimizerSection, PeerSection, Recipe
from runs import bert, chain_documents

VOCABULARY, LENGTH = 300, 24
SMALL: dict[str, dict[str, Any]] = {
    "bert": bert(32, 2),
    "roberta": {**bert(32, 2), "model_type": "roberta", "type_vocab_size": 1},
    "xlm-roberta": {**bert(32, 2), "model_type": "xlm-roberta", "type_vocab_size": 1},
    "camembert": {**bert(32, 2), "model_type": "camembert", "type_vocab_size": 1},
    "distilbert": {"model_type": "distilbert", "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64},
    "electra": {**bert(32, 2), "model_type": "electra", "embedding_size": 16},
    "modernbert": {
        "model_type": "modernbert",
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "max_position_embeddings": 64,
    },
    "albert": {**bert(32, 2), "model_type": "albert", "embedding_size": 16},
    "mpnet": {**bert(32, 2), "model_type": "mpnet"},  # positions begin after the padding id
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    folder = tmp_path_factory.mktemp("peers") / "corpus"
    return Corpus.open(write_corpus(folder, chain_documents(40, VOCABULARY), vocab_size=VOCABULARY))


def peer(corpus: Corpus, name: str = "teacher", **section: Any) -> Any:
    return build_peer(name, PeerSection.model_validate(section), corpus, 1, AutoModelForMaskedLM)


def batch(peers: int) -> Batch:
    """Five positions of `inputs`, asked of each peer."""
    ids, positions = inputs()
    labels = torch.full_like(ids, -100).flatten()
    labels[positions] = ids.flatten()[positions]
    return Batch.of({"input_ids": ids}, labels.view(ids.shape), peers)


def inputs(rows: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(5, VOCABULARY, (rows, LENGTH), generator=g)
    return ids, torch.tensor([1, 2, 7, LENGTH, 2 * LENGTH + 5])


@pytest.mark.parametrize("kind", SMALL)
def test_every_architecture_gets_gradients_and_keeps_its_tied_weights(corpus: Corpus, kind: str) -> None:
    section = PeerSection.model_validate({"model": SMALL[kind]})
    graph = Recipe.model_validate(
        {"corpus": {"path": "x"}, "peers": {"a": {"model": SMALL[kind]}}, "training": {"steps": 1}}
    ).graph()
    module = CoTraining({"a": build_peer("a", section, corpus, 1, AutoModelForMaskedLM)}, graph, VOCABULARY, seed=1)
    losses = module(batch(1), 0, 0)
    losses.total.backward()
    assert torch.isfinite(losses.total)
    assert losses.total.item() == pytest.approx(float(torch.log(torch.tensor(float(VOCABULARY)))), rel=0.1)
    model = module.peers["a"]
    embedding = model.get_input_embeddings().weight
    assert model.get_output_embeddings().weight is embedding
    assert (embedding.grad[VOCABULARY:] == 0).all(), "padding rows must never learn"
    assert all(p.grad is not None for p in model.parameters())


def test_initialisation_is_keyed_by_name_and_seed_and_not_by_company(corpus: Corpus) -> None:
    one, again = peer(corpus, model=bert(32, 2)), peer(corpus, model=bert(32, 2))
    other = peer(corpus, name="student", model=bert(32, 2))
    assert weights_sha256(one) == weights_sha256(again) != weights_sha256(other)


def test_a_frozen_peer_is_hashed_once() -> None:
    peer = torch.nn.Linear(2, 2)
    before = frozen_sha256(peer)
    assert before == weights_sha256(peer)
    torch.nn.init.zeros_(peer.weight)
    assert frozen_sha256(peer) == before != weights_sha256(peer)


def test_a_pretrained_peer_starts_from_its_checkpoint_in_a_padded_vocabulary(corpus: Corpus, tmp_path: Path) -> None:
    from transformers import BertConfig, BertForMaskedLM

    source = BertForMaskedLM(
        BertConfig(vocab_size=VOCABULARY, **{k: v for k, v in bert(32, 2).items() if k != "model_type"})
    )
    source.cls.predictions.bias.data.normal_()
    source.save_pretrained(tmp_path)
    model = peer(corpus, pretrained=str(tmp_path), frozen=True).eval()
    ids, _ = inputs()
    with torch.no_grad():
        found, expected = model(input_ids=ids).logits, source.eval()(input_ids=ids).logits
    torch.testing.assert_close(found[..., :VOCABULARY], expected)
    assert model.config.vocab_size == 320
    assert not any(p.requires_grad for p in model.parameters())


def test_a_frozen_peer_stays_in_eval_mode_and_is_not_optimised(corpus: Corpus) -> None:
    peers = {"teacher": {"pretrained": "d", "frozen": True}, "student": {"model": bert(32, 2), "soft": {"teacher": 4}}}
    graph = Recipe.model_validate({"corpus": {"path": "x"}, "peers": peers, "training": {"steps": 1}}).graph()
    teacher = peer(corpus, model=bert(32, 3)).requires_grad_(False)
    module = CoTraining({"teacher": teacher, "student": peer(corpus, "student", model=bert(32, 2))}, graph, 300, 1)
    module.train()
    assert not module.peers["teacher"].training and module.peers["student"].training
    groups = module.parameter_groups({"student": OptimizerSection(), "teacher": OptimizerSection()})
    assert {group["peer"] for group in groups} == {"student"}
    module(batch(2), 0, 0).total.backward()
    assert all(p.grad is None for p in module.peers["teacher"].parameters())
    assert all(p.grad is not None for p in module.peers["student"].parameters())


def test_biases_and_norms_have_no_weight_decay(corpus: Corpus) -> None:
    graph = Recipe.model_validate(
        {"corpus": {"path": "x"}, "peers": {"a": {"model": bert(32, 2)}}, "training": {"steps": 1}}
    ).graph()
    module = CoTraining({"a": peer(corpus, "a", model=bert(32, 2))}, graph, 300, 1)
    decayed, plain = module.parameter_groups({"a": OptimizerSection(weight_decay=0.1)})
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert all(p.ndim == 2 for p in decayed["params"]) and all(p.ndim == 1 for p in plain["params"])
    assert len(decayed["params"]) + len(plain["params"]) == len(list(module.parameters()))


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ({"model_type": "brt"}, "did you mean 'bert'?"),
        ({"model_type": "bert", "hiden_size": 32}, "did you mean 'hidden_size'?"),
        ({"model_type": "bert", "hidden_size": 30, "num_attention_heads": 4}, "does not divide hidden_size = 30"),
        ({"model_type": "bert", "max_position_embeddings": 16}, "less than corpus.sequence_length = 24"),
        ({"model_type": "bert", "hidden_size": "wide"}, "expected int"),
        ({"model_type": "gpt2"}, "no head for this task in transformers (AutoModelForMaskedLM)"),
    ],
)
def test_what_is_wrong_with_a_model_is_said_before_it_is_built(
    corpus: Corpus, model: dict[str, Any], said: str
) -> None:
    found = list(config_mistakes(PeerSection(model=model), corpus, LENGTH, AutoModelForMaskedLM))
    assert any(said in mistake for mistake in found), found


def test_key_heads_that_are_left_out_are_those_of_a_large_model(corpus: Corpus) -> None:
    small = {"model_type": "qwen2", "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1}
    config = peer_config(PeerSection(model=small), corpus, AutoModelForCausalLM)
    with pytest.raises(UserError, match="num_key_value_heads = 32 does not divide num_attention_heads = 4; give both"):
        cost(config, LENGTH, LENGTH, AutoModelForCausalLM)


def test_parameters_and_flops_are_those_of_the_models(corpus: Corpus) -> None:
    """Forward FLOPs against torch's own counter; heads on all positions, so that the counter sees the same work."""
    from torch.utils.flop_counter import FlopCounterMode

    for kind in ("bert", "distilbert", "electra", "roberta", "albert"):
        section = PeerSection(model=SMALL[kind])
        config, model = peer_config(section, corpus, AutoModelForMaskedLM), peer(corpus, model=SMALL[kind]).eval()
        found = cost(config, LENGTH, LENGTH, AutoModelForMaskedLM)
        assert found.parameters == sum(p.numel() for p in model.parameters())
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            ids, _ = inputs(rows=2)
            with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
                model(input_ids=ids)
        assert counter.get_total_flops() / ids.numel() == pytest.approx(found.forward_flops, rel=0.02), kind


def test_a_head_at_some_positions_costs_their_share(corpus: Corpus) -> None:
    config = peer_config(PeerSection(model=SMALL["bert"]), corpus, AutoModelForMaskedLM)
    whole, half = (cost(config, LENGTH, asked, AutoModelForMaskedLM).forward_flops for asked in (LENGTH, LENGTH // 2))
    assert whole - half == 0.5 * 2 * (32 * 32 + 32 * 320)
