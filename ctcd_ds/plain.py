"""Plain data that people write, YAML 1.2 or JSON. A key that is given twice is a mistake; a mistake is one line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML, MappingNode
from ruamel.yaml.constructor import DuplicateKeyError
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from ctcd_ds.cli import UserError
from ctcd_ds.kinds import missing, other_file


def from_yaml(text: str) -> Any:
    """Plain data from YAML 1.2 text (1e-4 is a float, `yes` a string). Raises ValueError, of one line."""
    yaml = YAML(typ="safe", pure=True)
    try:
        return yaml.load(text)
    except DuplicateKeyError:
        raise ValueError(next(_twice(yaml.compose(text)), "a key is given twice")) from None
    except MarkedYAMLError as problem:
        line, begun = (mark and mark.line + 1 for mark in (problem.problem_mark, problem.context_mark))
        behind = f" ({problem.context} that begins in line {begun})" if begun and problem.context else ""
        raise ValueError(f"line {line}: {problem.problem}{behind}") from None
    except YAMLError as problem:
        raise ValueError(" ".join(str(problem).split())) from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _twice(node: Any) -> Iterator[str]:
    """What is given twice in a mapping of a YAML document."""
    first: dict[Any, int] = {}
    for part in node.value if isinstance(node.value, list) else ():
        for inner in part if isinstance(node, MappingNode) else (part,):
            yield from _twice(inner)
        if isinstance(node, MappingNode):
            key, line = part[0], part[0].start_mark.line + 1
            if (before := first.get((key.tag, str(key.value)))) is not None:
                yield f"the key {key.value!r} is given twice, in line {before} and in line {line}"
            first[key.tag, str(key.value)] = line


def from_json(text: str) -> Any:
    """Plain data from JSON text. Raises ValueError, of one line."""
    try:
        return json.loads(text, object_pairs_hook=_once)
    except json.JSONDecodeError as problem:  # a comment, or a comma too many, is best seen
        there = text[problem.pos :].split("\n")[0][:30]
        where = f"line {problem.lineno} column {problem.colno}"
        raise ValueError(f"{problem.msg}: {where}{f', at {there!r}' if there else ''}") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} is given twice")
    return found


def read_file(path: Path, what: str, json_only: bool = False) -> Any:
    """Plain data from a YAML or JSON file.

    Raises UserError, which calls the file `what`, where it is neither, or clearly a file of another kind.
    """
    if said := other_file(path, None, what):
        raise UserError(f"{what} {path}: {said}")
    text = read_text(path, what)
    form, parse = ("JSON", from_json) if json_only or path.suffix == ".json" else ("YAML", from_yaml)
    try:
        content = parse(text)
    except ValueError as problem:
        raise UserError(f"{what} {path} is not valid {form}: {problem}") from None
    if said := other_file(path, content, what):
        raise UserError(f"{what} {path}: {said}")
    return content


def read_text(path: Path, what: str) -> str:
    """A file's text without a byte order mark. Raises UserError, which calls the file `what`, where it is no UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as problem:
        cure = "save it as UTF-8 (iconv -f ENCODING -t UTF-8)"
        raise UserError(f"{what} {path} cannot be read: it is not UTF-8, byte {problem.start}: {cure}") from None
    except FileNotFoundError:
        raise UserError(f"{what} {path}: {missing(path)}") from None
    except OSError as problem:
        raise UserError(f"{what} {path} cannot be read: {problem.strerror}") from None
