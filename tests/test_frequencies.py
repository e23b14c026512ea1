"""What word frequencies alone score, computed at preparation, and what is said of models that are no better."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corpora import write_corpus
from ctcd_ds.corpus.frequencies import unigram_loss
from ctcd_ds.experiments.collecting import reservations
from ctcd_ds.manifest import read_manifest
from ctcd_ds.training.run_directory import at_word_frequencies, duration

documents = st.lists(st.lists(st.integers(5, 19), max_size=9), min_size=1, max_size=5)


@settings(max_examples=25, deadline=None)
@given(train=documents, valid=documents)
def test_it_is_the_cross_entropy_of_the_held_out_tokens(
    tmp_path_factory: pytest.TempPathFactory, train: list[list[int]], valid: list[list[int]]
) -> None:
    path = write_corpus(tmp_path_factory.mktemp("frequencies") / "c", [train, train], valid, vocab_size=20)
    manifest = read_manifest(path / "manifest.json")
    found = unigram_loss([path], manifest["splits"], manifest["dtype"], manifest["tokenizer"])
    seen = Counter(id_ for document in train * 2 for id_ in document)
    asked = [id_ for document in valid for id_ in document]
    if not seen or not asked:
        assert found is None
    else:
        each = [-math.log((seen[id_] + 1) / (seen.total() + 20)) for id_ in asked]
        assert found == pytest.approx(sum(each) / len(each), abs=1e-5)


def test_who_has_learned_no_more_is_named(tmp_path: Path) -> None:
    said = at_word_frequencies({"teacher": 6.84, "student": 5.0}, 6.98)
    assert said == "teacher is still at word frequencies, which alone give 6.980 nats: train longer"
    assert at_word_frequencies({"teacher": 6.84, "student": 6.87}, 6.98).startswith("teacher and student are still")
    assert at_word_frequencies({"teacher": 5.0}, 6.98) == at_word_frequencies({"teacher": 7.0}, None) == ""


@pytest.mark.parametrize(("seconds", "said"), [(12.34, "12.3 s"), (200, "3 min 20 s"), (3725, "1 h 02 min")])
def test_times_are_said_as_people_say_them(seconds: float, said: str) -> None:
    assert duration(seconds) == said


def test_many_runs_at_word_frequencies_are_one_line_of_a_report(tmp_path: Path) -> None:
    runs = [tmp_path / f"cell-seed-{seed}" for seed in range(1, 7)]
    for run in runs:
        run.mkdir()
        loss = 5.0 if run is runs[-1] else 6.9
        (run / "summary.json").write_text(json.dumps({"valid/teacher/loss": loss, "unigram_loss": 6.98}))
    (said,) = reservations([*runs, runs[0]])
    assert said.startswith(
        "cell-seed-1, cell-seed-2, cell-seed-3, cell-seed-4 and 1 more: teacher is still at word frequencies"
    )
