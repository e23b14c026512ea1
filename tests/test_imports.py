"""The house's plan, walked: imports run one way, and DeepSpeed stays in its room."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "ctcd_ds"

# From the ground up: a room may import from floors below its own. On its own floor it may too, as long as the
# rooms form no circle. `cluster` stands beside `training`.
FLOORS = [
    {"ctcd_ds", "cli", "ending", "hub", "kinds", "manifest", "measuring", "memory", "plain"},
    {"recipe", "objective"},
    {"peers", "corpus"},
    {"tasks"},
    {"training", "cluster"},
    {"export", "evaluation", "preflight"},
    {"experiments", "demo"},
    {"commands"},
]
FLOOR_OF = {room: height for height, rooms in enumerate(FLOORS) for room in rooms}
DEEPSPEED_ROOMS = {"training"}


def python_files(*folders: str) -> list[Path]:
    return sorted(file for folder in folders for file in (ROOT / folder).rglob("*.py"))


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room(module: str) -> str:
    """ctcd_ds.corpus.rows → corpus, ctcd_ds.plain → plain, and the package itself → ctcd_ds."""
    return module.split(".")[1] if "." in module else module


def imports(file: Path) -> Iterator[tuple[int, str]]:
    """(line, module) of every import in a file, those inside functions and under TYPE_CHECKING too.

    `from package import name` gives package.name where that is a module, else the package.
    """
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: relative import; write the whole name"
            assert node.module is not None
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield node.lineno, inner if inner in modules() else node.module


@cache
def modules() -> Mapping[str, Path]:
    return {module_name(file): file for file in python_files("ctcd_ds")}


def own_imports(module: str) -> Iterator[tuple[int, str]]:
    return ((line, name) for line, name in imports(modules()[module]) if name.split(".")[0] == "ctcd_ds")


def circle(graph: Mapping[str, set[str]]) -> list[str]:
    """The names along one circle of a graph, first and last alike; empty where there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_every_room_has_a_floor() -> None:
    assert {room(module) for module in modules()} <= set(FLOOR_OF), "say in FLOORS where the new room stands"


def test_every_import_of_our_own_exists() -> None:
    for module in modules():
        for line, name in own_imports(module):
            assert name in modules(), f"{modules()[module]}:{line} imports {name}, which is no module"


@pytest.mark.parametrize("module", sorted(set(modules()) - {"ctcd_ds"}))  # the front door: it names what rooms give
def test_imports_run_downwards(module: str) -> None:
    for line, name in own_imports(module):
        below = FLOOR_OF[room(name)] <= FLOOR_OF[room(module)]
        assert below, f"{modules()[module]}:{line}: {room(module)} may not import {name}, which stands above it"


def test_rooms_form_no_circle() -> None:
    graph: dict[str, set[str]] = {}
    for module in modules():
        others = {room(name) for _, name in own_imports(module)} - {room(module)}
        graph.setdefault(room(module), set()).update(others)
    assert circle(graph) == []


def test_modules_form_no_circle() -> None:
    assert circle({module: {name for _, name in own_imports(module)} for module in modules()}) == []


@pytest.mark.parametrize("file", python_files("ctcd_ds", "tools", "launchers"), ids=lambda f: str(f.relative_to(ROOT)))
def test_deepspeed_stays_in_its_room(file: Path) -> None:
    inside = file.is_relative_to(PACKAGE) and room(module_name(file)) in DEEPSPEED_ROOMS
    for line, name in imports(file):
        assert inside or name.split(".")[0] != "deepspeed", f"{file}:{line}: only {DEEPSPEED_ROOMS} know DeepSpeed"


def test_the_package_knows_no_script() -> None:
    """It works where no checkout is: neither an import nor a path leads to tools/, launchers/ or tests/."""
    for module, file in modules().items():
        for line, name in imports(file):
            assert name.split(".")[0] not in {"tools", "launchers", "tests"}, f"{module}:{line} imports {name}"
        assert not re.search(r"(tools|launchers|tests)/|parents\[", file.read_text(encoding="utf-8")), module


def test_no_file_names_a_document_that_is_not_here() -> None:
    """A reader finds nothing behind "DESIGN §2": what is meant stands where it is said."""
    ours = [file for end in ("py", "md", "yaml", "json") for file in ROOT.rglob(f"*.{end}")]
    inside = [file for file in ours if not {".venv", "runs", ".git"} & set(file.relative_to(ROOT).parts)]
    named = re.compile(r"\b(DESIGN|FACTS|ANYMODEL|REDESIGN)(\.md| §)")
    assert not [file for file in inside if file != Path(__file__) and named.search(file.read_text(errors="replace"))]


def test_a_circle_is_seen() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    assert set(circle({"a": {"b"}, "b": {"c"}, "c": {"a"}})) == {"a", "b", "c"}
