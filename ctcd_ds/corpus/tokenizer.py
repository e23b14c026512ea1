"""Tokenizers: bring one (vocab.txt, SentencePiece .model, directory), load it, say who it is, save it.

All are Hugging Face tokenizers on the `tokenizers` library, with [CLS], [SEP], [MASK], [PAD] and [UNK] (by
whatever names), and `AutoTokenizer.from_pretrained` gives the same ids from the directory they are saved in.
"""

from __future__ import annotations

import json
import string
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ctcd_ds.cli import UserError
from ctcd_ds.manifest import canonical_sha256

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CAPITALS = string.ascii_uppercase  # uncased vocabularies do hold some rare capitals of other scripts
ROLES = ("cls", "sep", "mask", "pad", "unk")
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")  # in the order of the ids of a trained tokenizer


def load_tokenizer(directory: Path | str) -> PreTrainedTokenizerBase:
    """The tokenizer in a local directory (or of a hub name), as AutoTokenizer gives it.

    Raises UserError where there is none, where it lacks one of the five special tokens, and where it does not run
    on the `tokenizers` library.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False)
    except Exception as problem:  # transformers raises many kinds for what is one thing: no tokenizer there
        raw = sorted(path for end in ("vocab.txt", "*.model") for path in Path(directory).glob(end))
        reason = f"give the file itself: {raw[0]}" if raw else str(problem).strip().split("\n")[0]
        raise UserError(f"tokenizer {directory} cannot be loaded: {reason}") from None
    return _validated(tokenizer, str(directory))


def _validated(tokenizer: PreTrainedTokenizerBase, name: str) -> PreTrainedTokenizerBase:
    missing = [role for role in ROLES if getattr(tokenizer, f"{role}_token_id") is None]
    if missing:
        raise UserError(
            f"tokenizer {name} has no {' and no '.join(f'{role}_token' for role in missing)}; masked language "
            f"models need {', '.join(f'{role}_token' for role in ROLES)}: train one with `ctcd tokenizer`, "
            f"or add what is missing to its tokenizer_config.json"
        )
    if not tokenizer.is_fast:
        raise UserError(
            f"tokenizer {name} ({type(tokenizer).__name__}) does not run on the `tokenizers` library (no "
            f"tokenizer.json); convert it, or bring its vocab.txt or SentencePiece .model"
        )
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        raise UserError(f"tokenizer {name} knows nothing but its special tokens: its vocabulary file is missing")
    largest = max(tokenizer.get_vocab().values())
    if largest >= len(tokenizer):
        raise UserError(f"tokenizer {name} has {len(tokenizer)} tokens but ids up to {largest}: its ids have holes")
    return tokenizer


def bring_tokenizer(
    source: str, lowercase: bool | None = None, sample: Callable[[], list[str]] = lambda: []
) -> PreTrainedTokenizerBase:
    """A user's tokenizer: a BERT vocab.txt, a SentencePiece .model, a tokenizer directory, or a hub name.

    `lowercase` decides for a vocab.txt (by default: lowercase where it holds no capital letter); the others bring
    their own rule, and a contradiction is an error. `sample()` gives lines of the user's text, on which a .model
    is compared with native SentencePiece.
    """
    path = Path(source)
    if path.is_file() and path.suffix == ".model":
        from ctcd_ds.corpus.sentencepiece_model import import_sentencepiece

        tokenizer = import_sentencepiece(path, sample())
    elif path.is_file() and path.suffix == ".txt":
        tokenizer = _from_vocab(path, lowercase)
    elif path.is_file():
        raise UserError(f"tokenizer {source}: give a vocab.txt, a SentencePiece .model, or the directory it is in")
    elif path.suffix in (".txt", ".model"):
        raise UserError(f"tokenizer {source} does not exist")
    else:
        tokenizer = load_tokenizer(path if path.exists() else source)
    if lowercase is not None and lowercase != lowercases(tokenizer):
        does = "lowercases" if lowercases(tokenizer) else "does not lowercase"
        raise UserError(
            f"--lowercase {str(lowercase).lower()} contradicts the tokenizer {source}, which {does} its text; "
            f"leave the option out, it is for a vocab.txt"
        )
    return tokenizer


def lowercases(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer's normaliser turns capital letters into small ones."""
    normalizer = tokenizer.backend_tokenizer.normalizer
    return normalizer is not None and "a" in normalizer.normalize_str("A")


