"""The demo's files: text to pretrain on, and a task to fine-tune on, from documents of which no one is in both."""

from __future__ import annotations

import zlib
from pathlib import Path

from ctcd_ds.cli import UserError, command
from ctcd_ds.demo.pairs import README, rte_file, sentence_pairs
from ctcd_ds.demo.text import Document, documents
from ctcd_ds.manifest import write_atomic

HELD_OUT = 5  # one document of so many
DEV_PAIRS, TRAIN_PAIRS = 600, 3000


def is_held_out(document: Document) -> bool:
    """Whether a document goes into the task; by its name alone, whatever else there is."""
    return zlib.crc32(document.name.encode()) % HELD_OUT == 0


def data_commands(data: Path, home: Path, megabytes: float = 6.0, sentinels: int = 0) -> list[list[str]]:
    """The commands that make text and task in `data`, and tokenizer and corpus of that text in `home`.

    `sentinels`: tokens that stand for spans, where the corpus is to serve sequence-to-sequence models too.
    """
    text, tokenizer = data / "text.txt", home / "tokenizer"
    more = ["--sentinels", sentinels] if sentinels else []
    return [
        command("demo_data", "--output_dir", data, "--size_megabytes", megabytes),
        command("tokenizer", "--input", text, "--type", "wordpiece", "--vocab_size", 1024, *more,
                "--output_dir", tokenizer),
        command("corpus", "--input", text, "--tokenizer", tokenizer, "--output_dir", home / "corpus",
                "--valid_fraction", 0.05),
    ]  # fmt: skip


def make(output_dir: Path, size_bytes: int) -> str:
    """Writes text.txt of about `size_bytes` and glue/RTE/{train,dev}.tsv; returns a line that says what was made."""
    if output_dir.exists() and not output_dir.is_dir():
        raise UserError(f"--output_dir: {output_dir} is a file")
    found = documents(size_bytes * HELD_OUT // (HELD_OUT - 1))
    text = "\n".join("\n".join(d.paragraphs) + "\n" for d in found if not is_held_out(d))
    pairs = sentence_pairs([document for document in found if is_held_out(document)])
    dev = pairs[: min(DEV_PAIRS, len(pairs) // 5)]
    train = pairs[len(dev) :][:TRAIN_PAIRS]

    task = output_dir / "glue" / "RTE"
    task.mkdir(parents=True, exist_ok=True)
    write_atomic(output_dir / "text.txt", text)
    write_atomic(task / "train.tsv", rte_file(train))
    write_atomic(task / "dev.tsv", rte_file(dev))
    write_atomic(task / "README.txt", README)
    size = len(text.encode()) / 1e6
    return f"{output_dir}: text.txt ({size:.1f} MB), glue/RTE ({len(train)} train and {len(dev)} dev pairs)"
