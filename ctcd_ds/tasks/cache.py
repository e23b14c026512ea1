"""A finished teacher's predictions, written once: a few drawn tokens at every position that a recipe asks.

    manifest.json                   what was asked, of which teacher, and every file with its sha256; written last
    draws-00000.bin …               one record a position: its entropy, and the drawn tokens

The rows of a run come in an order that is a pure function of (seed, place), whatever the number of ranks
(`Rows.batch`). So records lie in that order: a rank's rows of a step are one piece of a file, wherever it stands.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from typing_extensions import TypedDict

from ctcd_ds.cli import Damage, UserError, count
from ctcd_ds.corpus.damage import READ_WHOLE_BYTES
from ctcd_ds.corpus.rows import Corpus
from ctcd_ds.kinds import instead
from ctcd_ds.manifest import FileEntry, check_shape, file_problems, read_manifest
from ctcd_ds.objective.batch import Batch, Drawn
from ctcd_ds.recipe.reading import flat, is_corpus_place
from ctcd_ds.recipe.sections import Recipe

FORMAT, VERSION = "ctcd_ds.cache", 1
PROGRESS = "unfinished.json"  # stands for the manifest until all is written


class _Shape(TypedDict):
    asked: dict[str, Any]
    teacher: dict[str, str]
    draws: int
    positions: int
    vocab_size: int
    rows: int
    file_rows: int
    files: dict[str, FileEntry]


def what_is_asked(recipe: Recipe, corpus: Corpus) -> dict[str, Any]:
    """All that decides what stands at a place of a recipe's rows, and where a teacher is asked: key → value."""
    resolved = recipe.resolved()
    objective = {key: resolved["objective"].get(key) for key in ("task", "soft_positions", "temperature")}
    keys = flat({"seed": recipe.seed, "corpus": resolved["corpus"], "objective": objective})
    here = {key: value for key, value in keys.items() if value is not None and not is_corpus_place(key)}
    return {**here, "the corpus's sha256": corpus.fingerprint}


def record(draws: int, vocab_size: int) -> np.dtype[Any]:
    """What is kept of a position: 4 bytes of entropy, and 2 a drawn token (4 beyond 65,536 tokens)."""
    return np.dtype([("entropy", "<f4"), ("tokens", "<u2" if vocab_size <= 1 << 16 else "<u4", (draws,))])


def file_name(number: int) -> str:
    """The file that holds the rows at places [number · file_rows, (number + 1) · file_rows)."""
    return f"draws-{number:05}.bin"


