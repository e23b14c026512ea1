"""Documents to token ids, by several threads: the tokenizer libraries let go of Python's lock while they work."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ctcd_ds.corpus.tokenizer import special_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

AHEAD = 8  # blocks per thread that are read ahead: with WordPiece the seconds in which the main thread loads megatron


@dataclass(frozen=True)
class Block:
    """Documents that one thread takes at once; `next` is the number of the first document behind them."""

    numbers: list[int]
    texts: list[str]
    characters: int
    next: int


@dataclass(frozen=True)
class Encoded:
    """`ids`: all documents one after another, each ended by [SEP]; `lengths`: of each of them, [SEP] included."""

    ids: npt.NDArray[Any]
    lengths: npt.NDArray[np.int64]
    unknown: int


class Encoder:
    """Documents to ids of `dtype`, without [CLS], without truncation; a literal "[SEP]" in a text stays text.

    Special tokens are not looked for in the text; where a tokenizer's own vocabulary makes one of its letters all
    the same, it becomes [UNK], because a [SEP] ends a document here and a [MASK] is a question.

    `sentencepiece`: the .model that the user brought, if it was one: SentencePiece itself then makes the ids, several
    times faster; its agreement with `tokenizer` on the user's text was checked when it was brought.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, sentencepiece: bytes | None, dtype: str) -> None:
        special = special_ids(tokenizer)
        self._sep, self._unk = special["sep"], special["unk"]
        self._known = np.arange(len(tokenizer)).astype(dtype)  # what becomes of each id
        self._known[[special[role] for role in ("cls", "sep", "mask", "pad")]] = self._unk
        json = tokenizer.backend_tokenizer.to_str()
        self._documents = _rust(json) if sentencepiece is None else _native(sentencepiece)

    def __call__(self, texts: list[str]) -> Encoded:
        lengths, ids = self._documents(texts, self._sep)
        ids = self._known[ids]
        ids[np.cumsum(lengths) - 1] = self._sep
        return Encoded(ids, lengths, int(np.count_nonzero(ids == self._unk)))


Joined = Callable[[list[str], int], tuple[npt.NDArray[np.int64], npt.NDArray[Any]]]
"""Texts and the id that ends each of them, to the lengths with it and all ids one after another."""


def _native(model: bytes) -> Joined:
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor(model_proto=model)

    def joined(texts: list[str], end: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[Any]]:
        documents = processor.encode(texts, out_type="numpy", num_threads=1)
        lengths = np.fromiter(map(len, documents), np.int64, len(documents)) + 1
        last = np.array([end], np.int32)
        return lengths, np.concatenate([last[:0], *(part for document in documents for part in (document, last))])

    return joined


def _rust(tokenizer: str) -> Joined:
    from tokenizers import Tokenizer

    rust = Tokenizer.from_str(tokenizer)
    rust.encode_special_tokens = True
    rust.no_truncation()
    rust.no_padding()

    def joined(texts: list[str], end: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[Any]]:
        documents = [one.ids for one in rust.encode_batch_fast(texts, add_special_tokens=False)]
        for document in documents:
            document.append(end)
        lengths = np.fromiter(map(len, documents), np.int64, len(documents))
        return lengths, np.fromiter(chain.from_iterable(documents), np.int64, int(lengths.sum()))

    return joined


def encode_in_order(
    blocks: Iterable[Block], encoder: Callable[[list[str]], Encoded], workers: int
) -> Iterator[tuple[Block, Encoded]]:
    """Every block with its ids, in order; at most a few blocks per thread are in memory at once."""
    with _no_threads_of_the_library(), ThreadPoolExecutor(workers) as pool:
        pending: deque[tuple[Block, Future[Encoded]]] = deque()
        try:
            for block in blocks:
                pending.append((block, pool.submit(encoder, block.texts)))
                if len(pending) >= AHEAD * workers:
                    first, future = pending.popleft()
                    yield first, future.result()
            for block, future in pending:
                yield block, future.result()
        finally:
            pool.shutdown(cancel_futures=True)  # after a mistake in the text nobody waits for what was read ahead


@contextmanager
def _no_threads_of_the_library() -> Iterator[None]:
    """`tokenizers` reads this at each call; its own threads would take all cores, whatever `workers` says."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
