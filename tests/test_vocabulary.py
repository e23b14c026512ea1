"""A finished model and a corpus of more or fewer tokens: which row of its tables is whose, in training and export."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

from ctcd_ds.cli import UserError
from ctcd_ds.measuring import peak_bytes
from ctcd_ds.peers.heads import way_of
from ctcd_ds.peers.vocabulary import fit_tables, new_tokens

OWN = 50  # rows of the model's tables
SIZES = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 48}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
MODELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "bert": (AutoModelForMaskedLM, SIZES),  # tied, with a bias that stands in two places
    "mobilebert": (AutoModelForMaskedLM, {**SIZES, "embedding_size": 16, "intra_bottleneck_size": 16}),  # two tables
    "llama": (AutoModelForCausalLM, {**SIZES, "tie_word_embeddings": False}),
    "gpt2": (AutoModelForCausalLM, {"n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 2, "eos_token_id": 3}),
    "t5": (AutoModelForSeq2SeqLM, T5),
}


def words(number: int) -> dict[str, int]:
    return {f"w{n}": n for n in range(number)}


@pytest.mark.parametrize(
    ("theirs", "ours", "rows", "new"),
    [
        (50, 50, 50, []),
        (50, 50, 64, []),  # rows that are padding
        (60, 50, 60, []),  # it knows more tokens than the corpus
        (50, 53, 50, [50, 51, 52]),  # the corpus has tokens of its own
        (50, 53, 64, [50, 51, 52]),  # … for which the checkpoint has rows that nobody trained
        (50, 50, 48, [48, 49]),  # its tables are smaller than its own tokenizer
    ],
)
def test_new_tokens_are_those_without_a_row_of_their_own(theirs: int, ours: int, rows: int, new: list[int]) -> None:
    assert new_tokens(words(theirs), words(ours), rows) == new


@pytest.mark.parametrize(
    "theirs", [{**words(50), "other": 7} | {"w7": 50}, {n: i for i, n in enumerate(reversed(words(50)))}]
)
def test_ids_that_mean_other_tokens_are_refused(theirs: dict[str, int]) -> None:
    with pytest.raises(UserError, match="the corpus's has"):
        new_tokens(theirs, words(50), 50)


def built(kind: str) -> tuple[Any, Any]:
    auto, settings = MODELS[kind]
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{"pad_token_id": 0, **settings, "vocab_size": OWN})
    return auto, auto.from_config(config).eval()


def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(5, 45).view(2, 20)
    with torch.no_grad():
        return model.eval()(
            input_ids=ids, **({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})
        ).logits


@pytest.mark.parametrize("kind", MODELS)
def test_tables_grow_and_what_was_known_stays_known(kind: str) -> None:
    auto, model = built(kind)
    before = logits(model)
    shared = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    fit_tables(model, 64, OWN, auto)
    found = logits(model)
    assert found.shape[-1] == 64 == model.config.vocab_size and torch.allclose(found[..., :OWN], before, atol=1e-6)
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == shared
    assert model.get_output_embeddings().out_features == 64 == model.get_input_embeddings().num_embeddings
    assert way_of(model).tap or kind == "mobilebert"
    expected = auto.from_config(model.config).state_dict()
    assert {n: t.shape for n, t in model.state_dict().items()} == {n: t.shape for n, t in expected.items()}


@pytest.mark.parametrize("kind", MODELS)
def test_new_tokens_begin_as_the_mean_of_those_that_are_known(kind: str) -> None:
    auto, model = built(kind)
    for parameter in model.parameters():
        parameter.data.uniform_(-1, 1)
    tokens, new = 53, [44, 50, 51, 52]
    before = model.get_input_embeddings().weight.detach().clone()
    fit_tables(model, 64, tokens, auto, new)
    known = [n for n in range(OWN) if n not in new]
    for table in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
        mean = table[known].mean(0).expand(len(new), -1)
        assert torch.allclose(table[new], mean, atol=1e-6)
        assert not table[tokens:].any()
    assert torch.equal(model.get_input_embeddings().weight[known], before[known])


def test_a_table_that_fits_is_not_touched() -> None:
    auto, model = built("bert")
    table = model.get_input_embeddings().weight
    fit_tables(model, OWN, 40, auto)
    assert model.get_input_embeddings().weight is table


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_growing_a_table_takes_that_table_and_no_model(dtype: torch.dtype) -> None:
    auto = AutoModelForMaskedLM
    config = AutoConfig.for_model("bert", **{**SIZES, "hidden_size": 128, "num_hidden_layers": 8, "vocab_size": 1000})
    model = auto.from_config(config, dtype=dtype)
    size, table = 2 if dtype == torch.bfloat16 else 4, 1024 * 128
    peak = peak_bytes(lambda: fit_tables(model, 1024, 1000, auto), torch.device("cpu"))
    assert peak <= 1.2 * size * table
    assert model.get_input_embeddings().weight.dtype == dtype
