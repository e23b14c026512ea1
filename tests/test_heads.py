"""The last projection of any language model at chosen positions: by hooks, and as the whole model gives it."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

from ctcd_ds.cli import UserError
from ctcd_ds.objective.projection import project
from ctcd_ds.peers.heads import Way, compilable, project_positions, way_of

V, E = 300, 32
BERT = {"hidden_size": E, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
BART = {"d_model": E, **{f"{s}_{n}": v for s in ("encoder", "decoder")
        for n, v in (("layers", 1), ("attention_heads", 4), ("ffn_dim", 64))}}  # fmt: skip
EVERYWHERE = torch.tensor([1, 2, 7, 24, 53])
CUT_AND_TAP = Way(cut=True, tap=True)

# task, architecture → its settings, the way that must be found
MODELS: dict[tuple[str, str], tuple[dict[str, Any], Way]] = {
    ("mlm", "bert"): (BERT, CUT_AND_TAP),
    ("mlm", "roberta"): (BERT, CUT_AND_TAP),
    ("mlm", "distilbert"): ({"dim": E, "n_layers": 2, "n_heads": 4, "hidden_dim": 64}, CUT_AND_TAP),
    ("mlm", "electra"): ({**BERT, "embedding_size": 16}, CUT_AND_TAP),
    ("mlm", "modernbert"): (BERT, CUT_AND_TAP),
    ("mlm", "albert"): ({**BERT, "embedding_size": 16}, CUT_AND_TAP),
    ("mlm", "mpnet"): (BERT, CUT_AND_TAP),
    ("mlm", "deberta-v2"): ({**BERT, "relative_attention": True, "pos_att_type": "p2c|c2p"}, CUT_AND_TAP),
    # After its output embedding it adds a bias that is zero before training.
    ("mlm", "esm"): ({**BERT, "mask_token_id": 4, "pad_token_id": 1}, Way(True, True, "lm_head.bias")),
    # It multiplies with the output embedding's weight itself.
    ("mlm", "mobilebert"): (
        {**BERT, "embedding_size": 16, "intra_bottleneck_size": 16, "num_feedforward_networks": 1},
        Way(cut=True, tap=False),
    ),
    ("mlm", "bart"): (BART, Way(True, True, "final_logits_bias")),
    ("clm", "gpt2"): ({"n_embd": E, "n_layer": 2, "n_head": 4}, CUT_AND_TAP),
    ("clm", "llama"): ({**BERT, "num_key_value_heads": 2}, CUT_AND_TAP),
    ("clm", "gemma2"): ({**BERT, "num_key_value_heads": 2, "head_dim": 8}, Way(True, True, cap=30.0)),
    ("clm", "cohere"): ({**BERT, "num_key_value_heads": 2, "logit_scale": 0.25}, Way(True, True, scale=0.25)),
    ("clm", "granite"): ({**BERT, "num_key_value_heads": 2, "logits_scaling": 8.0}, Way(True, True, scale=0.125)),
    ("span", "t5"): ({"d_model": E, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4}, Way(cut=False, tap=True)),
}
AUTO = {"mlm": AutoModelForMaskedLM, "clm": AutoModelForCausalLM, "span": AutoModelForSeq2SeqLM}


def build(task: str, kind: str) -> Any:
    special = {"bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2, "pad_token_id": 0}
    settings = {**special, "vocab_size": V, **MODELS[task, kind][0]}
    torch.manual_seed(0)
    model = AUTO[task].from_config(AutoConfig.for_model(kind, **settings))
    for tensor in (*model.parameters(), *(b for name, b in model.named_buffers() if name == "final_logits_bias")):
        if not tensor.any():
            nn.init.normal_(tensor, std=0.1)  # nothing stays zero by its initialisation
    return model


def rows(task: str) -> dict[str, Tensor]:
    ids = torch.randint(5, V, (3, 24), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "decoder_input_ids": ids.flip(1)} if task == "span" else {"input_ids": ids}


def gradients(model: Any, logits: Callable[[], Tensor]) -> dict[str, Tensor]:
    """Of a loss that no two columns share, by parameter; with dropout, from one seed."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(0)
    found = logits()
    (found * torch.linspace(-1, 1, found.shape[-1]).roll(7)).square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}


@pytest.mark.parametrize(("task", "kind"), MODELS)
def test_logits_and_gradients_at_positions_are_the_whole_models(task: str, kind: str) -> None:
    model, inputs = build(task, kind).eval(), rows(task)
    assert way_of(model) == MODELS[task, kind][1]
    for positions in (EVERYWHERE, None):
        chosen = slice(None) if positions is None else positions

        def ours(positions: Tensor | None = positions) -> Tensor:
            hidden, weight, bias, scale, cap = project_positions(model, inputs, positions)
            if weight is None:
                return hidden
            logits = scale * hidden @ weight.t()
            logits = logits if cap is None else cap * torch.tanh(logits / cap)
            return logits if bias is None else logits + bias

        def theirs(chosen: Any = chosen) -> Tensor:
            return model(**inputs).logits.flatten(0, 1)[chosen]

        torch.testing.assert_close(ours(), theirs(), rtol=1e-5, atol=1e-5)
        found, expected = gradients(model, ours), gradients(model, theirs)
        assert found.keys() == expected.keys()
        size = torch.stack([g.norm() for g in expected.values()]).norm()
        assert all((found[name] - g).norm() <= 1e-5 * size for name, g in expected.items())


