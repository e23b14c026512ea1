"""Tasks of one's own beside GLUE's: read, trained on or only scored, clean and adversarial side by side."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from commands import ROOT, command
from ctcd_ds.cli import UserError
from ctcd_ds.evaluation import data, finetune, glue, metrics, results, tasks
from ctcd_ds.evaluation.card import eval_results
from ctcd_ds.evaluation.task_file import own_tasks
from glue_files import sentence, write_glue, write_model, write_tsv

HOT = finetune.FinetuneSettings(epochs=3, learning_rate=1e-2, batch_size=16)
ADVGLUE_ROWS: dict[str, dict[str, str]] = {
    "sst2": {"sentence": "it was good"},
    "qqp": {"question1": "it was good ?", "question2": "was it good ?"},
    "mnli": {"premise": "it was good", "hypothesis": "it was bad"},
    "mnli-mm": {"premise": "it was good", "hypothesis": "it was bad"},
    "qnli": {"question": "was it good ?", "sentence": "it was bad"},
    "rte": {"sentence1": "it was good", "sentence2": "it was bad"},
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, GLUE's tasks, and sets of one's own that say the same or the contrary of SST-2."""
    home = tmp_path_factory.mktemp("own")
    write_glue(home / "glue", rows=256, dev=32)
    write_model(home / "hf/teacher", seed=1)
    draw = random.Random(7)
    rows = [(n % 2, sentence(draw, n % 2)) for n in range(256)]
    for name, part in (("train", rows), ("dev", rows[:40])):
        write_tsv(home / f"own/{name}.tsv", ["text", "mood"], [[s, ("poor", "great")[k]] for k, s in part])
        lines = [json.dumps({"text": s, "mood": k == 1}) for k, s in part]
        (home / f"own/{name}.jsonl").write_text("\n".join(lines) + "\n\n")
        turned = [json.dumps({"text": s, "mood": k != 1}) for k, s in part]
        (home / f"own/turned_{name}.jsonl").write_text("\n".join(turned))
        write_tsv(home / f"own/bare_{name}.tsv", None, [[f"{10.0 * k + 20}", s] for k, s in part])
    return home


def task_file(home: Path, name: str, text: str) -> Path:
    path = home / "own" / f"{name}.yaml"
    path.write_text(f"name: {name}\n{text}")
    return path


def tsv(home: Path) -> Path:
    return task_file(
        home,
        "moods",
        "text: text\nlabel: mood\nlabels: [poor, great]\nmetrics: [accuracy, f1]\ntrain: train.tsv\ndev: dev.tsv\n",
    )


def jsonl(home: Path, name: str = "lines", file: str = "dev.jsonl", base: str = "SST-2") -> Path:
    text = f"text: text\nlabel: mood\nlabels: [false, true]\nmetrics: accuracy\ntrain: train.jsonl\ndev: {file}\n"
    return task_file(home, name, text + f"base: {base}\n")


def adversarial(path: Path, labels: dict[str, list[int]]) -> Path:
    """A file in AdvGLUE's form with these labels."""
    content = {
        key: [{"idx": n, **ADVGLUE_ROWS[key], "label": label} for n, label in enumerate(found)]
        for key, found in labels.items()
    }
    path.write_text(json.dumps(content))
    return path


# ---- what files say


def test_tsv_and_jsonl_with_the_same_rows_are_the_same_rows(home: Path) -> None:
    first, second = own_tasks([tsv(home), jsonl(home)], [tasks.SST2])
    tabs, lines = (data.from_folder(Path(), task) for task in (first, second))
    assert tabs.train is not None and len(tabs.train) == 256
    assert (tabs.train, tabs.dev) == (lines.train, lines.dev)


def test_a_file_without_header_and_a_range_of_numbers(home: Path) -> None:
    text = "text: words\nlabel: value\nregression: [20, 30]\nmetrics: pearson\ncolumns: [value, words]\n"
    path = task_file(home, "warmth", text + "train: bare_train.tsv\ndev: bare_dev.tsv\n")
    (task,) = own_tasks([path], [])
    read = data.from_folder(Path(), task)
    assert set(read.dev[""].labels or ()) == {20.0, 30.0}
    assert metrics.predictions(task, np.array([[12.0], [25.0], [99.0]])).tolist() == [20.0, 25.0, 30.0]


