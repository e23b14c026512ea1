"""Text in three scripts, one of them without spaces: one tokenizer, three corpora, a mixture of them, real runs."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import ModelCard

from commands import run
from ctcd_ds.corpus.mixture import open_corpus
from ctcd_ds.corpus.prepare import Settings, prepare
from ctcd_ds.corpus.sources import Reading
from ctcd_ds.corpus.tokenizer_training import train_tokenizer
from ctcd_ds.experiments.report.agreement import held_out_answers
from ctcd_ds.experiments.report.build import write_report
from ctcd_ds.export.hf import export
from ctcd_ds.recipe.sections import CorpusSection
from ctcd_ds.training import checkpoint
from ctcd_ds.training.metrics import held_out_values
from ctcd_ds.training.run_directory import RunDirectory
from runs import Job, bert, drop_checkpoint, final_weights, metrics, run_jobs
from test_tasks import GPT2

STEPS = 12
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # it is drawn rank by rank
SOURCES = {"chinese": 60, "english": 300, "hindi": 120}  # documents
# Every consonant with every vowel; what is written without spaces is written without them here.
SYLLABLES = {
    "english": [a + b for a in "bdfgklmnprst" for b in ("a", "e", "i", "o", "an", "er")],
    "hindi": [a + b for a in "कखगचजटडतदनपबमयरलवसह" for b in ("", "ा", "ि", "ी", "ु", "े", "ो")],
    "chinese": [chr(number) for number in range(0x4E00, 0x4E00 + 160)],
}


def documents(language: str, number: int, seed: int) -> Iterator[str]:
    """Sentences of words that the language has, common ones more often."""
    made, random = np.random.default_rng(5), np.random.default_rng([seed, len(language)])
    words = ["".join(made.choice(SYLLABLES[language], made.integers(1, 4))) for _ in range(150)]
    often = 1 / np.sqrt(np.arange(1, 151))
    between, stop = ("", "。") if language == "chinese" else (" ", ".")
    for _ in range(number):
        sentences = [between.join(random.choice(words, 9, p=often / often.sum())) + stop for _ in range(5)]
        yield between.join(sentences)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three corpora of one SentencePiece tokenizer; english holds out hindi too, as another text."""
    folder = tmp_path_factory.mktemp("languages")
    texts = {language: list(documents(language, number, seed=1)) for language, number in SOURCES.items()}
    # As much of each for the tokenizer, or the characters of the small one would be too rare to get into it.
    every = [text for language in SOURCES for text in documents(language, 150, seed=1)]
    train_tokenizer("unigram", lambda caption: iter(every), 500, lowercase=False, output_dir=folder / "tokenizer")
    (folder / "other.txt").write_text("\n\n".join(documents("hindi", 30, seed=2)), encoding="utf-8")
    for language, own in texts.items():
        (folder / f"{language}.txt").write_text("\n\n".join(own), encoding="utf-8")
        sets = {"other": [str(folder / "other.txt")]} if language == "english" else {}
        prepare(
            [str(folder / f"{language}.txt")],
            str(folder / "tokenizer"),
            folder / language,
            Settings(valid_fraction=0.1),
            Reading(),
            valid_inputs=sets,
        )
    return folder


def mixture(folder: Path) -> dict[str, Any]:
    return {"sources": {name: {"path": str(folder / name)} for name in SOURCES}, "sampling_alpha": 0.3}


def recipe(corpus: dict[str, Any], steps: int = STEPS) -> dict[str, Any]:
    return {
        "corpus": {"sequence_length": 32, **corpus},
        "peers": {
            "teacher": {"model": bert(32, 2, **NO_DROPOUT), "soft": {"student": 1.0}},
            "student": {"model": bert(32, 1, **NO_DROPOUT), "soft": {"teacher": 4.0}},
        },
        "optimizer": {"lr": 3e-3},
        "training": {
            "global_batch_rows": 16,
            "steps": steps,
            "log_every": 1,
            "valid_every": 6,
            "checkpoint_every": 6,
            "keep_best": True,
        },
    }


