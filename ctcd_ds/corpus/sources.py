"""Where text comes from: files and datasets, read as a stream of documents.

A document is a non-empty string. `.txt` files hold documents apart by blank lines (the lines of one document are
joined by newlines) or one document a line; JSON lines and parquet hold one document a record; so do Hugging Face
datasets, saved with `save_to_disk` or named on the hub. Text and JSON lines may be compressed (compressed.py).
Nothing is read ahead: memory does not grow with the input. What is no Unicode text is found here, with file and line.
"""

from __future__ import annotations

import difflib
import glob
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ctcd_ds.cli import UserError
from ctcd_ds.corpus.compressed import FORMATS, decompressed, refuse_damage, suffix_of
from ctcd_ds.hub import settle_hub
from ctcd_ds.manifest import file_entry
from ctcd_ds.plain import from_json

KINDS = {".txt": "txt", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".parquet": "parquet"}
READABLE = (
    f".txt, .jsonl, .ndjson or .json (one record a line; each also as {', '.join(FORMATS)}), .parquet, a dataset "
    f"saved with save_to_disk, or OWNER/NAME"
)
BATCH = 1000  # records taken from a parquet file or a dataset at once


@dataclass(frozen=True)
class Reading:
    """How records become documents: the options that all kinds of sources share."""

    text_field: str = "text"
    text_layout: str = "paragraphs"  # txt: a document ends at a blank line; "lines": with its line
    format: str | None = None  # txt, jsonl, parquet; None: as the file's name says
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


def find_sources(inputs: Iterable[str], form: str | None = None, option: str = "--input") -> list[Source]:
    """The sources that `inputs` (paths, globs, dataset folders, hub names) stand for, sorted by name.

    `form`: txt, jsonl or parquet for every file, whatever its name ends in. Raises UserError, which speaks of `option`,
    for what does not exist, has no readable format, or is named twice.
    """
    names = sorted(name for given in inputs for name in _expand(given, option))
    sources = [_source(name, form, option) for name in names]
    seen: set[Path | str] = set()
    for source in sources:
        key = source.name if source.kind == "hub" else Path(source.name).resolve()
        if key in seen:
            raise UserError(f"{option} names {source.name} twice; name every source once")
        seen.add(key)
    return sources


def _expand(given: str, option: str) -> list[str]:
    if Path(given).exists() or not glob.has_magic(given):
        return [given]
    found = glob.glob(given, recursive=True)  # noqa: PTH207 (Path.glob takes no absolute pattern)
    if not found:
        raise UserError(f"{option} {given}: no file matches this pattern{_seen_from(given)}")
    return found


def _source(name: str, form: str | None, option: str) -> Source:
    path = Path(name)
    if path.is_dir():
        if not any((path / mark).exists() for mark in ("state.json", "dataset_dict.json")):
            raise UserError(
                f"{option} {name} is a folder, but not a dataset saved with save_to_disk; "
                f"for the files in it give a pattern such as '{name.rstrip('/')}/*.txt'"
            )
        return Source(name, "dataset", sum(file.stat().st_size for file in path.rglob("*.arrow")))
    compression = suffix_of(name)
    suffix = (path.with_suffix("") if compression else path).suffix.lower()
    kind = KINDS.get(suffix)
    if path.exists():
        kind = form or kind
        if kind is None or (kind == "parquet" and compression):
            raise UserError(f"{option} {name}: {_other_format(name, suffix)}")
        return Source(name, kind, path.stat().st_size)
    if path.is_symlink():
        raise UserError(f"{option} {name} is a link to {path.readlink()}, which does not exist")
    if kind is None and re.fullmatch(r"[\w-]+/[\w.-]+", name) and not path.parent.exists():
        return Source(name, "hub", 0)
    if "," in name and Path(name.split(",")[0]).exists():
        raise UserError(f"{option} {name} does not exist; set several inputs apart by spaces, not by commas")
    near = difflib.get_close_matches(path.name, _names(path.parent), n=1)
    hint = f"; did you mean {path.parent / near[0]}?" if near else ""
    raise UserError(f"{option} {name} does not exist{_seen_from(name)}{hint}")


def _seen_from(name: str) -> str:
    return "" if Path(name).is_absolute() else f" (seen from {Path.cwd()})"


def _other_format(name: str, suffix: str) -> str:
    if suffix in (".csv", ".tsv"):
        return (
            'tables are not read; make JSON lines of it, for example with python -c "import pandas; '
            f"pandas.read_csv({name!r}{', sep=chr(9)' if suffix == '.tsv' else ''})"
            ".to_json('text.jsonl', orient='records', lines=True)\""
        )
    return f"this format is not known; what can be read: {READABLE}. For another name, say --format txt, jsonl, parquet"