def test_a_folder_stands_for_its_task_file(home: Path, tmp_path: Path) -> None:
    (tmp_path / "moods").mkdir()
    for name in ("train.tsv", "dev.tsv"):
        (tmp_path / "moods" / name).symlink_to(home / "own" / name)
    (tmp_path / "moods/task.yaml").write_text(tsv(home).read_text())
    assert own_tasks([tmp_path / "moods"], [])[0].name == "moods"


def test_several_classes_of_the_base_may_mean_one_label(home: Path) -> None:
    """As in HANS, whose two labels are scored by models of MNLI's three."""
    write_tsv(
        home / "own/hans.tsv",
        ["premise", "hypothesis", "gold"],
        [["a", "a", "non-entailment"], ["a", "a", "entailment"]],
    )
    mapping = "{entailment: entailment, neutral: non-entailment, contradiction: non-entailment}"
    text = (
        f"base: mnli\ntext: [premise, hypothesis]\nlabel: gold\nlabels: {mapping}\nmetrics: accuracy\ndev: hans.tsv\n"
    )
    (task,) = own_tasks([task_file(home, "hans", text)], [tasks.MNLI])
    assert task.labels == ("entailment", "non-entailment") and task.base == "mnli"
    assert metrics.predictions(task, np.eye(3)).tolist() == [0, 1, 1]


def test_advglue_in_its_own_form(home: Path, tmp_path: Path, capsys: Any) -> None:
    labels = {"sst2": [0, 1], "qqp": [1], "mnli": [0, 1, 2], "mnli-mm": [2], "qnli": [0, 1], "rte": [1]}
    path = adversarial(tmp_path / "dev.json", labels)
    chosen = own_tasks([path], [tasks.SST2, tasks.QQP, tasks.MNLI, tasks.QNLI, tasks.RTE])
    read = {task.name: data.from_folder(Path(), task) for task in chosen}
    assert list(read) == ["adv_sst2", "adv_qqp", "adv_mnli", "adv_qnli", "adv_rte"]
    assert {name: [rows.labels for rows in of.dev.values()] for name, of in read.items()} == {
        "adv_sst2": [[0, 1]],
        "adv_qqp": [[1]],
        "adv_mnli": [[0, 1, 2], [2]],
        "adv_qnli": [[0, 1]],
        "adv_rte": [[1]],
    }
    assert read["adv_qnli"].dev[""].texts[0] == ("was it good ?", "it was bad")
    assert [task.metrics for task in chosen[:3]] == [("accuracy",), ("accuracy", "f1"), ("accuracy",)]
    assert [task.name for task in own_tasks([path], [tasks.RTE])] == ["adv_rte"]
    assert "adv_sst2 (add sst2)" in capsys.readouterr().err


def test_each_set_is_a_result_of_its_own_on_a_card(tmp_path: Path) -> None:
    path = adversarial(tmp_path / "dev.json", {"mnli": [0], "mnli-mm": [2], "qqp": [1]})
    known = {task.name: task for task in own_tasks([path], [tasks.MNLI, tasks.QQP])}
    cell = {"adv_mnli": {"accuracy_matched": 0.5, "accuracy_mismatched": 0.25}, "adv_qqp": {"accuracy": 1.0, "f1": 0.8}}
    scores = {name: {"median": 1.0, "seeds": {"1": {"metrics": metrics}}} for name, metrics in cell.items()}
    rows = {name: {"train_rows": 0, "dev_rows": 2} for name in known}
    content = {"settings": {"epochs": 3.0}, "tasks": rows, "models": {"it": {"tasks": scores}}}
    found = eval_results("it", content, known)
    assert [result.metric_value for result in found] == [0.5, 0.25, 1.0, 0.8]
    assert len({(*result.unique_identifier, result.metric_type) for result in found}) == 4
    assert all("fine-tuned on" in (result.metric_name or "") for result in found)


# ---- what is trained and what is scored


