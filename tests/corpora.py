"""Small corpora for tests, written by numpy alone, in the layout that tools/prepare_corpus.py writes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ctcd_ds.corpus.indexed import write_index
from ctcd_ds.corpus.rows import Corpus, Rows, SpecialIds
from ctcd_ds.corpus.workplace import write_preparation
from ctcd_ds.manifest import sampled_entry, write_manifest

SPECIAL = SpecialIds(cls=2, sep=3, mask=4, pad=0, unk=1)
Documents = Sequence[Sequence[int]]


def write_corpus(
    directory: Path,
    train: Documents | Sequence[Documents],
    valid: Documents | Sequence[Documents] = (),
    vocab_size: int = 1000,
    special: SpecialIds = SPECIAL,
    **sets: Documents | Sequence[Documents],
) -> Path:
    """A finished corpus at `directory`; `sets` are held out beside `valid`.

    A split is a list of documents (lists of ids, their [SEP] is added here) or, for several shards, a list of
    such lists; an empty list is an empty split.
    """
    directory.mkdir(parents=True)
    _write_tokenizer(directory / "tokenizer", vocab_size, special)
    splits = {
        split: [
            write_shard(directory, f"{split.replace('.', '-')}-{number:05}", documents, vocab_size, special.sep)
            for number, documents in enumerate(_shards(shards))
        ]
        for split, shards in {"train": train, "valid": valid, **{f"valid.{n}": s for n, s in sets.items()}}.items()
    }
    write_preparation(directory, {}, directory / "tokenizer")
    write_corpus_manifest(directory, splits, vocab_size, special)
    return directory


def random_documents(number: int, vocab_size: int = 1000, longest: int = 60, seed: int = 0) -> list[list[int]]:
    """Documents of 0 to `longest` ids, none of them special."""
    random = np.random.default_rng(seed)
    return [random.integers(5, vocab_size, random.integers(longest + 1)).tolist() for _ in range(number)]


def small_rows(directory: Path, length: int = 32, documents: int = 200, vocab_size: int = 1000) -> Any:
    """The training rows of a new random corpus of one shard, for tests of what comes after reading."""
    path = write_corpus(directory, random_documents(documents, vocab_size), vocab_size=vocab_size)
    return framed(Corpus.open(path), "train", length)


def framed(corpus: Corpus, split: str, length: int) -> Rows:
    """Rows between [CLS] and [SEP], as masked language models read them."""
    return corpus.rows(split, length, *corpus.frame)


def write_shard(directory: Path, name: str, documents: Documents, vocab_size: int, sep: int) -> dict[str, Any]:
    """Writes NAME.bin and NAME.idx; returns the shard's entry for the manifest."""
    dtype = corpus_dtype(vocab_size)
    stored = [np.array([*document, sep], dtype) for document in documents]
    lengths = np.array([len(document) for document in stored], np.int32)
    (directory / f"{name}.bin").write_bytes(b"".join(document.tobytes() for document in stored))
    (directory / f"{name}.idx").write_bytes(write_index(dtype, lengths))
    return {
        "name": name,
        "documents": len(stored),
        "tokens": int(lengths.sum()),
        "bin": sampled_entry(directory / f"{name}.bin"),
        "idx": sampled_entry(directory / f"{name}.idx"),
    }


def write_corpus_manifest(
    directory: Path, splits: dict[str, list[dict[str, Any]]], vocab_size: int, special: SpecialIds = SPECIAL
) -> None:
    """The manifest, last as always."""
    ids = special.present
    write_manifest(
        directory / "manifest.json",
        {
            "format": "ctcd_ds.corpus",
            "version": 2,
            "tokenizer": {"fingerprint": "f" * 64, "vocabulary": "e" * 64, "vocab_size": vocab_size, "special": ids},
            "separator": "sep",
            "frame": {"before": ["cls"], "after": ["sep"]},
            "dtype": corpus_dtype(vocab_size),
            "settings": {"seed": 1, "fraction": 1.0, "valid_fraction": 0.01},
            "splits": splits,
        },
    )


def corpus_dtype(vocab_size: int) -> str:
    return "uint16" if vocab_size < 65500 else "int32"


def _shards(split: Any) -> list[Documents]:
    documents_come_first = not split or not split[0] or np.isscalar(split[0][0])
    return [split] if documents_come_first else list(split)


def _write_tokenizer(directory: Path, vocab_size: int, special: SpecialIds) -> None:
    """A WordPiece tokenizer whose id i is the word "wi", special ids as given; AutoTokenizer loads it."""
    names = {special.cls: "[CLS]", special.sep: "[SEP]", special.mask: "[MASK]"}
    names |= {special.pad: "[PAD]", special.unk: "[UNK]"}
    roles = {f"{name[1:-1].lower()}_token": name for name in names.values()}
    names |= {id_: f"<extra_id_{number}>" for number, id_ in enumerate(special.sentinels)}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    directory.mkdir()
    (directory / "tokenizer.json").write_text(
        json.dumps(
            {
                "version": "1.0",
                "added_tokens": [
                    {"id": id_, "content": name, "special": True, **flags} for id_, name in sorted(names.items())
                ],
                "pre_tokenizer": {"type": "BertPreTokenizer"},
                "model": {
                    "type": "WordPiece",
                    "unk_token": "[UNK]",
                    "continuing_subword_prefix": "##",
                    "max_input_chars_per_word": 100,
                    "vocab": {names.get(number, f"w{number}"): number for number in range(vocab_size)},
                },
            }
        )
    )
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **roles})
    )
