"""From a row's number to its tokens, and from a step's number to its rows.

A corpus is opened by looking at its manifest and at the shards' sizes only, and its tokens stay on disk
(memory maps): opening costs the same for a thousand rows and for a billion. Nothing here needs megatron-core.
"""

from __future__ import annotations

import copy
import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import numpy as np
from pydantic import StringConstraints
from typing_extensions import NotRequired, TypedDict

from ctcd_ds.cli import Damage, UserError
from ctcd_ds.corpus.hashing import ROW_ORDER, extended, hashed
from ctcd_ds.corpus.indexed import Header
from ctcd_ds.kinds import instead, missing
from ctcd_ds.manifest import FileEntry, check_shape, read_manifest
from ctcd_ds.recipe.sections import NAME

FORMAT, VERSION = "ctcd_ds.corpus", 2
# By roles of the tokenizer: what ends each document in the shards, and what models that want a frame see around a row.
BERT_LAYOUT: dict[str, Any] = {"separator": "sep", "frame": {"before": ["cls"], "after": ["sep"]}}

# Rows come in random order. Up to this size of a split the system's read-ahead (128 KiB to 8 MiB for each
# row not in memory) soon has all of it in memory; beyond, it would read 500 times what is needed, or more.
_READ_AHEAD_BYTES = 4 << 30


Role = Literal["cls", "sep", "mask", "pad", "unk", "bos", "eos"]
MASKED_LM: tuple[Role, ...] = ("cls", "sep", "mask", "pad", "unk")  # what masked language models need
ABSENT = -1  # the id of a special token that a tokenizer has not got: no token is it


@dataclass(frozen=True)
class SpecialIds:
    """The ids that a corpus's tokenizer gives to its special tokens, by role; ABSENT where it has no such token.

    `sentinels`: of <extra_id_0>, <extra_id_1>, … in their order, which stand for spans of text.
    """

    cls: int = ABSENT
    sep: int = ABSENT
    mask: int = ABSENT
    pad: int = ABSENT
    unk: int = ABSENT
    bos: int = ABSENT
    eos: int = ABSENT
    sentinels: tuple[int, ...] = ()

    @property
    def end(self) -> int:
        """What ends each document: the separator, or where there is none the end of text."""
        return self.eos if self.sep == ABSENT else self.sep

    @property
    def present(self) -> dict[str, int]:
        """The ids that there are, by role."""
        return {role: number for role in get_args(Role) if (number := getattr(self, role)) != ABSENT}

    def reserved(self, tokens: np.ndarray) -> np.ndarray:
        """Which of `tokens` are no text: bool, same shape. [UNK] is text, of which the word is not known."""
        found = np.zeros(tokens.shape, bool)
        for number in {number for role, number in self.present.items() if role != "unk"}:
            found |= tokens == number
        if self.sentinels:
            found |= np.isin(tokens, self.sentinels)
        return found


@dataclass(frozen=True)
class Shard:
    """One .bin/.idx pair: `tokens` counts every stored id, the one at the end of each document too.

    `text_bytes`: how many bytes of UTF-8 its text had, where that is known.
    """

    name: str
    documents: int
    tokens: int
    text_bytes: int | None = None