# What stands between the base model and the output embedding, written out.
TRANSFORMS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "bert": lambda model, hidden: model.cls.predictions.transform(hidden),
    "roberta": lambda model, hidden: model.lm_head.layer_norm(nn.functional.gelu(model.lm_head.dense(hidden))),
    "distilbert": lambda model, hidden: model.vocab_layer_norm(model.activation(model.vocab_transform(hidden))),
    "electra": lambda model, hidden: model.generator_predictions(hidden),
    "modernbert": lambda model, hidden: model.head(hidden),
}


@pytest.mark.parametrize("kind", TRANSFORMS)
def test_the_hooks_change_no_bit(kind: str) -> None:
    """Hidden states and gradients with dropout, in training: as with the head written out."""
    model, inputs = build("mlm", kind).train(), rows("mlm")

    def by_hand() -> Tensor:
        hidden = model.base_model(**inputs)[0].flatten(0, 1)[EVERYWHERE]
        return TRANSFORMS[kind](model, hidden)

    def by_hooks() -> Tensor:
        projection = project_positions(model, inputs, EVERYWHERE)
        decoder = model.get_output_embeddings()
        assert projection.weight is decoder.weight and projection.bias is decoder.bias
        return projection.hidden

    way_of(model)
    torch.manual_seed(1)
    expected = by_hand()
    torch.manual_seed(1)
    assert torch.equal(by_hooks(), expected)
    found, expected_gradients = gradients(model, by_hooks), gradients(model, by_hand)
    assert found.keys() == expected_gradients.keys()
    assert all(torch.equal(found[name], expected_gradients[name]) for name in found)


class Unknown(nn.Module):
    """A language model that the package has never seen: a base model, a head, and something after it."""

    def __init__(self, after: str) -> None:
        super().__init__()
        self.config = SimpleNamespace(vocab_size=V, is_encoder_decoder=False)
        self.config.get_text_config = lambda: self.config
        self.base_model = Embedded()
        self.mixed, self.decoder = nn.Linear(E, E), nn.Linear(E, V, bias=False)
        self.after, self.late = after, nn.Parameter(torch.zeros(V))
        self.scale = nn.Parameter(torch.ones(()))

    def get_output_embeddings(self) -> nn.Module | None:
        return None if self.after == "hidden" else self.decoder

    def forward(self, input_ids: Tensor) -> Any:
        logits = self.decoder(torch.tanh(self.mixed(self.base_model(input_ids)[0])))
        if self.after == "learned scale":
            logits = logits * self.scale
        elif "scale" in self.after:
            logits = logits / 4
        if "soft cap" in self.after:
            logits = 30 * torch.tanh(logits / 30)
        if "bias" in self.after:
            logits = logits + self.late
        if self.after == "constant":
            logits = logits + torch.arange(V)
        if self.after == "by position":
            logits = logits + torch.arange(logits.shape[1]).unsqueeze(1)
        return SimpleNamespace(logits=None if self.after == "nothing" else logits)


class Embedded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(V, E)

    def forward(self, input_ids: Tensor) -> tuple[Tensor]:
        return (self.embedding(input_ids),)


@pytest.mark.parametrize(
    ("after", "way"),
    [
        ("", CUT_AND_TAP),
        ("bias", Way(True, True, "late")),
        ("learned scale", Way(True, False)),
        ("constant scale", Way(True, True, scale=0.25)),
        ("soft cap", Way(True, True, cap=30.0)),
        ("scale, soft cap and bias", Way(True, True, "late", 0.25, 30.0)),
        ("constant", Way(True, False)),
        ("by position", Way(False, False)),
        ("hidden", Way(True, False)),
    ],
)
def test_a_model_of_ones_own_is_understood(after: str, way: Way) -> None:
    torch.manual_seed(0)
    model, inputs = Unknown(after).eval(), rows("mlm")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert way_of(model) == way._replace(scale=pytest.approx(way.scale, rel=1e-6))
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items()), (
        "the probe left a trace"
    )
    with torch.no_grad():
        model.late.normal_()
        found = project(project_positions(model, inputs, EVERYWHERE), slice(None))
        torch.testing.assert_close(found, model(**inputs).logits.flatten(0, 1)[EVERYWHERE])


def test_a_model_without_logits_is_refused() -> None:
    with pytest.raises(UserError, match="Unknown cannot be a peer: it gives no logits"):
        way_of(Unknown("nothing"))


def test_looking_for_the_way_changes_neither_model_nor_random_numbers() -> None:
    """BigBird, shown a short row, would use full attention ever after."""
    settings = {**BERT, "vocab_size": V, "block_size": 4, "num_random_blocks": 1, "max_position_embeddings": 128}
    model = AutoModelForMaskedLM.from_config(AutoConfig.for_model("big_bird", **settings))
    before = torch.get_rng_state()
    assert way_of(model) == CUT_AND_TAP
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training and model.bert.attention_type == "block_sparse"


def test_compiled_layers_keep_the_hooks_outside() -> None:
    """One graph for all positions and all layers of a kind, and the numbers of the plain model."""
    graphs = []

    def backend(graph: Any, _inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    for kind, graphs_of_kind in (("bert", 1), ("modernbert", 2)):  # ModernBERT's layers look near, or everywhere
        model, inputs = build("mlm", kind).eval(), rows("mlm")
        expected = [project_positions(model, inputs, EVERYWHERE + shift).hidden for shift in range(4)]
        graphs.clear()
        for layer in compilable(model):
            layer.forward = torch.compile(layer.forward, dynamic=False, backend=backend)
        found = [project_positions(model, inputs, EVERYWHERE + shift).hidden for shift in range(4)]
        print(kind, len(compilable(model)), len(graphs))
        assert len(graphs) == graphs_of_kind
        torch.testing.assert_close(found, expected)
