"""Tokenizers: bring one (vocab.txt, SentencePiece .model, directory), load it, say who it is, save it.

All are Hugging Face tokenizers on the `tokenizers` library, and `AutoTokenizer.from_pretrained` gives the same ids from
the directory they are saved in. A corpus needs of them only what ends a document; which other special tokens there must
be is for the task to say.
"""

from __future__ import annotations

import itertools
import json
import re
import string
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import numpy.typing as npt

from ctcd_ds.cli import UserError
from ctcd_ds.corpus.rows import ABSENT, BERT_LAYOUT, MASKED_LM, Role, SpecialIds
from ctcd_ds.corpus.sentencepiece_model import panics_heard
from ctcd_ds.hub import settle_hub
from ctcd_ds.kinds import missing
from ctcd_ds.manifest import canonical_sha256

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CAPITALS = string.ascii_uppercase  # uncased vocabularies do hold some rare capitals of other scripts
SENTINEL = re.compile(r"<extra_id_(\d+)>")  # as T5 and its like name them
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")  # in the order of the ids of a trained tokenizer


def load_tokenizer(directory: Path | str) -> PreTrainedTokenizerBase:
    """The tokenizer in a local directory (or of a hub name), as AutoTokenizer gives it.

    Raises UserError where there is none, where it has no token that could end a document, and where it does not run
    on the `tokenizers` library.
    """
    from transformers import AutoTokenizer

    try:
        with panics_heard():
            tokenizer = AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False)
    except Exception as problem:  # transformers raises many kinds for what is one thing: no tokenizer there
        raise UserError(f"tokenizer {directory} cannot be loaded: {_reason(Path(directory), problem)}") from None
    return validated(tokenizer, str(directory))


def _reason(directory: Path, problem: Exception) -> str:
    if directory.is_absolute() and not directory.exists():
        return missing(directory)
    if raw := sorted(path for end in ("vocab.txt", "*.model") for path in directory.glob(end)):
        return f"give the file itself: {raw[0]}"
    if directory.is_dir() and not (directory / "tokenizer.json").exists():
        return "it is a directory that holds no tokenizer: no tokenizer.json, vocab.txt or .model"
    return str(problem).strip().split("\n")[0]


def validated(tokenizer: PreTrainedTokenizerBase, name: str) -> PreTrainedTokenizerBase:
    """The tokenizer, if it can serve; raises UserError, with its `name`, where not."""
    ids = _ids(tokenizer)
    if "sep" not in ids and "eos" not in ids:
        raise UserError(
            f"tokenizer {name} has no sep_token and no eos_token, so nothing could end a document: train one with "
            f"`ctcd tokenizer`, or name one of its tokens as eos_token in its tokenizer_config.json"
        )
    for role, other in itertools.combinations(MASKED_LM, 2) if "mask" in ids else ():
        same = role in ids and ids[role] == ids.get(other)
        if same and (role, other) != ("cls", "sep"):  # these two frame a row, and may look alike
            raise UserError(
                f"tokenizer {name}: its {role}_token and its {other}_token are one token "
                f"({getattr(tokenizer, f'{role}_token')!r}); each must be a token of its own: give them in its "
                f"tokenizer_config.json"
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
    source: str,
    lowercase: bool | None = None,
    sample: Callable[[], list[str]] = lambda: [],
    add_special_tokens: bool = True,
) -> PreTrainedTokenizerBase:
    """A user's tokenizer: a BERT vocab.txt, a SentencePiece .model, a tokenizer directory, or a hub name.

    `lowercase` decides for a vocab.txt (by default: lowercase where it holds no capital letter), and True lowers the
    text for a .model that does not do so itself; else a contradiction is an error. `sample()` gives lines of the user's
    text, on which a .model, and a directory that holds one, is compared with native SentencePiece.
    `add_special_tokens`: a .model gets what a masked language model needs and it lacks.
    """
    path = Path(source)
    if path.is_file() and path.suffix == ".model":
        from ctcd_ds.corpus.sentencepiece_model import import_sentencepiece

        lines = sample()
        tokenizer = import_sentencepiece(path, lines, add_special_tokens=add_special_tokens)
        if lowercase and not lowercases(tokenizer):
            tokenizer = import_sentencepiece(path, lines, True, add_special_tokens)
        validated(tokenizer, source)
    elif path.is_file() and path.suffix == ".txt":
        tokenizer = _from_vocab(path, lowercase)
    elif path.is_file():
        raise UserError(f"tokenizer {source}: give a vocab.txt, a SentencePiece .model, or the directory it is in")
    elif path.exists():
        tokenizer = load_tokenizer(path)
        for model in sorted(path.glob("*.model")):
            _compare_with_native(model, tokenizer, sample())
    else:
        _refuse_a_path(source)
        print(f"tokenizer {source}: no such file or directory here; asking the Hugging Face hub", flush=True)
        settle_hub()
        tokenizer = load_tokenizer(source)
    if lowercase is not None and lowercase != lowercases(tokenizer):
        does = "lowercases" if lowercases(tokenizer) else "does not lowercase"
        raise UserError(
            f"--lowercase {str(lowercase).lower()} contradicts the tokenizer {source}, which {does} its text; "
            f"leave the option out, it is for a vocab.txt or a .model"
        )
    return tokenizer


def _refuse_a_path(source: str) -> None:
    """Raises UserError where what does not exist can only be meant as a path, and so is no name on the hub."""
    path = Path(source)
    is_file = path.suffix in (".txt", ".model", ".json")
    is_name = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source) and not is_file
    if is_name and ("/" not in source or not path.parent.exists()):
        return
    seen = "" if path.is_absolute() else f" (seen from {Path.cwd()})"
    raise UserError(f"tokenizer {source}{seen}: {missing(path)}")


