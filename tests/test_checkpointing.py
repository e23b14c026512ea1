"""Activation checkpointing: the same losses and gradients bit for bit, less memory, and what the dry run says of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

from architectures import tiny
from ctcd_ds.measuring import peak_bytes
from ctcd_ds.objective.batch import Batch
from ctcd_ds.objective.graph import DistillationGraph
from ctcd_ds.peers.accounting import cost
from ctcd_ds.peers.checkpointing import checkpoint_layers
from ctcd_ds.peers.cotrain import CoTraining
from ctcd_ds.peers.heads import project_positions
from ctcd_ds.recipe.schema import Mistakes
from ctcd_ds.recipe.sections import Recipe
from ctcd_ds.training.plan import describe, make_plan, memory_per_rank
from runs import FP32, bert, chain_corpus

VOCABULARY, LENGTH, ROWS = 512, 64, 4
SIZES = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 4, "intermediate_size": 256}
MODELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "bert": (AutoModelForMaskedLM, SIZES),
    "llama": (AutoModelForCausalLM, {**SIZES, "attention_dropout": 0.1, "use_cache": False}),
    "gpt2": (
        AutoModelForCausalLM,
        {"n_embd": 64, "n_layer": 4, "n_head": 4, "use_cache": False, "bos_token_id": 2, "eos_token_id": 3},
    ),
    "t5": (
        AutoModelForSeq2SeqLM,
        {"d_model": 64, "d_kv": 16, "d_ff": 256, "num_layers": 4, "num_heads": 4, "use_cache": False},
    ),
}


def together(kind: str) -> tuple[CoTraining, Batch]:
    """Two peers of one architecture that learn from each other, and a batch for them."""
    auto, settings = MODELS[kind]
    config = AutoConfig.for_model(kind, vocab_size=VOCABULARY, **settings)
    torch.manual_seed(0)
    peers = {name: auto.from_config(config) for name in ("one", "other")}
    graph = DistillationGraph(("one", "other"), (1.0, 1.0), ((0.0, 2.0), (1.0, 0.0)), (True, True))
    ids = torch.randint(5, VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))
    labels = torch.where(torch.arange(LENGTH) % 7 == 0, ids, -100)
    inputs = {"input_ids": ids, **({"decoder_input_ids": ids} if config.is_encoder_decoder else {})}
    module = CoTraining(peers, graph, VOCABULARY)
    module.train()
    return module, Batch.of(inputs, labels, 2)


def step(module: CoTraining, batch: Batch) -> tuple[torch.Tensor, list[torch.Tensor]]:
    module.zero_grad(set_to_none=True)
    total = module(batch, 3).total
    total.backward()
    return total.detach(), [p.grad for p in module.parameters() if p.grad is not None]


def same(one: tuple[torch.Tensor, list[torch.Tensor]], other: tuple[torch.Tensor, list[torch.Tensor]]) -> bool:
    return torch.equal(one[0], other[0]) and all(torch.equal(a, b) for a, b in zip(one[1], other[1], strict=True))


@pytest.mark.parametrize("kind", MODELS)
def test_losses_and_gradients_are_the_same_bit_for_bit_with_dropout_on(kind: str) -> None:
    module, batch = together(kind)
    before = step(module, batch)
    plain = peak_bytes(lambda: step(module, batch), torch.device("cpu"))
    module.checkpoint_activations()
    assert same(step(module, batch), before)
    assert peak_bytes(lambda: step(module, batch), torch.device("cpu")) < 0.6 * plain


def test_without_the_random_state_of_the_first_run_it_would_not_be() -> None:
    """The dropout of a layer that runs again is ours: it draws from what torch has put back."""
    module, batch = together("bert")
    before = step(module, batch)
    for peer in module.peers.values():
        peer.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    assert not same(step(module, batch), before)


def test_a_frozen_peer_has_no_backward_to_keep_anything_for() -> None:
    graph = DistillationGraph(("one", "other"), (1.0, 0.0), ((0.0, 2.0), (0.0, 0.0)), (True, False))
    whole, _ = together("bert")
    module = CoTraining(whole.peers, graph, VOCABULARY)
    module.checkpoint_activations()
    assert [peer.is_activation_checkpointing for peer in module.peers.values()] == [True, False]


FUSED: dict[str, dict[str, Any]] = {  # attention that keeps no L × L matrix, as a GPU's kernels do
    "bert": {**SIZES, "attention_probs_dropout_prob": 0.0},
    "modernbert": {**SIZES, "pad_token_id": 0},
    "llama": {**SIZES, "use_cache": False},
}


@pytest.mark.parametrize("kind", FUSED)
def test_what_the_dry_run_says_is_what_is_held_within_a_factor_of_two(kind: str) -> None:
    """Beyond weights and gradients, in fp32: between the estimate and twice it, with and without."""
    auto, rows = MODELS.get(kind, MODELS["bert"])[0], 16
    config = AutoConfig.for_model(kind, vocab_size=VOCABULARY, **FUSED[kind])
    found, model = cost(config, LENGTH, 1, auto), auto.from_config(config).train()
    ids, positions = torch.randint(5, VOCABULARY, (rows, LENGTH)), torch.arange(rows) * LENGTH

    def learn() -> None:
        project_positions(model, {"input_ids": ids}, positions).hidden.square().mean().backward()

    learn()
    for values in (found.activations, found.checkpointed):
        assert values is not None
        held, said = peak_bytes(learn, torch.device("cpu")), 4 * rows * LENGTH * values
        gradients = 4 * sum(p.numel() for p in model.parameters())  # made anew, then added to those that are there
        print(kind, held / said, gradients / held)
        assert 1.0 <= held / said <= 2.0, (kind, held, said)
        checkpoint_layers(model)


def recipe(corpus: Path, **peers: dict[str, Any]) -> Recipe:
    training = {"steps": 2, "global_batch_rows": 16, "activation_checkpointing": True}
    raw = {"corpus": {"path": str(corpus), "sequence_length": 32}, "peers": peers, "training": training}
    return Recipe.model_validate(raw)


def test_the_plan_counts_it_and_refuses_who_cannot(tmp_path: Path) -> None:
    corpus = chain_corpus(tmp_path / "corpus")
    plans = {}
    for wanted in (True, False):
        asked = recipe(corpus, one={"model": bert(32, 4)})
        asked = asked.model_copy(
            update={"training": asked.training.model_copy(update={"activation_checkpointing": wanted})}
        )
        plans[wanted] = make_plan(asked, FP32, 1, "cpu", tmp_path / "run")
    with_it, without = (memory_per_rank(plans[wanted])[1] for wanted in (True, False))
    assert with_it < 0.7 * without
    assert plans[True].flops_per_token == plans[False].flops_per_token
    assert plans[True].work.flops_per_token == pytest.approx(4 / 3 * plans[False].work.flops_per_token)
    assert "memory a rank" in describe(plans[True])
    with pytest.raises(Mistakes, match=r"activation_checkpointing = true: peers.two is a albert") as found:
        make_plan(recipe(corpus, one={"model": bert(32, 1)}, two={"model": tiny("albert")}), FP32, 1, "cpu", tmp_path)
    assert len(found.value.mistakes) == 1
