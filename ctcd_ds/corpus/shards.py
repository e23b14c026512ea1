"""Shards: pairs of .bin and .idx files in the format of megatron-core's IndexedDataset, one document a sequence."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ctcd_ds.cli import UserError
from ctcd_ds.corpus.indexed import DTYPES, Header
from ctcd_ds.manifest import sampled_entry

Entry = dict[str, Any]  # a shard as the manifest lists it


@dataclass(frozen=True)
class Pair:
    """An open .bin/.idx pair. Document d is the sequences documents[d] to documents[d+1] of the index."""

    prefix: str
    tokens: npt.NDArray[Any]  # the .bin, memory-mapped
    lengths: npt.NDArray[np.int32]  # tokens of each sequence
    starts: npt.NDArray[np.int64]  # of each sequence in `tokens`
    documents: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.documents) - 1

    def document(self, number: int) -> npt.NDArray[Any]:
        """The ids of one document (its sequences joined), a copy."""
        first, last = self.documents[number], self.documents[number + 1]
        parts = [self.tokens[self.starts[s] : self.starts[s] + self.lengths[s]] for s in range(first, last)]
        return np.concatenate(parts) if parts else np.empty(0, self.tokens.dtype)


def open_pair(prefix: str) -> Pair:
    """Opens PREFIX.bin and PREFIX.idx; UserError where they are missing, damaged, or do not fit each other."""
    idx, data = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    for path in (idx, data):
        if not path.is_file():
            raise UserError(f"{path} does not exist; a corpus is a pair of {prefix}.bin and {prefix}.idx")
    content = idx.read_bytes()
    header = Header.read(content)
    if header is None:
        raise UserError(f"{idx} is not an index of megatron-core's IndexedDataset (version 1)")
    if header.dtype is None:
        raise UserError(f"{idx}: dtype code {header.code} is not one of token ids ({DTYPES})")
    sequences = header.sequences
    if len(content) < header.file_bytes or header.borders < 1:
        raise UserError(f"{idx} is damaged: {len(content)} bytes do not hold {sequences} sequences")
    lengths, pointers, bounds = header.arrays(content)
    dtype = np.dtype(header.dtype)
    size = data.stat().st_size
    if size % dtype.itemsize:
        raise UserError(f"{data} is damaged: its {size} bytes are no whole number of tokens of {dtype}")
    tokens = np.memmap(data, dtype, "r") if size else np.empty(0, dtype)
    ends = pointers + lengths.astype(np.int64) * dtype.itemsize
    if (lengths < 0).any() or (pointers < 0).any() or (pointers % dtype.itemsize).any() or (ends > size).any():
        raise UserError(f"{idx} does not fit {data}: sequences lie outside its {size} bytes")
    if bounds[0] != 0 or bounds[-1] != sequences or (np.diff(bounds) < 0).any():
        raise UserError(f"{idx} is damaged: its documents do not cover its {sequences} sequences in order")
    return Pair(prefix, tokens, lengths, pointers // dtype.itemsize, bounds)


class ShardWriter:
    """Writes one shard, document by document, through megatron-core's own builder."""

    def __init__(self, folder: Path, name: str, dtype: str) -> None:
        with warnings.catch_warnings():  # it misses TransformerEngine and Apex, which shards do not need
            warnings.simplefilter("ignore")
            from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder  # 4 s: only where it is used

        self.folder, self.name, self.dtype = folder, name, dtype
        self.documents = self.tokens = self.text_bytes = 0
        self._builder = IndexedDatasetBuilder(str(folder / f"{name}.bin"), dtype=np.dtype(dtype).type)

    def add(self, ids: npt.NDArray[Any], text_bytes: int) -> None:
        """Appends one document; `ids` has the shard's dtype (the builder would wrap larger ids silently)."""
        assert ids.dtype == self.dtype, (ids.dtype, self.dtype)
        self._builder.add_document(ids, [len(ids)])
        self.documents += 1
        self.tokens += len(ids)
        self.text_bytes += text_bytes

    def finish(self) -> Entry:
        """Makes the shard durable and describes it."""
        self._builder.finalize(str(self.folder / f"{self.name}.idx"))
        entry = shard_entry(self.folder, self.name, self.documents, self.tokens)
        return {**entry, "text_bytes": self.text_bytes} if self.text_bytes else entry


