"""A SentencePiece .model as a Hugging Face tokenizer, compared with native SentencePiece on real text.

The converters that come with transformers each serve one model family and were seen to disagree with SentencePiece
without a word: of 5,000 sentences AlbertTokenizer agreed on 4,959, LlamaTokenizer with a case-folding BPE model on 1,
PreTrainedTokenizerFast on a .model on none (transformers 5). This one follows SentencePiece itself: its normaliser,
its handling of spaces, its pieces of every type and their scores, and then proves it on the user's text.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ctcd_ds.cli import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

SPACE = "▁"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # SentencePiece's types of pieces
UNIGRAM, BPE = 1, 2
DEAD = "\U0010fff0"  # a character that no text holds, so that no piece does
BREAK = "\U000e0fff"  # another one, which ends what Unicode takes for one user-perceived character
PRIVATE = 0x10F000  # from here on one character for each user-defined piece, while the normaliser is at work

# By which names a model may already have the special tokens; what a masked language model lacks of its own five is
# appended behind the pieces.
NAMES = {
    "pad": ("[PAD]", "<pad>"),
    "unk": ("[UNK]", "<unk>"),
    "cls": ("[CLS]", "<cls>", "<s>"),
    "sep": ("[SEP]", "<sep>", "</s>"),
    "mask": ("[MASK]", "<mask>"),
}


@contextmanager
def panics_heard() -> Iterator[None]:
    """What makes the `tokenizers` library panic, a damaged table for one, is an Exception here: a panic is none."""
    try:
        yield
    except (Exception, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as panic:
        raise RuntimeError(str(panic)) from None


def import_sentencepiece(
    path: Path, sample: list[str], lowercase: bool = False, add_special_tokens: bool = True
) -> PreTrainedTokenizerBase:
    """The tokenizer of a SentencePiece unigram or BPE .model, its pieces with their native ids.

    `lowercase`: text is lowered before the model's own normaliser sees it. `add_special_tokens`: what a masked language
    model needs and it lacks is appended; else it stays as it is, and its <s>, where it has one, begins each text.
    Raises UserError where the file is no such model, and where more than one line in a hundred of `sample` becomes
    other pieces than native SentencePiece makes of it; fewer are counted aloud.
    """
    model = read_model(path)
    try:
        with panics_heard():
            backend = _backend(model, lowercase)
    except Exception as problem:  # what `tokenizers` finds in a damaged table has no type of its own
        raise UserError(f"{path} is damaged: {problem}") from None

    pieces = [piece.piece for piece in model.pieces]

    def ours(lines: list[str]) -> list[list[str]]:
        encodings = backend.encode_batch_fast(lines, add_special_tokens=False)
        return [[pieces[number] for number in encoding.ids] for encoding in encodings]

    compare(path, model, ours, [line.lower() for line in sample] if lowercase else sample, "a directory that has it")
    return _for_masked_models(backend, model) if add_special_tokens else _as_it_is(backend, model)


def read_model(path: Path) -> Any:
    """The ModelProto of a file. Raises UserError where it is none, or of a kind that cannot be used."""
    from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    try:
        model.ParseFromString(content := path.read_bytes())
        SentencePieceProcessor(model_proto=content)  # looks into the normaliser's table too
    except Exception as problem:
        raise UserError(f"{path} is not a SentencePiece model: {problem}") from None
    if not model.pieces:
        raise UserError(f"{path} is not a SentencePiece model: it holds no pieces")
    if model.trainer_spec.model_type not in (UNIGRAM, BPE):
        raise UserError(f"{path} is neither a unigram nor a BPE model; only these two can be used")
    if model.trainer_spec.treat_whitespace_as_suffix:
        raise UserError(f"{path} marks the ends of words (treat_whitespace_as_suffix), which cannot be used")
    return model


# ---- the tokenizer


def _backend(model: Any, lowercase: bool) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers

    steps = _normalizers(model)
    # Words are handled one by one where they can be, and their results cached.
    cuts: list[Any] = [pre_tokenizers.Metaspace(prepend_scheme="never", split=_words_apart(model))]
    if model.trainer_spec.model_type == UNIGRAM:
        backend = Tokenizer(_unigram(model))
        breaks = list(_never_whole(model))
        if model.trainer_spec.byte_fallback:
            cuts = [
                _isolated(f"{_before(name, at)}{re.escape(name[at])}{_behind(name, at)}") for name, at in breaks
            ] + cuts
        else:  # an unknown character for another: the ids stay, and so does what is unknown beside it
            steps += [normalizers.Replace(name, name[:at] + DEAD + name[at + 1 :]) for name, at in breaks]
    else:
        backend = Tokenizer(_bpe(model))
        cuts = [*_frozen(model), *cuts, *_never_words(model)]
    if lowercase:
        steps.insert(0, normalizers.Lowercase())
    backend.normalizer = normalizers.Sequence(steps)
    backend.pre_tokenizer = pre_tokenizers.Sequence(cuts) if len(cuts) > 1 else cuts[0]
    scheme = "always" if model.normalizer_spec.add_dummy_prefix else "never"
    text = decoders.Metaspace(prepend_scheme=scheme)
    fallback = [decoders.ByteFallback(), decoders.Fuse()] if model.trainer_spec.byte_fallback else []
    backend.decoder = decoders.Sequence([*fallback, text]) if fallback else text
    return backend


def _pieces(model: Any, *types: int) -> list[str]:
    return [piece.piece for piece in model.pieces if piece.type in types]


def _words_apart(model: Any) -> bool:
    """Whether no piece crosses a word's beginning."""
    return not any(SPACE in piece.piece[1:] or " " in piece.piece for piece in model.pieces)