@dataclass(frozen=True)
class Cache:
    """A finished cache: `rows` places from 0 on, `positions` records each, in files of `file_rows` rows."""

    path: Path
    fingerprint: str  # the manifest's own sha256
    asked: Mapping[str, Any]
    draws: int
    positions: int
    vocab_size: int
    rows: int
    file_rows: int

    @classmethod
    def open(cls, path: Path) -> Cache:
        """Reads the manifest, and looks at the files' sizes. Raises UserError where it is no cache, else Damage."""
        manifest = read_cache_manifest(path)
        names = ("asked", "draws", "positions", "vocab_size", "rows", "file_rows")
        cache = cls(path, manifest["sha256"], **{name: manifest[name] for name in names})
        for number in range(-(-cache.rows // cache.file_rows)):
            stated = manifest["files"].get(file_name(number), {}).get("bytes")
            there, file = min(cache.file_rows, cache.rows - number * cache.file_rows), path / file_name(number)
            found = file.stat().st_size if file.is_file() else 0
            if not found == stated == there * cache.row_bytes:
                said = f"it has {found:,} bytes, and {there:,} rows are {there * cache.row_bytes:,}"
                raise Damage(f"cache {path} is damaged at {file}: {said}; copy it again, or write it again")
        return cache

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.positions * record(self.draws, self.vocab_size).itemsize

    def describe(self, sequence_length: int) -> str:
        """What it holds, in words."""
        per_token = self.row_bytes / sequence_length
        return f"{count(self.draws, 'draw')} a position, {per_token:.1f} bytes a token of text"

    def refuse_damage(self) -> None:
        """Raises Damage with all that is not as the manifest says; of large caches only samples are read."""
        if problems := list(cache_damage(self.path, sampled=self.rows * self.row_bytes > READ_WHOLE_BYTES)):
            listed = "\n  ".join(problems)
            raise Damage(f"cache {self.path} is damaged; copy it again, or write it again:\n  {listed}")

    def mistakes(self, asked: Mapping[str, Any], rows: int) -> Iterator[str]:
        """Why it does not serve a run that is asked this at so many rows."""
        for key in sorted(asked.keys() | self.asked.keys()):
            then, now = self.asked.get(key), asked.get(key)
            if then != now:
                yield f"it was written for {key} = {then!r}, and here it is {now!r}; write one for this recipe"
        if rows > self.rows:
            yield (
                f"it holds {self.rows:,} rows, and the run reads {rows:,}: train for fewer steps, or write one for "
                "as many"
            )

    def read(self, place: int, rows: int) -> np.ndarray:
        """The records of the rows at [place, place + rows): [rows, positions] of `record`. O(1) memory besides."""
        kind, pieces = record(self.draws, self.vocab_size), []
        while rows:
            number, first = divmod(place, self.file_rows)
            taken = min(rows, self.file_rows - first)
            shape = (min(self.file_rows, self.rows - number * self.file_rows), self.positions)
            mapped = np.memmap(self.path / file_name(number), kind, "r", shape=shape)
            pieces.append(np.array(mapped[first : first + taken]))
            place, rows = place + taken, rows - taken
        found = np.concatenate(pieces)
        if found["tokens"].max(initial=0) >= self.vocab_size:
            raise Damage(f"cache {self.path} is damaged before row {place}: it holds tokens beyond the vocabulary")
        return found


@dataclass(frozen=True)
class CachedTeachers:
    """The cached teachers of a run by name. `learner`: the number of a peer that learns from one."""

    caches: Mapping[str, Cache]
    learner: int

    @property
    def fingerprints(self) -> dict[str, str]:
        """What each cache's manifest says of itself: equal ones teach the same."""
        return {name: cache.fingerprint for name, cache in self.caches.items()}

    def teach(self, batch: Batch, place: int) -> Batch:
        """The batch with what each teacher said at its shared positions; its rows stand at places from `place` on."""
        positions = batch.views[self.learner].positions
        drawn = {}
        for name, cache in self.caches.items():
            found = cache.read(place, len(batch.rows)).reshape(-1)
            if positions is not None and len(found) != batch.shared:  # kept for all positions, of which some are text
                found = found[positions[: batch.shared].numpy()]
            tokens = torch.from_numpy(found["tokens"].astype(np.int64))
            drawn[name] = Drawn(tokens, torch.from_numpy(found["entropy"].astype(np.float32)))
        return replace(batch, drawn=drawn)


def read_cache_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a cache. Raises UserError where there is none of this version, else Damage."""
    file = path / "manifest.json"
    if (path / PROGRESS).exists() and not file.exists():
        raise UserError(f"{path} is an unfinished cache: give the `ctcd cache-logits` again that was writing it")
    if not file.exists():
        raise UserError(f"{path} is no cache: {instead(path, 'cache')}")
    manifest = read_manifest(file)
    if manifest.get("format") != FORMAT:
        raise UserError(f"{path} is no cache: {instead(path, 'cache')}")
    if manifest.get("version") != VERSION:
        raise UserError(
            f"{path} is a cache of version {manifest.get('version')}, this program reads {VERSION}: write it again"
        )
    check_shape(file, manifest, _Shape)
    return manifest


def cache_damage(path: Path, sampled: bool = False) -> Iterator[str]:
    """What is not as the manifest says: a line with both sizes or hashes for each file."""
    yield from file_problems(path, read_cache_manifest(path)["files"], beside=(PROGRESS,), sampled=sampled)