def _names(folder: Path) -> list[str]:
    return [entry.name for entry in folder.iterdir()] if folder.is_dir() else []


def documents(
    sources: Sequence[Source], reading: Reading, advance: Callable[[float], Any] = lambda amount: None
) -> Iterator[str]:
    """All documents of `sources` in order; `advance` hears how many more bytes of the sources were read.

    Raises UserError, with file and line, for text that is not UTF-8, a missing field, or a damaged file. Says on stderr
    which of several sources hold no text.
    """
    for source in sources:
        any_text = False
        for text in _READERS[source.kind](source, reading, advance):
            if text and not text.isspace():
                any_text = True
                yield text
        if not any_text and len(sources) > 1:
            print(f"{source.name} holds no text", file=sys.stderr)


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


def _lines(source: Source, advance: Callable[[float], Any]) -> Iterator[tuple[int, str]]:
    """Line numbers (from 1) and lines without their ends; byte order marks (of files joined into one) are dropped."""
    offset, position = 0, 0
    with Path(source.name).open("rb") as raw:
        for number, line in enumerate(decompressed(source.name, raw), 1):
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as problem:
                raise _no_text(source, number, offset, problem) from None
            if "\0" in text and text.count("\0") * 3 > len(text):
                cure = _recode(_wide(line, offset), source)
                raise _unreadable(source, f"{source.name} looks like UTF-16 or UTF-32{cure}")
            offset += len(line)
            yield number, text.removeprefix("\ufeff").rstrip("\r\n")
            if number % 256 == 0:
                advance(raw.tell() - position)
                position = raw.tell()
        advance(source.bytes - position)


