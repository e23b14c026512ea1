"""What cannot end well does not begin: peers are tried in small, settings are honoured or refused with the reason."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForMaskedLM, BertConfig, BertForSequenceClassification, BertModel

from architectures import LENGTH, tiny
from ctcd_ds.corpus.rows import Corpus
from ctcd_ds.corpus.tokenizer import load_tokenizer
from ctcd_ds.peers.build import build_peer, config_mistakes, missing_weights, peer_config
from ctcd_ds.peers.cotrain import CoTraining
from ctcd_ds.peers.reading import fit_tokenizer, longest_row, row_limit
from ctcd_ds.peers.rehearsal import rehearse
from ctcd_ds.recipe.schema import Mistakes
from ctcd_ds.recipe.sections import PeerSection, Recipe
from ctcd_ds.training.plan import make_plan, rehearse_peers
from runs import bert, chain_corpus

AUTO = AutoModelForMaskedLM


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chain_corpus(tmp_path_factory.mktemp("rehearsal") / "corpus")


@pytest.fixture(scope="module")
def corpus(path: Path) -> Corpus:
    return Corpus.open(path)


def config(corpus: Corpus, **model: Any) -> Any:
    return peer_config(PeerSection(model=model), corpus, AUTO)


OFFSET = ("esm", "longformer", "luke", "roberta", "xlm-roberta-xl", "xmod")


@pytest.mark.parametrize("kind", OFFSET)
def test_positions_that_begin_after_the_padding_id_are_found(corpus: Corpus, kind: str) -> None:
    section = {**tiny(kind), "max_position_embeddings": LENGTH}
    offset = corpus.special.pad + 1
    said = rehearse(config(corpus, **section), AUTO, LENGTH, "fp32", "cpu")
    assert said is not None and f"enough for rows of {LENGTH - offset} tokens" in said
    enough = config(corpus, **{**section, "max_position_embeddings": LENGTH + offset})
    assert rehearse(enough, AUTO, LENGTH, "fp32", "cpu") is None


@pytest.mark.parametrize(
    ("kind", "longest"),
    [("bert", 64), ("distilbert", 72), ("bart", 64), ("mpnet", 70), ("modernbert", None), ("funnel", None)],
)
def test_the_longest_row_is_read_off_the_tables(corpus: Corpus, kind: str, longest: int | None) -> None:
    settings = bert(32, 1) if kind == "bert" else tiny(kind)
    model = AUTO.from_config(config(corpus, **settings))
    assert longest_row(model) == longest
    if kind == "modernbert":
        assert row_limit(model) == 72


@pytest.mark.parametrize("kind", ["fnet", "mra"])
def test_a_precision_that_an_architecture_cannot_do_is_refused(corpus: Corpus, kind: str) -> None:
    said = rehearse(config(corpus, **tiny(kind)), AUTO, LENGTH, "bf16", "cpu")
    assert said is not None and "cannot learn in bf16 on cpu" in said and "in fp32 on the CPU it can" in said
    assert rehearse(config(corpus, **bert(32, 2)), AUTO, LENGTH, "bf16", "cpu") is None


def test_a_rehearsal_takes_seconds_for_the_papers_models(corpus: Corpus) -> None:
    paper = config(corpus, **{**bert(768, 6), "intermediate_size": 3072, "num_attention_heads": 12})
    started = time.process_time()
    assert rehearse(paper, AUTO, 64, "fp32", "cpu") is None
    assert time.process_time() - started < 10


def test_what_fails_is_said_for_each_peer_before_the_start(path: Path, tmp_path: Path) -> None:
    short = {**tiny("esm"), "max_position_embeddings": LENGTH}
    peers = {"a": {"model": short}, "b": {"model": short}, "c": {"model": bert(32, 1)}}
    raw = {"corpus": {"path": str(path), "sequence_length": LENGTH}, "peers": peers}
    recipe = Recipe.model_validate({**raw, "training": {"steps": 2, "global_batch_rows": 4}})
    plan = make_plan(recipe, {"zero_optimization": {"stage": 2}}, 1, "cpu", tmp_path)
    with pytest.raises(Mistakes) as found:
        rehearse_peers(plan, "cpu")
    assert [line.split(":")[0] for line in found.value.mistakes] == ["peers.a", "peers.b"]


def test_a_model_that_asks_for_more_than_tokens_is_said_with_its_peer(tmp_path: Path) -> None:
    """Speech in, text out: transformers lists it among the sequence-to-sequence language models."""
    raw = {
        "corpus": {"path": str(chain_corpus(tmp_path / "corpus", sentinels=16)), "sequence_length": LENGTH},
        "objective": {"task": "span"},
        "peers": {"a": {"model": tiny("voxtral_realtime")}},
        "training": {"steps": 2, "global_batch_rows": 4},
    }
    with pytest.raises(Mistakes, match=r"peers.a: VoxtralRealtime cannot run on a row of 32 tokens: You must specify"):
        make_plan(Recipe.model_validate(raw), {"zero_optimization": {"stage": 2}}, 1, "cpu", tmp_path)


DEBERTA_V3 = {
    "model_type": "deberta-v2", "attention_probs_dropout_prob": 0.1, "hidden_act": "gelu", "hidden_dropout_prob": 0.1,
    "hidden_size": 32, "initializer_range": 0.02, "intermediate_size": 64, "max_position_embeddings": 512,
    "relative_attention": True, "position_buckets": 256, "norm_rel_ebd": "layer_norm", "share_att_key": True,
    "pos_att_type": "p2c|c2p", "layer_norm_eps": 1e-7, "max_relative_positions": -1, "position_biased_input": False,
    "num_attention_heads": 4, "num_hidden_layers": 2, "type_vocab_size": 0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (
            {**bert(32, 1), "return_dict": False},
            "model.return_dict = False: outputs are read by their names",
        ),
        ({**bert(32, 1), "is_decoder": True}, "model.is_decoder = True: the task decides"),
        ({**bert(32, 1), "add_cross_attention": True}, "model.add_cross_attention = True: there is no second row"),
        ({**bert(32, 1), "dtype": "bfloat16"}, "model.dtype = 'bfloat16': weights have the precision of the DeepSpeed"),
        ({**bert(32, 1), "gradient_checkpointing": True}, "= True: training.activation_checkpointing says it"),
        ({**bert(32, 1), "hidden_act": "nosuch"}, "model.hidden_act = 'nosuch': allowed: "),
        ({**bert(32, 1), "attn_implementation": "nosuch"}, "nosuch"),
        ({**bert(32, 1), "hiden_size": 32}, "did you mean 'hidden_size'?"),
        (bert(32, 1), None),
        ({**bert(32, 1), "attn_implementation": "eager"}, None),
        ({**bert(32, 1), "tie_word_embeddings": False}, None),
        (DEBERTA_V3, None),
    ],
)
def test_a_setting_is_honoured_or_refused_with_the_reason(
    corpus: Corpus, model: dict[str, Any], said: str | None
) -> None:
    mistakes = list(config_mistakes(PeerSection(model=model), corpus, LENGTH, AUTO))
    if said is None:
        assert not mistakes and rehearse(config(corpus, **model), AUTO, LENGTH, "fp32", "cpu") is None
    else:
        assert len(mistakes) == 1 and said in mistakes[0] and len(mistakes[0]) < 500, mistakes


def test_the_wanted_attention_is_the_models(corpus: Corpus) -> None:
    section = PeerSection(model={**bert(32, 1), "attn_implementation": "eager"})
    assert build_peer("a", section, corpus, 1, AUTO).config._attn_implementation == "eager"


def test_untied_embeddings_two_dimensional_vocabularies_and_a_zeroed_padding_row_survive(corpus: Corpus) -> None:
    for model in ({**bert(32, 1), "tie_word_embeddings": False}, tiny("mobilebert"), tiny("bart"), tiny("funnel")):
        assert rehearse(config(corpus, **model), AUTO, LENGTH, "fp32", "cpu") is None


@pytest.mark.parametrize("kind", [BertModel, BertForSequenceClassification])
def test_a_teacher_without_a_head_is_refused_by_the_names_it_lacks(kind: Any, path: Path, tmp_path: Path) -> None:
    teacher = tmp_path / "teacher"
    sizes = {key: value for key, value in bert(32, 1).items() if key != "model_type"}
    kind(BertConfig(vocab_size=300, **sizes)).save_pretrained(teacher)
    load_tokenizer(path / "tokenizer").save_pretrained(teacher)
    assert any(name.startswith("cls.predictions") for name in missing_weights(str(teacher), AUTO))
    raw: dict[str, Any] = {
        "corpus": {"path": str(path), "sequence_length": LENGTH},
        "peers": {
            "teacher": {"pretrained": str(teacher), "frozen": True},
            "student": {"model": bert(32, 1), "soft": {"teacher": 1.0}},
        },
        "training": {"steps": 2, "global_batch_rows": 4},
    }
    with pytest.raises(Mistakes, match=r"peers.teacher.pretrained .* lacks cls.predictions"):
        make_plan(Recipe.model_validate(raw), {"zero_optimization": {"stage": 2}}, 1, "cpu", tmp_path)
    raw["peers"]["teacher"] = {"pretrained": str(teacher)}
    plan = make_plan(Recipe.model_validate(raw), {"zero_optimization": {"stage": 2}}, 1, "cpu", tmp_path)
    assert list(plan.begun) == ["teacher"]


@pytest.mark.parametrize("name", ["half", "train", "eval", "float", "forward", "keys"])
def test_peers_may_have_the_names_of_methods(corpus: Corpus, name: str) -> None:
    section = PeerSection(model=bert(32, 1))
    raw = {"corpus": {"path": "x"}, "peers": {name: {"model": bert(32, 1)}}, "training": {"steps": 1}}
    module = CoTraining({name: build_peer(name, section, corpus, 1, AUTO)}, Recipe.model_validate(raw).graph(), 300, 1)
    module.train().eval().bfloat16()
    assert not module.peers[name].training and next(module.parameters()).dtype == torch.bfloat16
    assert all(key.startswith(f"peers.{name}.") for key in module.state_dict())
    assert [key for key, _ in module.peers.items()] == [name]


def test_a_tokenizer_is_exported_as_its_model_reads(corpus: Corpus) -> None:
    for settings, limit, segments in (
        (bert(32, 1), 64, True),
        ({**tiny("roberta"), "type_vocab_size": 1}, 72 - corpus.special.pad - 1, False),
        (tiny("distilbert"), 72, False),
        (tiny("yoso"), 72, False),
    ):
        tokenizer = load_tokenizer(corpus.tokenizer_path)
        fit_tokenizer(tokenizer, AUTO.from_config(config(corpus, **settings)))
        assert tokenizer.model_max_length == limit
        assert ("token_type_ids" in tokenizer.model_input_names) == segments
