"""GLUE: the official files of all ten tasks are read, learnt from, measured, compared, resumed and submitted."""

from __future__ import annotations

import dataclasses
import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest

from commands import run
from ctcd_ds.cli import UserError
from ctcd_ds.corpus.tokenizer import SPECIAL_TOKENS
from ctcd_ds.evaluation import data, finetune, glue, metrics, results, tasks
from glue_files import write_glue, write_model, write_tsv

SPELT = {
    "CoLA.tsv": {"0", "1"},
    "SST-2.tsv": {"0", "1"},
    "MRPC.tsv": {"0", "1"},
    "QQP.tsv": {"0", "1"},
    "WNLI.tsv": {"0", "1"},
    "QNLI.tsv": {"entailment", "not_entailment"},
    "RTE.tsv": {"entailment", "not_entailment"},
    "MNLI-m.tsv": {"entailment", "neutral", "contradiction"},
    "MNLI-mm.tsv": {"entailment", "neutral", "contradiction"},
    "AX.tsv": {"entailment", "neutral", "contradiction"},
    "STS-B.tsv": None,
}


FAST = finetune.FinetuneSettings(epochs=1, learning_rate=1e-3, batch_size=8)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models and all ten tasks."""
    home = tmp_path_factory.mktemp("glue")
    write_glue(home / "data")
    write_model(home / "hf/teacher", seed=1)
    write_model(home / "hf/student", seed=2)
    return home


@pytest.fixture(scope="module")
def finished(home: Path) -> Path:
    """The output directory of both models on all ten tasks."""
    glue.run([home / "hf/teacher", home / "hf/student"], ("all",), home / "data", home / "finished", (1,), FAST)
    return home / "finished"


# ---- the official files


@pytest.mark.parametrize("task", tasks.GLUE, ids=lambda task: task.name)
def test_every_official_file_is_read_with_its_labels_and_row_numbers(home: Path, task: tasks.Task) -> None:
    read = data.from_folder(home / "data", task)
    for rows in [read.train, *read.dev.values()]:
        if rows is not None:
            assert rows.labels is not None and len(rows.labels) == len(rows.texts) == len(rows.index)
            assert set(rows.labels) == (set(range(len(task.labels))) or {0.0, 5.0})
    for rows in read.test.values():
        assert rows.index == ["0", "1", "2", "3", "4"]
        assert (rows.labels is None) == (task.name != "ax")
    every = [rows for rows in [read.train, *read.dev.values(), *read.test.values()] if rows]
    assert all(
        text.startswith('It was "') and text.endswith(".") for rows in every for row in rows.texts for text in row
    )


def test_carriage_returns_and_odd_line_separators_inside_a_field_are_text(tmp_path: Path) -> None:
    rows = [["a \u2028 b \x0b c", 1], ["d \x85 e", 0]]
    write_tsv(tmp_path / "SST-2/train.tsv", ["sentence", "label"], rows)
    text = (tmp_path / "SST-2/train.tsv").read_text()
    (tmp_path / "SST-2/dev.tsv").write_bytes(text.replace("\n", "\r\n").encode())
    read = data.from_folder(tmp_path, tasks.SST2)
    assert read.train is not None
    assert read.train.texts == read.dev[""].texts == [("a \u2028 b \x0b c",), ("d \x85 e",)]


def test_the_few_broken_lines_of_qqp_are_left_out_and_counted(home: Path, tmp_path: Path) -> None:
    text = (home / "data/QQP/train.tsv").read_text()
    for name, content in (("train", text + '99\t7\t8\t"torn\n\thalf?\t0\n'), ("dev", text)):
        (tmp_path / "QQP").mkdir(exist_ok=True)
        (tmp_path / f"QQP/{name}.tsv").write_text(content)
    read = data.from_folder(tmp_path, tasks.QQP)
    assert read.train is not None and len(read.train) == 24 and read.left_out == 2


def test_a_diagnostic_is_found_under_its_other_official_names(home: Path, tmp_path: Path) -> None:
    full = data.from_folder(home / "data", tasks.AX).test["AX.tsv"]
    made = [[n, *texts] for n, texts in enumerate(full.texts)]
    write_tsv(tmp_path / "diagnostic/diagnostic.tsv", ["index", "sentence1", "sentence2"], made)
    unlabelled = data.from_folder(tmp_path, tasks.AX).test["AX.tsv"]
    assert unlabelled.texts == full.texts and unlabelled.labels is None


def test_the_hub_gives_the_same_rows_as_the_files(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    read = data.from_folder(home / "data", tasks.MNLI)
    splits = {table.hub_split: rows for keyed, found in ((tasks.MNLI.dev, read.dev), (tasks.MNLI.test, read.test))
              for table, rows in zip(keyed.values(), found.values(), strict=True)}  # fmt: skip
    configuration = ["---", "configs:", "- config_name: mnli", "  data_files:"]
    for name, rows in {"train": read.train, **splits}.items():
        assert rows is not None
        premises, hypotheses = zip(*rows.texts, strict=True)
        columns = {"premise": premises, "hypothesis": hypotheses, "label": rows.labels or [-1] * len(rows)}
        datasets.Dataset.from_dict(columns).to_parquet(tmp_path / f"repository/mnli/{name}.parquet")
        configuration += [f"  - split: {name}", f"    path: mnli/{name}.parquet"]
    (tmp_path / "repository/README.md").write_text("\n".join([*configuration, "---", ""]))
    from_hub = data.from_hub(tasks.MNLI, str(tmp_path / "repository"))
    assert (from_hub.train, from_hub.dev, from_hub.test) == (read.train, read.dev, read.test)


# ---- metrics, averages, names


def test_metrics_are_the_official_ones() -> None:
    truth, answers = [1, 1, 1, 0, 0, 1, 0, 1], np.array([1, 0, 1, 0, 1, 1, 0, 1])  # tp 4, fp 1, fn 1, tn 2
    assert metrics.scores(tasks.COLA, answers, truth) == {"matthews": pytest.approx(7 / 15)}
    assert metrics.scores(tasks.MRPC, answers, truth) == {"accuracy": 0.75, "f1": pytest.approx(0.8)}
    assert metrics.scores(tasks.QQP, answers, truth) == metrics.scores(tasks.MRPC, answers, truth)
    assert metrics.scores(tasks.RTE, answers, truth) == {"accuracy": 0.75}
    scores, guesses = [0.0, 1.0, 2.5, 5.0], np.array([0.5, 0.7, 4.0, 3.0])
    found = metrics.scores(tasks.STSB, guesses, scores)
    assert found == {"pearson": pytest.approx(np.corrcoef(scores, guesses)[0, 1]), "spearman": pytest.approx(0.8)}
    assert metrics.scores(tasks.STSB, np.ones(4), scores) == {"pearson": 0.0, "spearman": 0.0}
    assert metrics.score({"accuracy": 0.75, "f1": 0.8}) == pytest.approx(77.5)


def test_the_average_counts_mnli_once_ax_never_and_says_what_is_missing() -> None:
    medians = {"cola": 10.0, "mnli": 40.0, "rte": 70.0, "wnli": 20.0, "ax": 99.0}
    assert metrics.average(medians) == {
        "with_wnli": 35.0,
        "without_wnli": 40.0,
        "tasks": ["cola", "mnli", "rte", "wnli"],
        "missing": ["sst2", "mrpc", "stsb", "qqp", "qnli"],
    }
    assert metrics.average({"cola": 10.0})["with_wnli"] is None
    assert metrics.average({"wnli": 10.0})["without_wnli"] is None


def test_models_are_named_by_the_shortest_tail_that_tells_them_apart() -> None:
    paths = [Path("/runs/demo/hf/teacher"), Path("/runs/alone/hf/teacher"), Path("/runs/demo/hf/student")]
    assert glue.short_names(paths) == ["demo/hf/teacher", "alone/hf/teacher", "student"]


def test_task_names_are_taken_in_both_spellings_and_put_in_order() -> None:
    assert tasks.named(["STS-B", "sst2", " cola"]) == [tasks.COLA, tasks.SST2, tasks.STSB]


# ---- the grid


def test_all_ten_tasks_give_metrics_and_an_average(finished: Path) -> None:
    content = json.loads((finished / "results.json").read_text())
    assert list(content["models"]) == ["teacher", "student"]
    for model in content["models"].values():
        assert list(model["tasks"]) == [task.name for task in tasks.GLUE]
        assert set(model["tasks"]["mnli"]["seeds"]["1"]["metrics"]) == {"accuracy_matched", "accuracy_mismatched"}
        medians = [entry["median"] for name, entry in model["tasks"].items() if name != "ax"]
        assert model["average"]["with_wnli"] == pytest.approx(np.mean(medians))
        assert model["average"]["missing"] == []
    first, second = (model["tasks"]["stsb"]["median"] for model in content["models"].values())
    assert content["differences"]["against"] == "teacher"
    assert content["differences"]["models"]["student"]["stsb"] == pytest.approx(second - first)
    text = results.score_table(content)
    assert all(f"\n{task.name}" in text for task in tasks.GLUE) and "average without wnli" in text


def test_the_submission_has_the_official_names_rows_and_spellings(finished: Path) -> None:
    with zipfile.ZipFile(finished / "submissions/teacher.zip") as archive:
        assert set(archive.namelist()) == set(SPELT)
        for name, allowed in SPELT.items():
            header, *rows = archive.read(name).decode().splitlines()
            cells = [row.split("\t") for row in rows]
            assert header == "index\tprediction"
            assert [index for index, _ in cells] == ["0", "1", "2", "3", "4"]
            for _, answer in cells:
                assert 0 <= float(answer) <= 5 if allowed is None else answer in allowed


def test_the_same_command_again_does_nothing_again(home: Path, finished: Path) -> None:
    before = (finished / "results.json").read_text()
    glue.run([home / "hf/teacher", home / "hf/student"], ("all",), home / "data", finished, (1,), FAST)
    assert (finished / "results.json").read_text() == before


def test_a_run_that_goes_on_later_ends_like_one_that_was_never_cut(home: Path, tmp_path: Path) -> None:
    model = [home / "hf/teacher"]
    whole = glue.run(model, ("rte", "mnli", "ax"), home / "data", tmp_path / "whole", (1, 2, 3), FAST)
    glue.run(model, ("rte",), home / "data", tmp_path / "parts", (2,), FAST)
    glue.run(model, ("mnli",), home / "data", tmp_path / "parts", (3, 1), FAST)
    parts = glue.run(model, ("rte", "mnli", "ax"), home / "data", tmp_path / "parts", (1, 2, 3), FAST)

    def told(content: dict) -> dict:
        entry = content["models"]["teacher"]
        for task in entry["tasks"].values():
            for cell in task["seeds"].values():
                cell.pop("seconds", None)
        return entry

    assert told(parts) == told(whole)
    for file in sorted((tmp_path / "whole/submissions/teacher").iterdir()):
        assert file.read_bytes() == (tmp_path / "parts/submissions/teacher" / file.name).read_bytes()
    assert sorted(whole["models"]["teacher"]["tasks"]["rte"]["seeds"]) == ["1", "2", "3"]
    assert "median of 3 seeds (min-max)" in results.score_table(whole)


def test_the_submission_comes_from_the_seed_that_is_best_on_dev(home: Path, tmp_path: Path) -> None:
    model, hot = [home / "hf/teacher"], finetune.FinetuneSettings(epochs=2, learning_rate=1e-2, batch_size=8)
    content = glue.run(model, ("sst2",), home / "data", tmp_path / "three", (1, 2, 3), hot)
    entry = content["models"]["teacher"]["tasks"]["sst2"]
    best = max((cell["score"], -int(seed)) for seed, cell in entry["seeds"].items())
    assert entry["best_seed"] == -best[1] and entry["max"] == best[0]
    glue.run(model, ("sst2",), home / "data", tmp_path / "best", (entry["best_seed"],), hot)
    of_three, of_best = (tmp_path / f"{name}/submissions/teacher/SST-2.tsv" for name in ("three", "best"))
    assert of_three.read_bytes() == of_best.read_bytes()


def test_fine_tuning_learns(home: Path, tmp_path: Path) -> None:
    write_glue(tmp_path / "data", rows=256, dev=32)
    hot = finetune.FinetuneSettings(epochs=3, learning_rate=1e-2, batch_size=16)
    content = glue.run([home / "hf/teacher"], ("sst2", "stsb"), tmp_path / "data", tmp_path / "out", (1,), hot)
    entry = content["models"]["teacher"]["tasks"]
    assert entry["sst2"]["median"] == 100.0
    assert entry["stsb"]["seeds"]["1"]["metrics"]["pearson"] > 0.8


@pytest.mark.parametrize("model_type", ["roberta", "distilbert", "electra", "modernbert"])
def test_other_architectures_and_rows_longer_than_their_positions(home: Path, tmp_path: Path, model_type: str) -> None:
    model = write_model(tmp_path / model_type, model_type=model_type)
    long = [["good bad " * 40, "it was " * 40, "entailment"], ["a", "a", "not_entailment"]] * 8
    for name in ("train", "dev"):
        rows = long if name == "train" else long[::-1]
        write_tsv(tmp_path / f"RTE/{name}.tsv", ["sentence1", "sentence2", "label"], rows)
    content = glue.run([model], ("rte",), tmp_path, tmp_path / "out", (1,), FAST)
    positions = {"roberta": 23}.get(model_type, 24)  # RoBERTa's first position stands for padding
    assert content["models"][model_type]["max_length"] == positions
    assert not (tmp_path / "out/submissions").exists()  # there is no test.tsv


def test_samples_are_limited_and_then_nothing_is_submitted(home: Path, tmp_path: Path) -> None:
    few = finetune.FinetuneSettings(epochs=1, batch_size=4, max_train_samples=8, max_eval_samples=4)
    glue.run([home / "hf/teacher"], ("rte",), home / "data", tmp_path / "out", (1,), few, keep_models=True)
    assert not (tmp_path / "out/submissions").exists()
    kept = finetune.open_checkpoint(tmp_path / "out/models/teacher/rte/seed-1", "kept")
    assert kept.positions == 24


# ---- a user's mistakes


def refuse(home: Path, match: str, output_dir: Path, **changed: object) -> None:
    """Expects one clear message and an untouched output directory."""
    there = output_dir.exists()
    options = {"models": [home / "hf/teacher"], "tasks": ("rte",), "data_dir": home / "data", "settings": FAST}
    with pytest.raises(UserError, match=match):
        glue.run(**{**options, "output_dir": output_dir, **changed})  # type: ignore[arg-type]
    assert output_dir.exists() == there


def test_mistakes_are_told_before_anything_is_written(home: Path, tmp_path: Path) -> None:
    out, empty = tmp_path / "out", tmp_path / "empty"
    empty.mkdir()
    refuse(home, r"nowhere is no Hugging Face model .*: no such file or directory", out, models=[tmp_path / "nowhere"])
    refuse(home, r"no config\.json\): it is a folder", out, models=[empty])
    torn = write_model(tmp_path / "torn")
    weights = (torn / "model.safetensors").read_bytes()
    (torn / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    refuse(home, "torn cannot be opened for fine-tuning", out, models=[torn])
    other = write_model(tmp_path / "other", model_type="distilbert")
    (other / "config.json").write_text((home / "hf/teacher/config.json").read_text())
    refuse(home, r"weights in .*other do not fit its config\.json", out, models=[other])
    refuse(home, "given twice", out, models=[home / "hf/teacher", home / "hf/../hf/teacher"])
    alike = [write_model(tmp_path / name) for name in ("a/student", "b/student", "a-student")]
    refuse(home, "the submissions of a/student and a-student would be one file", out, models=alike)
    refuse(home, "'colla' is no task.*did you mean 'cola'", out, tasks=("colla",))
    refuse(home, "add mnli", out, tasks=("ax",))
    refuse(home, r"task rte needs .*RTE/train\.tsv, which does not exist", out, data_dir=empty)
    refuse(home, "holds no task", out, data_dir=empty, tasks=("all",))
    refuse(home, "is no directory", out, data_dir=tmp_path / "nowhere")
    refuse(home, "names no seed", out, seeds=())
    with pytest.raises(UserError, match="--learning_rate: -1"):
        finetune.FinetuneSettings(learning_rate=-1)


@pytest.mark.parametrize(
    ("file", "line", "match"),
    [
        ("train", "9\tonly\ttwo", r"train\.tsv:26: 3 columns .* should be 4 \(index, sentence1"),
        ("dev", "9\ta\tb\tentailement", r"dev\.tsv:12: label 'entailement' is none of entailment, not_entailment"),
        ("test", "\n9\ta\tb", r"test\.tsv:7: 1 columns"),
    ],
)
def test_a_malformed_line_is_named(home: Path, tmp_path: Path, file: str, line: str, match: str) -> None:
    for name in ("train", "dev", "test"):
        (tmp_path / "RTE").mkdir(exist_ok=True)
        text = (home / f"data/RTE/{name}.tsv").read_text()
        (tmp_path / f"RTE/{name}.tsv").write_text(text + (line + "\n" if name == file else ""))
    refuse(home, match, tmp_path / "out", data_dir=tmp_path)


def test_wrong_columns_scores_and_encodings_are_named(home: Path, tmp_path: Path) -> None:
    for name in ("train", "dev"):
        write_tsv(tmp_path / f"WNLI/{name}.tsv", ["index", "sentence1", "label"], [[0, "a", 1]])
        write_tsv(tmp_path / f"STS-B/{name}.tsv", ["sentence1", "sentence2", "score"], [["a", "b", "5.1"]])
    (tmp_path / "SST-2").mkdir()
    (tmp_path / "SST-2/train.tsv").write_bytes(b"sentence\tlabel\ncaf\xe9\t1\n")
    refuse(home, r"train\.tsv:1: no column 'sentence2'", tmp_path / "out", data_dir=tmp_path, tasks=("wnli",))
    refuse(home, r"train\.tsv:2: score '5.1'", tmp_path / "out", data_dir=tmp_path, tasks=("stsb",))
    refuse(home, r"train\.tsv is not UTF-8 text", tmp_path / "out", data_dir=tmp_path, tasks=("sst2",))


@pytest.mark.parametrize(
    "name, content, match",
    [
        ("train.tsv", "sentence\tlabel\ra\t1\rb\t2\r", r"train\.tsv:3: label '2'"),  # as old Macs end lines
        ("train.tsv", "", r"train\.tsv is empty"),
        ("train.tsv", "sentence\tlabel\tlabel\na\t1\t0\n", r"train\.tsv:1: the header names 'label' twice"),
        ("dev.tsv", "sentence\tlabel\na\t1\n\nb\t0\n", r"dev\.tsv:3: 1 columns"),
    ],
)
def test_odd_tables_are_named(home: Path, tmp_path: Path, name: str, content: str, match: str) -> None:
    for each in ("train", "dev"):
        (tmp_path / "SST-2").mkdir(exist_ok=True)
        (tmp_path / f"SST-2/{each}.tsv").write_text("\ufeffsentence\tlabel\na\t1\nb\t0\n\r\n\n")  # blank ends: no rows
    assert len(data.from_folder(tmp_path, tasks.SST2).dev[""]) == 2
    (tmp_path / "SST-2" / name).write_text(content)
    refuse(home, match, tmp_path / "out", data_dir=tmp_path, tasks=("sst2",))


def test_what_cannot_be_measured_is_refused_before_anything_is_trained(home: Path, tmp_path: Path) -> None:
    one, short, out = (
        finetune.FinetuneSettings(max_eval_samples=1),
        dataclasses.replace(FAST, max_length=4),
        tmp_path / "o",
    )
    said = r"stsb: its dev set has one label in all of its one row: pearson, spearman cannot .*\(--max_eval_samples\)"
    refuse(home, said, out, tasks=("stsb",), settings=one)
    for name, label in (("train", 1), ("dev", 0)):
        write_tsv(tmp_path / f"CoLA/{name}.tsv", None, [["x", n % 2 * label, "", f"it was {name}"] for n in range(4)])
        write_tsv(tmp_path / f"SST-2/{name}.tsv", ["sentence", "label"], [["it was", 1], ["a", 0]])
    own = {"data_dir": tmp_path}
    refuse(home, r"cola: its dev set has one label in all of its 4 rows: matthews", out, tasks=("cola",), **own)
    refuse(home, "sst2: its dev set is its training set", out, tasks=("sst2",), **own)
    short = dataclasses.replace(FAST, max_length=4)
    for seed in (-1, 2**32):
        refuse(home, rf"--seeds: {seed} is not in 0 … 4294967295", out, seeds=(seed,))
    refuse(home, "--max_length: 4 leaves no room for text .* of teacher; give 5", out, settings=short)


def test_a_model_with_no_tokenizer_or_anothers_is_refused(home: Path, tmp_path: Path) -> None:
    """transformers makes a tokenizer of special tokens alone where there is none: every word would be unknown."""
    from transformers import BertTokenizer

    model = write_model(tmp_path / "m")
    for file in [*model.glob("tok*"), model / "vocab.txt"]:
        file.unlink()
    refuse(home, "knows nothing but its special tokens", tmp_path / "out", models=[model])
    words = [*SPECIAL_TOKENS, *(f"w{number}" for number in range(50))]
    BertTokenizer(vocab={word: number for number, word in enumerate(words)}).save_pretrained(model)
    refuse(home, "tokenizer has 55 tokens and its embedding 28: not of one model", tmp_path / "out", models=[model])


def test_an_output_directory_keeps_its_models_data_and_settings(home: Path, finished: Path, tmp_path: Path) -> None:
    both, other = [home / "hf/teacher", home / "hf/student"], dataclasses.replace(FAST, epochs=2)
    before = (finished / "results.json").read_text()
    refuse(home, r"settings\.epochs = 1, this command has 2", finished, models=both, settings=other)
    refuse(home, r"models\.student", finished)
    write_glue(tmp_path / "data", rows=30)
    refuse(home, r"tasks\.rte\.", finished, models=both, data_dir=tmp_path / "data")
    write_model(tmp_path / "hf/student", seed=3)
    refuse(home, r"models\.student", finished, models=[home / "hf/teacher", tmp_path / "hf/student"])
    assert (finished / "results.json").read_text() == before
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/results.json").write_text("{}")
    refuse(home, "not the results of a GLUE run", tmp_path / "foreign")


def test_a_model_is_named_as_on_the_hub_where_it_is_no_directory(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here from the hub's cache, as without a network; its files are links there, and stay as they are."""
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(home)
    place = tmp_path / "cache/models--someone--small"
    (place / "refs").mkdir(parents=True)
    (place / "refs/main").write_text("0" * 40)
    shutil.copytree(home / "hf/teacher", place / "snapshots" / ("0" * 40))
    models = ["hf/student", "someone/small"]
    assert glue.model_names(models) == [(home / "hf/student", "student"), (place / "snapshots" / ("0" * 40), models[1])]
    content = glue.run(models, ("rte",), home / "data", tmp_path / "out", (1,), FAST)
    assert set(content["models"]) == {"student", "someone/small"} and (tmp_path / "out/submissions").is_dir()
    said = r"--model: someone/else is neither a directory here nor a model that the hub gives: "
    refuse(home, said, tmp_path / "other", models=["someone/else"])
    refuse(home, r"--model: hf/teachr is no Hugging Face model .*: no such", tmp_path / "other", models=["hf/teachr"])


def test_a_hub_that_cannot_be_reached_is_said(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    refuse(home, r"--data_dir hub: nyu-mll/glue \(rte\) cannot be loaded", tmp_path / "out", data_dir="hub")


def test_the_command_ends_with_2_for_a_mistake_and_0_with_a_table(home: Path, tmp_path: Path) -> None:
    line = ["tools/run_glue.py", "--data_dir", home / "data", "--epochs", 1, "--output_dir", tmp_path / "out"]
    line += ["--model", home / "hf/teacher", "--tasks"]
    wrong = run(*line, "rtee")
    assert wrong.returncode == 2 and "did you mean 'rte'" in wrong.stderr and "Traceback" not in wrong.stderr
    right = run(*line, "rte,cola")
    assert right.returncode == 0, right.stderr
    assert "\nrte " in right.stdout and "\ncola" in right.stdout
    assert all("step" in line for line in right.stderr.splitlines() if line.strip())  # one bar, nothing else
