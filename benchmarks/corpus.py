"""Measures corpus preparation against the tokenizer library by itself, on the same text with as many workers.

The library's own rate is its batch call on the documents in memory: `tokenizers` with its own threads, or native
SentencePiece for a .model. Ours reads the files, chooses, tokenises, writes shards, hashes, syncs, publishes.
Without --input, the text is the prose that comes with Python, and the tokenizer is trained on it.
"""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import common

from ctcd_ds import cli
from ctcd_ds.corpus import options
from ctcd_ds.corpus.prepare import Settings, prepare
from ctcd_ds.corpus.rows import Corpus
from ctcd_ds.corpus.sources import Reading, documents, find_sources

BATCH = 1000  # documents in one call of the library


def python_prose(folder: Path, megabytes: float, vocab_size: int) -> tuple[str, str]:
    """Text and a WordPiece tokenizer that need no file of the user's: (input, tokenizer).

    The vocabulary is smaller than `vocab_size` where this Python's prose does not give as many tokens.
    """
    from ctcd_ds.corpus.tokenizer_training import TooLarge, train_tokenizer
    from ctcd_ds.demo.text import documents as prose

    found = ["\n".join(document.paragraphs) for document in prose(int(megabytes * 2**20))]
    text = folder / "prose.txt"
    text.write_text("\n\n".join(found) + "\n", encoding="utf-8")
    try:
        train_tokenizer("wordpiece", lambda caption: iter(found), vocab_size, True, folder / "tokenizer")
    except TooLarge as limit:
        train_tokenizer("wordpiece", lambda caption: iter(found), limit.possible, True, folder / "tokenizer")
    return str(text), str(folder / "tokenizer")


def library_batch(tokenizer: str, workers: int, lowercase: bool | None) -> Callable[[list[str]], int]:
    """The library's own batch call: a function from documents to the number of their tokens."""
    if Path(tokenizer).suffix == ".model":
        import sentencepiece

        native = sentencepiece.SentencePieceProcessor(model_file=tokenizer)
        return lambda texts: sum(map(len, native.encode(texts, num_threads=workers)))

    from ctcd_ds.corpus.tokenizer import bring_tokenizer

    backend = bring_tokenizer(tokenizer, lowercase).backend_tokenizer
    return lambda texts: sum(len(one) for one in backend.encode_batch_fast(texts, add_special_tokens=False))


def library_rate(encode: Callable[[list[str]], int], texts: list[str]) -> tuple[float, int]:
    """Tokens a second, and tokens."""
    started = time.perf_counter()
    tokens = sum(encode(texts[at : at + BATCH]) for at in range(0, len(texts), BATCH))
    return tokens / (time.perf_counter() - started), tokens


def our_rate(inputs: list[str], tokenizer: str, lowercase: bool | None, workers: int, folder: Path) -> float:
    """Tokens a second of the whole `prepare` call; the first one loads the libraries too."""
    started = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        prepare(inputs, tokenizer, folder, Settings(), Reading(), lowercase=lowercase, workers=workers)
    elapsed = time.perf_counter() - started
    corpus = Corpus.open(folder)
    return sum(corpus.tokens(split) - corpus.documents(split) for split in corpus.splits) / elapsed


def measure(
    inputs: list[str], tokenizer: str, lowercase: bool | None, workers: int, repetitions: int, folder: Path
) -> dict[str, Any]:
    """The row's values; the two ways take turns."""
    texts = list(documents(find_sources(inputs), Reading(), lambda n: None))
    encode = library_batch(tokenizer, workers, lowercase)
    rounds: dict[str, list[float]] = {"ours": [], "tokenizer": []}
    for number in range(repetitions):
        rate, tokens = library_rate(encode, texts)
        rounds["tokenizer"].append(rate)
        rounds["ours"].append(our_rate(inputs, tokenizer, lowercase, workers, folder / f"corpus-{number}"))
    return {
        "ratio_to_tokenizer": common.ratio(rounds["ours"], rounds["tokenizer"]),
        "tokens_per_s": median(rounds["ours"]),
        "tokenizer_tokens_per_s": median(rounds["tokenizer"]),
        "workers": workers,
        "documents": len(texts),
        "tokens": tokens,
        "characters": sum(map(len, texts)),
        "rounds": {name: [round(rate) for rate in rates] for name, rates in rounds.items()},
    }


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--input", nargs="+", metavar="F", help="text; left out: prose that comes with Python")
    parser.add_argument("--tokenizer", help="directory, vocab.txt, .model; goes with --input")
    parser.add_argument("--lowercase", type=options.true_or_false, metavar="true|false", help="for a vocab.txt")
    parser.add_argument("--workers", type=cli.positive, default=2)
    parser.add_argument("--megabytes", type=float, default=24.0, help="of Python's prose, where there is no --input")
    parser.add_argument(
        "--vocab_size", type=cli.positive, default=30522, help="of the tokenizer trained on it, at most"
    )
    parser.set_defaults(device="cpu", repetitions=3)
    arguments = parser.parse_args()
    common.begin(arguments)
    if (arguments.input is None) != (arguments.tokenizer is None):
        raise cli.UserError("--input and --tokenizer go together: give both, or neither")
    os.environ.update(TOKENIZERS_PARALLELISM="true", RAYON_NUM_THREADS=str(arguments.workers))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        inputs, tokenizer = arguments.input, arguments.tokenizer
        if inputs is None:
            text, tokenizer = python_prose(folder, arguments.megabytes, arguments.vocab_size)
            inputs = [text]
        how = (arguments.lowercase, arguments.workers, arguments.repetitions, folder)
        common.write_row(arguments, measure(inputs, tokenizer, *how))


if __name__ == "__main__":
    cli.run(main)
