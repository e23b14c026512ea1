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
from ctcd_ds.corpus.rows import ABSENT
from ctcd_ds.corpus.tokenizer import SPECIAL_TOKENS, save_tokenizer, special_ids, unknown_pieces, wordpiece_tokenizer
from ctcd_ds.manifest import built

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TYPES = ("wordpiece", "unigram", "bpe", "byte_bpe")
END_OF_TEXT, PAD = "<|endoftext|>", "<|pad|>"  # a byte-level BPE's; GPT-2 has the first only
ALPHABET = 1000  # single characters that a WordPiece vocabulary holds of an alphabet, as in BERT's own training
COVERAGE = 0.9999  # of all characters; a script of thousands has more than ALPHABET for it, where there is room
MINIMUM = 2  # a WordPiece that the text holds only once is not worth an embedding
SAMPLE = 5000  # lines on which a tokenizer is tried: compared with native SentencePiece, its unknown pieces counted

Texts = Callable[[str], Iterator[str]]  # called with a caption for its progress bar; each call reads from the start


def train_tokenizer(
    kind: str,
    texts: Texts,
    vocab_size: int,
    lowercase: bool,
    output_dir: Path,
    byte_fallback: bool = False,
    sentinels: int = 0,
) -> None:
    """Trains a tokenizer of `kind` (one of TYPES) and saves it into `output_dir`, which must be new.

    `byte_fallback`: of the SentencePiece kinds; what no piece is for becomes its bytes, not an unknown token.
    `sentinels`: so many of the `vocab_size` tokens are <extra_id_0>, … and stand for spans of text (span corruption).
    Raises UserError where the text cannot give a vocabulary of `vocab_size`; then nothing is written.
    """
    from tokenizers import AddedToken

    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise UserError(f"--output_dir {output_dir} exists already; name a new one")
    if byte_fallback and kind not in ("unigram", "bpe"):
        raise UserError(f"--byte_fallback true: for the SentencePiece types unigram and bpe; {kind} has no such thing")
    bytes_first = 256 if kind == "byte_bpe" or byte_fallback else 0
    least = bytes_first + (1 if kind == "byte_bpe" else len(SPECIAL_TOKENS)) + sentinels
    if sentinels < 0:
        raise UserError(f"--sentinels {sentinels}: a number of tokens, 0 or more")
    if vocab_size <= least:
        said = f"the special tokens alone are {least}" if not bytes_first else f"bytes and special tokens are {least}"
        raise UserError(f"--vocab_size {vocab_size} is too small: {said}")
    sample: list[str] = []
    texts = _sampling(texts, sample)
    model, vocab_size = None, vocab_size - sentinels
    try:
        if kind == "wordpiece":
            tokenizer = _train_wordpiece(texts, vocab_size, lowercase)
        elif kind == "byte_bpe":
            tokenizer = _train_byte_bpe(texts, vocab_size, lowercase, sample, pad=sentinels > 0)
        else:
            tokenizer, model = _train_sentencepiece(kind, texts, vocab_size, lowercase, sample, byte_fallback)
    except TooLarge as mistake:
        raise TooLarge(vocab_size + sentinels, mistake.possible + sentinels) from None
    names = [f"<extra_id_{number}>" for number in range(sentinels)]
    tokenizer.add_tokens([AddedToken(name, normalized=False, special=True) for name in names], special_tokens=True)
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
    if special_ids(tokenizer).unk == ABSENT:
        return
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


# ---- byte-level BPE


def _train_byte_bpe(
    texts: Texts, vocab_size: int, lowercase: bool, sample: list[str], pad: bool
) -> PreTrainedTokenizerBase:
    """GPT-2's kind: the 256 bytes and the merges that are most frequent; nothing is unknown, one special token.

    `pad`: a second one for padding, with which the decoder of a sequence-to-sequence model begins.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    if lowercase:
        backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=MINIMUM,
        special_tokens=[END_OF_TEXT, PAD] if pad else [END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),  # else their ids would be those of a hash map
        show_progress=sys.stderr.isatty(),
    )
    backend.train_from_iterator(texts("counting words"), trainer)
    if not sample:
        raise UserError("--input holds no text")
    if (possible := backend.get_vocab_size()) < vocab_size:
        raise TooLarge(vocab_size, possible)
    names = dict.fromkeys(("bos_token", "eos_token"), END_OF_TEXT) | ({"pad_token": PAD} if pad else {})
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


# ---- SentencePiece


def _train_sentencepiece(
    kind: str, texts: Texts, vocab_size: int, lowercase: bool, sample: list[str], byte_fallback: bool
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
            byte_fallback=byte_fallback,
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
