"""Compressed files as streams whose end is proved: a file is read to its last byte, or is refused as damaged.

The readers that come with the libraries take much for an end: a zstd frame that was cut, or the zero bytes that may
stand between the streams of an .xz. Here an end is what the decompressor itself calls one, at the end of the file.
"""

from __future__ import annotations

import bz2
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ctcd_ds.cli import UserError

PIECE = 1 << 14  # compressed bytes taken at once: what they grow to is held in memory
LARGEST_WINDOW = 1 << 31  # of `zstd --long=31`; a frame takes as much memory as its own window says


def _zstd() -> Any:
    import zstandard

    return zstandard.ZstdDecompressor(max_window_size=LARGEST_WINDOW).decompressobj()


@dataclass(frozen=True)
class Format:
    """`new` makes a decompressor of one stream; a file is one stream or several. `magic`: how each of them begins.

    `padding`: zero bytes may follow a stream, in multiples of so many; with 0, only another stream may.
    """

    new: Callable[[], Any]
    magic: bytes
    padding: int = 0


FORMATS = {
    ".gz": Format(lambda: zlib.decompressobj(wbits=31), b"\x1f\x8b", padding=1),
    ".bz2": Format(bz2.BZ2Decompressor, b"BZh"),
    ".xz": Format(lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ), b"\xfd7zXZ\x00", padding=4),
    ".zst": Format(_zstd, b"\x28\xb5\x2f\xfd"),
}


def suffix_of(name: str) -> str:
    """The suffix in FORMATS by which a file's name says that it is compressed, or nothing."""
    suffix = Path(name).suffix.lower()
    return suffix if suffix in FORMATS else ""


def decompressed(name: str, raw: BinaryIO) -> BinaryIO:
    """The bytes that the file `name`, open as `raw`, stands for. Reading raises UserError where it is damaged."""
    suffix = suffix_of(name)
    return io.BufferedReader(_Reader(_pieces(name, FORMATS[suffix], raw)), 1 << 17) if suffix else raw


def refuse_damage(name: str) -> None:
    """Reads the file to its end where it is compressed. Raises UserError where it is damaged."""
    with Path(name).open("rb") as raw:
        while suffix_of(name) and decompressed(name, raw).read(1 << 20):
            pass


def _pieces(name: str, kind: Format, raw: BinaryIO) -> Iterator[bytes]:
    """Decompressed pieces of all streams of a file."""
    import zstandard

    data, streams = raw.read(PIECE), 0
    begins = data
    try:
        while data or raw.tell() == 0:
            stream, begins = kind.new(), data
            while not stream.eof:
                if not data:
                    raise EOFError("it ends before its compressed data do; it was cut, or not written to its end")
                yield stream.decompress(data)
                data = stream.unused_data if stream.eof else raw.read(PIECE)
            data, streams = _behind_padding(kind.padding, data or raw.read(PIECE), raw), streams + 1
    except (EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError, OSError, ValueError) as problem:
        if streams and begins[: len(kind.magic)] != kind.magic[: len(begins)]:
            raise UserError(
                f"{name} is damaged: behind its compressed data stands something else, {begins[:40]!r}; make it anew "
                f"(`zcat` and its like, which pass over that, give what is before it)"
            ) from None
        raise UserError(f"{name} is damaged or not of the format its name says: {problem}") from None


def _behind_padding(step: int, data: bytes, raw: BinaryIO) -> bytes:
    """What follows the zero bytes that may follow a stream; nothing at the file's end."""
    zeros = 0
    while step and data.startswith(b"\0"):
        rest = data.lstrip(b"\0")
        zeros += len(data) - len(rest)
        data = rest or raw.read(PIECE)
    if step and zeros % step:
        raise EOFError(f"{zeros} zero bytes behind a stream, where only multiples of {step} may be")
    return data


class _Reader(io.RawIOBase):
    """Pieces of bytes as a file."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces, self._piece = pieces, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._piece:
            piece = next(self._pieces, None)
            if piece is None:
                return 0
            self._piece = memoryview(piece)
        size = min(len(buffer), len(self._piece))
        buffer[:size], self._piece = self._piece[:size], self._piece[size:]
        return size
