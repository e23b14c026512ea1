"""Where text comes from: files and datasets, read as a stream of documents.

A document is a non-empty string. `.txt` files hold documents apart by blank lines (the lines of one document are
joined by newlines) or one document a line; `.jsonl` and `.parquet` hold one document a record; so do Hugging Face
datasets, saved with `save_to_disk` or named on the hub. Text and JSON lines may be compressed (.gz, .xz, .zst).
Nothing is read ahead: memory does not grow with the input.
"""

from __future__ import annotations

import difflib
import glob
import gzip
import io
import json
import lzma
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ctcd_ds.cli import UserError
from ctcd_ds.manifest import file_entry

COMPRESSIONS = (".gz", ".xz", ".zst")
KINDS = {".txt": "txt", ".jsonl": "jsonl", ".parquet": "parquet"}
READABLE = ".txt or .jsonl (each also as .gz, .xz, .zst), .parquet, a dataset saved with save_to_disk, or OWNER/NAME"
BATCH = 1000  # records taken from a parquet file or a dataset at once


@dataclass(frozen=True)
class Reading:
    """How records become documents: the options that all kinds of sources share."""

    text_field: str = "text"
    text_layout: str = "paragraphs"  # txt: a document ends at a blank line; "lines": with its line
    dataset_config: str | None = None
    dataset_split: str = "train"


@dataclass(frozen=True)
class Source:
    """One input. `kind`: txt, jsonl, parquet, dataset (a folder) or hub; `bytes` is 0 where it is not known."""

    name: str
    kind: str
    bytes: int

    def identity(self) -> dict[str, Any]:
        """What tells this source from another one: its content, wherever it lies (reads it, at 1.5 GB/s)."""
        if self.kind == "hub":
            return {"name": self.name}
        path = Path(self.name)
        if path.is_dir():
            return {str(file.relative_to(path)): file_entry(file) for file in sorted(path.rglob("*.arrow"))}
        return file_entry(path)


def find_sources(inputs: Iterable[str]) -> list[Source]:
    """The sources that `inputs` (paths, globs, dataset folders, hub names) stand for, sorted by name.

    Raises UserError for what does not exist, has no readable format, or is named twice.
    """
    names = sorted(name for given in inputs for name in _expand(given))
    sources = [_source(name) for name in names]
    seen: set[Path | str] = set()
    for source in sources:
        key = source.name if source.kind == "hub" else Path(source.name).resolve()
        if key in seen:
            raise UserError(f"--input names {source.name} twice; name every source once")
        seen.add(key)
    return sources


def _expand(given: str) -> list[str]:
    if Path(given).exists() or not glob.has_magic(given):
        return [given]
    found = glob.glob(given, recursive=True)  # noqa: PTH207 (Path.glob takes no absolute pattern)
    if not found:
        raise UserError(f"--input {given}: no file matches this pattern")
    return found


def _source(name: str) -> Source:
    path = Path(name)
    if path.is_dir():
        if not any((path / mark).exists() for mark in ("state.json", "dataset_dict.json")):
            raise UserError(
                f"--input {name} is a folder, but not a dataset saved with save_to_disk; "
                f"for the files in it give a pattern such as '{name.rstrip('/')}/*.txt'"
            )
        return Source(name, "dataset", sum(file.stat().st_size for file in path.rglob("*.arrow")))
    suffix = path.with_suffix("").suffix if path.suffix in COMPRESSIONS else path.suffix
    kind = KINDS.get(suffix)
    if path.exists():
        if kind is None or (kind == "parquet" and path.suffix in COMPRESSIONS):
            raise UserError(f"--input {name}: this format is not known; what can be read: {READABLE}")
        return Source(name, kind, path.stat().st_size)
    if kind is None and re.fullmatch(r"[\w-]+/[\w.-]+", name) and not path.parent.exists():
        return Source(name, "hub", 0)
    near = difflib.get_close_matches(path.name, _names(path.parent), n=1)
    hint = f"; did you mean {path.parent / near[0]}?" if near else ""
    raise UserError(f"--input {name} does not exist{hint}")


def _names(folder: Path) -> list[str]:
    return [entry.name for entry in folder.iterdir()] if folder.is_dir() else []


def documents(
    sources: Sequence[Source], reading: Reading, advance: Callable[[float], Any] = lambda amount: None
) -> Iterator[str]:
    """All documents of `sources` in order; `advance` hears how many more bytes of the sources were read.

    Raises UserError, with file and line, for text that is not UTF-8, a missing field, or a damaged file.
    """
    for source in sources:
        for text in _READERS[source.kind](source, reading, advance):
            if text and not text.isspace():
                yield text


