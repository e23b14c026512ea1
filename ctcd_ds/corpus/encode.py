"""What a worker process does: blocks of documents to token ids. It imports little, so that many start fast."""

from __future__ import annotations

import os
import pickle
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import chain
from multiprocessing import connection, get_context, parent_process
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ctcd_ds.cli import RunFailure

AHEAD = 8  # blocks per worker that are read ahead: enough for the seconds in which the main process loads megatron


@dataclass(frozen=True)
class Block:
    """Documents that one worker takes at once; `next` is the number of the first document behind them."""

    numbers: list[int]
    texts: list[str]
    characters: int
    next: int


@dataclass(frozen=True)
class Encoding:
    """How text becomes ids: the `tokenizers` tokenizer as JSON, and the special ids that matter here.

    `sentencepiece`: the .model that the user brought. SentencePiece itself then makes the ids, several times faster;
    its agreement with `tokenizer` on the user's text was checked when it was brought.
    """

    tokenizer: str
    sentencepiece: bytes | None
    dtype: str
    sep: int
    unk: int
    reserved: tuple[int, ...]  # special ids that text itself must never become


@dataclass(frozen=True)
class Encoded:
    """`ids`: all documents one after another, each ended by [SEP]; `lengths`: of each of them, [SEP] included."""

    ids: npt.NDArray[Any]
    lengths: npt.NDArray[np.int64]
    unknown: int


class Encoder:
    """Documents to ids, without [CLS], without truncation; a literal "[SEP]" in a text stays text.

    Special tokens are not looked for in the text; where a tokenizer's own vocabulary makes one of its letters all
    the same, it becomes [UNK], because a [SEP] ends a document here and a [MASK] is a question.
    """

    def __init__(self, encoding: Encoding) -> None:
        self._encoding = encoding
        self._ids: Callable[[list[str]], list[list[int]]]
        if encoding.sentencepiece is not None:
            from sentencepiece import SentencePieceProcessor

            self._ids = SentencePieceProcessor(model_proto=encoding.sentencepiece).encode
            return
        from tokenizers import Tokenizer

        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # processes share the cores, threads would fight for them
        tokenizer = Tokenizer.from_str(encoding.tokenizer)
        tokenizer.encode_special_tokens = True
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._ids = lambda texts: [one.ids for one in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def __call__(self, texts: list[str]) -> Encoded:
        encoding = self._encoding
        documents = self._ids(texts)
        for document in documents:
            document.append(encoding.sep)
        lengths = np.fromiter(map(len, documents), np.int64, len(documents))
        ids = np.fromiter(chain.from_iterable(documents), np.int64, int(lengths.sum()))
        text = np.ones(len(ids), dtype=np.bool_)
        text[np.cumsum(lengths) - 1] = False
        ids[text & np.isin(ids, encoding.reserved)] = encoding.unk
        unknown = int(np.count_nonzero(ids == encoding.unk))
        return Encoded(ids.astype(encoding.dtype), lengths, unknown)


def encode_in_order(blocks: Iterable[Block], encoding: Encoding, workers: int) -> Iterator[tuple[Block, Encoded]]:
    """Every block with its ids, in order; at most a few blocks per worker are in memory at once."""
    if workers == 1:
        encoder = Encoder(encoding)
        for block in blocks:
            yield block, encoder(block.texts)
        return
    context = get_context("spawn")  # forking a process that holds threads (Rust, Arrow) can hang
    with (
        tempfile.TemporaryDirectory(prefix="ctcd-") as folder,
        # By a file: what goes to a new process through its pipe must fit into the pipe, else the main process waits
        # for ever where that process is ended before it has read all (CPython keeps the reading end open meanwhile).
        ProcessPoolExecutor(workers, context, _start, (_handed_over(encoding, Path(folder)),)) as pool,
    ):
        pending: deque[tuple[Block, Future[Encoded]]] = deque()
        try:
            for block in blocks:
                pending.append((block, pool.submit(_encode, block.texts)))
                if len(pending) >= AHEAD * workers:
                    first, future = pending.popleft()
                    yield first, future.result()
            for block, future in pending:
                yield block, future.result()
        except BrokenProcessPool:
            raise RunFailure(
                "a worker process was ended from outside, most often for want of memory (see dmesg): the same command "
                "goes on behind the shards that are finished; take fewer --workers"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)  # after a mistake in the text nobody waits for what was read ahead


def _handed_over(encoding: Encoding, folder: Path) -> Path:
    place = folder / "encoding.pickle"
    place.write_bytes(pickle.dumps(encoding))
    return place


_encoder: Encoder | None = None  # one in each worker process


def _start(encoding: Path) -> None:
    import signal

    global _encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's affair
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _encoder = Encoder(pickle.loads(encoding.read_bytes()))


def _end_with_parent() -> None:
    """A worker whose main process was killed would wait for work for ever."""
    parent = parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


def _encode(texts: list[str]) -> Encoded:
    assert _encoder is not None
    return _encoder(texts)
