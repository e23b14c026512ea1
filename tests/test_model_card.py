"""Cards of exported peers: metadata that the hub's library takes, code that runs, a picture, scores that arrive."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from ctcd_ds.evaluation import finetune, glue
from ctcd_ds.export.hf import export
from ctcd_ds.export.model_card import _plateau, _read
from ctcd_ds.recipe.reading import load_recipe
from ctcd_ds.recipe.sections import Recipe
from ctcd_ds.training.run_directory import RunDirectory
from glue_files import write_tsv
from runs import Job, bert, chain_corpus, run_jobs

FAST = finetune.FinetuneSettings(epochs=1, batch_size=8)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short real run of two peers."""
    home = tmp_path_factory.mktemp("cards")
    recipe = {
        "corpus": {"path": str(chain_corpus(home / "tales")), "sequence_length": 32},
        "peers": {
            "teacher": {"model": bert(32, 2), "soft": {"student": 1.0}},
            "student": {"model": bert(32, 1), "soft": {"teacher": 4.0}},
        },
        "training": {"global_batch_rows": 8, "steps": 6, "log_every": 1, "valid_every": 2, "valid_rows": 16},
    }
    run_jobs([Job(recipe, home / "run")], 1, home)
    for task, columns in (("SST-2", ["sentence"]), ("RTE", ["sentence1", "sentence2"])):
        for name in ("train", "dev"):
            spelt = ("0", "1") if task == "SST-2" else ("entailment", "not_entailment")
            rows = [
                [*(f"w{5 + n % 2} w{n + (7 if name == 'train' else 9)}" for _ in columns), spelt[n % 2]]
                for n in range(16)
            ]
            write_tsv(home / f"glue/{task}/{name}.tsv", [*columns, "label"], rows)
    return home / "run"


@pytest.fixture
def exported(run: Path, tmp_path: Path) -> Path:
    export(run, "all", tmp_path / "hf", data_license="CC BY-SA 4.0 (Wikipedia)")
    return tmp_path / "hf"


def read(place: Path) -> Any:
    """The card, as the hub's library reads it: it raises where the metadata is not of its form."""
    return ModelCard((place / "README.md").read_text())


def test_the_metadata_is_the_hubs_and_survives_its_library(exported: Path) -> None:
    card = read(exported / "student")
    assert str(card) == (exported / "student/README.md").read_text()
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "fill-mask")
    (entry,) = card.data.to_dict()["model-index"]
    assert entry["name"] == "student"
    (result,) = entry["results"]
    assert result["task"]["type"] == "fill-mask" and result["dataset"]["type"] == "tales"
    assert [metric["type"] for metric in result["metrics"]] == ["loss", "accuracy"]
    loss, accuracy = (metric["value"] for metric in result["metrics"])
    assert 3 < loss < 7 and 0 < accuracy < 1, "fractions for the hub, percent for people"
    assert "1,536 tokens in rows of 32. Corpus `tales`" in card.text and "of at most 16 rows" in card.text
    assert f"| {loss} nats |" in card.text and f"| {100 * accuracy:.2f} % |" in card.text
    broken = str(card).replace("- task:", "- tusk:")
    with pytest.raises(ValueError, match="model_index"):
        ModelCard(broken)