def _unknown(model: Any) -> int:
    return next(number for number, piece in enumerate(model.pieces) if piece.type == UNKNOWN)


def _normalizers(model: Any) -> list[Any]:
    """SentencePiece's normaliser: its table, then spaces. User-defined pieces go through it untouched."""
    from tokenizers import Regex, normalizers

    spec = model.normalizer_spec
    steps: list[Any] = []
    if spec.precompiled_charsmap:
        table = _table(spec.precompiled_charsmap)
        kept = [piece for piece in _pieces(model, USER_DEFINED) if table.normalize_str(piece) != piece]
        hidden = [(piece, chr(PRIVATE + n)) for n, piece in enumerate(sorted(kept, key=len, reverse=True))]
        steps += [normalizers.Replace(piece, character) for piece, character in hidden]
        steps.append(table)
        steps += [normalizers.Replace(character, piece) for piece, character in hidden]
    # Spaces alone: a line's end or a tabulator is one only where the table says so. A run is looked at from its first
    # space only: from each of them, one of 40,000 took four seconds.
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(pattern), new) for pattern, new in ((" {2,}", " "), (r"\A | \z", ""))]
    steps.append(normalizers.Replace(" ", SPACE))
    if spec.remove_extra_whitespaces:
        steps.append(normalizers.Replace(Regex(f"(?<!{SPACE}){SPACE}+\\z"), ""))
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    return steps


def _table(charsmap: bytes) -> Any:
    """The table of a normaliser, applied as SentencePiece does.

    `Precompiled` looks a letter and the marks on it up as one, finds the letter alone ("E" of "É" in two characters),
    and loses the marks. So letters and marks are composed where the table would, and set apart where not. What the
    table makes of two (a half-width letter and its mark of sound, single Jamo) is composed as it would too.
    """
    from tokenizers import Regex, normalizers

    table = normalizers.Precompiled(charsmap)
    composed = [normalizers.NFC()] if table.normalize_str("e\u0301") == "é" else []
    apart = normalizers.Replace(Regex(r"(?<=.)(?=\p{M}|\u200c|\u200d)|(?<=\r)(?=\n)"), BREAK)
    return normalizers.Sequence([*composed, apart, table, *composed, normalizers.Replace(BREAK, "")])


def _unigram(model: Any) -> Any:
    """User-defined pieces have the score that native gives them, whatever the file says: more, the longer they are."""
    from tokenizers import models

    normal = [piece.score for piece in model.pieces if piece.type == NORMAL]
    worst = min(normal, default=0.0)
    never_whole = dict(_never_whole(model))

    def score(piece: Any) -> float:
        if piece.type == NORMAL:
            return float(piece.score)
        if piece.type == USER_DEFINED:
            return 0.1 * len(piece.piece.encode()) - 0.1
        # What text must never become: worse than its characters one by one, and no worse than needed, because an
        # unknown character costs 10 more than the worst of all scores.
        return worst if piece.piece in never_whole else len(piece.piece) * worst - 1.0

    scores = [(piece.piece, score(piece)) for piece in model.pieces]
    return models.Unigram(scores, unk_id=_unknown(model), byte_fallback=model.trainer_spec.byte_fallback)


