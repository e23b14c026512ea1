"""Several corpora as one: exact shares, each row once an epoch, the same rows however a run is cut, mistakes."""

from __future__ import annotations

import json
import re
import shutil
import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corpora import SPECIAL, random_documents, write_corpus
from ctcd_ds.corpus.mixture import PLACES, MixedRows, open_corpus, quotas_of
from ctcd_ds.corpus.rows import Corpus, Rows, batch_rows
from ctcd_ds.recipe.mistakes import recipe_mistakes
from ctcd_ds.recipe.reading import load_recipe
from ctcd_ds.recipe.schema import Mistakes
from ctcd_ds.recipe.sections import CorpusSection
from ctcd_ds.tasks.loader import Cut
from ctcd_ds.tasks.masking import Masking
from ctcd_ds.tasks.mlm import MaskedLM, PeerMasks
from ctcd_ds.training.identity import changes, identity
from ctcd_ds.training.metrics import held_out_values, shown_as
from ctcd_ds.training.plan import Plan, describe, make_plan
from runs import FP32, bert

LENGTH = 16
WEIGHTS = {"en": 0.7, "sw": 0.25, "zh": 0.05}


class Sized(Rows):
    """Rows of which only the number counts."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size


def mixed(sizes: list[int], weights: list[float]) -> MixedRows:
    """The places of a mixture, without corpora."""
    corpus: Any = SimpleNamespace(quotas=tuple(quotas_of(weights).tolist()))
    return MixedRows(corpus, "train", {str(k): Sized(size) for k, size in enumerate(sizes)})


def drawn(rows: Rows, steps: int, batch: int, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Epochs and rows of the first steps, one after another."""
    found = [rows.batch(seed, step, batch) for step in range(steps)]
    return np.concatenate([epochs for epochs, _ in found]), np.concatenate([numbers for _, numbers in found])


def owners(numbers: np.ndarray, sizes: list[int]) -> np.ndarray:
    return np.searchsorted(np.cumsum(sizes), numbers, side="right")


# --- which rows come -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("sources", "distance"), [(2, 0.51), (5, 2), (20, 2.5), (100, 4)])
def test_every_prefix_has_each_sources_share(sources: int, distance: float) -> None:
    random = np.random.default_rng(sources)
    weights = random.dirichlet(np.full(sources, 0.5)) + 1e-4
    quotas, rows = quotas_of(weights.tolist()), mixed([1000] * sources, weights.tolist())
    _, numbers = drawn(rows, 20, 4096)  # more than a period
    whose = owners(numbers, [1000] * sources)
    for source, quota in enumerate(quotas):
        came, exact = np.cumsum(whose == source), quota / PLACES * np.arange(1, len(numbers) + 1)
        assert np.abs(came - exact).max() <= distance and came[PLACES - 1] == quota


@given(weights=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=60))
def test_quotas_are_the_weights_to_within_one_place(weights: list[float]) -> None:
    quotas, exact = quotas_of(weights), np.array(weights) / sum(weights) * PLACES
    assert quotas.sum() == PLACES and (np.abs(quotas - exact) < 1).all()


