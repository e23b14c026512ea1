"""Tokenizers: trained or brought, they give one and the same ids wherever they are loaded."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from tokenizers import decoders
from transformers import AutoTokenizer, BertTokenizer, PreTrainedTokenizerFast

from ctcd_ds.cli import UserError
from ctcd_ds.corpus.rows import MASKED_LM
from ctcd_ds.corpus.tokenizer import (
    bring_tokenizer,
    continuations,
    load_tokenizer,
    save_tokenizer,
    tokenizer_identity,
    validated,
    wordpiece_tokenizer,
)
from ctcd_ds.corpus.tokenizer_training import TYPES, train_tokenizer

TEXT = [text for _, text in sorted(topics.items())]  # English that every Python installation carries
LINES = [line for text in TEXT for line in text.split("\n") if line.strip()][:3000]
HARD = [
    "  two  spaces ",
    "naïve Ⅷ ﬁne",
    "日本語 text",
    "tab\tand\nnewline",
    "[SEP] <s> ▁ ##ing",
    "\u200b",
    "don't-stop 33333",
]
VOCAB_SIZE = 1200
MASKED = tuple(kind for kind in TYPES if kind != "byte_bpe")  # with the special tokens of masked language models


def texts(caption: str) -> Iterator[str]:
    return iter(TEXT)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of a tokenizer of each type, trained once."""
    root = tmp_path_factory.mktemp("trained")

    def directory(kind: str) -> Path:
        if not (root / kind).exists():
            train_tokenizer(kind, texts, VOCAB_SIZE, lowercase=True, output_dir=root / kind)
        return root / kind

    return directory


def ids(tokenizer: object, lines: list[str]) -> list[list[int]]:
    return [one[1:-1] for one in tokenizer(lines, split_special_tokens=True)["input_ids"]]


@pytest.mark.parametrize("kind", MASKED)
def test_a_trained_tokenizer_has_the_special_tokens_first_and_the_size_that_was_asked_for(
    kind: str, trained: Callable[[str], Path]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(trained(kind))
    assert tokenizer.convert_tokens_to_ids(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]) == [0, 1, 2, 3, 4]
    assert len(tokenizer) == VOCAB_SIZE
    assert [tokenizer.special_tokens_map[f"{role}_token"] for role in MASKED_LM] == [
        f"[{r.upper()}]" for r in MASKED_LM
    ]
    assert tokenizer("a", "b").input_ids.count(3) == 2  # [CLS] a [SEP] b [SEP]


@pytest.mark.parametrize("kind", ("unigram", "bpe"))
def test_a_trained_sentencepiece_tokenizer_agrees_with_the_native_model_beside_it(
    kind: str, trained: Callable[[str], Path]
) -> None:
    native = sentencepiece.SentencePieceProcessor(model_file=str(trained(kind) / "spiece.model"))
    assert ids(AutoTokenizer.from_pretrained(trained(kind)), LINES + HARD) == native.encode(LINES + HARD)


@pytest.mark.parametrize("kind", TYPES)
def test_training_again_gives_the_same_files(kind: str, trained: Callable[[str], Path], tmp_path: Path) -> None:
    train_tokenizer(kind, texts, VOCAB_SIZE, lowercase=True, output_dir=tmp_path / "again")
    for file in trained(kind).iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes(), file.name


@pytest.mark.parametrize("kind", MASKED)
def test_decoding_gives_the_normalised_text_back(kind: str, trained: Callable[[str], Path]) -> None:
    tokenizer = load_tokenizer(trained(kind))
    backend = tokenizer.backend_tokenizer
    checked = 0
    for line in LINES[:500]:
        numbers = ids(tokenizer, [line])[0]
        if tokenizer.unk_token_id in numbers:
            continue
        normal = backend.normalizer.normalize_str(line)
        if kind == "wordpiece":  # BERT's words and punctuation marks, one space between them
            words = " ".join(word for word, _ in backend.pre_tokenizer.pre_tokenize_str(normal))
            tokens = tokenizer.convert_ids_to_tokens(numbers)
            assert decoders.WordPiece("##", cleanup=False).decode(tokens) == words
        else:
            assert tokenizer.decode(numbers) == normal.removeprefix("▁").replace("▁", " ")
        checked += 1
    assert checked > 400


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("model_type", ("bert", "distilbert", "roberta"))
def test_beside_a_model_the_ids_stay_the_same(
    kind: str, model_type: str, trained: Callable[[str], Path], tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(trained(kind))
    save_tokenizer(tokenizer, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, "vocab_size": VOCAB_SIZE}))
    beside = AutoTokenizer.from_pretrained(tmp_path)
    assert beside(LINES[:200])["input_ids"] == tokenizer(LINES[:200])["input_ids"]
    assert tokenizer_identity(beside) == tokenizer_identity(tokenizer)