@dataclass(frozen=True)
class Corpus:
    """A prepared corpus: who made its ids, and which shards make up each split's token stream."""

    path: Path
    fingerprint: str  # the manifest's own sha256: equal corpora have equal ones
    special: SpecialIds
    vocab_size: int
    tokenizer_fingerprint: str
    vocabulary: str
    dtype: str
    splits: dict[str, tuple[Shard, ...]]
    frame: tuple[tuple[int, ...], tuple[int, ...]]  # ids before and after a row
    unigram_loss: float | None = None  # nats a held-out token, for who knows how often each occurs and no more

    @classmethod
    def open(cls, path: Path) -> Corpus:
        """Opens a corpus directory and checks that it is whole: sizes and headers, not contents.

        Raises UserError, naming the file, where it is no corpus, is unfinished, truncated or of another
        version.
        """
        manifest = read_corpus_manifest(path)
        tokenizer, frame = manifest["tokenizer"], manifest["frame"]
        ids = tokenizer["special"]
        if not (path / "tokenizer").is_dir():
            raise UserError(f"{path} is damaged: its folder tokenizer/ is missing; prepare the corpus again")
        return cls(
            path=path,
            fingerprint=manifest["sha256"],
            special=SpecialIds(**ids, sentinels=tuple(tokenizer.get("sentinels", ()))),
            vocab_size=tokenizer["vocab_size"],
            tokenizer_fingerprint=tokenizer["fingerprint"],
            vocabulary=tokenizer["vocabulary"],
            dtype=manifest["dtype"],
            splits={
                split: tuple(_checked_shard(path, manifest["dtype"], entry) for entry in entries)
                for split, entries in manifest["splits"].items()
            },
            frame=(tuple(ids[role] for role in frame["before"]), tuple(ids[role] for role in frame["after"])),
            unigram_loss=manifest.get("unigram_loss"),
        )

    @property
    def tokenizer_path(self) -> Path:
        """The Hugging Face tokenizer directory that the corpus carries."""
        return self.path / "tokenizer"

    def documents(self, split: str) -> int:
        """Number of documents of a split."""
        return sum(shard.documents for shard in self.splits.get(split, ()))

    def tokens(self, split: str) -> int:
        """Number of stored ids of a split, one at the end of each document among them."""
        return sum(shard.tokens for shard in self.splits.get(split, ()))

    @property
    def parts(self) -> dict[str, Corpus]:
        """The corpora that this one is made of, by name: itself, without a name."""
        return {"": self}

    @property
    def shares(self) -> dict[str, float]:
        """The share of the training rows that comes from each of `parts`."""
        return {"": 1.0}

    @property
    def held_out(self) -> dict[str, float]:
        """The held-out splits that hold text, each with its weight in the mean that stands for all; they add up to 1.

        Sets of other text (`valid.NAME`) are looked at beside the corpus's own split, and stand for it where it has
        none.
        """
        found = [split for split in self.splits if split != "train" and self.tokens(split)]
        counted = ["valid"] if "valid" in found else found
        return {split: (split in counted) / len(counted) for split in found}

    def bytes_per_token(self, split: str) -> float | None:
        """UTF-8 bytes of text that a stored id of the split stands for, on average; None where nobody counted them."""
        sizes = [shard.text_bytes for shard in self.splits.get(split, ()) if shard.text_bytes is not None]
        return sum(sizes) / self.tokens(split) if sizes and len(sizes) == len(self.splits[split]) else None

    def rows(
        self,
        split: str,
        sequence_length: int,
        before: tuple[int, ...] = (),
        after: tuple[int, ...] = (),
        lookahead: int = 0,
    ) -> Rows:
        """The rows of `split` ("train" or "valid"): `sequence_length` ids with the frame `before`, `after`.

        `lookahead`: so many ids of the next row come with each. Raises UserError where the split has not enough text
        for one row.
        """
        width = sequence_length - len(before) - len(after)
        if (tokens := self.tokens(split)) < width + lookahead:
            remedy = "prepare it with a larger --valid_fraction" if split == "valid" else "give it more text"
            raise UserError(
                f"corpus {self.path}: split {split!r} holds {tokens} tokens, but one row of sequence_length "
                f"{sequence_length} takes {width + lookahead}: {remedy}, or lower sequence_length"
            )
        ahead = tokens * np.dtype(self.dtype).itemsize <= _READ_AHEAD_BYTES
        streams = [
            np.frombuffer(_mapped(self.path / f"{shard.name}.bin", ahead), self.dtype)
            for shard in self.splits[split]
            if shard.tokens  # an empty file cannot be mapped
        ]
        return Rows(self, split, streams, width, before, after, lookahead)


def _mapped(file: Path, read_ahead: bool) -> mmap.mmap:
    with file.open("rb") as opened:
        mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    if not read_ahead:
        mapped.madvise(mmap.MADV_RANDOM)
    return mapped


class _ShardShape(TypedDict):
    name: str
    documents: int
    tokens: int
    text_bytes: NotRequired[int]
    bin: FileEntry
    idx: FileEntry


_Split = Annotated[str, StringConstraints(pattern=rf"^(train|valid(\.{NAME})?)$")]


class _TokenizerShape(TypedDict):
    fingerprint: str
    vocabulary: str
    vocab_size: int
    special: dict[Role, int]
    sentinels: NotRequired[list[int]]


class _FrameShape(TypedDict):
    before: list[Role]
    after: list[Role]


class _Shape(TypedDict):
    tokenizer: _TokenizerShape
    separator: Role
    begin: NotRequired[Role | None]
    frame: _FrameShape
    dtype: Literal["uint16", "int32"]
    splits: dict[_Split, list[_ShardShape]]