def _never_whole(model: Any) -> Iterable[tuple[str, int]]:
    """Names that text must never become, each with the place of a character that is unknown wherever the name stands.

    Such a character costs more than the name does. (Where a name has none, the name's own score is enough.)
    """
    usable = _pieces(model, NORMAL, USER_DEFINED)
    alphabet = set(itertools.chain.from_iterable(usable))
    single = {piece for piece in usable if len(piece) == 1}
    for name in _pieces(model, UNKNOWN, CONTROL, UNUSED, BYTE):
        for place, character in enumerate(name):
            if character in single:
                continue
            if character not in alphabet or not any(_covers(p, name, place) for p in usable if character in p):
                yield name, place
                break


def _covers(piece: str, name: str, place: int) -> bool:
    """Whether `piece` can stand over the character at `place` of a text that holds `name`."""
    for inside in (n for n, character in enumerate(piece) if character == name[place]):
        start = place - inside  # of the piece, in the name
        first, last = max(0, start), min(len(name), start + len(piece))
        if piece[first - start : last - start] == name[first:last]:
            return True
    return False


def _before(name: str, place: int) -> str:
    return f"(?<={re.escape(name[:place])})" if place else ""


def _behind(name: str, place: int) -> str:
    return f"(?={re.escape(name[place + 1 :])})" if name[place + 1 :] else ""


def _isolated(pattern: str) -> Any:
    from tokenizers import Regex, pre_tokenizers

    return pre_tokenizers.Split(Regex(pattern), "isolated")


def _bpe(model: Any) -> Any:
    """SentencePiece merges any two neighbours whose union is a piece, the best-scored first: as a list of merges."""
    from tokenizers import models

    ids = {piece.piece: number for number, piece in enumerate(model.pieces)}
    scores = {piece.piece: piece.score for piece in model.pieces if piece.type == NORMAL}
    merges = [
        (-score, ids[piece[:cut]], ids[piece[cut:]])
        for piece, score in scores.items()
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    ]
    pieces = [piece.piece for piece in model.pieces]
    return models.BPE(
        vocab=ids,
        merges=[(pieces[left], pieces[right]) for _, left, right in sorted(merges)],
        unk_token=pieces[_unknown(model)],
        fuse_unk=True,
        byte_fallback=model.trainer_spec.byte_fallback,
        ignore_merges=any(len(piece) > 1 for piece in _pieces(model, USER_DEFINED)),
    )


def _frozen(model: Any) -> list[Any]:
    """The cuts around user-defined pieces, which nothing merges into or out of.

    No merges lead to them: they are words that the vocabulary is asked for first (`ignore_merges`).
    """
    user_defined = _pieces(model, USER_DEFINED)
    return [_isolated(_any_of(user_defined))] if user_defined else []


def _never_words(model: Any) -> list[Any]:
    """Cuts what stands in the vocabulary and is not what its text becomes, "<s>" or "<0x0A>", behind its first piece.

    It would else be taken from there where it is a whole word.
    """
    if not _pieces(model, USER_DEFINED):
        return []
    pieces = [piece.piece for piece in model.pieces]
    wrong = [
        (piece, found[0])
        for piece, found in zip(pieces, _native(model, normalizer=False)(pieces), strict=True)
        if len(found) > 1 and piece.startswith(found[0])
    ]
    ends = (f"{re.escape(first)}(?={re.escape(piece[len(first) :])}\\z)" for piece, first in wrong)
    return [_isolated(f"\\A(?:{'|'.join(ends)})")] if wrong else []


def _any_of(words: Iterable[str]) -> str:
    """A pattern for the longest of `words` that begins at a place; it looks at each of their beginnings once."""
    tails: dict[str, list[str]] = {}
    for word in words:
        tails.setdefault(word[0], []).append(word[1:])
    parts = []
    for first, rests in sorted(tails.items()):
        longer = [rest for rest in rests if rest]
        tail = f"(?:{_any_of(longer)})" if longer else ""
        parts.append(re.escape(first) + tail + ("?" if longer and len(longer) < len(rests) else ""))
    return "|".join(parts)