@pytest.mark.parametrize("kind", TYPES)
def test_the_vocabulary_size_that_the_message_names_is_one_that_works(kind: str, tmp_path: Path) -> None:
    def little(caption: str) -> Iterator[str]:
        return iter(TEXT[3:5])

    with pytest.raises(UserError, match="too large for this text") as mistake:
        train_tokenizer(kind, little, 30522, lowercase=True, output_dir=tmp_path / "t")
    assert not list(tmp_path.iterdir())
    possible = int(re.findall(r"at most (\d+) tokens", str(mistake.value))[0])
    train_tokenizer(kind, little, possible, lowercase=True, output_dir=tmp_path / "t")
    assert len(load_tokenizer(tmp_path / "t")) == possible


@pytest.mark.parametrize("kind", TYPES)
def test_what_cannot_be_trained_is_said_and_leaves_nothing(kind: str, tmp_path: Path) -> None:
    for source, size, message in ((texts, 20, "too small"), (lambda caption: iter(()), 500, "no text")):
        with pytest.raises(UserError, match=message):
            train_tokenizer(kind, source, size, lowercase=True, output_dir=tmp_path / "t")
        assert not list(tmp_path.iterdir())


def test_characters_that_a_wordpiece_vocabulary_has_room_for_are_in_it(tmp_path: Path, capsys: Any) -> None:
    """Chinese has thousands of characters; BERT's limit of 1,000 was made for alphabets."""
    characters = [chr(0x4E00 + number) for number in range(2500)]
    lines = ["".join(characters[n : n + 50]) for n in range(0, 2500, 50)] * 2
    train_tokenizer("wordpiece", lambda caption: iter(lines), 2505, lowercase=True, output_dir=tmp_path / "t")
    tokenizer = load_tokenizer(tmp_path / "t")
    assert len(tokenizer) == 2505 and tokenizer.unk_token_id not in tokenizer("".join(characters)).input_ids
    assert " lines: 0.000%\n" in capsys.readouterr().out


@pytest.mark.parametrize("kind", MASKED)
def test_text_of_control_characters_only_is_no_text(kind: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--input holds no text"):
        train_tokenizer(kind, lambda caption: iter(["\x01\x02", "\x03"]), 50, True, tmp_path / "t")
    assert not list(tmp_path.iterdir())


def vocabulary(tmp_path: Path, *tokens: str) -> Path:
    path = tmp_path / "vocab.txt"
    path.write_text("".join(f"{token}\n" for token in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *tokens)))
    return path


def test_a_vocab_txt_gives_what_berts_own_tokenizer_gives(tmp_path: Path) -> None:
    path = vocabulary(tmp_path, "hello", "##s", "world", ",", "café")
    brought, bert = bring_tokenizer(str(path)), BertTokenizer(vocab=str(path))
    line = "Hellos, WORLD [MASK] café unknown"
    assert brought(line).input_ids == bert(line).input_ids
    save_tokenizer(brought, tmp_path / "saved")
    assert AutoTokenizer.from_pretrained(tmp_path / "saved")(line).input_ids == bert(line).input_ids
    assert tokenizer_identity(load_tokenizer(tmp_path / "saved")) == tokenizer_identity(brought)


def test_a_vocabulary_with_capitals_is_taken_as_cased_unless_told_otherwise(tmp_path: Path) -> None:
    path = str(vocabulary(tmp_path, "Hello", "hello"))
    assert bring_tokenizer(path).tokenize("Hello hello") == ["Hello", "hello"]
    assert bring_tokenizer(path, lowercase=True).tokenize("Hello hello") == ["hello", "hello"]
    cased, uncased = (tokenizer_identity(bring_tokenizer(path, lowercase=fold)) for fold in (False, True))
    assert cased["vocabulary"] == uncased["vocabulary"] and cased["fingerprint"] != uncased["fingerprint"]


def test_odd_tokens_and_trailing_blanks_change_nothing_in_a_vocab_txt(tmp_path: Path) -> None:
    path = vocabulary(tmp_path, "<S>", "<T>", "hello", "\u3000")
    assert bring_tokenizer(str(path)).tokenize("Hello") == ["hello"]
    path.write_text("".join(f"{line} \t\r\n" for line in path.read_text().split("\n")[:-1]))
    assert bring_tokenizer(str(path)).tokenize("Hello") == ["hello"]


