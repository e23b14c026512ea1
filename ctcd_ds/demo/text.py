"""English prose that every Python installation carries: the language reference and the docstrings of its packages.

Nothing is imported or downloaded: docstrings are read from the sources with `ast`. What is left of them are
paragraphs of prose; code, doctests, tables and lists of parameters are dropped.
"""

from __future__ import annotations

import ast
import inspect
import os
import re
import sysconfig
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

# those with most prose for the time it takes to read them come first
PACKAGES = ["scipy", "sklearn", "numpy", "pandas", "networkx", "sympy", "torch", "huggingface_hub", "datasets"]
PACKAGES += ["accelerate", "deepspeed", "megatron", "hypothesis", "tensorboard", "jinja2", "rich", "fsspec", "pip"]
PACKAGES += ["setuptools", "absl", "google", "pyarrow", "transformers"]
SKIPPED = {"test", "tests", "site-packages", "__pycache__", "idlelib", "lib2to3", "_vendor", "vendor", "pydoc_data"}
_MARKUP = [
    (re.compile(r":[a-z]+(?::[a-z]+)*:`[~!]?([^`<]*?)(?: <[^`]*>)?`"), r"\1"),  # :class:`~torch.Tensor`
    (re.compile(r"\[`?([^\]`]+)`?\]\([^)]*\)"), r"\1"),  # [text](address)
    (re.compile(r"`{1,2}([^`]*)`{1,2}_?"), r"\1"),
    (re.compile(r"(?<!\w)\*{1,2}(\w[^*]*)\*{1,2}(?!\w)"), r"\1"),
    (re.compile(r"\s*\[\d+\]_?"), ""),  # references
    (re.compile(r"^[\w*`, .]+ \([^)]*\)\s*(?::|--)\s+"), ""),  # name (type): description
    (re.compile(r"^(?:[-*•]|\d+\.)\s+"), ""),
    (re.compile(r"\s+"), " "),
]
_NOT_PROSE = re.compile(r"^(?:>>>|\.\.|\$|@|#|\||\+-|:|http)|>>>|\\|[{}<>|=_]{2}|[{}\\^]|https?:|\$|--|==")
_WORD = re.compile(r"^[(\"']?[A-Za-z][a-z]*(?:[-'][a-z]+)*[.,;:!?)\"']*$")


@dataclass(frozen=True)
class Document:
    """The prose of one source file or one chapter: its name, and its paragraphs without line breaks."""

    name: str
    paragraphs: tuple[str, ...]


def prose(text: str) -> list[str]:
    """The paragraphs of `text` that are English sentences, each on one line."""
    paragraphs = []
    for block in re.split(r"\n\s*\n", inspect.cleandoc(text)):
        for lines in _same_indentation(block.splitlines()):
            line = " ".join(lines)
            if line.count(" ") < 7 or line[-1] not in ".!?" or _NOT_PROSE.search(line):
                continue  # the quick tests first: most of what stands in docstrings is no prose
            for pattern, replacement in _MARKUP:
                line = pattern.sub(replacement, line).strip()
            if _is_prose(line):
                paragraphs.append(line)
    return paragraphs


def _same_indentation(lines: list[str]) -> Iterator[list[str]]:
    """Runs of lines with the same indentation: a parameter's description apart from its name and type."""
    run: list[str] = []
    indentation = -1
    for line in lines:
        here = len(line) - len(line.lstrip())
        if run and here != indentation:
            yield run
            run = []
        indentation = here
        run.append(line.strip())
    yield run


def _is_prose(line: str) -> bool:
    words = line.split()
    if len(words) < 8 or not line[0].isupper():
        return False
    return sum(bool(_WORD.match(word)) for word in words) >= 0.8 * len(words)


def docstrings(path: Path) -> list[str]:
    """All docstrings of one source file, in its order; none where the file is not valid Python."""
    source = path.read_bytes()
    if b'"""' not in source:
        return []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return list(_strings(ast.parse(source).body, first=True))
    except (SyntaxError, ValueError):
        return []


def _strings(body: list[ast.stmt], first: bool) -> Iterator[str]:
    """Docstrings of a body and of the classes and functions in it, and those given by a call (torch.add_docstr)."""
    for node in body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from _strings(node.body, first=True)
        elif isinstance(node, ast.Expr):
            values = node.value.args if isinstance(node.value, ast.Call) else [node.value] if first else []
            yield from (v.value for v in values if isinstance(v, ast.Constant) and isinstance(v.value, str))
        first = False


def _file_prose(path: Path) -> tuple[str, ...]:
    return tuple(paragraph for text in docstrings(path) for paragraph in prose(text))


def sources() -> list[tuple[str, Path]]:
    """Names and paths of all source files: the standard library's, then those of PACKAGES, sorted in each."""
    places = sysconfig.get_paths()
    roots = [("python", Path(places["stdlib"]))]
    roots += [(package, Path(places["purelib"]) / package) for package in PACKAGES]
    found = []
    for name, root in roots:
        for folder, folders, files in os.walk(root):
            folders[:] = sorted(set(folders) - SKIPPED)
            relative = Path(folder).relative_to(root)
            found += [
                (f"{name}/{relative / file}", Path(folder) / file) for file in sorted(files) if file.endswith(".py")
            ]
    return found


def documents(size_bytes: int, workers: int | None = None) -> list[Document]:
    """Documents of about `size_bytes` of UTF-8 text in a fixed order; no paragraph comes twice."""
    from pydoc_data.topics import topics

    seen: set[str] = set()
    collected: list[Document] = []
    size = 0
    listed = sources()
    with ProcessPoolExecutor(workers or os.cpu_count()) as pool:
        reference = ((f"reference/{topic}", tuple(prose(text))) for topic, text in sorted(topics.items()))
        read = pool.map(_file_prose, (path for _, path in listed), chunksize=16)
        for name, paragraphs in chain(reference, zip((name for name, _ in listed), read, strict=True)):
            new = {_letters(paragraph): paragraph for paragraph in paragraphs}
            new = {letters: paragraph for letters, paragraph in new.items() if letters not in seen}
            seen.update(new)
            if new:
                collected.append(Document(name, tuple(new.values())))
                size += sum(len(paragraph.encode()) + 1 for paragraph in new.values()) + 1
            if size >= size_bytes:
                pool.shutdown(cancel_futures=True)
                break
    return collected


def _letters(paragraph: str) -> str:
    """What makes a paragraph the same as another: its letters, whatever the numbers and the punctuation."""
    return re.sub(r"[\W\d_]", "", paragraph.lower())
