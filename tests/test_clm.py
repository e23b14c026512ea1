"""Causal language modelling: what is asked where, tokenizers that have only an end of text, and the whole way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from commands import run
from corpora import SPECIAL, random_documents, write_corpus
from ctcd_ds.cli import UserError
from ctcd_ds.corpus.rows import Corpus
from ctcd_ds.corpus.shards import ShardWriter, open_pair
from ctcd_ds.corpus.tokenizer import bring_tokenizer, load_tokenizer, special_ids
from ctcd_ds.peers.build import build_peer, peer_config
from ctcd_ds.peers.reading import keeps_apart, sees_the_future, uncached
from ctcd_ds.peers.rehearsal import rehearse
from ctcd_ds.recipe.mistakes import recipe_mistakes
from ctcd_ds.recipe.reading import load_recipe
from ctcd_ds.recipe.schema import Mistakes
from ctcd_ds.recipe.sections import PeerSection, Recipe
from ctcd_ds.tasks.clm import CausalLM, positions_by_document
from ctcd_ds.tasks.loader import Cut
from ctcd_ds.training.plan import make_plan
from ctcd_ds.training.schedule import lr_factor
from runs import Job, bert, chain_corpus, metrics, run_jobs
from test_tasks import GPT2, LLAMA, STILL

LENGTH = 16


def run_tool(name: str, *arguments: object) -> None:
    done = run(f"ctcd_ds/commands/{name}.py", *arguments)
    assert done.returncode == 0, done.stderr


def recipe(corpus: Path, **corpus_keys: Any) -> dict[str, Any]:
    return {
        "corpus": {"path": str(corpus), "sequence_length": LENGTH, **corpus_keys},
        "objective": {"task": "clm"},
        "peers": {"a": {"model": LLAMA, "soft": {"b": 1.0}}, "b": {"model": GPT2, "soft": {"a": 1.0}}},
        "training": {"global_batch_rows": 8, "steps": 4},
    }


def task_of(corpus: Path, **changes: Any) -> CausalLM:
    raw = recipe(corpus)
    raw["corpus"] |= changes
    return CausalLM.of(Recipe.model_validate(raw), Corpus.open(corpus))


def test_every_token_but_the_first_is_a_target_once_an_epoch(tmp_path: Path) -> None:
    """Over borders of documents and shards; only what is short of a row at the end is left out."""
    shards = [random_documents(30, seed=1), random_documents(25, seed=2)]
    task = task_of(write_corpus(tmp_path / "c", shards))
    stream = np.array([i for documents in shards for d in documents for i in (*d, SPECIAL.sep)])
    rows = task.rows("train")
    assert len(rows) == (len(stream) - 1) // LENGTH
    numbers = np.arange(len(rows))
    seen, asked = [], []
    for batch in task.batches(rows.read(numbers), 1, np.zeros_like(numbers), numbers, 4):
        [view] = set(map(id, batch.views)) and [batch.views[0]]
        assert view.positions is None and view.hard_count == batch.shared == len(view.targets)
        seen.append(view.inputs["input_ids"].flatten().numpy())
        asked.append(view.targets.numpy())
    kept = len(rows) * LENGTH
    assert np.array_equal(np.concatenate(seen), stream[:kept])
    assert np.array_equal(np.concatenate(asked), stream[1 : kept + 1])


def test_positions_begin_again_behind_each_end() -> None:
    tokens = np.array([[5, 6, 3, 7, 8, 9, 3], [3, 3, 5, 5, 5, 5, 5]])
    assert positions_by_document(tokens, 3).tolist() == [[0, 1, 2, 0, 1, 2, 3], [0, 0, 0, 1, 2, 3, 4]]


def test_label_noise_is_one_peers_own(tmp_path: Path) -> None:
    raw = recipe(write_corpus(tmp_path / "c", random_documents(200)))
    raw["peers"]["b"]["label_noise"] = 0.3
    task = CausalLM.of(Recipe.model_validate(raw), Corpus.open(tmp_path / "c"))
    [batch] = Cut(32).batches(task.rows("train"), task, 1, 0)
    plain, noisy = batch.views
    share = (plain.targets != noisy.targets).float().mean().item()
    assert 0.2 < share < 0.4 and torch.equal(plain.inputs["input_ids"], noisy.inputs["input_ids"])
    assert task.held_out().noise == {"a": None, "b": None}


# ---- models


def small(corpus: Path, model: dict[str, Any]) -> Any:
    return build_peer("x", PeerSection(model=model), Corpus.open(corpus), 1, AutoModelForCausalLM).eval()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chain_corpus(tmp_path_factory.mktemp("clm") / "corpus")


def test_berts_are_made_causal_and_what_cannot_be_is_refused(corpus: Path) -> None:
    assert not sees_the_future(small(corpus, bert(32, 1)))
    assert small(corpus, bert(32, 1)).config.is_decoder
    task = task_of(corpus)
    xlnet = {"model_type": "xlnet", "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64}
    config = peer_config(PeerSection(model=xlnet), task.corpus, AutoModelForCausalLM)
    said = rehearse(config, AutoModelForCausalLM, LENGTH, "fp32", "cpu", task.unfit)
    assert said is not None and "see what comes after them" in said


@pytest.mark.parametrize("model", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_documents_apart_have_no_gradient_from_one_to_the_other(corpus: Path, model: dict[str, Any]) -> None:
    built = small(corpus, model)
    ids = torch.arange(20, 36).view(1, 16)
    places = (torch.arange(16) % 8).view(1, 16)
    embedded = built.get_input_embeddings()(ids).detach().requires_grad_()
    built(inputs_embeds=embedded, position_ids=places, **uncached(built)).logits[:, 8:].sum().backward()
    assert not embedded.grad[:, :8].any() and embedded.grad[:, 8:].any()
    with torch.no_grad():
        packed = built(ids, position_ids=places, **uncached(built)).logits[:, 8:]
        torch.testing.assert_close(packed, built(ids[:, 8:]).logits, rtol=1e-4, atol=1e-5)
    assert keeps_apart(built)


def test_a_model_that_cannot_keep_documents_apart_is_refused(corpus: Path) -> None:
    """OPT makes its positions from a mask, and a cache would hide where documents begin."""
    opt = {"model_type": "opt", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "ffn_dim": 64,
           "max_position_embeddings": 64, "word_embed_proj_dim": 32}  # fmt: skip
    apart, joined = task_of(corpus, documents="apart"), task_of(corpus)
    config = peer_config(PeerSection(model=opt), joined.corpus, AutoModelForCausalLM)
    assert rehearse(config, AutoModelForCausalLM, LENGTH, "fp32", "cpu", joined.unfit) is None
    said = rehearse(config, AutoModelForCausalLM, LENGTH, "fp32", "cpu", apart.unfit)
    assert said is not None and "use documents: joined" in said


def test_a_forward_that_fills_a_cache_would_mix_documents(corpus: Path) -> None:
    """Why `uncached` is there: transformers looks for borders in position_ids only without a cache."""
    built = small(corpus, LLAMA)
    places = (torch.arange(16) % 8).view(1, 16)
    first, second = torch.arange(20, 36).view(1, 16), torch.arange(20, 36).view(1, 16)
    second[:, 1:7] += 100
    with torch.no_grad():
        mixed = [built(ids, position_ids=places, use_cache=True).logits[:, 8:] for ids in (first, second)]
        apart = [built(ids, position_ids=places, **uncached(built)).logits[:, 8:] for ids in (first, second)]
    assert not torch.equal(*mixed) and torch.equal(*apart)


def test_a_peer_alone_learns_as_in_a_plain_loop_with_the_models_own_loss(corpus: Path, tmp_path: Path) -> None:
    model = {**GPT2, **STILL["clm"]}
    raw = {**recipe(corpus), "peers": {"it": {"model": model}}}
    raw["training"] = {"global_batch_rows": 8, "steps": 8, "log_every": 1}
    run_jobs([Job(raw, tmp_path / "run")], 1, tmp_path)
    parsed = Recipe.model_validate(raw)
    task = CausalLM.of(parsed, Corpus.open(corpus))
    plain = build_peer("it", parsed.peers["it"], task.corpus, parsed.seed, AutoModelForCausalLM).train()
    settings, rows = parsed.optimizer, task.rows("train")
    groups = [
        {"params": [p for p in plain.parameters() if (p.ndim > 1) == decay], "weight_decay": weight}
        for decay, weight in ((True, settings.weight_decay), (False, 0.0))
    ]
    optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps)
    for step, row in metrics(tmp_path / "run").items():
        [batch] = Cut(8).batches(rows, task, parsed.seed, step - 1)
        ids = torch.from_numpy(rows.read(batch.rows).astype(np.int64))
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * lr_factor(parsed.schedule, step - 1, 8)
        # the vocabulary's padding is no part of the softmax; the plain model has it
        logits = plain(ids).logits[:, :-1, : task.corpus.vocab_size]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        assert row["loss/it/hard"] == pytest.approx(loss.item(), abs=1e-5), step


# ---- recipes


def test_keys_of_another_task_are_refused_and_not_written(corpus: Path, tmp_path: Path) -> None:
    raw = recipe(corpus, mask_fraction=0.2)
    raw["objective"]["soft_positions"] = "all"
    raw["peers"]["a"]["mask_seed"] = 3
    said = recipe_mistakes(raw)
    assert len(said) == 3 and all("and it is clm here; remove it" in line for line in said)
    assert said[2].startswith("peers.a.mask_seed = 3")
    masked = {**recipe(corpus, documents="apart"), "objective": {"task": "mlm"}}
    assert ["corpus.documents = 'apart': for objective.task clm" in line for line in recipe_mistakes(masked)] == [True]
    good = Recipe.model_validate(recipe(corpus, documents="apart"))
    (tmp_path / "again.yaml").write_text(good.to_yaml())
    assert load_recipe(tmp_path / "again.yaml") == good and "mask_fraction" not in good.to_yaml()


def test_a_model_of_another_task_is_told_which_one(corpus: Path, tmp_path: Path) -> None:
    masked = {**recipe(corpus), "objective": {"task": "mlm"}}
    causal = recipe(corpus)
    causal["peers"]["a"]["model"] = {"model_type": "t5"}
    causal["corpus"]["sequence_length"] = 128
    said = []
    for raw in (masked, causal):
        with pytest.raises(Mistakes) as mistakes:
            make_plan(Recipe.model_validate(raw), {"zero_optimization": {"stage": 2}}, 1, "cpu", tmp_path / "no")
        said.append(mistakes.value.mistakes)
    assert "'llama' has no head for this task" in said[0][0] and said[0][0].endswith("has one for objective.task: clm")
    assert "'t5' has no head for this task" in said[1][0] and said[1][0].endswith("has one for objective.task: span")
    assert "n_positions = 64" in said[1][1] or "max_position_embeddings = 64" in said[1][1]


# ---- tokenizers


LINES = [f"Line {n}: the naïve café of street {n * 7 % 31} has {n} tables, 中文 and tea." for n in range(300)]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n".join(LINES))
    return path


@pytest.fixture(scope="module")
def byte_bpe(text: Path) -> Path:
    run_tool("tokenizer", "--input", text, "--type", "byte_bpe", "--vocab_size", 400, "--output_dir", text.parent / "t")
    return text.parent / "t"


def test_a_byte_level_bpe_knows_every_text_and_comes_out_the_same_again(text: Path, byte_bpe: Path) -> None:
    tokenizer = load_tokenizer(byte_bpe)
    assert len(tokenizer) == 400 and special_ids(tokenizer).present == {"bos": 0, "eos": 0}
    for odd in ("Ünïcode, 中文, \t tabs\n and 🙂", "<|endoftext|> is text here"):
        ids = tokenizer(odd, split_special_tokens=True)["input_ids"]
        assert tokenizer.decode(ids) == odd and 0 not in ids
    run_tool("tokenizer", "--input", text, "--type", "byte_bpe", "--vocab_size", 400, "--output_dir", text.parent / "u")
    assert (text.parent / "u/tokenizer.json").read_bytes() == (byte_bpe / "tokenizer.json").read_bytes()


def test_a_sentencepiece_model_with_bytes_stays_as_it_is_for_causal_models(text: Path) -> None:
    run_tool("tokenizer", "--input", text, "--type", "bpe", "--byte_fallback", "true", "--vocab_size", 500,
             "--output_dir", text.parent / "s")  # fmt: skip
    model = text.parent / "llama.model"
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(model.with_suffix("")), vocab_size=450, model_type="bpe", byte_fallback=True,
        minloglevel=2,
    )  # fmt: skip
    native = sentencepiece.SentencePieceProcessor(model_file=str(model))
    tokenizer = bring_tokenizer(str(model), sample=lambda: LINES, add_special_tokens=False)
    assert len(tokenizer) == 450 and special_ids(tokenizer).present == {"unk": 0, "bos": 1, "eos": 2}
    for line in (*LINES[:20], "🙂 is in bytes"):
        assert tokenizer(line, add_special_tokens=False)["input_ids"] == native.encode(line)
    assert len(bring_tokenizer(str(model), sample=lambda: LINES)) == 452  # with [MASK] and [PAD]
    assert load_tokenizer(text.parent / "s").unk_token_id not in load_tokenizer(text.parent / "s")("🙂")["input_ids"]


def test_a_tokenizer_without_an_end_is_refused(byte_bpe: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(byte_bpe)
    tokenizer.save_pretrained(tmp_path / "endless")
    config = json.loads((tmp_path / "endless/tokenizer_config.json").read_text())
    del config["eos_token"]
    (tmp_path / "endless/tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="no sep_token and no eos_token, so nothing could end a document"):
        load_tokenizer(tmp_path / "endless")


# ---- the whole way


@pytest.fixture(scope="module")
def causal_corpus(text: Path, byte_bpe: Path) -> Path:
    run_tool("corpus", "--input", text, "--tokenizer", byte_bpe, "--output_dir", text.parent / "corpus",
             "--valid_fraction", 0.1)  # fmt: skip
    return text.parent / "corpus"


def test_the_corpus_has_each_document_and_its_end_and_knows_its_bytes(causal_corpus: Path, byte_bpe: Path) -> None:
    corpus, tokenizer = Corpus.open(causal_corpus), load_tokenizer(byte_bpe)
    documents = []
    for split in ("train", "valid"):
        [shard] = corpus.splits[split]
        ids = np.fromfile(causal_corpus / f"{shard.name}.bin", corpus.dtype)
        found = np.split(ids, np.flatnonzero(ids == corpus.special.end) + 1)
        assert not len(found[-1]) and len(found) == shard.documents + 1
        texts = [tokenizer.decode(document[:-1]) for document in found[:-1]]
        assert shard.text_bytes == sum(len(text.encode()) for text in texts)
        documents += texts
    assert sorted(documents) == sorted(LINES) and corpus.frame == ((), ())


def test_megatrons_gpt_corpora_are_adopted(causal_corpus: Path, byte_bpe: Path, tmp_path: Path) -> None:
    """Made with --append-eod: a copy of the bytes; without: every document gets its end."""
    corpus = Corpus.open(causal_corpus)
    [shard] = corpus.splits["train"]
    made = open_pair(str(causal_corpus / shard.name))
    bare = ShardWriter(tmp_path, "bare", corpus.dtype)
    for number in range(len(made)):
        bare.add(made.document(number)[:-1], 0)
    bare.finish()
    for name, prefix in (("with", causal_corpus / shard.name), ("without", tmp_path / "bare")):
        run_tool("corpus", "--adopt", prefix, "--tokenizer", byte_bpe, "--output_dir", tmp_path / name,
                 "--valid_fraction", 0)  # fmt: skip
        [adopted] = Corpus.open(tmp_path / name).splits["train"]
        found = (tmp_path / name / f"{adopted.name}.bin").read_bytes()
        assert found == (causal_corpus / f"{shard.name}.bin").read_bytes()
    run_tool("corpus", "--adopt", tmp_path / "bare", "--tokenizer", byte_bpe, "--output_dir", tmp_path / "parts",
             "--valid_fraction", 0.2)  # fmt: skip
    parts = Corpus.open(tmp_path / "parts")
    texts = sum(part.text_bytes or 0 for split in parts.splits.values() for part in split)
    assert texts == shard.text_bytes, "what its documents decode to"


def test_text_becomes_a_model_that_writes(causal_corpus: Path, tmp_path: Path) -> None:
    raw = recipe(causal_corpus)
    raw["training"] |= {"steps": 30, "valid_every": 30}
    raw["optimizer"] = {"lr": 3e-3}
    raw["corpus"]["documents"] = "apart"
    run_jobs([Job(raw, tmp_path / "run")], 1, tmp_path)
    row = metrics(tmp_path / "run")[30]
    corpus = Corpus.open(causal_corpus)
    bytes_each = sum(len(line.encode()) for line in LINES) / (corpus.tokens("train") + corpus.tokens("valid"))
    assert row["valid/a/bits_per_byte"] == pytest.approx(row["valid/a/loss"] / np.log(2) / bytes_each, rel=0.05)
    run_tool("export", "--checkpoint", tmp_path / "run", "--peer", "all", "--output_dir", tmp_path / "hf")
    for peer in ("a", "b"):
        card = (tmp_path / "hf" / peer / "README.md").read_text()
        assert "causal language model" in card and "text-generation" in card and "bits_per_byte" in card
        exec(card.split("```python\n")[1].split("```")[0].replace('"."', repr(str(tmp_path / "hf" / peer))), {})
        write = pipeline("text-generation", model=str(tmp_path / "hf" / peer))
        said = write("Line 7: the", max_new_tokens=12, do_sample=False)[0]["generated_text"]
        assert said.startswith("Line 7: the") and len(said) > 20
        config = json.loads((tmp_path / "hf" / peer / "generation_config.json").read_text())
        assert config["eos_token_id"] == config["pad_token_id"] == 0
        assert AutoTokenizer.from_pretrained(tmp_path / "hf" / peer).pad_token == "<|endoftext|>"
    with pytest.raises(Mistakes, match=r"no cls_token and no sep_token and .*causal models \(objective.task: clm\)"):
        masked = {**recipe(causal_corpus), "objective": {"task": "mlm"}}
        make_plan(Recipe.model_validate(masked), {"zero_optimization": {"stage": 2}}, 1, "cpu", tmp_path / "no")