def read_corpus_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a corpus directory. Raises UserError where there is none of this version, else Damage."""
    file = path / "manifest.json"
    if not path.is_dir():
        found = "it is a file" if path.exists() else missing(path)
        raise UserError(f"there is no corpus at {path}: {found} (`ctcd corpus` makes one)")
    if not file.exists():
        unfinished = "it has no manifest.json (was `ctcd corpus` finished?)"
        raise UserError(f"{path} is not a corpus: {unfinished}; {instead(path, 'corpus')}")
    manifest = read_manifest(file)
    if manifest.get("format") != FORMAT:
        stated = f"its manifest.json says format {manifest.get('format')!r}"
        raise UserError(f"{path} is not a corpus: {stated}; {instead(path, 'corpus')}")
    if manifest.get("version") == 1:
        manifest = _as_version_2(manifest)
    if manifest.get("version") != VERSION:
        raise UserError(
            f"{path} is a corpus of version {manifest.get('version')}, this program reads versions 1 and {VERSION}: "
            "prepare it again, or use the ctcd_ds that made it"
        )
    check_shape(file, manifest, _Shape)
    return manifest


def _as_version_2(manifest: dict[str, Any]) -> dict[str, Any]:
    """A manifest of version 1, which had the special ids beside the tokenizer's sizes, and one layout only."""
    tokenizer = manifest.get("tokenizer")
    if not isinstance(tokenizer, dict):
        return {**manifest, **BERT_LAYOUT, "version": 2}
    special = {role: tokenizer[role] for role in get_args(Role) if role in tokenizer}
    others = {key: value for key, value in tokenizer.items() if key not in special}
    return {**manifest, **BERT_LAYOUT, "version": 2, "tokenizer": {**others, "special": special}}


def _checked_shard(path: Path, dtype: str, entry: dict[str, Any]) -> Shard:
    """One shard as the manifest lists it, after its files were found to have the sizes that belong to it."""
    shard = Shard(entry["name"], entry["documents"], entry["tokens"], entry.get("text_bytes"))
    for kind in ("bin", "idx"):
        file, stated = path / f"{shard.name}.{kind}", entry[kind]["bytes"]
        if not file.is_file():
            raise _damaged(file, "it is missing")
        if (found := file.stat().st_size) != stated:
            raise _damaged(file, f"it has {found} bytes, the manifest says {stated}")
    if entry["bin"]["bytes"] != shard.tokens * np.dtype(dtype).itemsize:
        raise _damaged(path / f"{shard.name}.bin", f"its size is not that of {shard.tokens} tokens of {dtype}")

    file = path / f"{shard.name}.idx"
    with file.open("rb") as index:
        header = Header.read(index.read(Header.BYTES))
    if header is None:
        raise _damaged(file, "it has no IndexedDataset header of version 1")
    if (header.dtype, header.borders) != (dtype, shard.documents + 1):
        raise _damaged(file, f"its header does not say {dtype}, {shard.documents} documents")
    if entry["idx"]["bytes"] != header.file_bytes:
        raise _damaged(file, f"its size is not that of {header.sequences} sequences")
    return shard


def _damaged(file: Path, what: str) -> Damage:
    return Damage(f"corpus is damaged at {file}: {what}; copy it again from its source, or prepare it again")


