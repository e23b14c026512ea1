"""Trains tokenizers on the user's text: WordPiece as BERT has it, SentencePiece unigram and BPE.

The same text and options give the same files, on any number of cores.
"""

from __future__ import annotations

import re
import string
import sys
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from ctcd_ds.cli import UserError
from ctcd_ds.corpus.tokenizer import SPECIAL_TOKENS, save_tokenizer, unknown_pieces, wordpiece_tokenizer
from ctcd_ds.manifest import built

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TYPES = ("wordpiece", "unigram", "bpe")
ALPHABET = 1000  # single characters that a WordPiece vocabulary holds of an alphabet, as in BERT's own training
COVERAGE = 0.9999  # of all characters; a script of thousands has more than ALPHABET for it, where there is room
MINIMUM = 2  # a WordPiece that the text holds only once is not worth an embedding
SAMPLE = 5000  # lines on which a tokenizer is tried: compared with native SentencePiece, its unknown pieces counted

Texts = Callable[[str], Iterator[str]]  # called with a caption for its progress bar; each call reads from the start


def train_tokenizer(kind: str, texts: Texts, vocab_size: int, lowercase: bool, output_dir: Path) -> None:
    """Trains a tokenizer of `kind` (wordpiece, unigram, bpe) and saves it into `output_dir`, which must be new.

    Raises UserError where the text cannot give a vocabulary of `vocab_size`; then nothing is written.
    """
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise UserError(f"--output_dir {output_dir} exists already; name a new one")
    if vocab_size <= len(SPECIAL_TOKENS):
        raise UserError(f"--vocab_size {vocab_size}: the special tokens alone are {len(SPECIAL_TOKENS)}")
    sample: list[str] = []
    texts = _sampling(texts, sample)
    if kind == "wordpiece":
        tokenizer, model = _train_wordpiece(texts, vocab_size, lowercase), None
    else:
        tokenizer, model = _train_sentencepiece(kind, texts, vocab_size, lowercase, sample)
    with built(output_dir) as folder:
        save_tokenizer(tokenizer, folder)
        if model is not None:
            (folder / "spiece.model").write_bytes(model)
    _say_unknown(tokenizer, sample)


def _sampling(texts: Texts, sample: list[str]) -> Texts:
    """The same texts, whose first lines are left in `sample`."""

    def passed(caption: str) -> Iterator[str]:
        for text in texts(caption):
            if len(sample) < SAMPLE:
                sample.extend(line for line in _sentences(text) if line.strip())
            yield text

    return passed


def _say_unknown(tokenizer: PreTrainedTokenizerBase, sample: list[str]) -> None:
    encodings = tokenizer.backend_tokenizer.encode_batch_fast(sample, add_special_tokens=False)
    total = sum(len(encoding.ids) for encoding in encodings)
    unknown = sum(encoding.ids.count(tokenizer.unk_token_id) for encoding in encodings)
    most = ", ".join(f"{piece!r} ({count:,})" for piece, count in unknown_pieces(tokenizer, sample))
    print(
        f"unknown tokens in the first {len(sample):,} lines: {unknown / max(1, total):.3%}"
        f"{f'; most often {most}' if most else ''}",
        flush=True,
    )


# ---- WordPiece