@pytest.fixture(scope="module")
def scored(home: Path) -> dict[str, Any]:
    """SST-2 fine-tuned on; two sets of one's own and AdvGLUE scored by its models; one set trained on by itself."""
    files = [
        tsv(home),
        jsonl(home),
        jsonl(home, "turned", "turned_dev.jsonl"),
        adversarial(home / "dev.json", {"sst2": [0, 1]}),
    ]
    return glue.run(
        [home / "hf/teacher"], ("sst2",), home / "glue", home / "out", (1, 2), HOT,
        task_files=files, no_finetune_on=("lines", "turned"),
    )  # fmt: skip


def test_a_set_with_a_base_is_scored_by_the_models_fine_tuned_on_it(scored: dict[str, Any]) -> None:
    done = scored["models"]["teacher"]["tasks"]
    assert done["sst2"]["median"] == 100.0
    assert done["lines"]["median"] == 100.0  # the same kind of sentences
    assert done["turned"]["median"] == 0.0  # every label the other way round
    assert done["adv_sst2"]["median"] == 50.0  # one sentence, both labels
    assert done["turned"]["against_base"] == {"base": 100.0, "difference": -100.0}
    assert "train_loss" in done["moods"]["seeds"]["1"] and "train_loss" not in done["lines"]["seeds"]["1"]
    assert [known["train_rows"] for known in scored["tasks"].values()] == [256, 256, 0, 0, 0]
    assert scored["models"]["teacher"]["average"]["tasks"] == ["sst2"]


def test_the_table_shows_clean_and_other_rows_side_by_side(scored: dict[str, Any]) -> None:
    lines = {line.split("  ")[0]: line for line in results.score_table(scored).splitlines()}
    assert re.search(r"sst2 -> turned +40 +100\.0 -> 0\.0 \(0\.0-0\.0\) +-100\.0", lines["sst2 -> turned"])
    assert re.search(r"sst2 -> adv_sst2 +2 +100\.0 -> 50\.0", lines["sst2 -> adv_sst2"])
    assert "sst2 -> moods" not in lines and "moods" in lines


def test_a_task_file_that_names_no_set_to_leave_alone_is_trained_on(home: Path) -> None:
    (task,) = own_tasks([jsonl(home, "turned", "turned_dev.jsonl")], [tasks.SST2])
    assert task.train is not None and task.base is None
    (task,) = own_tasks([jsonl(home, "turned", "turned_dev.jsonl")], [tasks.SST2], ["turned"])
    assert task.train is None and task.base == "sst2"


def test_a_later_command_goes_on_with_more_sets(home: Path, scored: dict[str, Any], tmp_path: Path) -> None:
    model, path = [home / "hf/teacher"], adversarial(tmp_path / "dev.json", {"sst2": [0, 1]})
    glue.run(model, ("sst2",), home / "glue", tmp_path / "out", (1,), HOT)
    later = glue.run(model, ("sst2",), home / "glue", tmp_path / "out", (1,), HOT, task_files=[path])
    assert later["models"]["teacher"]["tasks"]["adv_sst2"]["median"] == 50.0
    again = glue.run(model, ("sst2",), home / "glue", tmp_path / "out", (1,), HOT)
    assert list(again["tasks"]) == ["sst2", "adv_sst2"]
    adversarial(path, {"sst2": [0, 0]})
    with pytest.raises(UserError, match=r"tasks\.adv_sst2\.sha256"):
        glue.run(model, ("sst2",), home / "glue", tmp_path / "out", (1,), HOT, task_files=[path])


def test_a_task_of_ones_own_may_be_the_base_and_needs_no_glue(home: Path, tmp_path: Path) -> None:
    files = [jsonl(home, "turned", "turned_dev.jsonl", base="moods"), tsv(home)]
    with pytest.raises(UserError, match="there is nothing to do"):
        glue.run([home / "hf/teacher"], ("all",), None, tmp_path / "out", (1,), HOT)
    content = glue.run([home / "hf/teacher"], ("all",), None, tmp_path / "out", (1,), HOT, False, files, ["turned"])
    assert content["models"]["teacher"]["tasks"]["turned"]["median"] == 0.0
    text = results.score_table(content)
    assert "not in the average" not in text and "moods -> turned" not in text  # their metrics differ


# ---- a user's mistakes