class Rows:
    """The rows of one split: row r is `before` + S[r·width : (r+1)·width + lookahead] + `after`, S its token stream.

    Rows run on over borders of documents and shards; what is left at the end of S is no row.
    """

    def __init__(
        self,
        corpus: Corpus,
        split: str,
        streams: Sequence[np.ndarray],
        width: int,
        before: tuple[int, ...] = (),
        after: tuple[int, ...] = (),
        lookahead: int = 0,
    ) -> None:
        self.corpus, self.split, self._streams = corpus, split, streams
        self._width, self._before, self._after, self._lookahead = width, before, after, lookahead
        lengths = np.array([len(stream) for stream in streams], np.int64)
        self._ends = np.cumsum(lengths)
        self._begins = self._ends - lengths
        self._whole = self._count = (int(self._ends[-1]) - lookahead) // width

    def __len__(self) -> int:
        return self._count

    def spread(self, count: int) -> Rows:
        """So many of these rows, evenly spread over the split and always the same ones.

        Raises UserError where the split has fewer.
        """
        if count > self._whole:
            raise UserError(
                f"corpus {self.corpus.path}: split {self.split!r} has {self._whole} rows, fewer than {count}"
            )
        fewer = copy.copy(self)
        fewer._count = count
        return fewer

    @property
    def parts(self) -> dict[str, Rows]:
        """The rows of each of `corpus.parts`."""
        return {"": self}

    def batch(self, seed: int, step: int, global_batch: int) -> tuple[np.ndarray, np.ndarray]:
        """What a step trains on, (epoch int64[B], row int64[B]): a pure function of the arguments."""
        return batch_rows(seed, len(self), step, global_batch)

    def read(self, numbers: np.ndarray) -> np.ndarray:
        """The rows of these numbers (int64[n], each in [0, len(self))): int32[n, sequence_length + lookahead].

        Raises Damage where the stored ids are none of the tokenizer's (a damaged shard).
        """
        width, begin = self._width + self._lookahead, len(self._before)
        if self._count < self._whole:
            numbers = numbers * self._whole // self._count
        rows = np.empty((len(numbers), begin + width + len(self._after)), np.int32)
        rows[:, :begin], rows[:, begin + width :] = self._before, self._after
        first = np.searchsorted(self._ends, numbers * self._width, side="right")
        starts = numbers * self._width - self._begins[first]
        for row, shard, start in zip(rows[:, begin : begin + width], first.tolist(), starts.tolist(), strict=True):
            piece = self._streams[shard][start : start + width]
            filled = len(piece)
            row[:filled] = piece
            while filled < width:  # the row runs on in the next shard
                shard += 1
                piece = self._streams[shard][: width - filled]
                row[filled : filled + len(piece)] = piece
                filled += len(piece)
        self._check_ids(rows, numbers)
        return rows

    def _check_ids(self, rows: np.ndarray, numbers: np.ndarray) -> None:
        """An id beyond the vocabulary would end as a crash deep in an embedding, on a GPU without a place."""
        if rows.size and (rows.min() < 0 or rows.max() >= self.corpus.vocab_size):
            bad = np.argmax(((rows < 0) | (rows >= self.corpus.vocab_size)).any(axis=1))
            raise Damage(
                f"corpus {self.corpus.path} is damaged: row {numbers[bad]} of split {self.split!r} holds "
                f"token ids outside 0 … {self.corpus.vocab_size - 1}; prepare it again"
            )


@dataclass(frozen=True)
class RowOrder:
    """A random order of `count` rows, another one for each seed and epoch, without an array of their number.

    A Feistel network on pairs (left, right) of about √count values each: every round adds to one half a hash
    of the other, which can be undone, so all rounds together permute the pairs. The few numbers beyond
    `count` that the pairs have room for are sent through again until they fall inside (cycle walking), which
    keeps it a permutation.
    """

    seed: int
    count: int

    def rows(self, epoch: int | np.ndarray, positions: np.ndarray) -> np.ndarray:
        """The rows at `positions` (int64[n], each in [0, count)) of the order of `epoch` (int or int64[n]).

        int64[n]; over all positions of one epoch each row comes exactly once.
        """
        keys = np.broadcast_to(hashed(self.seed, ROW_ORDER, epoch), positions.shape)
        rows = self._permuted(keys, positions)
        while len(outside := np.flatnonzero(rows >= self.count)):
            rows[outside] = self._permuted(keys[outside], rows[outside])
        return rows

    def _permuted(self, keys: np.ndarray, numbers: np.ndarray, rounds: int = 8) -> np.ndarray:
        width = math.isqrt(self.count - 1) + 1
        sizes = np.uint64(width), np.uint64(-(-self.count // width))
        halves = list(np.divmod(numbers.astype(np.uint64), sizes[1]))
        for step in range(rounds):
            one, other = step % 2, 1 - step % 2
            added = extended(keys, halves[other] * np.uint64(rounds) + np.uint64(step))
            # The hash is halved before it is added: a sum that overflowed could not be undone.
            halves[one] = (halves[one] + (added >> np.uint64(1))) % sizes[one]
        left, right = halves
        return (left * sizes[1] + right).astype(np.int64)


def batch_rows(seed: int, rows: int, step: int, global_batch: int) -> tuple[np.ndarray, np.ndarray]:
    """The batch of a step, (epoch int64[B], row int64[B]): places [step·B, (step+1)·B) of the endless order.

    Epoch e has the places [e·rows, (e+1)·rows), so a batch may hold the end of one epoch and the start of
    the next (or several whole ones, where it is larger than the corpus). Nothing but the arguments decides
    it.
    """
    return endless_rows(seed, rows, step * global_batch + np.arange(global_batch, dtype=np.int64))


def endless_rows(seed: int, rows: int, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(epoch int64[n], row int64[n]) at `places` (int64[n], from 0) of one epoch after another, each in its order."""
    epoch, position = np.divmod(places, rows)
    return epoch, RowOrder(seed, rows).rows(epoch, position)