def shard_entry(folder: Path, name: str, documents: int, tokens: int) -> Entry:
    """A shard as the manifest lists it, its two files forced to the disk."""
    entry: Entry = {"name": name, "documents": documents, "tokens": tokens}
    for suffix in ("bin", "idx"):
        path = folder / f"{name}.{suffix}"
        with path.open("rb") as file:
            os.fsync(file.fileno())
        entry[suffix] = sampled_entry(path)
    return entry


class Step:
    """The shards that one stretch of the input becomes: one of train, one of valid, as far as they have documents.

    `share(number)` in [0, 1) decides: below `valid_fraction`, document `number` is held out.
    """

    def __init__(
        self,
        folder: Path,
        dtype: str,
        finished: dict[str, list[Entry]],
        valid_fraction: float,
        share: Callable[[int], float],
    ) -> None:
        self._folder, self._dtype, self._finished = folder, dtype, finished
        self._valid_fraction, self._share = valid_fraction, share
        self._writers: dict[str, ShardWriter] = {}
        # The train document that is nearest to being held out: its share, its index, the bytes of its text.
        self._nearest = (1.0, 0, 0)

    def add(self, number: int, ids: npt.NDArray[Any], text_bytes: int) -> None:
        """Appends document `number` to the split it belongs to."""
        share = self._share(number)
        split = "valid" if share < self._valid_fraction else "train"
        if split not in self._writers:
            self._writers[split] = ShardWriter(self._folder, self._name(split), self._dtype)
        if split == "train":
            self._nearest = min(self._nearest, (share, self._writers[split].documents, text_bytes))
        self._writers[split].add(ids, text_bytes)

    def _name(self, split: str) -> str:
        return f"{split}-{len(self._finished[split]):05d}"

    def finish(self) -> dict[str, list[Entry]]:
        """Ends the shards and gives them by split (none or one each)."""
        entries = {split: [writer.finish()] for split, writer in self._writers.items()}
        train = sum(entry["documents"] for entry in self._finished["train"] + entries.get("train", []))
        held_out = self._finished["valid"] or "valid" in entries
        if self._valid_fraction > 0 and not held_out and "train" in entries and train >= 2:
            entries = self._hold_out_nearest()
        return {split: entries.get(split, []) for split in ("train", "valid")}

    def _hold_out_nearest(self) -> dict[str, list[Entry]]:
        """With few documents chance may hold out none: then the one that was nearest to it."""
        shard = self._folder / self._name("train")
        pair = open_pair(str(shard))
        writers: dict[str, ShardWriter] = {}
        for number in range(len(pair)):
            split = "valid" if number == self._nearest[1] else "train"
            if split not in writers:
                writers[split] = ShardWriter(self._folder, f"again-{split}", self._dtype)
            writers[split].add(pair.document(number), 0)
        _, _, writers["valid"].text_bytes = self._nearest
        writers["train"].text_bytes = self._writers["train"].text_bytes - writers["valid"].text_bytes
        for suffix in ("bin", "idx"):
            shard.with_name(f"{shard.name}.{suffix}").unlink()
        return {split: [self._named(writer, self._name(split))] for split, writer in writers.items()}

    def _named(self, writer: ShardWriter, name: str) -> Entry:
        entry = writer.finish()
        for suffix in ("bin", "idx"):
            (self._folder / f"{writer.name}.{suffix}").replace(self._folder / f"{name}.{suffix}")
        return {**entry, "name": name}
