"""A SentencePiece .model as a Hugging Face tokenizer, compared with native SentencePiece on real text.

The converters that come with transformers each serve one model family and were seen to disagree with SentencePiece
without a word: of 5,000 sentences AlbertTokenizer agreed on 4,959, LlamaTokenizer with a case-folding BPE model on 1,
PreTrainedTokenizerFast on a .model on none (transformers 5). This one follows SentencePiece itself: its
normaliser, its handling of spaces, its pieces and scores, and then proves it on the user's text.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ctcd_ds.cli import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

SPACE = "▁"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # SentencePiece's types of pieces
UNIGRAM, BPE = 1, 2
NEVER = -1e6  # the score of a piece that text must never become: native keeps those out of its trie

# By which names a model may already have the special tokens; what it lacks is appended behind its own pieces.
NAMES = {
    "pad": ("[PAD]", "<pad>"),
    "unk": ("[UNK]", "<unk>"),
    "cls": ("[CLS]", "<cls>", "<s>"),
    "sep": ("[SEP]", "<sep>", "</s>"),
    "mask": ("[MASK]", "<mask>"),
}


def import_sentencepiece(path: Path, sample: list[str]) -> PreTrainedTokenizerBase:
    """The tokenizer of a SentencePiece unigram or BPE .model, its pieces with their native ids.

    Raises UserError where the file is no such model, and where a line of `sample` becomes other pieces than
    native SentencePiece makes of it.
    """
    model = _parse(path)
    try:
        backend = _backend(model, path)
    except UserError:
        raise
    except Exception as problem:  # what `tokenizers` finds in a damaged table has no type of its own
        raise UserError(f"{path} is damaged: {problem}") from None
    _compare(path, model, backend, sample)
    return _with_special_tokens(backend, model)


def _parse(path: Path) -> Any:
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
    except Exception as problem:
        raise UserError(f"{path} is not a SentencePiece model: {problem}") from None
    if not model.pieces:
        raise UserError(f"{path} is not a SentencePiece model: it holds no pieces")
    if model.trainer_spec.model_type not in (UNIGRAM, BPE):
        raise UserError(f"{path} is neither a unigram nor a BPE model; only these two can be used")
    if model.trainer_spec.treat_whitespace_as_suffix:
        raise UserError(f"{path} marks the ends of words (treat_whitespace_as_suffix), which cannot be used")
    return model


def _backend(model: Any, path: Path) -> Tokenizer:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers

    spec = model.normalizer_spec
    steps: list[Any] = [normalizers.Precompiled(spec.precompiled_charsmap)] if spec.precompiled_charsmap else []
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    steps.append(normalizers.Replace(" ", SPACE))
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))

    backend = Tokenizer(_unigram(model) if model.trainer_spec.model_type == UNIGRAM else _bpe(model))
    backend.normalizer = normalizers.Sequence(steps)
    # Where no piece crosses a word's beginning, words can be handled one by one (and their results cached).
    split = not any(SPACE in piece.piece[1:] for piece in model.pieces)
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=split)
    scheme = "always" if spec.add_dummy_prefix else "never"
    text = decoders.Metaspace(prepend_scheme=scheme)
    fallback = [decoders.ByteFallback(), decoders.Fuse()] if model.trainer_spec.byte_fallback else []
    backend.decoder = decoders.Sequence([*fallback, text]) if fallback else text
    backend.add_tokens([AddedToken(p.piece, normalized=False) for p in model.pieces if p.type == USER_DEFINED])
    return backend


def _unknown(model: Any) -> int:
    return next(number for number, piece in enumerate(model.pieces) if piece.type == UNKNOWN)


def _unigram(model: Any) -> Any:
    from tokenizers import models

    scores = [(p.piece, p.score if p.type in (NORMAL, USER_DEFINED) else NEVER) for p in model.pieces]
    return models.Unigram(scores, unk_id=_unknown(model), byte_fallback=model.trainer_spec.byte_fallback)


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
    )


def _compare(path: Path, model: Any, backend: Tokenizer, sample: list[str]) -> None:
    """Raises UserError at the first line of `sample` that the two tokenizers cut differently.

    A unigram model can give two segmentations the same score ("33"+"3" and "3"+"33"); native SentencePiece then
    decides by the rounding of its float32 sums, which no other implementation repeats. These are counted aloud.
    """
    import sentencepiece

    if not sample:
        print(f"{path}: not compared with native SentencePiece, as there is no text here to compare it on", flush=True)
        return
    native = sentencepiece.SentencePieceProcessor(model_file=str(path)).encode(sample)
    ours = [encoding.ids for encoding in backend.encode_batch_fast(sample, add_special_tokens=False)]
    ties = 0
    for line, expected, got in zip(sample, native, ours, strict=True):
        if expected == got:
            continue
        if model.trainer_spec.model_type == UNIGRAM and _tie(model, expected, got):
            ties += 1
            continue
        first = next(i for i, pair in enumerate(zip([*expected, -1], [*got, -1], strict=False)) if pair[0] != pair[1])
        around = slice(max(0, first - 2), first + 6)
        pieces = [p.piece for p in model.pieces]
        raise UserError(
            f"{path}: this model cannot be used: its Hugging Face form disagrees with native SentencePiece on your "
            f"text. Line: {line[:300]!r}. SentencePiece: {[pieces[i] for i in expected[around]]}. Hugging Face: "
            f"{[pieces[i] for i in got[around]]}. Train one with `ctcd tokenizer`, or bring a directory"
        )
    if ties:
        print(
            f"{path}: {ties} of {len(sample)} lines hold two segmentations of equal score; SentencePiece took the "
            f"other one there",
            flush=True,
        )


def _tie(model: Any, left: list[int], right: list[int]) -> bool:
    def text_and_score(ids: list[int]) -> tuple[str, float]:
        return "".join(model.pieces[i].piece for i in ids), sum(model.pieces[i].score for i in ids)

    (left_text, left_score), (right_text, right_score) = text_and_score(left), text_and_score(right)
    return left_text == right_text and abs(left_score - right_score) <= 1e-5 * abs(left_score)


def _with_special_tokens(backend: Tokenizer, model: Any) -> PreTrainedTokenizerBase:
    from tokenizers import AddedToken, processors
    from transformers import PreTrainedTokenizerFast

    own = {p.piece for p in model.pieces if p.type in (UNKNOWN, CONTROL, USER_DEFINED)}
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
