"""megatron-core's .idx, the file beside a .bin of token ids: its layout, read and written without megatron-core.

A header; the tokens of each sequence (int32); the byte of the .bin at which each begins (int64); the borders of
documents, counted in sequences (int64).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}  # megatron's codes
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_HEADER = struct.Struct("<9sQBQQ")  # magic word, version, dtype code, sequences, borders of documents
_MAGIC, _VERSION = b"MMIDIDX\x00\x00", 1


@dataclass(frozen=True)
class Header:
    """What the first `Header.BYTES` bytes say. `code`: the dtype's, one of DTYPES where it is one of token ids."""

    code: int
    sequences: int
    borders: int

    BYTES = _HEADER.size

    @classmethod
    def read(cls, content: bytes) -> Header | None:
        """The header at the beginning of a file's content; None where it is none of version 1."""
        if len(content) < cls.BYTES:
            return None
        magic, version, code, sequences, borders = _HEADER.unpack_from(content)
        return cls(code, sequences, borders) if (magic, version) == (_MAGIC, _VERSION) else None

    @property
    def dtype(self) -> str | None:
        """numpy's name of the tokens' dtype."""
        return DTYPES.get(self.code)

    @property
    def file_bytes(self) -> int:
        """The size of the whole file."""
        return self.BYTES + 12 * self.sequences + 8 * self.borders

    def arrays(self, content: bytes) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Of a whole file: the tokens of each sequence, the byte at which each begins, the borders of documents."""
        at = self.BYTES + 4 * self.sequences
        return (
            np.frombuffer(content, np.int32, self.sequences, self.BYTES),
            np.frombuffer(content, np.int64, self.sequences, at),
            np.frombuffer(content, np.int64, self.borders, at + 8 * self.sequences),
        )

    def write(self) -> bytes:
        """The header's bytes."""
        return _HEADER.pack(_MAGIC, _VERSION, self.code, self.sequences, self.borders)


def write_index(dtype: str, lengths: npt.ArrayLike) -> bytes:
    """The .idx of a .bin in which documents of `lengths` tokens, one sequence each, follow one another."""
    tokens = np.asarray(lengths, np.int32)
    starts = (np.cumsum(tokens, dtype=np.int64) - tokens) * np.dtype(dtype).itemsize
    borders = np.arange(len(tokens) + 1, dtype=np.int64)
    header = Header(_CODES[dtype], len(tokens), len(borders)).write()
    return header + tokens.tobytes() + starts.tobytes() + borders.tobytes()
