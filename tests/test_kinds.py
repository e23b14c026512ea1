"""A file or folder given for another kind is recognised, and the message says what takes it or what was meant."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ctcd_ds.cli import UserError
from ctcd_ds.commands.recipes import SHIPPED
from ctcd_ds.experiments.specification import load_experiment
from ctcd_ds.kinds import folder_kind, instead, missing
from ctcd_ds.plain import read_file
from ctcd_ds.recipe.reading import load_recipe
from ctcd_ds.training.deepspeed_config import read_config

RECIPE, EXPERIMENT = SHIPPED / "recipes" / "paper.yaml", SHIPPED / "experiments" / "baselines.yaml"


def test_shipped_files_are_of_their_own_kind() -> None:
    for folder, kind in (("recipes", "recipe"), ("experiments", "experiment")):
        assert [read_file(path, kind) for path in (SHIPPED / folder).glob("*.yaml")]
    assert [read_config(path) for path in SHIPPED.glob("*.json")]


@pytest.mark.parametrize(
    ("reader", "path", "said"),
    [
        (load_recipe, SHIPPED / "cpu.json", "this is a DeepSpeed config"),
        (load_recipe, EXPERIMENT, "this is an experiment (cells, question): `ctcd experiment --experiment` takes it"),
        (load_experiment, RECIPE, "this is a recipe (peers): `ctcd pretrain --recipe` takes it"),
        (read_config, RECIPE, "this is a recipe"),
        (read_config, EXPERIMENT, "this is an experiment"),
        (lambda path: read_file(path, "task file"), RECIPE, "this is a recipe"),
        (lambda path: read_file(path, "task file"), Path("RTE/dev.tsv"), "give the YAML file that describes it"),
        (load_recipe, SHIPPED, "this is a folder, not a file"),
    ],
)
def test_a_file_for_another_kind_is_named(reader: object, path: Path, said: str) -> None:
    with pytest.raises(UserError) as problem:
        reader(path)  # type: ignore[operator]
    assert str(path) in str(problem.value) and said in str(problem.value) and "\n" not in str(problem.value)


def test_a_mistyped_file_of_the_right_kind_is_still_read(tmp_path: Path) -> None:
    """A recipe that holds a DeepSpeed key by mistake is a recipe; so is one without peers and any other's keys."""
    for text in ("peers: {}\nbf16: {}", "training: {}"):
        (tmp_path / "recipe.yaml").write_text(text)
        assert read_file(tmp_path / "recipe.yaml", "recipe")


def made(path: Path, content: object = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content or {}))
    return path.parent


def test_a_folder_for_another_kind_is_named_with_what_lies_below_it(tmp_path: Path) -> None:
    run = made(tmp_path / "runs" / "ctcd" / "recipe.yaml")
    models = [made(run / "hf" / name / "config.json") for name in ("student", "teacher")]
    for model in models:
        (model / "model.safetensors").touch()
    made(run / "peers" / "teacher" / "config.json")  # which has no weights
    corpus = made(tmp_path / "corpora" / "text" / "manifest.json", {"format": "ctcd_ds.corpus"})
    experiment = made(tmp_path / "runs" / "baselines" / "results.json", {"cells": []})
    kinds = {run: "run", models[0]: "model", corpus: "corpus", experiment: "experiment", run / "hf": None}
    assert {place: folder_kind(place) for place in kinds} == kinds

    export = f"give {models[0]} {models[1]}"
    assert instead(run, "model") == f"it is a run directory; {export}"
    assert instead(run / "hf", "model") == f"it is a folder with a Hugging Face model in it; {export}"
    assert instead(run.parent, "run", "experiment").endswith(f"; give {experiment} {run}")
    assert instead(corpus.parent, "corpus").endswith(f"give {corpus}")
    assert instead(corpus, "model") == "it is a corpus; `ctcd export` makes models of a run"
    absent = "no such file or directory"
    assert instead(tmp_path / "nowhere", "run") == absent
    assert missing(tmp_path / "run" / "ctdc") == f"{absent}; did you mean {run}?"
    assert missing(run / "recipe.yml") == f"{absent}; did you mean {run / 'recipe.yaml'}?"
    assert missing(run / "recipe.yaml" / "x") == missing(tmp_path / "quite" / "other") == absent