def _as_it_is(backend: Tokenizer, model: Any) -> PreTrainedTokenizerBase:
    """With the special tokens that the model itself names: what begins and ends a text, what is unknown, padding."""
    from tokenizers import AddedToken, processors
    from transformers import PreTrainedTokenizerFast

    spec, own = model.trainer_spec, set(_pieces(model, CONTROL))
    names = {"bos": spec.bos_piece, "eos": spec.eos_piece, "pad": spec.pad_piece}
    names = {role: name for role, name in names.items() if name in own}
    names["unk"] = model.pieces[_unknown(model)].piece
    backend.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in names.values()])
    if bos := names.get("bos"):
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos}:0 $A:0",
            pair=f"{bos}:0 $A:0 {bos}:1 $B:1",
            special_tokens=[(bos, backend.token_to_id(bos))],
        )
    return PreTrainedTokenizerFast(tokenizer_object=backend, **{f"{role}_token": name for role, name in names.items()})


def _for_masked_models(backend: Tokenizer, model: Any) -> PreTrainedTokenizerBase:
    from tokenizers import AddedToken, processors
    from transformers import PreTrainedTokenizerFast

    own = set(_pieces(model, UNKNOWN, CONTROL, USER_DEFINED))
    names = {role: next((n for n in known if n in own), known[0]) for role, known in NAMES.items()}
    names["unk"] = model.pieces[_unknown(model)].piece
    # A masked word loses its space with it, as a word's own first piece holds it.
    backend.add_special_tokens(
        [AddedToken(name, lstrip=role == "mask", normalized=False, special=True) for role, name in names.items()]
    )
    cls, sep = names["cls"], names["sep"]
    backend.post_processor = processors.TemplateProcessing(
        single=f"{cls}:0 $A:0 {sep}:0",
        pair=f"{cls}:0 $A:0 {sep}:0 $B:1 {sep}:1",
        special_tokens=[(name, backend.token_to_id(name)) for name in (cls, sep)],
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, **{f"{role}_token": name for role, name in names.items()})


# ---- native SentencePiece beside it


def _native(model: Any, normalizer: bool = True) -> Callable[[list[str]], list[list[str]]]:
    """SentencePiece's own pieces of texts, whatever is unknown as the model's unknown piece."""
    from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

    copy = sentencepiece_model_pb2.ModelProto()
    copy.CopyFrom(model)
    if not normalizer:
        copy.normalizer_spec.precompiled_charsmap = b""
        copy.normalizer_spec.add_dummy_prefix = False
        copy.normalizer_spec.remove_extra_whitespaces = False
    processor = SentencePieceProcessor(model_proto=copy.SerializeToString())
    pieces = [piece.piece for piece in model.pieces]
    return lambda texts: [[pieces[number] for number in numbers] for numbers in processor.encode(texts)]


def compare(
    path: Path,
    model: Any,
    ours: Callable[[list[str]], list[list[str]]],
    sample: list[str],
    instead: str,
    lenient: bool = False,
) -> None:
    """Compares the pieces that `ours` makes of the lines of `sample` with native SentencePiece's.

    A unigram model can give two segmentations the same score ("33"+"3" and "3"+"33"); native SentencePiece then
    decides by the rounding of its float32 sums, which no other implementation repeats. These are counted aloud, and so
    are other differences up to one line in a hundred; with more, UserError says what to bring `instead` (not if
    `lenient`).
    """
    if not sample:
        print(f"{path}: not compared with native SentencePiece, as there is no text here to compare it on", flush=True)
        return
    scores = {piece.piece: piece.score for piece in model.pieces}
    ties, others = 0, []
    for line, expected, got in zip(sample, _native(model)(sample), ours(sample), strict=True):
        if expected == got:
            continue
        if model.trainer_spec.model_type == UNIGRAM and _tie(scores, expected, got):
            ties += 1
        else:
            others.append(_difference(line, expected, got))
    if len(others) * 100 > len(sample) and not lenient:
        raise UserError(
            f"{path}: this model cannot be used: its Hugging Face form disagrees with native SentencePiece on "
            f"{len(others)} of {len(sample)} lines of your text. {others[0]}. Train one with `ctcd tokenizer`, "
            f"or bring {instead}"
        )
    if ties or others:
        print(
            f"{path}: of {len(sample)} lines, {ties} hold two segmentations of equal score, of which SentencePiece "
            f"took the other one, and {len(others)} others are cut in another way{': ' if others else ''}"
            f"{'; '.join(others[:1])}. A corpus has the ids of the tokenizer that is saved with it",
            flush=True,
        )