def test_a_name_is_given_once(home: Path, tmp_path: Path) -> None:
    path = adversarial(tmp_path / "dev.json", {"sst2": [0, 1]})
    for files in ([tsv(home), tsv(home)], [path, path]):
        with pytest.raises(UserError, match="there are two tasks named"):
            own_tasks(files, [tasks.SST2])


GOOD_FILE = {
    "name": "mine", "text": "text", "label": "mood", "labels": ["poor", "great"], "metrics": "accuracy",
    "train": "train.tsv", "dev": "dev.tsv",
}  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"metric": "accuracy"}, "metric = 'accuracy': unknown key; did you mean 'metrics'?"),
        ({"metrics": "acuracy"}, "'acuracy' is none; did you mean 'accuracy'?"),
        ({"metrics": "pearson"}, "pearson does not fit labels; accuracy, f1, matthews do"),
        ({"regression": [0, 5]}, "both are given"),
        ({"labels": None}, "neither is given"),
        ({"labels": ["a", "b", "c"], "metrics": "f1"}, "f1 is for two labels"),
        ({"labels": ["a"]}, "at least two"),
        ({"dev": "dve.tsv"}, "did you mean 'dev.tsv'?"),
        ({"dev": "dev.csv"}, "a file ending in .tsv, .jsonl"),
        ({"train": None}, "neither train nor base"),
        ({"text": ["a", "b", "c"]}, "text = "),
        ({"text": 3}, "text = 3"),
        ({"name": "sst-2"}, "is GLUE's"),
        ({"name": "a/b"}, "letters, digits"),
        ({"name": None}, "name = None: must be a valid string"),
        ({"columns": ["mod", "text"]}, "'mood' is not among them; did you mean 'mod'?"),
        ({"base": "sst2", "train": None}, "add sst2 to --tasks"),
        ({"base": "stt2", "train": None}, "did you mean 'sst2'?"),
        ({"base": "cola", "labels": ["a", "b", "c"], "train": None}, "the base cola has 2 (0, 1)"),
        ({"base": "cola", "labels": {"0": "a", "2": "b"}, "train": None}, "each of the base's labels means here: 0, 1"),
        ({"base": "cola", "labels": None, "regression": [0, 1], "metrics": "pearson", "train": None}, "it has numbers"),
    ],
)  # fmt: skip
def test_a_mistake_in_a_task_file_is_one_message_with_its_cure(home: Path, changed: dict[str, Any], said: str) -> None:
    content = {key: value for key, value in {**GOOD_FILE, **changed}.items() if value is not None or key == "name"}
    (home / "own/mine.yaml").write_text(json.dumps(content))
    with pytest.raises(UserError) as raised:
        own_tasks([home / "own/mine.yaml"], [tasks.COLA])
    assert said in str(raised.value) and "mine.yaml" in str(raised.value)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"text": "a", "mod": "poor"}', "bad.jsonl:2: no key 'mood'; did you mean 'mod'?"),
        ('{"text": "a", "mood": "por"}', "bad.jsonl:2: label 'por' is none of poor, great; did you mean 'poor'?"),
        ('{"text": 1, "mood": "poor"}', "bad.jsonl:2: text = 1 is no text"),
        ('{"text": "a"', "bad.jsonl:2 is not JSON"),
        ('{"text": "half \\ud83d", "mood": "poor"}', "bad.jsonl:2: text is no Unicode text: character 6"),
        ('\ufeff{"text": "a", "mood": "por"}', "bad.jsonl:2: label 'por' is none"),
        ('{"text": "a", "mood": "poor", "mood": "great"}', "bad.jsonl:2 is not JSON: the key 'mood' is given twice"),
        ('["a"]', "bad.jsonl:2: a row is an object with text, mood"),
    ],
)
def test_a_wrong_row_is_named(home: Path, line: str, said: str) -> None:
    (home / "own/bad.jsonl").write_text('{"text": "a", "mood": "poor"}\n' + line + "\n")
    (home / "own/mine.yaml").write_text(json.dumps({**GOOD_FILE, "dev": "bad.jsonl"}))
    with pytest.raises(UserError) as raised:
        data.from_folder(Path(), own_tasks([home / "own/mine.yaml"], [])[0])
    assert said in str(raised.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"sst2": []}', "holds no rows"),
        ('{"sst-2": []}', "did you mean 'sst2'?"),
        ('{"qqp": []}', "adv_qqp (add qqp)"),
        ("[1, 2]", "is not AdvGLUE's dev.json"),
        ('{"sst2": [{"sentence": "a", "label": 2}]}', "label '2' is none of 0, 1"),
        ('\ufeff{"sst2": [{"sentence": "a", "label": 2}]}', "label '2' is none of 0, 1"),
        ("{", "is not JSON"),
    ],
)
def test_a_file_that_is_not_advglues_is_said(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "dev.json").write_text(content)
    with pytest.raises(UserError) as raised:
        glue_tasks = own_tasks([tmp_path / "dev.json"], [tasks.SST2])
        data.from_folder(tmp_path, glue_tasks[0])
    assert said in str(raised.value)


