"""What people write, read as plain data: every mistake in it is one line that says where."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ctcd_ds.cli import UserError
from ctcd_ds.plain import from_json, from_yaml, read_file


@pytest.mark.parametrize(
    ("parse", "text", "said"),
    [
        (from_yaml, "a: 1\nb:\n  x: 1\n  y: 2\n  x: 3\n", "the key 'x' is given twice, in line 3 and in line 5"),
        (from_yaml, "a: [{x: 1}, {x: 2,\n x: 1}]", "the key 'x' is given twice, in line 1 and in line 2"),
        (from_yaml, "a: 1\nb: [1, 2\n", "line 3: expected ',' or ']'.*that begins in line 2"),
        (from_yaml, "a:\n\tb: 1\n", r"line 2: found character '\\t'"),
        (from_yaml, "a: !!python/object:os.system x", "line 1: could not determine a constructor"),
        (from_yaml, "a: 2024-13-45", "month must be"),
        (from_yaml, "a: \x07", "special characters are not allowed"),
        (from_json, '{"text": "a", "id": {"text": "b"}, "text": "c"}', "the key 'text' is given twice"),
        (from_json, '{"a": 1,  // why\n "b": 2}', "line 1 column 11, at '// why'"),
        (from_json, '{"a": 1,}', "line 1 column 8, at ',}'|line 1 column 9, at '}'"),
        (from_json, "[" * 100_000, "nested too deeply"),
    ],
)
def test_a_mistake_is_one_line_with_its_place(parse: Callable[[str], Any], text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said) as problem:
        parse(text)
    assert "\n" not in str(problem.value)


def test_the_same_key_in_two_mappings_is_none() -> None:
    assert from_yaml("a: {x: 1}\nb: {x: 1}\n1: n\n'1': s") == {"a": {"x": 1}, "b": {"x": 1}, 1: "n", "1": "s"}
    assert from_json('{"a": {"x": 1}, "b": {"x": 1}}') == {"a": {"x": 1}, "b": {"x": 1}}


@pytest.mark.parametrize(("name", "what"), [("r.yaml", "recipe"), ("t.yaml", "task file"), ("e.json", "experiment")])
def test_whatever_the_file_is_it_is_named(name: str, what: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text('{"dev": 1, "peers": 2, "cells": 3, "dev": 4}')
    with pytest.raises(UserError, match=rf"^{what} \S*{name} is not valid (YAML|JSON): the key 'dev' is given twice"):
        read_file(tmp_path / name, what)
