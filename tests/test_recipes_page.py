"""docs/recipes.md says every key of a recipe with its default, and what it shows can be used as it stands."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from pydantic import BaseModel

from commands import ROOT
from ctcd_ds.commands.recipes import SHIPPED
from ctcd_ds.plain import from_yaml
from ctcd_ds.recipe.mistakes import recipe_mistakes
from ctcd_ds.recipe.reading import load_recipe
from ctcd_ds.recipe.sections import PeerSection, Recipe
from ctcd_ds.training.deepspeed_config import resolve

PAGE = (ROOT / "docs" / "recipes.md").read_text()
PAPER = SHIPPED / "recipes" / "paper.yaml"


def keys(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every key of a section and those below it with its default; ... where it must be given."""
    for name, field in section.model_fields.items():
        inner = PeerSection if name == "peers" else field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from keys(inner, f"{prefix}{name}.{'NAME.' if name == 'peers' else ''}")
        else:
            default = ... if field.is_required() else field.default
            yield prefix + name, list(default) if isinstance(default, tuple) else default


def test_the_table_is_all_keys_with_their_defaults() -> None:
    rows = re.findall(r"^\| `([\w.]+)` \| (.*?) ?\| .*\|$", PAGE, re.MULTILINE)
    assert [(key, from_yaml(default) if default else ...) for key, default in rows] == list(keys(Recipe))


def test_every_set_of_the_docs_is_taken() -> None:
    text = PAGE + (ROOT / "README.md").read_text()
    found = re.findall(r"--set ((?:[\w.]+=\w+ ?)+)", text)
    assert len(found) >= 4
    for words in found:
        load_recipe(PAPER, words.split())


def test_the_sections_of_the_page_make_a_recipe() -> None:
    base: dict[str, Any] = {"training": {"steps": 1}}
    found = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    weights, corpus = found[0], from_yaml(found[-1])
    for peers in map(from_yaml, found[1:-1]):
        assert list(peers) == ["peers"] and recipe_mistakes({**base, **peers, **corpus}) == []
    model = {"model": {"model_type": "bert"}}
    said = [from_yaml(line) for line in weights.splitlines()]
    assert len(said) == 3 and all(list(soft) == ["soft"] for soft in said)
    for soft in said:
        sections = {"corpus": {"path": "x"}, "peers": {"teacher": model, "student": {**model, **soft}}}
        assert recipe_mistakes({**base, **sections}) == []


def test_the_deepspeed_json_of_the_page_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", ModuleType("wandb"))  # as where it is installed
    (text,) = re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)
    given = json.loads(text)
    config, mistakes = resolve(given, load_recipe(PAPER), 1, "cpu", Path("RUN"))
    assert mistakes == [] and config is not None and config.values["wandb"] == given["wandb"]
    from deepspeed.monitor.config import WandbConfig

    assert set(given["wandb"]) <= set(WandbConfig.model_fields)