@pytest.mark.parametrize("name", ["task.yaml", "train.tsv", "dev.jsonl", "adv.json"])
def test_a_damaged_file_is_read_or_refused_with_a_message(home: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "train.tsv").write_text("text\tmood\n" + "it was good\tgreat\nit was bad\tpoor\n" * 6)
    (tmp_path / "dev.jsonl").write_text('{"text": "a", "mood": "poor"}\n{"text": "b", "mood": "great"}\n')
    (tmp_path / "task.yaml").write_text(json.dumps({**GOOD_FILE, "base": "sst2", "dev": "dev.jsonl"}))
    adversarial(tmp_path / "adv.json", {"sst2": [0, 1]})
    whole, chance, refused = (tmp_path / name).read_bytes(), random.Random(1), 0
    for number in range(300):
        changed = bytearray(whole[: chance.randrange(len(whole) + 1)] if number % 3 == 0 else whole)
        for _ in range(number % 4):
            if changed:
                changed[chance.randrange(len(changed))] = chance.randrange(256)
        (tmp_path / name).write_bytes(bytes(changed))
        try:
            for task in own_tasks([tmp_path / "task.yaml", tmp_path / "adv.json"], [tasks.SST2]):
                data.from_folder(tmp_path, task)
        except UserError as mistake:
            assert str(tmp_path) in str(mistake)
            refused += 1
    assert 50 < refused < 300


def test_the_command_shows_both_and_names_typing_mistakes(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    path = adversarial(tmp_path / "dev.json", {"sst2": [0, 1], "rte": [1]})
    line = (
        "tools/run_glue.py",
        "--model",
        home / "hf/teacher",
        "--tasks",
        "sst2",
        "--data_dir",
        home / "glue",
        "--epochs",
        1,
    )
    line = (*line, "--output_dir", tmp_path / "out", "--task_files", path, jsonl(home))
    code, _, err = command(monkeypatch, capsys, *line, "--no_finetune_on", "line")
    assert code == 2 and "did you mean 'lines'?" in err and not (tmp_path / "out").exists()
    code, _, err = command(monkeypatch, capsys, *line, "--no_finetune_on", "sst2")
    assert code == 2 and "sst2 has no base" in err
    code, out, err = command(monkeypatch, capsys, *line, "--no_finetune_on", "lines")
    assert code == 0 and "sst2 -> lines" in out and "adv_rte (add rte)" in err, err


def test_the_documented_task_file_is_one(home: Path, tmp_path: Path) -> None:
    text = (ROOT / "docs/evaluation.md").read_text()
    blocks = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert blocks
    for number, block in enumerate(blocks):
        path = tmp_path / f"{number}.yaml"
        for name in re.findall(r"[\w./-]+\.(?:tsv|jsonl|json|conll)\b", block):
            (tmp_path / name).touch()
        path.write_text(block)
        own_tasks([path], [tasks.SST2, tasks.MNLI])


def test_documented_commands_have_these_options(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    text = (ROOT / "docs/evaluation.md").read_text().replace("\\\n", "")
    lines = re.findall(r"^python (tools/.*)$", text, re.MULTILINE)
    assert len(lines) > 5
    for line in lines:
        code, _, err = command(monkeypatch, capsys, *line.split(), "--help")
        assert code == 0, f"{line}: {err}"
