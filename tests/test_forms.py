"""A label of each word, an answer in a text, curves over few examples, and causal models that are fine-tuned."""

from __future__ import annotations

import dataclasses
import json
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ctcd_ds.cli import UserError
from ctcd_ds.evaluation import data, finetune, glue, results
from ctcd_ds.evaluation.card import eval_results
from ctcd_ds.evaluation.claims import called
from ctcd_ds.evaluation.finetune import FinetuneSettings, few, open_checkpoint
from ctcd_ds.evaluation.forms import ANSWERS, FORMS, SENTENCES, WORDS
from ctcd_ds.evaluation.forms.answers import answer_f1, answers, exact_match
from ctcd_ds.evaluation.forms.form import Encoded, Form
from ctcd_ds.evaluation.forms.words import entities, entity_f1
from ctcd_ds.evaluation.tables import TaskRows
from ctcd_ds.evaluation.task_file import own_tasks
from ctcd_ds.experiments.running import scoring_options
from ctcd_ds.experiments.specification import Glue
from glue_files import BAD, GOOD, write_causal, write_glue, write_model

HOT = FinetuneSettings(epochs=4, learning_rate=1e-2, batch_size=16, max_length=24)
TAGS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A masked, two causal and a sequence-to-sequence model; GLUE's tasks; sentences with names; questions."""
    home = tmp_path_factory.mktemp("forms")
    write_model(home / "hf/bert")
    write_causal(home / "hf/gpt2", "gpt2")
    write_causal(home / "hf/llama", "llama")
    write_causal(home / "hf/t5", "t5")
    write_glue(home / "glue", rows=256, dev=32)
    draw = random.Random(0)
    for name, size in (("train", 96), ("dev", 24)):
        sentences = [[word_and_tag(draw) for _ in range(draw.choice((3, 5, 5, 30)))] for _ in range(size)]
        lines = ["-DOCSTART- -X- O\n", *("\n".join(f"{w} NN {t}" for w, t in words) + "\n" for words in sentences)]
        (home / f"{name}.conll").write_text("\n".join(lines))
        (home / f"{name}.json").write_text(json.dumps({"data": [{"paragraphs": list(paragraphs(draw, size))}]}))
    (home / "names.yaml").write_text(
        f"name: names\ncolumns: [word, pos, ner]\ntext: word\nlabel: ner\nlabels: [{', '.join(TAGS)}]\n"
        "metrics: [entity_f1, token_accuracy]\ntrain: train.conll\ndev: dev.conll\n"
    )
    (home / "asked.yaml").write_text(
        "name: asked\nmetrics: [exact_match, answer_f1]\ntrain: train.json\ndev: dev.json\n"
    )
    return home


def word_and_tag(draw: random.Random) -> tuple[str, str]:
    kind = draw.randrange(3)
    return (draw.choice([GOOD, BAD, ["it", "was", "a"]][kind]), ("B-PER", "B-LOC", "O")[kind])


def paragraphs(draw: random.Random, size: int) -> Any:
    """The answer is the one good word of a text of bad ones, which may be longer than any row."""
    for number in range(size):
        words = [draw.choice(BAD) for _ in range(draw.choice((4, 9, 9, 30)))]
        place = draw.randrange(len(words))
        words[place] = draw.choice(GOOD)
        start = len(" ".join([*words[:place], ""]))
        found = [{"text": words[place], "answer_start": start}]
        yield {"context": " ".join(words), "qas": [{"id": str(number), "question": "was it a ?", "answers": found}]}


# ---- learnt, in every form


@pytest.mark.parametrize("model", ["bert", "llama"])
def test_names_and_answers_are_learnt_in_rows_longer_than_a_model_reads(home: Path, tmp_path: Path, model: str) -> None:
    files = [home / "names.yaml", home / "asked.yaml"]
    content = glue.run([home / "hf" / model], ("all",), None, tmp_path, (1,), HOT, task_files=files)
    found = {name: entry["seeds"]["1"]["metrics"] for name, entry in content["models"][model]["tasks"].items()}
    assert found["names"]["entity_f1"] > 0.95 and found["names"]["token_accuracy"] > 0.95
    assert found["asked"]["exact_match"] > 0.9 and found["asked"]["answer_f1"] >= found["asked"]["exact_match"]
    known = {task.name: task for task in own_tasks(files, [])}
    cards = [(r.task_type, r.metric_type) for r in eval_results(model, content, known)]
    words, texts = "token-classification", "question-answering"
    assert cards == [(words, "f1"), (words, "accuracy"), (texts, "exact_match"), (texts, "f1")]