@given(
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=6),
    batch=st.integers(1, 200),
    seed=st.integers(0, 2**63 - 1),
    data=st.data(),
)
@settings(max_examples=40, deadline=None)
def test_each_row_of_each_source_comes_once_an_epoch(
    sizes: list[int], batch: int, seed: int, data: st.DataObject
) -> None:
    weights = data.draw(st.lists(st.floats(0.05, 1.0), min_size=len(sizes), max_size=len(sizes)))
    epochs, numbers = drawn(mixed(sizes, weights), 12, batch, seed)
    whose, begins = owners(numbers, sizes), np.cumsum([0, *sizes])
    for source, size in enumerate(sizes):
        own, epoch = numbers[whose == source] - begins[source], epochs[whose == source]
        assert (epoch == np.arange(len(own)) // size).all()
        for start in range(0, len(own), size):
            part = own[start : start + size]
            assert len(set(part.tolist())) == len(part) and 0 <= part.min() <= part.max() < size


@given(size=st.integers(1, 200_000), batch=st.integers(1, 300), step=st.integers(0, 10**7), seed=st.integers(0, 2**63))
@settings(max_examples=50, deadline=None)
def test_a_mixture_of_one_is_that_corpus(size: int, batch: int, step: int, seed: int) -> None:
    for ours, plain in zip(
        mixed([size], [3.0]).batch(seed, step, batch), batch_rows(seed, size, step, batch), strict=True
    ):
        assert (ours == plain).all()


def test_the_rows_of_a_mixture_stay_what_they_are() -> None:
    """Resuming a run under a later version must read the same rows: these numbers may never change."""
    epochs, numbers = mixed([1000, 300, 20], [7, 2.5, 0.5]).batch(1, 124, 12)
    assert epochs.tolist() == [1, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]
    assert numbers.tolist() == [880, 1300, 1199, 495, 267, 176, 1027, 696, 401, 788, 1138, 948]


def test_equal_corpora_are_not_read_in_step() -> None:
    _, numbers = drawn(mixed([500, 500], [1, 1]), 1, 1000)
    one, other = numbers[numbers < 500], numbers[numbers >= 500] - 500
    assert (one == other).mean() < 0.03


def test_memory_does_not_grow_with_the_corpora() -> None:
    rows = mixed([10**12, 10**11, 10**9], [7, 2, 1])
    tracemalloc.start()
    _, numbers = rows.batch(1, 10**9, 1000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 300_000 and numbers.max() < len(rows) == 10**12 + 10**11 + 10**9


# --- what is read --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three corpora of one tokenizer; zh holds out a set of other text too."""
    folder = tmp_path_factory.mktemp("mixture")
    for seed, (name, documents) in enumerate({"en": 200, "sw": 60, "zh": 12}.items()):
        sets = {"news": random_documents(9, seed=7)} if name == "zh" else {}
        write_corpus(folder / name, random_documents(documents, seed=seed), random_documents(9, seed=9 + seed), **sets)
    return folder


def sources(folder: Path, weights: dict[str, float | None] | None = None) -> dict[str, Any]:
    """The mixture as a recipe's section has it."""
    return {
        name: {"path": str(folder / name), **({} if weight is None else {"weight": weight})}
        for name, weight in (WEIGHTS if weights is None else weights).items()
    }


def section(folder: Path, weights: dict[str, float | None] | None = None, **keys: Any) -> CorpusSection:
    return CorpusSection(sources=sources(folder, weights), sequence_length=LENGTH, **keys)


def framed(corpus: Corpus, split: str = "train") -> Rows:
    return corpus.rows(split, LENGTH, *corpus.frame)


def test_a_mixture_reads_its_sources_rows(folder: Path) -> None:
    corpus = open_corpus(section(folder))
    rows, parts = framed(corpus), [framed(Corpus.open(folder / name)) for name in WEIGHTS]
    assert list(rows.parts) == list(WEIGHTS) and len(rows) == sum(map(len, parts))
    every = np.concatenate([part.read(np.arange(len(part))) for part in parts])
    numbers = np.random.default_rng(0).permutation(len(rows))
    assert (rows.read(numbers) == every[numbers]).all()
    assert rows.read(numbers[:0]).shape == (0, LENGTH)
    valid = framed(corpus, "valid")
    assert len(valid) == sum(len(framed(Corpus.open(folder / name), "valid")) for name in WEIGHTS)


def test_the_order_of_the_sources_means_nothing(folder: Path) -> None:
    one, other = (open_corpus(section(folder, dict(order))) for order in (WEIGHTS.items(), [*WEIGHTS.items()][::-1]))
    assert one.fingerprint == other.fingerprint
    assert (drawn(framed(one), 3, 100)[1] == drawn(framed(other), 3, 100)[1]).all()


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_shares_by_size_are_tokens_to_the_power(folder: Path, alpha: float) -> None:
    corpus = open_corpus(section(folder, dict.fromkeys(WEIGHTS), sampling_alpha=alpha))
    powers = {name: part.tokens("train") ** alpha for name, part in corpus.parts.items()}
    for name, share in corpus.shares.items():
        assert share == pytest.approx(powers[name] / sum(powers.values()), abs=1 / PLACES)


def test_every_cut_into_ranks_and_micro_batches_trains_on_the_same(folder: Path) -> None:
    corpus = open_corpus(section(folder))
    rows, masking = framed(corpus), Masking(0.15, SPECIAL, 1000)
    task = MaskedLM(corpus, LENGTH, masking, {"a": PeerMasks(masking)})
    for step in (0, 5000):
        [whole] = Cut(24).batches(rows, task, 1, step)
        for micro_batch, accumulation, world in [(1, 4, 6), (12, 1, 2), (4, 2, 3)]:
            cuts = [Cut(micro_batch, accumulation, rank, world) for rank in range(world)]
            parts = [batch.views[0] for cut in cuts for batch in cut.batches(rows, task, 1, step)]
            for key in ("targets", "input_ids"):
                cut_up = [getattr(view, key, view.inputs["input_ids"]) for view in parts]
                view = whole.views[0]
                assert np.concatenate(cut_up).tolist() == getattr(view, key, view.inputs["input_ids"]).tolist()


def test_what_is_held_out_is_weighted_as_it_is_trained_on(folder: Path) -> None:
    assert Corpus.open(folder / "zh").held_out == {"valid": 1.0, "valid.news": 0.0}
    expected = {"valid.en": 0.7, "valid.sw": 0.25, "valid.zh": 0.05, "valid.zh.news": 0}
    assert open_corpus(section(folder)).held_out == pytest.approx(expected, abs=1e-4)


def test_sets_stand_for_a_corpus_that_holds_nothing_else_out(tmp_path: Path) -> None:
    path = write_corpus(tmp_path / "c", [[5] * 99], a=[[6] * 50], b=[[7] * 50])
    assert Corpus.open(path).held_out == {"valid.a": 0.5, "valid.b": 0.5}


def test_tensorboard_knows_sets_and_sources_in_words() -> None:
    assert shown_as("valid/sw/student/loss") == "Held-out loss of sw/student"
    assert shown_as("valid/zh.news/agreement/a/b") == "Same answer on held-out rows of zh.news/a and b"


def test_a_row_of_metrics_is_read_by_peer_and_set() -> None:
    row = {
        "valid/a/loss": 1.0,
        "valid/sw/a/loss": 2.0,
        "valid/sw/a/accuracy": 0.1,
        "valid/zh/a/loss": None,
        "valid/b/loss": 3.0,
        "valid/agreement/a/b": 0.5,
        "valid/sw/agreement/a/loss": 0.5,
        "loss/a/hard": 9.0,
    }
    assert held_out_values(row, "a") == {"": {"loss": 1.0}, "sw": {"loss": 2.0, "accuracy": 0.1}}


# --- mistakes ------------------------------------------------------------------------------------------


def recipe(corpus: dict[str, Any], **training: Any) -> dict[str, Any]:
    return {
        "corpus": {"sequence_length": LENGTH, **corpus},
        "peers": {
            "teacher": {"model": bert(16, 1), "soft": {"student": 1.0}},
            "student": {"model": bert(16, 1), "soft": {"teacher": 4.0}},
        },
        "schedule": {"type": "constant", "warmup_fraction": 0.0},
        "training": {"global_batch_rows": 8, "steps": 20, **training},
    }


@pytest.mark.parametrize(
    ("corpus", "said"),
    [
        ({}, "corpus: exactly one of path (a corpus) and sources (several); neither is given"),
        ({"path": "a", "sources": {"a": {"path": "a", "weight": 1}}}, "both are given"),
        ({"sources": {}}, "corpus.sources = {}: at least one source"),
        ({"sources": {"a": {"path": "a", "weight": 0}}}, "corpus.sources.a.weight = 0: must be greater than 0"),
        ({"sources": {"a": {"path": "a", "weight": 1, "wieght": 1}}}, "did you mean 'weight'?"),
        ({"sources": {"a": {"weight": 1}}}, "corpus.sources.a.path: missing"),
        ({"sources": {"a.b": {"path": "a", "weight": 1}}}, "corpus.sources.a.b: a name is letters"),
        ({"sources": {"agreement": {"path": "a", "weight": 1}}}, "corpus.sources.agreement: this name is taken"),
        ({"sources": {"a": {"path": "a"}, "b": {"path": "b", "weight": 1}}}, "corpus.sources: a without weight"),
        ({"sources": {"a": {"path": "a", "weight": 1}}, "sampling_alpha": 0.3}, "and a has one; remove either"),
        ({"sources": {"a": {"path": "a"}}, "sampling_alpha": 1.5}, "corpus.sampling_alpha = 1.5: must be less than"),
        ({"sources": {"a": {"path": "a", "weight": 1}}, "train_rows": 9}, "corpus.train_rows = 9: reduces one corpus"),
        ({"path": "a", "sampling_alpha": 0.3}, "corpus.sampling_alpha = 0.3: is for several corpora"),
    ],
)
def test_each_mistake_is_one_message(corpus: dict[str, Any], said: str) -> None:
    mistakes = recipe_mistakes(recipe(corpus))
    assert len(mistakes) == 1 and said in mistakes[0], mistakes


def test_epochs_of_a_mixture_are_refused() -> None:
    [said] = recipe_mistakes(recipe({"sources": {"a": {"path": "a", "weight": 1}}}, steps=None, epochs=2))
    assert said == "training.epochs = 2: the corpora of a mixture end at different times; give training.steps"


def test_set_changes_and_takes_away_sources_that_there_are(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(json.dumps(recipe({"sources": sources(folder)})))
    changed = load_recipe(tmp_path / "r.json", ["corpus.sources.sw=null", "corpus.sources.en.weight=3"]).corpus
    assert changed.sources is not None and list(changed.sources) == ["en", "zh"] and changed.sources["en"].weight == 3
    plain = load_recipe(tmp_path / "r.json", ["corpus.sources=null", f"corpus.path={folder / 'en'}"]).corpus
    assert (plain.title, changed.title) == ("en", "en + zh")
    for override in ("corpus.sources.swa.weight=3", "corpus.sources.swa=null"):
        with pytest.raises(Mistakes) as found:
            load_recipe(tmp_path / "r.json", [override])
        [said] = found.value.mistakes
        assert "corpus.sources.swa: no source has this name; did you mean 'sw'?" in said


def test_corpora_that_do_not_make_a_mixture_are_named(folder: Path, tmp_path: Path) -> None:
    def said(weights: dict[str, float] | None = None, **more: Path) -> str:
        listed = sources(folder, weights) | {name: {"path": str(path), "weight": 1} for name, path in more.items()}
        with pytest.raises(Mistakes) as found:
            open_corpus(CorpusSection(sources=listed))
        [line] = found.value.mistakes
        return line

    other = write_corpus(tmp_path / "other", random_documents(20), vocab_size=500)
    change_tokenizer(other)
    assert re.match(r"corpus.sources.xx.path = '.*other': its tokenizer \(500 tokens\) is not that of", said(xx=other))
    assert "the same corpus as corpus.sources.sw.path" in said(xx=folder / "sw")
    assert "corpus.sources.xx.path = '/nowhere': there is no corpus" in said(xx=Path("/nowhere"))
    assert "corpus.sources.zh: its weight is 1e-05 of all, and below 1/65,536" in said({"en": 1.0, "zh": 1e-5})


def change_tokenizer(path: Path) -> None:
    from ctcd_ds.manifest import read_manifest, write_manifest

    manifest = read_manifest(path / "manifest.json")
    del manifest["sha256"]
    manifest["tokenizer"]["fingerprint"] = "0" * 64
    write_manifest(path / "manifest.json", manifest)


def plan_of(raw: dict[str, Any], folder: Path, *overrides: str) -> Plan:
    path = folder / "recipe.json"
    path.write_text(json.dumps(raw))
    return make_plan(load_recipe(path, overrides), FP32, 1, "cpu", folder / "run")


def test_the_dry_run_says_how_often_each_source_is_read(folder: Path) -> None:
    plan = plan_of(recipe({"sources": sources(folder)}, steps=250), folder)
    said, rows = describe(plan), {name: len(part) for name, part in plan.rows.parts.items()}
    for name, share in WEIGHTS.items():
        epochs = plan.corpus.shares[name] * 2000 / rows[name]
        assert f"{rows[name]:,} rows of {LENGTH} tokens, {share:.2%} of what is read, {epochs:.2f} epochs" in said
        assert (f"warning: {name} is small for its share" in said) == (epochs > 4)
    assert "warning: zh" in said or "warning: sw" in said, "else this proves nothing"
    assert re.search(r"held out       \d+ rows of en, \d+ rows of sw, \d+ rows of zh, \d+ rows of zh.news", said)


def test_a_source_without_a_row_is_named(folder: Path) -> None:
    long = [f"peers.{peer}.model.max_position_embeddings=999" for peer in ("teacher", "student")]
    with pytest.raises(Mistakes, match=r"corpus .*/zh: split 'train' holds 263 tokens, but one row .* takes 398"):
        plan_of(recipe({"sources": sources(folder)}), folder, "corpus.sequence_length=400", *long)


def test_resume_refuses_another_mixture(folder: Path, tmp_path: Path) -> None:
    raw = recipe({"sources": sources(folder)})
    then = identity(plan_of(raw, tmp_path))
    for override, refused in {
        "corpus.sources.en.weight=3": "corpus.sources.en.weight: the run has 0.7, now 3.0",
        f"corpus.sources.en.path={folder / 'sw'} corpus.sources.sw.path={folder / 'en'}": "corpus: the run has",
        "corpus.sources.zh=null": "corpus: the run has",
    }.items():
        said, _ = changes(then, plan_of(raw, tmp_path, *override.split()), step=3)
        assert any(refused in line for line in said), said
    (tmp_path / "moved").mkdir()
    shutil.copytree(folder / "sw", tmp_path / "moved" / "sw")
    moved = plan_of(raw, tmp_path, f"corpus.sources.sw.path={tmp_path / 'moved' / 'sw'}")
    said, allowed = changes(then, moved, step=3)
    assert not said and len(allowed) == 1 and "corpus.sources.sw.path" in allowed[0]
