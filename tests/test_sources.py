"""What people bring is read whole, or refused with file, place and cure."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
from pyarrow import parquet

from ctcd_ds.cli import UserError
from ctcd_ds.corpus.sources import Reading, documents, find_sources

TEXTS = ["one", "zwei äöü", "три", "四\n五"]


def read(*inputs: object, **reading: Any) -> list[str]:
    options = Reading(**reading)
    return list(documents(find_sources(map(str, inputs), options.format), options))


def records(texts: list[str]) -> str:
    return "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)


@pytest.mark.parametrize(
    "name, form", [("a.ndjson", None), ("a.json", None), ("A.JSONL", None), ("wiki_00", "jsonl"), ("a.data", "jsonl")]
)
@pytest.mark.parametrize("packed", [False, True])
def test_json_lines_by_any_name(name: str, form: str | None, packed: bool, tmp_path: Path) -> None:
    content = ("\ufeff" + records(TEXTS[:2]) + "\n\ufeff" + records(TEXTS[2:])).encode()  # two files joined into one
    path = tmp_path / (f"{name}.GZ" if packed else name)
    path.write_bytes(gzip.compress(content) if packed else content)
    assert read(path, format=form) == TEXTS


@pytest.mark.parametrize("name, form", [("A.TXT", None), ("wiki_00", "txt"), ("a.jsonl", "txt")])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_text_by_any_name_with_any_line_ends(name: str, form: str | None, end: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(f"one{end}two{end}{end}three{end}".encode())
    assert read(tmp_path / name, format=form) == ["one\ntwo", "three"]
    assert read(tmp_path / name, format=form, text_layout="lines") == ["one", "two", "three"]


def test_a_field_inside_a_field(tmp_path: Path) -> None:
    rows = [{"meta": {"text": {"en": text}}, "dotted.name": text.upper()} for text in TEXTS]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = pyarrow.Table.from_pylist(rows)
    parquet.write_table(table, tmp_path / "a.parquet")
    datasets.Dataset(table).save_to_disk(tmp_path / "saved")
    for name in ("a.jsonl", "a.parquet", "saved"):
        assert read(tmp_path / name, text_field="meta.text.en") == TEXTS
        assert read(tmp_path / name, text_field="dotted.name") == [text.upper() for text in TEXTS]
        with pytest.raises(UserError, match=r"no field 'meta\.txt'.*did you mean --text_field meta\.text"):
            read(tmp_path / name, text_field="meta.txt")


def test_of_a_saved_dataset_only_the_split_that_is_asked_for_is_opened(tmp_path: Path) -> None:
    full, empty = (datasets.Dataset.from_dict({"text": texts}) for texts in (TEXTS, []))
    datasets.DatasetDict({"train": full, "test": empty}).save_to_disk(tmp_path / "a")
    assert read(tmp_path / "a") == TEXTS
    for split, message in (("test", "a/test is an empty dataset"), ("dev", "no split 'dev', it has 'test', 'train'")):
        with pytest.raises(UserError, match=message):
            read(tmp_path / "a", dataset_split=split)


def not_utf8() -> pyarrow.Array:
    sound = pyarrow.array(["fine", "caf\xe9".ljust(6), None])
    validity, offsets, data = sound.buffers()
    broken = data.to_pybytes().replace("\xe9".encode(), b"\xe9 ")
    return pyarrow.Array.from_buffers(pyarrow.string(), 3, [validity, offsets, pyarrow.py_buffer(broken)])


@pytest.mark.parametrize("form", ["parquet", "saved"])
def test_a_column_with_a_null_or_without_utf8_is_named_with_its_row(form: str, tmp_path: Path) -> None:
    whole = pyarrow.table({"text": not_utf8()})
    for table, message in ((whole, "row 2: the field 'text' is not UTF-8"), (whole.slice(2), "row 1:.*holds NoneType")):
        path = tmp_path / f"{len(table)}.{form}"
        if form == "parquet":
            parquet.write_table(table, path)
        else:
            datasets.Dataset(table).save_to_disk(path)
        with pytest.raises(UserError, match=f"{path.name}, {message}"):
            read(path)


def half_a_pair(path: Path) -> None:
    path.write_text('{"text": "fine \\ud83d\\ude00"}\n\n{"text": "half \\ud83d"}\n')


def a_list(path: Path) -> None:
    path.write_text(json.dumps([{"text": text} for text in TEXTS], indent=1))


def a_file_missing_its_comma(path: Path) -> None:
    path.write_text('{"text": "a"}\n{"text" "b"}\n')


def a_field_given_twice(path: Path) -> None:
    path.write_text('{"text": "a"}\n{"text": "b", "id": 1, "text": "c"}\n')


@pytest.mark.parametrize(
    "write, message",
    [
        (a_field_given_twice, "line 2: .*the key 'text' is given twice"),
        (half_a_pair, r"a.jsonl, line 3: .*'text' is no Unicode text: character 6 is \\ud83d"),
        (a_list, r"line 1: this is JSON, but not one record a line.*jq -c"),
        (a_file_missing_its_comma, "line 2: no valid JSON"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_mistake_in_a_record_is_named_with_its_line(
    write: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    write(tmp_path / "a.jsonl")
    with pytest.raises(UserError, match=message):
        read(tmp_path / "a.jsonl")


def test_what_is_not_there_is_said_with_the_way_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "b.txt", "t.csv", "x.doc"):
        Path(name).write_text("text")
    Path("gone.txt").symlink_to("nowhere.txt")
    for given, message in {
        "a.txt,b.txt": "set several inputs apart by spaces",
        "gone.txt": "is a link to nowhere.txt, which does not exist",
        "c.txt": rf"does not exist \(seen from {tmp_path}\); did you mean [ab].txt",
        "*.jsonl": rf"no file matches this pattern \(seen from {tmp_path}\)",
        "t.csv": r"tables are not read; .*pandas.read_csv\('t.csv'\)",
        "x.doc": "this format is not known.*--format",
    }.items():
        with pytest.raises(UserError, match=message):
            read(given)