def sample_lines(sources: Sequence[Source], reading: Reading, count: int) -> list[str]:
    """About `count` lines of real text from the starts of up to 20 sources, and the first documents whole."""
    chosen = [sources[i * len(sources) // min(20, len(sources))] for i in range(min(20, len(sources)))]
    share = -(-count // len(chosen))
    sample: list[str] = []
    for source in chosen:
        lines: list[str] = []
        for text in documents([source], reading):
            lines += [line for line in text.split("\n") if line and not line.isspace()]
            if len(text) < 5000 and len(sample) < count // 20:
                sample.append(text)
            if len(lines) >= share:
                break
        sample += lines[:share]
    return sample


# ---- text files


@contextmanager
def _opened(source: Source) -> Iterator[tuple[Iterable[bytes], BinaryIO]]:
    """The decompressed stream of a file, and the raw one whose position tells the progress."""
    with Path(source.name).open("rb") as raw:
        if source.name.endswith(".gz"):
            with gzip.GzipFile(fileobj=raw) as stream:
                yield stream, raw
        elif source.name.endswith(".xz"):
            with lzma.LZMAFile(raw) as stream:
                yield stream, raw
        elif source.name.endswith(".zst"):
            import zstandard

            reader = zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True, closefd=False)
            yield io.BufferedReader(reader), raw
        else:
            yield raw, raw


def _lines(source: Source, advance: Callable[[float], Any]) -> Iterator[tuple[int, str]]:
    """Line numbers (from 1) and lines without their ends; a byte order mark is dropped."""
    import zlib

    import zstandard

    offset, position = 0, 0
    with _opened(source) as (stream, raw):
        try:
            for number, line in enumerate(stream, 1):
                try:
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as problem:
                    bad = problem.object[problem.start]
                    raise UserError(
                        f"{source.name} is not UTF-8: byte 0x{bad:02x} in line {number}, at byte offset "
                        f"{offset + problem.start}; convert it first, for example with "
                        f"iconv -f LATIN1 -t UTF-8"
                    ) from None
                offset += len(line)
                yield number, text.rstrip("\r\n")
                if number % 256 == 0:
                    advance(raw.tell() - position)
                    position = raw.tell()
        except (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError, zstandard.ZstdError) as problem:
            raise UserError(f"{source.name} is damaged or not of the format its name says: {problem}") from None
        advance(source.bytes - position)


def _read_txt(source: Source, reading: Reading, advance: Callable[[float], Any]) -> Iterator[str]:
    if reading.text_layout == "lines":
        yield from (line for _, line in _lines(source, advance))
        return
    paragraph: list[str] = []
    for _, line in _lines(source, advance):
        if line and not line.isspace():
            paragraph.append(line)
        elif paragraph:
            yield "\n".join(paragraph)
            paragraph = []
    yield "\n".join(paragraph)


def _read_jsonl(source: Source, reading: Reading, advance: Callable[[float], Any]) -> Iterator[str]:
    for number, line in _lines(source, advance):
        if not line or line.isspace():
            continue
        where = f"{source.name}, line {number}"
        try:
            record = json.loads(line)
        except ValueError as problem:
            raise UserError(f"{where}: no valid JSON ({problem})") from None
        if not isinstance(record, dict):
            raise UserError(f'{where}: a JSON object such as {{"{reading.text_field}": "…"}} is needed')
        if reading.text_field not in record:
            raise _missing_field(where, reading.text_field, list(record))
        yield _text(record[reading.text_field], where, reading.text_field)


# ---- tables


def _missing_field(where: str, field: str, fields: Sequence[str]) -> UserError:
    near = difflib.get_close_matches(field, fields, n=1)
    hint = f"; did you mean --text_field {near[0]}?" if near else "; choose one with --text_field"
    return UserError(f"{where}: there is no field {field!r}, there are {', '.join(map(repr, fields))}{hint}")


def _text(value: Any, where: str, field: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{where}: the field {field!r} holds {type(value).__name__}, a string is needed")
    return value


def _read_parquet(source: Source, reading: Reading, advance: Callable[[float], Any]) -> Iterator[str]:
    import pyarrow
    from pyarrow import parquet

    field = reading.text_field
    try:
        with parquet.ParquetFile(source.name) as file:
            if field not in file.schema_arrow.names:
                raise _missing_field(source.name, field, file.schema_arrow.names)
            step = source.bytes / max(1, file.metadata.num_rows)
            for batch in file.iter_batches(batch_size=BATCH, columns=[field]):
                for value in batch.column(0).to_pylist():
                    yield _text(value, source.name, field)
                advance(step * len(batch))
    except (pyarrow.ArrowInvalid, OSError) as problem:
        raise UserError(f"{source.name} is not readable as parquet: {problem}") from None


def _read_dataset(source: Source, reading: Reading, advance: Callable[[float], Any]) -> Iterator[str]:
    import datasets

    try:
        dataset = datasets.load_from_disk(source.name)
    except Exception as problem:  # whatever the library finds wrong with the folder, it is the folder
        raise UserError(f"--input {source.name} is not readable as a saved dataset: {problem}") from None
    if isinstance(dataset, dict):
        if reading.dataset_split not in dataset:
            raise UserError(
                f"--input {source.name} has no split {reading.dataset_split!r}, it has "
                f"{', '.join(map(repr, dataset))}; choose one with --dataset_split"
            )
        dataset = dataset[reading.dataset_split]
    yield from _records(source, reading, dataset, lambda rows: advance(source.bytes * rows / len(dataset)))


def _read_hub(source: Source, reading: Reading, advance: Callable[[float], Any]) -> Iterator[str]:
    import datasets

    try:
        dataset = datasets.load_dataset(
            source.name, reading.dataset_config, split=reading.dataset_split, streaming=True
        )
    except Exception as problem:  # offline, unknown name, unknown config: the library's message says which
        raise UserError(
            f"--input {source.name} is neither a file here nor a dataset that the hub gives: {problem}"
        ) from None
    yield from _records(source, reading, dataset, lambda rows: None)


def _records(source: Source, reading: Reading, dataset: Any, advance: Callable[[int], Any]) -> Iterator[str]:
    field = reading.text_field
    if dataset.column_names is not None and field not in dataset.column_names:
        raise _missing_field(source.name, field, dataset.column_names)
    for batch in dataset.iter(batch_size=BATCH):
        if field not in batch:
            raise _missing_field(source.name, field, list(batch))
        for value in batch[field]:
            yield _text(value, source.name, field)
        advance(len(batch[field]))


_READERS: dict[str, Callable[[Source, Reading, Callable[[float], Any]], Iterator[str]]] = {
    "txt": _read_txt,
    "jsonl": _read_jsonl,
    "parquet": _read_parquet,
    "dataset": _read_dataset,
    "hub": _read_hub,
}