def test_causal_and_other_models_of_text_are_classifiers_though_a_tokenizer_has_no_padding(
    home: Path, tmp_path: Path
) -> None:
    two, models = dataclasses.replace(HOT, epochs=2), [home / "hf/gpt2", home / "hf/t5"]
    content = glue.run(models, ("sst2",), home / "glue", tmp_path, (1,), two, keep_models=True)
    assert [model["tasks"]["sst2"]["median"] > 90 for model in content["models"].values()] == [True, True]
    kept = open_checkpoint(tmp_path / "models/gpt2/sst2/seed-1", "kept")
    assert kept.tokenizer.pad_token_id == kept.tokenizer.eos_token_id


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("model", ["gpt2", "llama"])
def test_a_causal_models_weights_are_under_every_head(home: Path, model: str, form: Form) -> None:
    from transformers import AutoModel

    found, missing = finetune.load(form, home / "hf" / model, open_checkpoint(home / "hf" / model, model).tokenizer)
    kept = AutoModel.from_pretrained(home / "hf" / model).state_dict()
    assert not missing and kept.keys() == found.base_model.state_dict().keys()
    assert all(torch.equal(weights, kept[name]) for name, weights in found.base_model.state_dict().items())


@pytest.mark.parametrize("model", ["gpt2", "llama"])
def test_padding_changes_no_logits_and_two_texts_are_kept_apart(home: Path, model: str) -> None:
    tokenizer = open_checkpoint(home / "hf" / model, model).tokenizer
    classifier = finetune.load(SENTENCES, home / "hf" / model, tokenizer)[0].eval()
    short, long = "it was good", "it was a bad bad bad ."
    alone = classifier(**tokenizer([short], return_tensors="pt")).logits
    padded = classifier(**tokenizer([short, long], padding=True, return_tensors="pt")).logits
    np.testing.assert_allclose(alone[0].detach(), padded[0].detach(), atol=1e-6)
    assert tokenizer("good", " bad").input_ids != tokenizer("good bad").input_ids


def test_a_model_type_without_such_a_head_is_named(home: Path, tmp_path: Path) -> None:
    (tmp_path / "xglm").mkdir()
    for file in (home / "hf/gpt2").iterdir():
        (tmp_path / "xglm" / file.name).symlink_to(file)
    (tmp_path / "xglm/config.json").unlink()
    (tmp_path / "xglm/config.json").write_text('{"model_type": "xglm"}')
    for form, called_ in ((WORDS, "token-classification on xglm"), (ANSWERS, "question-answering on xglm")):
        with pytest.raises(UserError, match=f"no head for {called_}; leave out"):
            open_checkpoint(tmp_path / "xglm", "xglm", [form])


# ---- files of words and their metrics