@pytest.fixture(scope="module")
def runs(folder: Path) -> Path:
    """The mixture on one rank, on two, and begun on one and gone on with by two; a corpus alone and a mixture of it."""
    plain, path = {"path": str(folder / "english")}, {"path": str(folder / "english"), "weight": 2.0}
    causal = {"objective": {"task": "clm"}, "peers": {"a": {"model": GPT2}}}
    jobs = [
        Job(recipe(mixture(folder)), folder / "one"),
        Job(recipe(plain, 6), folder / "plain"),
        Job(recipe({"sources": {"english": path}}, 6), folder / "alone"),
        Job({**recipe(mixture(folder), 6), **causal}, folder / "causal"),
    ]
    run_jobs(jobs, 1, folder)
    shutil.copytree(folder / "one", folder / "resumed")
    drop_checkpoint(folder / "resumed", STEPS)
    again = recipe(mixture(folder))
    run_jobs([Job(again, folder / "two"), Job(again, folder / "resumed", resume=True)], 2, folder)
    return folder


def test_every_script_is_known_to_the_tokenizer(folder: Path) -> None:
    """Without spaces too, pieces are longer than characters; SentencePiece leaves out only the rarest ones."""
    from ctcd_ds.corpus.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(folder / "tokenizer")
    for language in SOURCES:
        text = "".join(documents(language, 20, seed=3))
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert ids.count(tokenizer.unk_token_id) < 0.01 * len(ids) and len(ids) < 0.75 * len(text)


def test_small_languages_come_more_often_than_they_are_large(folder: Path) -> None:
    corpus = open_corpus(CorpusSection.model_validate(mixture(folder)))
    sizes = {name: part.tokens("train") for name, part in corpus.parts.items()}
    for name, share in corpus.shares.items():
        assert share == pytest.approx(sizes[name] ** 0.3 / sum(size**0.3 for size in sizes.values()), abs=1e-4)
    assert corpus.shares["chinese"] > sizes["chinese"] / sum(sizes.values())
    assert list(corpus.held_out) == ["valid.chinese", "valid.english", "valid.english.other", "valid.hindi"]


@pytest.mark.parametrize("other", ["two", "resumed"])
def test_a_run_is_the_same_on_two_ranks_and_resumed_by_two(runs: Path, other: str) -> None:
    one, another = metrics(runs / "one"), metrics(runs / other)
    assert list(one) == list(another) == list(range(1, STEPS + 1))
    for step, row in one.items():
        for key in (key for key in row if key.startswith(("loss/", "valid/"))):
            assert another[step][key] == pytest.approx(row[key], rel=2e-4), (step, key)


def test_a_mixture_of_one_trains_what_the_corpus_alone_does(runs: Path) -> None:
    plain, alone = final_weights(runs / "plain"), final_weights(runs / "alone")
    assert all((plain[peer][key] == alone[peer][key]).all() for peer in plain for key in plain[peer])
    rows = metrics(runs / "plain")[6], metrics(runs / "alone")[6]
    for key in (key for key in rows[0] if key.startswith(("loss/", "grad_norm/", "valid/")) and "other" not in key):
        assert rows[0][key] == rows[1][key], key


def test_every_language_and_set_is_measured(runs: Path) -> None:
    """The value without a name is the mean by the mixture's weights; a set of other text has none."""
    corpus = open_corpus(CorpusSection.model_validate(mixture(runs)))
    first, last = metrics(runs / "one")[6], metrics(runs / "one")[STEPS]
    for peer in ("teacher", "student"):
        found = held_out_values(last, peer)
        assert list(found) == ["", "chinese", "english", "english.other", "hindi"]
        for what, value in found[""].items():
            mean = sum(corpus.shares[name] * found[name][what] for name in SOURCES)
            assert value == pytest.approx(mean, rel=1e-12)
        assert found[""]["loss"] < held_out_values(first, peer)[""]["loss"]
        assert last[f"valid/english.other/{peer}/loss"] != found["hindi"]["loss"]
    one, two = "teacher", "student"
    mean = sum(corpus.shares[name] * last[f"valid/{name}/agreement/{one}/{two}"] for name in SOURCES)
    assert last[f"valid/agreement/{one}/{two}"] == pytest.approx(mean, rel=1e-12)


