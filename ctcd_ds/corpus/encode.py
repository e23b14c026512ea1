"""Documents to token ids, by several threads: the tokenizer libraries let go of Python's lock while they work."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, compress, islice
from operator import not_
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ctcd_ds.cli import UserError
from ctcd_ds.corpus.rows import ABSENT
from ctcd_ds.corpus.sentencepiece_model import Native
from ctcd_ds.corpus.tokenizer import begin_role, special_ids

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
    """`ids`: all documents one after another; `lengths`: of each of them with what begins and ends it.

    A document of which the tokenizer leaves nothing has length 0. `text_bytes`: of each text, in UTF-8.
    """

    ids: npt.NDArray[Any]
    lengths: npt.NDArray[np.int64]
    text_bytes: npt.NDArray[np.int64]
    unknown: int


class Encoder:
    """Documents to ids of `dtype`, each with what begins and ends it, not cut; a literal "[SEP]" in a text stays text.

    Special tokens are not looked for in the text; where a tokenizer's own vocabulary makes one of its letters all
    the same, it becomes the unknown token, because a [SEP] ends a document here and a [MASK] is a question.

    The ids are those of `tokenizer`, whoever makes them. `native`, of a .model that the user brought, is several times
    faster; it takes what it is sure of, and where each call begins with such, that is made by both and compared.
    Raises UserError where a text makes a special token and the tokenizer has none for what is unknown.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, native: Native | None, dtype: str) -> None:
        self.dtype, special = dtype, special_ids(tokenizer)
        begin = [] if begin_role(tokenizer) is None else [special.bos]
        self._begin, self._end = np.array(begin, dtype), np.array([special.end], dtype)
        self._unk = special.unk
        self._known = np.arange(len(tokenizer)).astype(dtype)  # what becomes of each id
        self._reserved = special.reserved(np.arange(len(tokenizer)))
        if special.unk != ABSENT:
            self._known[self._reserved] = special.unk
        rust = _rust(tokenizer.backend_tokenizer.to_str())
        self._documents = rust if native is None else _mixed(native, rust)

    def __call__(self, texts: list[str]) -> Encoded:
        documents = [self._checked(ids, text) for ids, text in zip(self._documents(texts), texts, strict=True)]
        marks = len(self._begin) + len(self._end)
        lengths = np.array([len(ids) + marks if len(ids) else 0 for ids in documents], np.int64)
        parts = [part for ids in documents if len(ids) for part in (self._begin, self._known[ids], self._end)]
        sizes = np.array([len(text.encode("utf-8", "surrogatepass")) for text in texts], np.int64)
        ids = np.concatenate([self._end[:0], *parts])
        return Encoded(ids, lengths, sizes, int(np.count_nonzero(ids == self._unk)) if self._unk != ABSENT else 0)

    def _checked(self, ids: npt.NDArray[np.int32], text: str) -> npt.NDArray[np.int32]:
        if self._unk == ABSENT and self._reserved[ids].any():
            raise UserError(
                f"the text {text[:200]!r} makes one of the tokenizer's special tokens, and it has none for what is "
                "unknown: take that out of the text, or add an unk_token to its tokenizer_config.json"
            )
        return ids


Documents = Callable[[list[str]], list[npt.NDArray[np.int32]]]  # texts to the ids of each


def _rust(tokenizer: str) -> Documents:
    from tokenizers import Tokenizer

    rust = Tokenizer.from_str(tokenizer)
    rust.encode_special_tokens = True
    rust.no_truncation()
    rust.no_padding()
    return lambda texts: [
        np.array(one.ids, np.int32) for one in rust.encode_batch_fast(texts, add_special_tokens=False)
    ]


def _mixed(native: Native, rust: Documents) -> Documents:
    """Native SentencePiece for the parts of texts that it is sure of, `rust` for the others."""
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor(model_proto=native.model)

    def of_parts(parts: list[str]) -> Iterator[npt.NDArray[np.int32]]:
        sure = [native.fits(part) for part in parts]
        ours = iter(rust(list(compress(parts, map(not_, sure)))))
        theirs = iter(
            processor.encode(list(compress(parts, sure)), out_type="numpy", num_threads=1) if any(sure) else []
        )
        return (next(theirs if fits else ours) for fits in sure)

    def documents(texts: list[str]) -> list[npt.NDArray[np.int32]]:
        parts = [native.parts(text) for text in texts]
        found = of_parts(list(chain.from_iterable(parts)))
        probe = " ".join(parts[0][:4])
        again = native.parts(probe)
        if any(map(native.fits, again)) and not np.array_equal(np.concatenate([*of_parts(again)]), rust([probe])[0]):
            raise UserError(
                f"native SentencePiece makes other ids than its Hugging Face form of {probe[:300]!r}; bring the "
                f"tokenizer as a directory with a tokenizer.json"
            )
        return [np.concatenate([*islice(found, len(of_text))]) for of_text in parts]

    return documents


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