def _compare_with_native(path: Path, tokenizer: PreTrainedTokenizerBase, sample: list[str]) -> None:
    """Compares what a directory makes of text with native SentencePiece on the .model `path` that lies in it.

    A directory without a tokenizer.json is what transformers makes of the .model: refused where that is something else.
    With one, it says itself what it is: then differences are only said.
    """
    from ctcd_ds.corpus.sentencepiece_model import compare, read_model

    model = read_model(path)
    unknown = next(piece.piece for piece in model.pieces if piece.type == 2)

    def ours(lines: list[str]) -> list[list[str]]:
        rows = tokenizer(lines, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        found = [tokenizer.convert_ids_to_tokens(row) for row in rows]
        return [[unknown if token == tokenizer.unk_token else token for token in tokens] for tokens in found]

    lenient = (path.parent / "tokenizer.json").exists()
    compare(path, model, ours, sample, f"the file itself: {path}", lenient)


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
    tokens = [token.rstrip(" \t\r") or token for token in (tokens[:-1] if tokens[-1] == "" else tokens)]
    if missing := [token for token in SPECIAL_TOKENS if token not in tokens]:
        raise UserError(f"{path} is no BERT vocabulary: it has no {', '.join(missing)} (one token a line)")
    if len(set(tokens)) < len(tokens):
        first: dict[str, int] = {}
        again = next((t, i) for i, t in enumerate(tokens) if first.setdefault(t, i) != i)
        raise UserError(f"{path}: {again[0]!r} stands in line {first[again[0]] + 1} and in line {again[1] + 1}")
    if lowercase is None:  # "[CLS]" and "<S>" are capitals in every vocabulary
        words = (token for token in tokens if token[:1] not in ("[", "<"))
        lowercase = not any(capital in token for token in words for capital in CAPITALS)
    return wordpiece_tokenizer(tokens, lowercase)


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Saves the tokenizer so that `AutoTokenizer.from_pretrained(directory)` gives the same ids."""
    tokenizer.save_pretrained(str(directory))


def unknown_pieces(tokenizer: PreTrainedTokenizerBase, lines: list[str], count: int = 8) -> list[tuple[str, int]]:
    """What of these lines is unknown to the tokenizer, and how often, the most frequent pieces first."""
    unknown = tokenizer.unk_token_id
    found: Counter[str] = Counter()
    encodings = tokenizer.backend_tokenizer.encode_batch(lines, add_special_tokens=False)
    for line, encoding in zip(lines, encodings, strict=True):
        places = zip(encoding.ids, encoding.offsets, strict=True)
        found.update(line[start:end] for number, (start, end) in places if number == unknown)
    return found.most_common(count)


def _rules(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """All that decides which ids a text becomes, as JSON; [CLS] and [SEP] around it are not part of it."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    return {part: backend[part] for part in ("normalizer", "pre_tokenizer", "model", "added_tokens")}


def _ids(tokenizer: PreTrainedTokenizerBase) -> dict[Role, int]:
    """All special tokens that the tokenizer names, by role."""
    named = {role: getattr(tokenizer, f"{role}_token_id") for role in get_args(Role)}
    return {role: int(number) for role, number in named.items() if number is not None}


def special_ids(tokenizer: PreTrainedTokenizerBase) -> SpecialIds:
    """The ids of the special tokens that matter here.

    Where there are a cls and a sep token, bos and eos are others' names for them, or nobody's. An unknown or a padding
    token that also is the end of text (GPT-2's) is none: text would end where a word is not known, and the end would be
    no word to learn.
    """
    ids = _ids(tokenizer)
    end = ids.get("sep", ids.get("eos"))
    dropped = {"bos": "cls" in ids, "eos": "sep" in ids, "unk": ids.get("unk") == end, "pad": ids.get("pad") == end}
    kept = {role: number for role, number in ids.items() if not dropped.get(role)}
    named = ((SENTINEL.fullmatch(token), number) for token, number in tokenizer.get_added_vocab().items())
    sentinels = sorted((int(name[1]), number) for name, number in named if name)
    return SpecialIds(**kept, sentinels=tuple(number for _, number in sentinels))


def begin_role(tokenizer: PreTrainedTokenizerBase) -> Role | None:
    """Which special token begins each document: bos, where the tokenizer itself puts one before every text (Llama)."""
    bos = special_ids(tokenizer).bos
    ids = tokenizer.backend_tokenizer.encode("a").ids
    return "bos" if bos != ABSENT and ids and ids[0] == bos else None


def layout(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """How documents lie in a corpus, and what frames a row, by the tokenizer's roles: for the manifest."""
    special = special_ids(tokenizer)
    if ABSENT not in (special.cls, special.sep):
        return BERT_LAYOUT
    separator = "eos" if special.sep == ABSENT else "sep"
    return {"separator": separator, "begin": begin_role(tokenizer), "frame": {"before": [], "after": []}}


def tokenizer_identity(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The manifest's "tokenizer" object: fingerprint (text → ids), vocabulary (token → id), sizes, special ids."""
    special = special_ids(tokenizer)
    ids, sentinels = special.present, list(special.sentinels)
    return {
        "fingerprint": canonical_sha256({"rules": _rules(tokenizer), "special": ids}),
        "vocabulary": canonical_sha256({"tokens": tokenizer.get_vocab(), "special": ids}),
        "vocab_size": len(tokenizer),
        "special": ids,
        **({"sentinels": sentinels} if sentinels else {}),
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