def _train_wordpiece(texts: Texts, vocab_size: int, lowercase: bool) -> PreTrainedTokenizerBase:
    """The library's trainer, given its alphabet.

    Left alone it numbers the "##x" in the order of a hash map, and ties between merges go by these numbers: every
    run gave other ids, at times other tokens. With all single characters named before, nothing is left to chance.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    characters, continuing = _alphabet(normalizer.normalize_str, texts("counting characters"), vocab_size)
    named = [*SPECIAL_TOKENS, *characters, *(f"##{c}" for c in continuing)]
    if len(named) > vocab_size:
        raise UserError(f"--vocab_size {vocab_size} is too small for this text: its characters alone need {len(named)}")
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = normalizer, pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=MINIMUM,
        special_tokens=named,
        limit_alphabet=0,
        show_progress=sys.stderr.isatty(),
    )
    backend.train_from_iterator(texts("counting words"), trainer)
    tokens = backend.get_vocab()
    if len(tokens) < vocab_size:
        raise TooLarge(vocab_size, len(tokens))
    return wordpiece_tokenizer(sorted(tokens, key=lambda token: tokens[token]), lowercase)


def _alphabet(normalize: Callable[[str], str], texts: Iterator[str], vocab_size: int) -> tuple[list[str], list[str]]:
    """The most frequent characters of the normalised text, and those of them that also stand inside words.

    ALPHABET of them, and more for COVERAGE as long as `vocab_size` tokens have room (with each one's "##").
    """
    counts: Counter[str] = Counter()
    neighbours: set[tuple[str, str]] = set()
    for text in texts:
        normal = normalize(text)
        counts.update(normal)
        neighbours.update(pairwise(normal))
    if not counts:
        raise UserError("--input holds no text")
    frequent = sorted((c for c in counts if not c.isspace()), key=lambda c: (-counts[c], c))
    inside = {c for before, c in neighbours if _in_word(before) and _in_word(c)}
    wanted = COVERAGE * sum(counts[c] for c in frequent)
    covered, room, number = 0, vocab_size - len(SPECIAL_TOKENS), 0
    for number, character in enumerate(frequent):
        room -= 1 + (character in inside)
        if number >= ALPHABET and (room < 0 or covered >= wanted):
            break
        covered += counts[character]
    else:
        number = len(frequent)
    characters = sorted(frequent[:number])
    return characters, [c for c in characters if c in inside]


def _in_word(character: str) -> bool:
    """BERT cuts at white space and keeps every punctuation mark by itself."""
    return not (
        character.isspace() or character in string.punctuation or unicodedata.category(character).startswith("P")
    )


class TooLarge(UserError):
    """A vocabulary size that the text cannot give; `possible` is the largest that it can."""

    def __init__(self, vocab_size: int, possible: int) -> None:
        super().__init__(
            f"--vocab_size {vocab_size} is too large for this text, which gives at most {possible} tokens; "
            f"ask for {possible} or less, or give more text"
        )
        self.possible = possible


# ---- SentencePiece


def _train_sentencepiece(
    kind: str, texts: Texts, vocab_size: int, lowercase: bool, sample: list[str]
) -> tuple[PreTrainedTokenizerBase, bytes]:
    """SentencePiece's own trainer; its model as a Hugging Face tokenizer, and the model itself."""
    import io

    import sentencepiece

    from ctcd_ds.corpus.sentencepiece_model import import_sentencepiece

    pad, unk, cls, sep, mask = SPECIAL_TOKENS
    written = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(line for text in texts("reading") for line in _sentences(text)),
            model_writer=written,
            model_type=kind,
            vocab_size=vocab_size,
            normalization_rule_name="nmt_nfkc_cf" if lowercase else "nmt_nfkc",
            pad_id=0,
            unk_id=1,
            bos_id=2,
            eos_id=3,
            pad_piece=pad,
            unk_piece=unk,
            bos_piece=cls,
            eos_piece=sep,
            control_symbols=[mask],
            num_threads=16,  # sums of floats depend on it: a constant, not the number of cores
            minloglevel=0 if sys.stderr.isatty() else 1,  # its log is the only sign of progress it gives
        )
    except RuntimeError as problem:
        raise _explained(str(problem), vocab_size, bool(sample)) from None
    model = _with_exact_sums(written.getvalue()) if kind == "unigram" else written.getvalue()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "spiece.model"
        path.write_bytes(model)
        tokenizer = import_sentencepiece(path, sample)
    if len(tokenizer) != vocab_size:
        raise TooLarge(vocab_size, len(tokenizer))
    return tokenizer, model


def _sentences(text: str) -> Iterator[str]:
    """The lines of a document, cut at spaces to at most 1,000 characters (SentencePiece skips what is longer)."""
    for line in text.split("\n"):
        if len(line) <= 1000:
            yield line
        else:
            yield from re.findall(r"\S.{0,999}(?=\s|$)|\S{1,1000}", line)


def _with_exact_sums(model: bytes) -> bytes:
    """Scores rounded to 1/256, so that float32 adds them without error.

    Segmentations of equal score ("33"+"3", "3"+"33") are then equal for every implementation, and all of them
    break the tie in the same way; unrounded, the rounding of sums decides, in each one differently.
    """
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(model)
    for piece in proto.pieces:
        piece.score = round(piece.score * 256) / 256
    return bytes(proto.SerializeToString())


def _explained(problem: str, vocab_size: int, any_text: bool) -> Exception:
    """The trainer's complaint in the words of our options; what is not a user's mistake stays what it is."""
    if not any_text or "all_chars_count" in problem:  # none, or none but what the normaliser drops
        return UserError("--input holds no text")
    if found := re.search(r"too high \(\d+\)\. Please set it to a value <= (\d+)", problem):
        return TooLarge(vocab_size, int(found[1]))
    if found := re.search(r"smaller than required_chars\. \d+ vs (\d+)", problem):
        return UserError(f"--vocab_size {vocab_size} is too small for this text: its characters alone need {found[1]}")
    return RuntimeError(f"SentencePiece's trainer failed: {problem}")
