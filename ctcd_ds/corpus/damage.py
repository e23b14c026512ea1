"""Whether a corpus is as it was written: every byte on demand, and before a run what can be read in a moment."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ctcd_ds.cli import Damage, UserError
from ctcd_ds.corpus.rows import read_corpus_manifest
from ctcd_ds.corpus.tokenizer import load_tokenizer, tokenizer_identity
from ctcd_ds.corpus.workplace import PLAN
from ctcd_ds.manifest import file_problems, read_manifest

# Up to here all is read before a run, in less than a second (sha256 runs at 1.5 GB/s); beyond, samples of each file.
READ_WHOLE_BYTES = 2**30


def corpus_damage(path: Path, manifest: Mapping[str, Any], sampled: bool = False) -> Iterator[str]:
    """What is not as the manifest says: a line with both sizes or hashes for each file, and for the tokenizer."""
    yield from file_problems(path, _files(manifest), beside=("tokenizer", PLAN), sampled=sampled)
    try:
        found = tokenizer_identity(load_tokenizer(path / "tokenizer"))
    except UserError as problem:
        yield str(problem)
        return
    if found != manifest["tokenizer"]:
        yield f"{path / 'tokenizer'}: its identity is {found}, the manifest says {manifest['tokenizer']}"


def damage_beside(path: Path) -> Iterator[str]:
    """The same of what does not make a corpus another: preparation.json, and every byte of the tokenizer's files."""
    try:
        yield from file_problems(path / "tokenizer", read_manifest(path / PLAN)["tokenizer"])
    except UserError as problem:
        yield str(problem)


def refuse_damage(path: Path) -> None:
    """Raises Damage with all that is not as the manifest says; of large corpora only samples are read."""
    manifest = read_corpus_manifest(path)
    sampled = sum(entry["bytes"] for entry in _files(manifest).values()) > READ_WHOLE_BYTES
    if problems := list(corpus_damage(path, manifest, sampled)):
        raise Damage(f"corpus {path} is damaged; copy it again, or prepare it again:\n  " + "\n  ".join(problems))


def _files(manifest: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    shards = [shard for shards in manifest["splits"].values() for shard in shards]
    return {f"{shard['name']}.{kind}": shard[kind] for shard in shards for kind in ("bin", "idx")}