def test_a_set_beside_a_corpus_moves_nothing(runs: Path) -> None:
    plain = metrics(runs / "plain")[6]
    assert math.isfinite(plain["valid/other/student/loss"])
    assert plain["valid/student/loss"] == metrics(runs / "alone")[6]["valid/english/student/loss"]


def test_a_causal_model_has_bits_per_byte_of_each_language(runs: Path) -> None:
    """What a token says in bits, over the bytes of that language's text that it stands for."""
    corpus, last = open_corpus(CorpusSection.model_validate(mixture(runs))), metrics(runs / "causal")[6]
    bits = {name: last[f"valid/{name}/a/bits_per_byte"] for name in SOURCES}
    for name in SOURCES:
        [shard] = corpus.splits[f"valid.{name}"]
        assert shard.text_bytes is not None
        loss = last[f"valid/{name}/a/loss"]
        assert bits[name] == pytest.approx(loss / math.log(2) * shard.tokens / shard.text_bytes, rel=1e-9)
    assert last["valid/a/bits_per_byte"] == pytest.approx(sum(corpus.shares[name] * bits[name] for name in SOURCES))


def test_a_card_and_a_report_say_each_language(runs: Path, tmp_path: Path) -> None:
    export(runs / "one", "student", tmp_path / "student")
    card = ModelCard((tmp_path / "student" / "README.md").read_text())
    stated = {(r.dataset_config, r.metric_type): r.metric_value for r in card.data.eval_results}
    for name, values in held_out_values(metrics(runs / "one")[STEPS], "student").items():
        for what, value in values.items():
            assert stated.pop((name or None, what)) == round(value, 4)
    assert not stated and "held-out rows of chinese + english + hindi, english.other" in card.text
    assert "Corpus `chinese + english + hindi`" in card.text
    page = write_report([runs / "one"], tmp_path / "report", agreement_rows=9).read_text()
    for words in (
        "held-out loss on chinese (nats)",
        "held-out loss on english.other (nats)",
        "corpus chinese + english",
    ):
        assert words in page
    assert len(held_out_answers(RunDirectory(runs / "one"), 9).peers["student"]) >= 9


def test_commands_look_at_every_source(folder: Path, tmp_path: Path) -> None:
    """A damaged one is named before training; hosts are held against each other by what all of them hold."""
    shutil.copytree(folder / "hindi", tmp_path / "hindi")
    corpus = mixture(folder)
    corpus["sources"]["hindi"]["path"] = str(tmp_path / "hindi")
    (tmp_path / "r.json").write_text(json.dumps(recipe(corpus)))
    (tmp_path / "d.json").write_text('{"zero_optimization": {"stage": 1}}')
    files = [
        "--recipe",
        tmp_path / "r.json",
        "--deepspeed_config",
        tmp_path / "d.json",
        "--output_dir",
        tmp_path / "run",
    ]
    good = run("launchers/preflight.py", *files)
    assert good.returncode == 0, good.stdout + good.stderr
    with (tmp_path / "hindi" / "train-00000.bin").open("r+b") as file:
        file.write(b"\7\7")
    refused = run("launchers/pretrain.py", *files)
    assert refused.returncode == 1 and "hindi/train-00000.bin: sha256" in refused.stderr
    assert not (tmp_path / "run").exists()


def test_what_is_kept_and_said_goes_by_the_mean(runs: Path) -> None:
    newest = checkpoint.newest(runs / "one" / "checkpoints")
    assert newest is not None
    last = metrics(runs / "one")[STEPS]
    assert newest[1]["valid"] == {peer: last[f"valid/{peer}/loss"] for peer in ("teacher", "student")}
    said, summary = RunDirectory(runs / "one").summed_up(), json.loads((runs / "one" / "summary.json").read_text())
    for name in ("", " on chinese", " on english", " on english.other", " on hindi"):
        loss = held_out_values(summary, "teacher")[name.removeprefix(" on ")]["loss"]
        assert f"teacher{name}: held-out loss {loss:.3f} nats" in said
    assert summary["unigram_loss"] is not None