def _difference(line: str, expected: Sequence[str], got: Sequence[str]) -> str:
    first = next(i for i, pair in enumerate(zip([*expected, ""], [*got, ""], strict=False)) if pair[0] != pair[1])
    around = slice(max(0, first - 2), first + 6)
    return f"Line: {line[:300]!r}. SentencePiece: {expected[around]}. Hugging Face: {got[around]}"


def _tie(scores: Mapping[str, float], left: list[str], right: list[str]) -> bool:
    if "".join(left) != "".join(right) or not all(piece in scores for piece in right):
        return False
    left_score, right_score = (sum(scores[piece] for piece in pieces) for pieces in (left, right))
    return abs(left_score - right_score) <= 1e-5 * abs(left_score)


_CUT = re.compile(r"(?s)(.{400,}?\w) (?=\w)")  # takes the space out, which the prefix of the next part puts back


@dataclass(frozen=True)
class Native:
    """Native SentencePiece for the texts of which it is known to make the same ids as the tokenizer, only faster."""

    model: bytes
    odd: re.Pattern[str]  # what the texts must not hold
    longest: float  # characters: beyond, float32 sums of scores are not exact
    words_apart: bool  # the ids of two words are those of both together

    def parts(self, text: str) -> list[str]:
        """The text cut between words, so that what is odd or long in one part costs the others nothing."""
        return [part for part in _CUT.split(text) if part] if self.words_apart and text else [text]

    def fits(self, text: str) -> bool:
        return len(text) <= self.longest and self.odd.search(text) is None


def native_beside(path: Path, tokenizer: PreTrainedTokenizerBase) -> Native | None:
    """What native SentencePiece may be trusted with; None for models whose scores are not exact in float32.

    Left out are texts with names of special, user-defined or byte pieces, and with characters that are no single
    letters, digits, or marks of punctuation that both normalisers make the same of.
    """
    model = read_model(path)
    longest = float("inf")
    if model.trainer_spec.model_type == UNIGRAM:
        scores = [piece.score for piece in model.pieces if piece.type == NORMAL]
        if any(score * 256 != round(score * 256) for score in scores):
            return None
        longest = 2**16 / (10 - min(scores, default=0.0))
    names = "|".join(re.escape(p.piece) for p in model.pieces if p.type != NORMAL and p.type != BYTE)
    odd = re.compile(f"{names}|<0x|[^{_safe(model, tokenizer)}]")
    return Native(path.read_bytes(), odd, longest, model.normalizer_spec.add_dummy_prefix and _words_apart(model))


def _safe(model: Any, tokenizer: PreTrainedTokenizerBase) -> str:
    """Character ranges, as a regular expression's class has them, that both normalisers treat alike by themselves."""
    import unicodedata

    from sentencepiece import SentencePieceProcessor

    kinds = ("Lu", "Ll", "Lo", "Nd", "No", "Pd", "Ps", "Pe", "Pi", "Pf", "Po", "Sm", "Sc", "Sk", "So")
    candidates = [
        chr(n)
        for n in range(0x20, 0x10000)
        if n < 0x7F or (unicodedata.category(chr(n)) in kinds and not 0x1100 <= n < 0x1200)  # Jamo join
    ]
    native = SentencePieceProcessor(model_proto=model.SerializeToString())
    rust = tokenizer.backend_tokenizer.normalizer.normalize_str
    texts = [f"a{character}b" for character in candidates]
    alike = [
        c for c, text, theirs in zip(candidates, texts, native.normalize(texts), strict=True) if rust(text) == theirs
    ]
    alike = [c for c in alike if c not in "\uff9e\uff9f"]  # half-width marks of sound join too
    ranges = []
    for _, group in itertools.groupby(enumerate(map(ord, ["\n", *alike])), lambda pair: pair[1] - pair[0]):
        numbers = [number for _, number in group]
        ranges.append(f"{re.escape(chr(numbers[0]))}-{re.escape(chr(numbers[-1]))}")
    return "".join(ranges)