def wordpiece_tokenizer(vocabulary: list[str], lowercase: bool) -> PreTrainedTokenizerBase:
    """A BERT tokenizer with this vocabulary (token i has id i), by BERT's own rules for text."""
    from transformers import BertTokenizer

    return BertTokenizer(vocab={token: number for number, token in enumerate(vocabulary)}, do_lower_case=lowercase)


def _from_vocab(path: Path, lowercase: bool | None) -> PreTrainedTokenizerBase:
    try:
        tokens = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as problem:
        raise UserError(f"{path} is not UTF-8 (byte offset {problem.start})") from None
    tokens = [token.removesuffix("\r") for token in (tokens[:-1] if tokens[-1] == "" else tokens)]
    if missing := [token for token in SPECIAL_TOKENS if token not in tokens]:
        raise UserError(f"{path} is no BERT vocabulary: it has no {', '.join(missing)} (one token a line)")
    if len(set(tokens)) < len(tokens):
        first: dict[str, int] = {}
        again = next((t, i) for i, t in enumerate(tokens) if first.setdefault(t, i) != i)
        raise UserError(f"{path}: {again[0]!r} stands in line {first[again[0]] + 1} and in line {again[1] + 1}")
    if lowercase is None:  # "[CLS]" and its like are capitals in every vocabulary
        lowercase = not any(capital in token for token in tokens if token[:1] != "[" for capital in CAPITALS)
    return wordpiece_tokenizer(tokens, lowercase)


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Saves the tokenizer so that `AutoTokenizer.from_pretrained(directory)` gives the same ids."""
    tokenizer.save_pretrained(str(directory))


def _rules(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """All that decides which ids a text becomes, as JSON; [CLS] and [SEP] around it are not part of it."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    return {part: backend[part] for part in ("normalizer", "pre_tokenizer", "model", "added_tokens")}


def special_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """The ids of the five special tokens by role: cls, sep, mask, pad, unk."""
    return {role: int(getattr(tokenizer, f"{role}_token_id")) for role in ROLES}


def tokenizer_identity(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The manifest's "tokenizer" object: fingerprint (text → ids), vocabulary (token → id), sizes, special ids."""
    ids = special_ids(tokenizer)
    return {
        "fingerprint": canonical_sha256({"rules": _rules(tokenizer), "special": ids}),
        "vocabulary": canonical_sha256({"tokens": tokenizer.get_vocab(), "special": ids}),
        "vocab_size": len(tokenizer),
        "special": ids,
    }


def continuations(tokenizer: PreTrainedTokenizerBase) -> npt.NDArray[np.bool_]:
    """bool[vocab_size]: True where the id continues a word, for whole-word masking; special tokens are False.

    WordPiece marks continuations ("##ing"); SentencePiece and byte-level BPE mark beginnings ("▁", "Ġ"), so there
    punctuation that follows a word without a space belongs to it. UserError where a vocabulary marks neither.
    """
    model = _rules(tokenizer)["model"]
    prefix = model.get("continuing_subword_prefix") if model.get("type") == "WordPiece" else None
    result = np.zeros(len(tokenizer), dtype=np.bool_)
    for token, number in tokenizer.get_vocab().items():
        result[number] = token.startswith(prefix) if prefix else not token.startswith(("▁", "Ġ"))
    if not prefix and result.all():
        raise UserError("whole-word masking: no token of this tokenizer marks the beginning of a word (▁ or Ġ)")
    result[list(tokenizer.all_special_ids)] = False
    return result