def _no_text(source: Source, number: int, offset: int, problem: UnicodeDecodeError) -> UserError:
    """Says what a file that is not UTF-8 seems to be. `offset`: bytes before its line `number`."""
    start = problem.object if number == 1 else b""
    if not suffix_of(source.name):
        for suffix, kind in FORMATS.items():
            if start.startswith(kind.magic):
                return UserError(f"{source.name} is compressed; let its name say so: {source.name}{suffix}")
    for suffix, kind in FORMATS.items():
        if suffix_of(source.name) and start.startswith(kind.magic):
            return UserError(f"{source.name} is compressed twice: unpack it once (inside is {suffix})")
    if start[:4] in (b"\xff\xfe\0\0", b"\0\0\xfe\xff"):
        return UserError(f"{source.name} is UTF-32, not UTF-8{_recode('UTF-32', source)}")
    if start[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return UserError(f"{source.name} is UTF-16, not UTF-8{_recode('UTF-16', source)}")
    bad = problem.object[problem.start]
    return _unreadable(
        source,
        f"{source.name} is not UTF-8: byte 0x{bad:02x} in line {number}, at byte offset {offset + problem.start}"
        f"{_recode('LATIN1', source)} (or whatever its encoding is)",
    )


def _wide(line: bytes, offset: int) -> str:
    """The encoding of UTF-16 or UTF-32 without a mark, of which `line` stands at byte `offset`: where its zeros are."""
    width = 4 if line.count(0) * 7 > len(line) * 4 else 2  # three zeros of four bytes, or one of two
    firsts = line[-offset % width :: width]
    return f"UTF-{8 * width}{'BE' if firsts.count(0) * 2 > len(firsts) else 'LE'}"


def _recode(encoding: str, source: Source) -> str:
    return f"; convert it first, for example with iconv -f {encoding} -t UTF-8 {source.name}"


def _unreadable(source: Source, message: str) -> UserError:
    """A mistake in the text; of a compressed file only where its damage, which may show first as that, is excluded."""
    refuse_damage(source.name)
    return UserError(message)


def _read_txt(source: Source, reading: Reading, advance: Callable[[float], Any]) -> Iterator[str]:
    lines = (part for _, line in _lines(source, advance) for part in line.split("\r"))  # as old Macs ended lines
    if reading.text_layout == "lines":
        yield from lines
        return
    paragraph: list[str] = []
    for line in lines:
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
            record = from_json(line)
        except ValueError as problem:
            raise _unreadable(source, f"{where}: {_no_record(line, problem)}") from None
        if not isinstance(record, dict):
            raise UserError(f"{where}: {_no_record(line, None)}")
        yield _text(_field(record, reading.text_field, where), where, reading.text_field)


def _no_record(line: str, problem: Exception | None) -> str:
    if line.strip() in ("[", "{") or line.lstrip().startswith("["):
        return 'this is JSON, but not one record a line; make that of it, for example with jq -c ".[]" (of a list)'
    return f"no valid JSON ({problem})" if problem else "a JSON object is needed, with a field for the text"


def _field(record: Mapping[str, Any], field: str, where: str, outer: str = "") -> Any:
    """The value of `field`; a.b is the field b of what the field a holds, where no field is named a.b itself.

    `outer`: the fields around `record`, each followed by its dot.
    """
    if field in record:
        return record[field]
    first, _, rest = field.partition(".")
    if rest and isinstance(record.get(first), Mapping):
        return _field(record[first], rest, where, f"{outer}{first}.")
    raise _missing_field(where, outer + field, [outer + name for name in record])


# ---- tables


def _missing_field(where: str, field: str, fields: Sequence[str]) -> UserError:
    near = difflib.get_close_matches(field, fields, n=1)
    hint = f"; did you mean --text_field {near[0]}?" if near else "; choose one with --text_field"
    return UserError(f"{where}: there is no field {field!r}, there are {', '.join(map(repr, fields))}{hint}")


def _text(value: Any, where: str, field: str) -> str:
    """`value`, if it is Unicode text."""
    if not isinstance(value, str):
        raise UserError(f"{where}: the field {field!r} holds {type(value).__name__}, a string is needed")
    return unicode_text(value, f"{where}: the field {field!r}")


def unicode_text(text: str, where: str) -> str:
    """`text`, as it is. Raises UserError where it holds half of a surrogate pair, which JSON can spell."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as problem:
            raise UserError(
                f"{where} is no Unicode text: character {problem.start + 1} is \\u{ord(text[problem.start]):04x}, half "
                f"of a surrogate pair; mend or remove the record"
            ) from None
    return text


def _read_parquet(source: Source, reading: Reading, advance: Callable[[float], Any]) -> Iterator[str]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(source.name, page_checksum_verification=True) as file:
            first = _column(reading.text_field, source, file.schema_arrow.names)
            step = source.bytes / max(1, file.metadata.num_rows)
            batches = file.iter_batches(batch_size=BATCH, columns=[first])
            yield from _table_texts(source, reading, batches, lambda rows: advance(step * rows))
    except (pyarrow.ArrowInvalid, OSError) as problem:
        raise UserError(f"{source.name} is not readable as parquet: {problem}") from None


def _read_dataset(source: Source, reading: Reading, advance: Callable[[float], Any]) -> Iterator[str]:
    import datasets

    folder = Path(source.name)
    if (folder / "dataset_dict.json").exists():  # only the split that is asked for: others may be empty, or large
        splits = sorted(state.parent.name for state in folder.glob("*/state.json"))
        if reading.dataset_split not in splits:
            raise UserError(
                f"--input {source.name} has no split {reading.dataset_split!r}, it has "
                f"{', '.join(map(repr, splits))}; choose one with --dataset_split"
            )
        folder = folder / reading.dataset_split
    try:
        if json.loads((folder / "state.json").read_text(encoding="utf-8"))["_data_files"] == []:
            raise UserError(f"--input {folder} is an empty dataset; choose another with --dataset_split")
        dataset = datasets.load_from_disk(str(folder))
    except UserError:
        raise
    except Exception as problem:  # whatever the library finds wrong with the folder, it is the folder
        raise UserError(f"--input {source.name} is not readable as a saved dataset: {problem}") from None
    yield from _records(source, reading, dataset, lambda rows: advance(source.bytes * rows / len(dataset)))


def _read_hub(source: Source, reading: Reading, advance: Callable[[float], Any]) -> Iterator[str]:
    settle_hub()
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
    yield from _table_texts(source, reading, dataset.with_format("arrow").iter(batch_size=BATCH), advance)


def _column(field: str, source: Source, names: Sequence[str]) -> str:
    """The column that holds `field`: itself, or what stands before its first dot."""
    for name in (field, field.partition(".")[0]):
        if name in names:
            return name
    raise _missing_field(source.name, field, names)


def _table_texts(
    source: Source, reading: Reading, batches: Iterable[Any], advance: Callable[[int], Any]
) -> Iterator[str]:
    """The texts of pyarrow's tables or batches of rows."""
    field, row = reading.text_field, 0
    for batch in batches:
        name = _column(field, source, batch.schema.names)
        column = batch.column(batch.schema.names.index(name))
        try:
            values = column.to_pylist()
        except UnicodeDecodeError:  # in one of them: the loop says in which
            values = column
        for value in values:
            row += 1
            where = f"{source.name}, row {row}"
            try:
                value = value.as_py() if hasattr(value, "as_py") else value
            except UnicodeDecodeError as problem:
                raise UserError(f"{where}: the field {field!r} is not UTF-8: {problem.reason}") from None
            yield _text(value if name == field else _field({name: value}, field, where), where, field)
        advance(len(column))


_READERS: dict[str, Callable[[Source, Reading, Callable[[float], Any]], Iterator[str]]] = {
    "txt": _read_txt,
    "jsonl": _read_jsonl,
    "parquet": _read_parquet,
    "dataset": _read_dataset,
    "hub": _read_hub,
}