def test_the_code_in_the_card_runs(exported: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    for peer in ("teacher", "student"):
        (code,) = re.findall(r"```python\n(.*?)```", read(exported / peer).text, re.DOTALL)
        monkeypatch.chdir(exported / peer)
        exec(code, {})
        assert "token_str" in capsys.readouterr().out


def test_the_card_says_how_much_of_its_text_was_read_again_and_how_few_rows_are_held_out() -> None:
    raw = {"corpus": {"path": "x"}, "peers": {"a": {"model": bert(32, 1)}}, "training": {"epochs": 4}}
    reduced = {**raw, "corpus": {"path": "x", "train_rows": 80}, "training": {"steps": 30, "global_batch_rows": 16}}
    half = {"step": 15, "steps": 30}
    assert _read(Recipe.model_validate(raw), half) == " (the whole corpus 2.0 times)"
    assert _read(Recipe.model_validate(reduced), half) == " (80 of the corpus's rows, 3.0 times each)"


def test_a_card_says_that_its_model_is_at_word_frequencies(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text('{"unigram_loss": 6.2}')
    run, said = (
        RunDirectory(tmp_path),
        "- It is still at word frequencies, which alone give 6.200 nats: train longer.\n",
    )
    assert _plateau(run, [{"step": 4, "valid/a/loss": 6.1}], 4, "a") == said
    for rows in ([{"step": 4, "valid/a/loss": 5.1}], [{"step": 2, "valid/a/loss": 6.1}], [{"step": 4}], []):
        assert _plateau(run, rows, 4, "a") == ""


def test_the_recipe_in_the_card_is_the_runs(run: Path, exported: Path, tmp_path: Path) -> None:
    (text,) = re.findall(r"```yaml\n(.*?)```", read(exported / "teacher").text, re.DOTALL)
    (tmp_path / "again.yaml").write_text(text)
    assert load_recipe(tmp_path / "again.yaml") == load_recipe(run / "recipe.yaml")


def test_a_picture_with_the_curves_of_both_peers_lies_beside_the_card(exported: Path) -> None:
    from PIL import Image

    path = exported / "student" / "curves.png"
    assert "](curves.png)" in read(path.parent).text
    assert path.stat().st_size < 100_000
    colours = {pixel[:3] for _, pixel in Image.open(path).convert("RGB").getcolors(1 << 20)}
    assert {(0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)} <= colours


def test_values_of_other_weights_are_not_in_a_card(run: Path, tmp_path: Path) -> None:
    """Held-out values are those of the exported step, and a run that goes on is said to."""
    early = sorted((run / "checkpoints").glob("step-*"))[0]
    step = int(early.name.removeprefix("step-"))
    rows = {row["step"]: row for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())}
    export(early, "student", tmp_path / "early")
    card = read(tmp_path / "early")
    stated = [result.metric_value for result in card.data.eval_results or []]
    measured = rows.get(step, {}).get("valid/student/loss")
    assert stated[:1] == ([round(measured, 4)] if measured is not None else [])
    assert (f"{step} steps of" in card.text) == (step < max(rows))


def test_the_licence_of_the_data_is_the_users_word_or_not_stated(run: Path, exported: Path, tmp_path: Path) -> None:
    assert "Licence of the training text: CC BY-SA 4.0 (Wikipedia)" in read(exported / "student").text
    export(run, "student", tmp_path / "other")
    card = read(tmp_path / "other")
    assert "Licence of the training text: not stated" in card.text and card.data.license is None


def test_run_glue_writes_scores_into_the_card_and_leaves_the_rest(
    run: Path, exported: Path, tmp_path: Path, capsys: Any
) -> None:
    student, data = exported / "student", run.parent / "glue"
    text = (student / "README.md").read_text().replace("## Limits", "## Limits\n\n- A remark of the owner's.")
    (student / "README.md").write_text(text)
    other = exported / "teacher" / "README.md"
    other.write_text("# my own card\n")
    models = [student, exported / "teacher"]
    content = glue.run(models, ("sst2",), data, tmp_path / "first", (1, 2), FAST)
    glue.run(models, ("rte",), data, tmp_path / "second", (1,), FAST)
    card = read(student)
    found = {result.dataset_type: result for result in card.data.eval_results}
    assert list(found)[1:] == ["sst2", "rte"]
    accuracies = [
        cell["metrics"]["accuracy"] for cell in content["models"]["student"]["tasks"]["sst2"]["seeds"].values()
    ]
    assert found["sst2"].metric_value == pytest.approx(sum(accuracies) / 2, abs=1e-4)
    assert "nyu-mll" not in str(card) and found["sst2"].dataset_split is None, "these rows are not GLUE's"
    assert "| sst2 stand-in (a stand-in of " in card.text
    assert (
        "GLUE's sst2 has 67,349 training and 872 dev rows) | accuracy, fine-tuned for 1 epoch, median of 2" in card.text
    )
    assert "A remark of the owner's." in card.text and "none yet" not in card.text
    assert other.read_text() == "# my own card\n"
    glue.run(models, ("sst2",), data, tmp_path / "third", (1,), FAST)
    assert "median of 2 seeds" not in read(student).text and read(student).text.count("| sst2 stand-in") == 1
    assert "in place of sst2 stand-in" in capsys.readouterr().err, "what was better founded does not go without a word"
