"""Compressed input: all of a file is read, or it is refused; the formats' own tools are the judges."""

from __future__ import annotations

import random
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ctcd_ds.cli import UserError
from ctcd_ds.corpus.sources import Reading, documents, find_sources

TOOLS = {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".zst": "zstd"}
LINES = [f"line {number} of a text {number * 7919 % 1000}" for number in range(2000)]
HALVES = ["\n".join(half).encode() + b"\n" for half in (LINES[:1000], LINES[1000:])]


def tool(suffix: str, data: bytes, *options: str) -> bytes | None:
    """What the format's own tool makes of bytes; None where it says that they are damaged."""
    done = subprocess.run([TOOLS[suffix], "-q", "-c", *options], input=data, capture_output=True)
    return None if done.returncode else done.stdout


def ours(suffix: str, data: bytes, folder: Path) -> bytes | None:
    path = folder / f"a.txt{suffix}"
    path.write_bytes(data)
    try:
        return "".join(f"{text}\n" for text in read(path)).encode()
    except UserError as problem:
        assert str(path) in str(problem)
        return None


def read(path: Path) -> Iterator[str]:
    return documents(find_sources([str(path)]), Reading(text_layout="lines"))


@pytest.fixture(params=TOOLS)
def suffix(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_cut_anywhere_a_file_is_read_as_its_own_tool_reads_it_or_refused(suffix: str, tmp_path: Path) -> None:
    first, second = (tool(suffix, half) or b"" for half in HALVES)
    whole = first + second
    borders = {0, 1, 4, 8, len(first) - 1, len(first), len(first) + 1, len(whole) - 4, len(whole) - 1}
    borders |= set(random.Random(1).sample(range(len(whole)), 12))
    assert ours(suffix, whole, tmp_path) == b"".join(HALVES)
    assert ours(suffix, first, tmp_path) == HALVES[0]
    for border in sorted(borders - {len(first)}):
        assert ours(suffix, whole[:border], tmp_path) is None, border


def test_a_flipped_bit_is_found_or_changes_nothing(suffix: str, tmp_path: Path) -> None:
    options = ("--check",) if suffix == ".zst" else ()
    whole = b"".join(tool(suffix, half, *options) or b"" for half in HALVES)
    for place in [*range(12), *random.Random(2).sample(range(len(whole)), 25), *range(len(whole) - 12, len(whole))]:
        flipped = bytearray(whole)
        flipped[place] ^= 1 << place % 8
        assert ours(suffix, bytes(flipped), tmp_path) in (None, b"".join(HALVES)), place


def test_zero_bytes_between_and_behind_streams_are_no_end(tmp_path: Path) -> None:
    for suffix, zeros in ((".xz", 4), (".xz", 8 << 10), (".gz", 1), (".gz", 1 << 15)):
        first, second = (tool(suffix, half) or b"" for half in HALVES)
        padded = first + bytes(zeros) + second + bytes(zeros)
        assert ours(suffix, padded, tmp_path) == b"".join(HALVES), (suffix, zeros)
    assert ours(".xz", first and (tool(".xz", HALVES[0]) or b"") + bytes(3), tmp_path) is None


def test_what_follows_a_stream_must_be_one(suffix: str, tmp_path: Path) -> None:
    first = tool(suffix, HALVES[0]) or b""
    assert ours(suffix, first + b"something else", tmp_path) is None


def test_zstd_frames_that_are_skipped_and_wide_windows_are_read(tmp_path: Path) -> None:
    first, second = (tool(".zst", half) or b"" for half in HALVES)
    skipped = b"\x50\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"hello"
    assert ours(".zst", skipped + first + skipped + second + skipped, tmp_path) == b"".join(HALVES)
    wide = tool(".zst", HALVES[0], "--long=31", "--ultra")  # from a pipe: the frame asks for its whole window
    assert wide and ours(".zst", wide, tmp_path) == HALVES[0]


def test_damage_is_said_though_it_first_shows_as_a_mistake_of_the_text(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.jsonl{suffix}"
    records = "".join(f'{{"text": "{line}"}}\n' for line in LINES).encode()
    for content, cut, message in (
        (records, 5, "is damaged"),
        (records + b"no record\n", 0, "line 2001: no valid JSON"),
    ):
        packed = tool(suffix, content) or b""
        path.write_bytes(packed[: len(packed) - cut])
        with pytest.raises(UserError, match=message):
            list(documents(find_sources([str(path)]), Reading()))


def gzip_under_another_name(path: Path) -> None:
    path.write_bytes(tool(".gz", HALVES[0]) or b"")


def compressed_twice(path: Path) -> None:
    twice = path.with_name("a.txt.gz")
    twice.write_bytes(tool(".gz", tool(".gz", HALVES[0]) or b"") or b"")


def text_behind_a_gzip(path: Path) -> None:
    path.with_name("a.txt.gz").write_bytes((tool(".gz", HALVES[0]) or b"") + b"Bytes: 300\n")


def encoded(encoding: str) -> Callable[[Path], None]:
    return lambda path: path.write_bytes("\n".join(["w", *LINES]).encode(encoding)) and None


def latin1(path: Path) -> None:
    path.write_text("ascii\nZürich\n", encoding="latin-1")


@pytest.mark.parametrize(
    "write, message",
    [
        (gzip_under_another_name, r"is compressed; let its name say so: \S*a\.txt\.gz"),
        (text_behind_a_gzip, r"a\.txt\.gz is damaged: behind its compressed data stands something else, b'Bytes: 300"),
        (compressed_twice, "is compressed twice: unpack it once"),
        (encoded("utf-16"), "is UTF-16.*iconv -f UTF-16 "),
        (encoded("utf-32"), "is UTF-32.*iconv -f UTF-32 "),
        *(
            (
                encoded(f"utf-{name}"),
                f"looks like UTF-16.*iconv -f UTF-{name} ".replace("-le", "LE").replace("-be", "BE"),
            )
            for name in ("16-le", "16-be", "32-le", "32-be")
        ),
        (latin1, "byte 0xfc in line 2, at byte offset 7;.*iconv -f LATIN1 "),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_is_not_utf8_is_named_with_its_cure(write: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    write(tmp_path / "a.txt")
    [path] = tmp_path.iterdir()
    with pytest.raises(UserError, match=message):
        list(read(path))