def test_roles_that_share_a_token_are_refused(trained: Callable[[str], Path]) -> None:
    backend = load_tokenizer(trained("bpe")).backend_tokenizer
    names = {role: f"[{role.upper()}]" for role in MASKED_LM}
    for role, other in itertools.combinations(MASKED_LM, 2):
        shared = {f"{r}_token": names[other if r == role else r] for r in MASKED_LM}
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **shared)
        if (role, other) == ("cls", "sep"):
            assert validated(tokenizer, "t") is tokenizer
        else:
            with pytest.raises(UserError, match=rf"its {role}_token and its {other}_token are one token"):
                validated(tokenizer, "t")


def test_continuations_follow_each_familys_own_mark(trained: Callable[[str], Path]) -> None:
    for kind in MASKED:
        tokenizer = load_tokenizer(trained(kind))
        marks = continuations(tokenizer)
        assert marks.dtype == np.bool_ and marks.shape == (len(tokenizer),)
        assert not marks[tokenizer.all_special_ids].any()
        for token, number in tokenizer.get_vocab().items():
            if number not in tokenizer.all_special_ids:
                assert marks[number] == (token.startswith("##") if kind == "wordpiece" else not token.startswith("▁"))


def test_what_a_sentencepiece_model_lacks_is_appended_and_its_own_ids_stay(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES), model_prefix=str(tmp_path / "plain"), vocab_size=500, minloglevel=2
    )
    native = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "plain.model"))
    tokenizer = bring_tokenizer(str(tmp_path / "plain.model"), sample=lambda: LINES)
    pairs = zip(ids(tokenizer, LINES), native.encode(LINES), strict=True)
    ties = [(ours, theirs) for ours, theirs in pairs if ours != theirs]
    assert len(ties) < 30 and all(sorted(ours) == sorted(theirs) for ours, theirs in ties)
    assert f"of {len(LINES)} lines, {len(ties)} hold two segmentations of equal score" in capsys.readouterr().out
    assert (tokenizer.unk_token, tokenizer.cls_token, tokenizer.sep_token) == ("<unk>", "<s>", "</s>")
    assert sorted([tokenizer.pad_token_id, tokenizer.mask_token_id]) == [500, 501]


def test_a_sentencepiece_model_that_disagrees_is_refused_with_the_line_and_both_pieces(
    trained: Callable[[str], Path], tmp_path: Path
) -> None:
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString((trained("bpe") / "spiece.model").read_bytes())
    for piece in model.pieces:
        if piece.piece == "th":  # native SentencePiece still merges through an unused piece
            piece.type = 5
    (tmp_path / "odd.model").write_bytes(model.SerializeToString())
    with pytest.raises(UserError, match=r"Line: '.*SentencePiece: \[.*Hugging Face: \["):
        bring_tokenizer(str(tmp_path / "odd.model"), sample=lambda: LINES)


def test_tokenizers_that_cannot_serve_are_refused_by_name(trained: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "raw").mkdir()
    vocabulary(tmp_path / "raw", "a")
    (tmp_path / "hollow").mkdir()  # transformers makes a vocabulary of five tokens for it, without a word
    (tmp_path / "hollow/tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    (tmp_path / "broken.model").write_bytes(b"no protobuf")
    (tmp_path / "twice.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\nb\na\n")
    (tmp_path / "maskless.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\na\n")
    for name, message in {
        "empty": "a directory that holds no tokenizer: no tokenizer.json",
        "raw": "give the file itself: .*raw/vocab.txt",
        "hollow": "vocabulary file is missing",
        "missing.txt": "no such file or directory",
        "missing": "no such file or directory",
        "emty": r"no such file or directory; did you mean .*empty\\?",
        "broken.model": "not a SentencePiece model",
        "twice.txt": "'a' stands in line 6 and in line 8",
        "maskless.txt": r"has no \[MASK\]",
    }.items():
        with pytest.raises(UserError, match=message):
            bring_tokenizer(str(tmp_path / name))
    with pytest.raises(UserError, match="contradicts"):
        bring_tokenizer(str(trained("bpe")), lowercase=False)


def test_a_wordpiece_vocabulary_keeps_the_order_it_is_given_in() -> None:
    tokens = ["[PAD]", "b", "[UNK]", "[CLS]", "a", "[SEP]", "[MASK]"]
    tokenizer = wordpiece_tokenizer(tokens, lowercase=True)
    assert tokenizer.convert_tokens_to_ids(tokens) == list(range(7))