def conlleval(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """The entities by the rules of conlleval.pl, one by one."""
    found, start = set(), 0
    for n, (before, now) in enumerate(zip(["O", *tags], [*tags, "O"], strict=True)):
        (p, _, pt), (t, _, tt) = before.partition("-"), now.partition("-")
        ends = p in ("E", "S") or (p in ("B", "I") and t in ("B", "S", "O")) or (p != "O" and pt != tt)
        starts = t in ("B", "S") or (p in ("E", "S", "O") and t in ("E", "I")) or (t != "O" and pt != tt)
        if p != "O" and ends:
            found.add((pt, start, n))
        if starts:
            start = n
    return found


def test_entities_are_those_of_conlleval_in_every_way_of_marking() -> None:
    assert list(entities(["B-A", "I-A", "B-A", "O", "I-B"])) == [("A", 0, 2), ("A", 2, 3), ("B", 4, 5)]  # IOB2
    assert list(entities(["I-A", "I-A", "B-A", "I-B"])) == [("A", 0, 2), ("A", 2, 3), ("B", 3, 4)]  # IOB1
    assert list(entities(["B-A", "E-A", "S-B", "S-B"])) == [("A", 0, 2), ("B", 2, 3), ("B", 3, 4)]  # IOBES
    draw = random.Random(1)
    spelt = ["O", *(f"{mark}-{kind}" for mark in "BIES" for kind in ("A", "B"))]
    for _ in range(3000):
        tags = draw.choices(spelt, k=draw.randrange(9))
        assert set(entities(tags)) == conlleval(tags), tags


def test_f1_of_entities_counts_whole_ones_of_the_right_type() -> None:
    truth = [["B-A", "I-A", "O", "B-B"], ["O", "B-A"]]
    assert entity_f1(truth, truth) == 1.0
    assert entity_f1(truth, [["B-A", "O", "O", "B-B"], ["O", "B-B"]]) == pytest.approx(2 * 1 / (3 + 3))
    assert entity_f1(truth, [["O"] * 4, ["O"] * 2]) == 0.0 == entity_f1([["O"]], [["O"]])


def test_universal_dependencies_are_read_without_ranges_and_comments(tmp_path: Path) -> None:
    def row(*cells: str) -> str:
        return "\t".join([*cells, *["_"] * (10 - len(cells))])

    lines = ["# text = it's", row("1-2", "it's"), row("1", "it", "it", "PRON"), row("2", "#", "be", "AUX"), ""]
    (tmp_path / "a.conllu").write_text("\n".join(lines + lines[1:]))
    (tmp_path / "t.yaml").write_text(
        "name: pos\ntext: form\nlabel: upos\nlabels: [PRON, AUX]\nmetrics: token_accuracy\n"
        "train: a.conllu\ndev: a.conllu\n"
    )
    [task] = own_tasks([tmp_path / "t.yaml"], [])
    read = data.from_folder(Path(), task).dev[""]
    assert (read.texts, read.labels) == ([("it", "#")] * 2, [(0, 1)] * 2)


# ---- answers


def test_answers_are_compared_as_squad_compares_them() -> None:
    assert exact_match("The U.S. Senate", "us  senate!") == 1.0 and exact_match("a cat", "the dog") == 0.0
    assert answer_f1("in the house", "a big house") == pytest.approx(2 * 1 / (2 + 2))
    assert answer_f1("go go go", "go go") == pytest.approx(2 * 2 / (3 + 2))
    assert answer_f1("", "") == 1.0 and answer_f1("", "x") == answer_f1("x", "the") == 0.0


def test_the_best_answer_of_all_windows_counts_unless_none_is_likelier() -> None:
    text = "one two three"
    spans = {"a": [None, (0, 3), (4, 7), None], "b": [None, (4, 7), (8, 13), None]}
    features = [{"row": 0, "none": 0, "spans": spans[key]} for key in "ab"]
    logits = np.zeros((2, 4, 2), np.float32)
    logits[0, 1, 0], logits[0, 1, 1] = 3.0, 1.0  # "one": 4
    logits[1, 1, 0], logits[1, 2, 1] = 2.5, 2.0  # "two three": 4.5
    logits[1, 3] = 50.0  # no place of the text
    encoded = Encoded(TaskRows([("?", text)], [()], ["0"]), features)
    assert answers(encoded, logits, may_be_none=False) == answers(encoded, logits, may_be_none=True) == ["two three"]
    logits[:, 0] = 2.3
    assert answers(encoded, logits, may_be_none=False) == ["two three"]
    assert answers(encoded, logits, may_be_none=True) == [""]
    logits[0, 0] = -9.0  # one window that surely holds it is enough
    assert answers(encoded, logits, may_be_none=True) == ["two three"]


@pytest.mark.parametrize("model", ["bert", "gpt2", "llama"])
def test_every_answer_is_a_target_in_a_window_and_reads_as_it_was_written(home: Path, model: str) -> None:
    [task] = own_tasks([home / "asked.yaml"], [])
    rows = data.from_folder(Path(), task).dev[""]
    tokenizer = open_checkpoint(home / "hf" / model, model, [ANSWERS]).tokenizer
    encoded = ANSWERS.encode(rows, tokenizer, 24)
    assert len(encoded.features) > len(rows)
    logits = np.zeros((len(encoded.features), 24, 2), np.float32)
    for number, feature in enumerate(encoded.features):
        assert len(feature["input_ids"]) <= 24
        if feature["start_positions"] != feature["none"]:
            logits[number, feature["start_positions"], 0] = logits[number, feature["end_positions"], 1] = 1.0
    assert ANSWERS.scores(task, logits, encoded) == {"exact_match": 1.0, "answer_f1": 1.0}


# ---- few examples


def test_few_examples_are_even_over_labels_nested_and_a_matter_of_the_seed() -> None:
    rows = TaskRows(
        [(str(n),) for n in range(300)], [int(n % 10 == 0) for n in range(300)], [str(n) for n in range(300)]
    )
    some = {number: few(rows, number, 1) for number in (16, 64, 100)}
    assert [Counter(some[number].labels) for number in (16, 64)] == [{0: 8, 1: 8}, {0: 34, 1: 30}]
    assert set(some[16].texts) < set(some[64].texts) < set(some[100].texts)
    assert few(rows, 16, 1) == some[16] != few(rows, 16, 2)


def test_a_curve_is_a_row_of_the_table_for_each_number(home: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(finetune, "FEW_STEPS", 12)
    models, where = [home / "hf/bert"], (home / "glue", tmp_path / "out")
    glue.run(models, ("sst2",), *where, (1, 2), HOT, train_examples=(64, 16))
    glue.run(models, ("stsb",), *where, (1,), HOT, train_examples=(8,))
    content = glue.run(models, ("sst2",), *where, (1,), HOT)
    assert list(content["tasks"]) == ["sst2@16", "sst2@64", "sst2", "stsb@8"]
    [model] = content["models"].values()
    assert set(model["tasks"]["sst2@16"]["seeds"]) == {"1", "2"} and model["tasks"]["sst2@64"]["median"] > 60
    assert model["average"]["tasks"] == ["sst2"], "a few examples are not GLUE"
    lines = [line.split()[0] for line in results.score_table(content).splitlines()[2:6]]
    assert lines == list(content["tasks"])
    assert called("sst2@16", content["tasks"]["sst2@16"], content["settings"]) == "sst2 stand-in 16 examples"
    with pytest.raises(UserError, match="--train_examples: 257: task sst2 has 256 training rows; give 1 to 256"):
        glue.run(models, ("sst2",), *where, (1,), HOT, train_examples=(257,))


def test_an_experiment_asks_for_a_curve_in_the_commands_words() -> None:
    options = scoring_options(Glue(train_examples=[16, 64], seeds=[1, 2]))
    assert (options["train_examples"], options["seeds"]) == ("16,64", "1,2")


# ---- a user's mistakes


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("names", {"labels": None}, "labels: entity_f1, token_accuracy need them"),
        ("names", {"labels": ["O", "PER"]}, "'PER' marks no entity"),
        ("names", {"columns": None}, "columns: name the columns of the file, as in [word, pos, chunk, ner]"),
        ("names", {"text": "wrd"}, "columns: 'wrd' is not among them; did you mean 'word'?"),
        ("names", {"metrics": ["entity_f1", "accuracy"]}, "accuracy does not fit entity_f1; entity_f1, token"),
        ("names", {"dev": "dev.json"}, "a file ending in .conll"),
        ("asked", {"text": "question"}, "text, columns: files of SQuAD have names of their own"),
        ("asked", {"labels": ["a", "b"]}, "labels, regression: exact_match, answer_f1 compare words"),
        ("asked", {"base": "sst2", "train": None}, "it measures exact_match, answer_f1, its base sst2 accuracy"),
        ("asked", {"metrics": "accuracy"}, "text: say which column holds the text"),
    ],
)  # fmt: skip
def test_a_mistake_in_such_a_task_file_is_one_message(home: Path, file: str, change: dict, said: str) -> None:
    from ruamel.yaml import YAML

    from ctcd_ds.evaluation.tasks import SST2

    content = {**YAML(typ="safe").load(home / f"{file}.yaml"), **change}
    (home / "mine.yaml").write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    with pytest.raises(UserError) as raised:
        own_tasks([home / "mine.yaml"], [SST2])
    assert said in str(raised.value)


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("dev.conll", "good NN\n", "dev.conll:1: 2 columns, where there should be 3 (word, pos, ner)"),
        ("dev.conll", "good NN O\n\nbad NN B-PRE\n", "dev.conll:3: label 'B-PRE' is none of O, B-PER"),
        ("dev.conll", "-DOCSTART- -X- O\n\n", "dev.conll holds no rows"),
        ("dev.json", '{"data": [{"paragraphs": [{"context": "a"}]}]}', "is not in SQuAD's form"),
        ("dev.json", '{"data": []}', "dev.json holds no rows"),
        (
            "dev.json",
            json.dumps({"data": [{"paragraphs": [{"context": "a b", "qas": [
                {"id": 7, "question": "?", "answers": [{"text": "b", "answer_start": 1}]}]}]}]}),
            "question 7: 'b' is not at 1 of its text",
        ),
    ],
)  # fmt: skip
def test_a_wrong_row_is_named(home: Path, tmp_path: Path, file: str, text: str, said: str) -> None:
    for name in ("names.yaml", "asked.yaml", "train.conll", "train.json"):
        (tmp_path / name).symlink_to(home / name)
    (tmp_path / file).write_text(text)
    [task] = own_tasks([tmp_path / ("names.yaml" if file == "dev.conll" else "asked.yaml")], [])
    with pytest.raises(UserError) as raised:
        data.from_folder(Path(), task)
    assert said in str(raised.value)
