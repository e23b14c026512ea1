"""SentencePiece models as people publish them: the tokenizer that is saved gives native SentencePiece's own ids."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pytest
import sentencepiece
from transformers import AutoTokenizer

from ctcd_ds.cli import UserError
from ctcd_ds.corpus.encode import Encoder
from ctcd_ds.corpus.prepare import Settings, prepare
from ctcd_ds.corpus.sentencepiece_model import native_beside, read_model
from ctcd_ds.corpus.shards import open_pair
from ctcd_ds.corpus.sources import Reading
from ctcd_ds.corpus.tokenizer import bring_tokenizer, save_tokenizer
from ctcd_ds.corpus.tokenizer_training import _with_exact_sums
from ctcd_ds.manifest import read_manifest

ALBERT = {  # as google's: lowered, nine user-defined pieces of which most are punctuation, control pieces for the roles
    "normalization_rule_name": "nmt_nfkc_cf",
    "control_symbols": ["[CLS]", "[SEP]"],
    "user_defined_symbols": ["[MASK]", "(", ")", '"', "-", ".", "–", "£", "€"],
    "pad_id": 0,
    "unk_id": 1,
    "bos_id": -1,
    "eos_id": -1,
    "pad_piece": "<pad>",
}
GEMMA = {  # as google's: nothing is normalised, bytes for what is unknown, runs of spaces and line ends are pieces
    "normalization_rule_name": "identity",
    "byte_fallback": True,
    "add_dummy_prefix": False,
    "remove_extra_whitespaces": False,
    "user_defined_symbols": ["<user>", "\n", "\t", "▁▁", "▁▁▁▁"],
    "pad_id": 0,
    "eos_id": 1,
    "bos_id": 2,
    "unk_id": 3,
}
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bpe": {"model_type": "bpe"},
    "albert": ALBERT,
    "albert, bpe": {**ALBERT, "model_type": "bpe"},
    "gemma": {**GEMMA, "model_type": "bpe"},
    "gemma, unigram": GEMMA,
    "llama": {
        "model_type": "bpe",
        "normalization_rule_name": "identity",
        "byte_fallback": True,
        "remove_extra_whitespaces": False,
        "split_digits": True,
    },
    "t5": {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1, "pad_piece": "<pad>"},
    "t5, sentinels": {"user_defined_symbols": [f"<extra_id_{number}>" for number in range(12)]},
    "nfkc": {"normalization_rule_name": "nfkc"},
    "identity": {"normalization_rule_name": "identity"},
    "lowering, bpe, bytes": {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "nmt_nfkc_cf"},
    "bytes": {"byte_fallback": True},
    "no dummy prefix": {"add_dummy_prefix": False},
    "spaces kept": {"remove_extra_whitespaces": False},
    "across words": {"split_by_whitespace": False},
    "tags": {"user_defined_symbols": ["<br>", "@user"]},
    "tags, bpe": {"user_defined_symbols": ["<br>", "@user"], "model_type": "bpe"},
    "roles anywhere": {"unk_id": 7, "pad_id": 2, "bos_id": 5, "eos_id": 0, "unk_piece": "⁇"},
    "words of its own": {
        "user_defined_symbols": ["New York", "▁the", "the", "ABC", "é", "日"],
        "normalization_rule_name": "nfkc_cf",
        "model_type": "bpe",
        "byte_fallback": True,
    },
    "control in words": {"control_symbols": ["the", "<sep>"], "byte_fallback": True},
    "half an alphabet": {"character_coverage": 0.99, "user_defined_symbols": ["<x>"], "control_symbols": ["<y>"]},
}
LINES = [line for _, text in sorted(topics.items()) for line in text.split("\n") if line.strip()]
SEEN, UNSEEN = LINES[:4000], LINES[4000:5000]
# fmt: off
PIECES = [
    "", " ", "\n", "  two  spaces ", "the", "tab\tand\nnewline\n", "naïve Ⅷ ﬁne ①", "日本語",
    "don't-stop 33333", "[SEP] <s> ▁ ##ing", "<s>", "</s>", "<unk>", "<pad>", "[CLS]", "[MASK]",
    "[mask]", "x[MASK]y", "(<s>)", "<user><s>", "\n<s>\n", "</s>\tx", "<<s>>", "<s", "é<s>é",
    "日<s>本", "<日>", "<br>", "x<br>y", "<BR>", "@user", "hi@user", "(a)", "-- a-b", "3.14.15",
    "£5–€6", '"q"', "…", "((()))", "\n\n\n", "\t\t", "a\r\nb", "<0x0A>", "a <0x41> b",
    "E\u0301cole cafe\u0301", "X\u0301", "ﬁ\u0301", "👨\u200d👩\u200d👧 😀", "\u1100\u1161\u11a8",
    "Straße ẞ İ ς Σ", "\u2028x\u2029", "\x01 a \x7f", "a\u00a0b\u3000c", "▁▁ x", "x ▁", "    four",
    "a    b  c   d", "<extra_id_1>", "a <extra_id_11>b", "<x>", "a<x>b<y>c", "ＡＢＣ１２３", "\u200b",
    "\ufeffx", "ไทย กำ", "क़", "ŉ", "ｶﾞｷﾞ ﾊﾟ カﾞ あﾞ", "ㄱㅏ ﾡￂ", "New York ABC É", "bathe the <sep>", "\x00 a\x00b",
    "\U000e0001z", "👩🏽\u200d🚀 🏳\ufe0f\u200d🌈", "\u202eabc\u202c ½ ℡ ㍿", "٣٤ १२", "\u3000\u3000x\u2003",
]
# fmt: on
HARD = PIECES + [
    "".join(one.choice(PIECES) + one.choice(["", " ", "  "]) for _ in range(one.randrange(2, 6)))
    for one in map(random.Random, range(300))
]


@cache
def trained(kind: str, folder: Path) -> Path:
    prefix = folder / kind.replace(", ", "-").replace(" ", "-")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SEEN),
        model_prefix=str(prefix),
        vocab_size=1000,
        hard_vocab_limit=False,
        minloglevel=2,
        **KINDS[kind],
    )
    return prefix.with_suffix(".model")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("models")
    return lambda kind: trained(kind, folder)


def differences(path: Path, tokenizer: Any, lines: list[str]) -> list[str]:
    """The lines that the tokenizer cuts otherwise than native, but for those of two segmentations of equal score."""
    native = sentencepiece.SentencePieceProcessor(model_file=str(path))

    def score(ids: list[int]) -> float:
        return sum(native.get_score(number) for number in ids)

    pairs = zip(
        lines,
        native.encode(lines),
        tokenizer(lines, add_special_tokens=False, split_special_tokens=True).input_ids,
        strict=True,
    )
    return [
        line
        for line, theirs, ours in pairs
        if theirs != ours and (sorted(theirs) != sorted(ours) or abs(score(theirs) - score(ours)) > 1e-3)
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_native_on_text_and_on_lines_made_to_hurt(
    kind: str, model: Callable[[str], Path], tmp_path: Path
) -> None:
    path = model(kind)
    tokenizer = bring_tokenizer(str(path), sample=lambda: UNSEEN + HARD)
    save_tokenizer(tokenizer, tmp_path / "saved")
    assert differences(path, AutoTokenizer.from_pretrained(tmp_path / "saved"), UNSEEN + HARD) == []


@pytest.mark.data
@pytest.mark.parametrize(
    "kind", [kind if kind == "albert" else pytest.param(kind, marks=pytest.mark.nightly) for kind in KINDS]
)
def test_ids_are_native_on_real_text(kind: str, model: Callable[[str], Path], shared_data: Path) -> None:
    import lzma
    from itertools import islice

    lines: list[str] = []
    for name in ("wiki_en.txt.xz", "books_en.txt.xz"):
        with lzma.open(shared_data / "corpus" / name, "rt", encoding="utf-8") as file:
            lines += islice((line.rstrip("\n") for line in file), 12_000)
    assert sum(map(len, lines)) > 5_000_000
    path = model(kind)
    assert differences(path, bring_tokenizer(str(path)), lines) == []


@pytest.mark.parametrize("kind", ["albert", "gemma", "nfkc", "lowering, bpe, bytes"])
def test_a_corpus_has_the_ids_of_the_tokenizer_beside_it(
    kind: str, model: Callable[[str], Path], tmp_path: Path
) -> None:
    """The hard lines come last, behind all that is compared when the model is brought."""
    texts = [" ".join(line.split()) for line in UNSEEN * 6] + [line.replace("\n", " ") for line in HARD if line.strip()]
    (tmp_path / "a.txt").write_text("\n".join(texts) + "\n", encoding="utf-8", newline="\n")
    reading = Reading(text_layout="lines")
    prepare([str(tmp_path / "a.txt")], str(model(kind)), tmp_path / "c", Settings(valid_fraction=0), reading, workers=2)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "c/tokenizer")
    (shard,) = read_manifest(tmp_path / "c/manifest.json")["splits"]["train"]
    pair = open_pair(str(tmp_path / "c" / shard["name"]))
    stored = [pair.document(number).tolist()[:-1] for number in range(len(pair))]
    frame = {tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.mask_token_id, tokenizer.pad_token_id}
    documents = [part for text in texts for part in text.removeprefix("\ufeff").split("\r") if part.strip()]
    expected = tokenizer(documents, add_special_tokens=False, split_special_tokens=True).input_ids
    known = [[tokenizer.unk_token_id if number in frame else number for number in ids] for ids in expected if ids]
    assert stored == known


@pytest.mark.parametrize("kind", KINDS)
def test_long_documents_have_the_ids_of_the_tokenizer_whoever_makes_them(
    kind: str, model: Callable[[str], Path], tmp_path: Path
) -> None:
    """As tokenizers trained here are (their scores add up exactly), so that native SentencePiece takes most parts."""
    path, choose = tmp_path / "exact.model", random.Random(1)
    path.write_bytes(_with_exact_sums(model(kind).read_bytes()))
    tokenizer = bring_tokenizer(str(path), sample=lambda: [])
    lines = [choose.choice(UNSEEN if choose.random() < 0.8 else HARD) for _ in range(1200)]
    documents = [choose.choice([" ", "\n"]).join(lines[start : start + 60]) for start in range(0, len(lines), 60)]
    native = native_beside(path, tokenizer)
    assert native is not None
    encoded = Encoder(tokenizer, native, "uint16")([*documents, *PIECES])
    assert np.array_equal(encoded.ids, Encoder(tokenizer, None, "uint16")([*documents, *PIECES]).ids)
    parts = [part for document in documents for part in native.parts(document)]
    if native.words_apart:
        assert max(map(len, parts)) < 2000 and any(map(native.fits, parts))


@pytest.mark.parametrize("kind", ["albert", "identity"])
@pytest.mark.timeout(240)  # it takes seconds, or eight minutes
def test_runs_of_spaces_cost_what_text_costs(kind: str, model: Callable[[str], Path]) -> None:
    """A table's blank column can be long: where each space looks for the run's end, these lines take minutes."""
    lines = [f"the{' ' * 300_000}end", f"the{'▁' * 300_000}end", f"the end{' ▁' * 100_000}"]
    tokenizer = bring_tokenizer(str(model(kind)), sample=lambda: SEEN[:9])
    assert differences(model(kind), tokenizer, lines) == []


def test_a_model_of_lowered_text_lowers_when_told_so(model: Callable[[str], Path], tmp_path: Path) -> None:
    tokenizer = bring_tokenizer(str(model("identity")), lowercase=True, sample=lambda: UNSEEN)
    assert tokenizer.tokenize("The ÄÖ Statement") == tokenizer.tokenize("the äö statement")
    with pytest.raises(UserError, match="contradicts"):
        bring_tokenizer(str(model("albert")), lowercase=False)


def test_a_damaged_table_is_a_message(model: Callable[[str], Path], tmp_path: Path) -> None:
    """`tokenizers` panics over it, which is no Exception; native SentencePiece has an error of its own."""
    save_tokenizer(bring_tokenizer(str(model("plain"))), tmp_path / "t")
    text = (tmp_path / "t/tokenizer.json").read_text(encoding="utf-8")
    place = text.index('"precompiled_charsmap"') + 5000
    (tmp_path / "t/tokenizer.json").write_text(text[:place] + "!" + text[place + 1 :], encoding="utf-8")
    with pytest.raises(UserError, match=r"tokenizer \S*t cannot be loaded: "):
        bring_tokenizer(str(tmp_path / "t"))
    damaged = read_model(model("plain"))
    damaged.normalizer_spec.precompiled_charsmap = b"\xff" * 40
    (tmp_path / "d.model").write_bytes(damaged.SerializeToString())
    with pytest.raises(UserError, match=r"d\.model is not a SentencePiece model: INTERNAL"):
        bring_tokenizer(str(tmp_path / "d.model"))


def test_a_directory_that_transformers_reads_otherwise_than_its_model_is_refused(
    model: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without tokenizer.json it is transformers' own conversion; with one, it says itself what it is."""
    directory = tmp_path / "t"
    directory.mkdir()
    (directory / "tokenizer.model").write_bytes(model("lowering, bpe, bytes").read_bytes())
    roles = '"pad_token": "<pad>", "mask_token": "<mask>", "cls_token": "<s>", "sep_token": "</s>"'
    (directory / "tokenizer_config.json").write_text(f'{{"tokenizer_class": "LlamaTokenizer", {roles}}}')
    with pytest.raises(UserError, match=r"disagrees with native SentencePiece.*bring the file itself: \S*\.model"):
        bring_tokenizer(str(directory), sample=lambda: UNSEEN)
    save_tokenizer(AutoTokenizer.from_pretrained(directory), directory)
    bring_tokenizer(str(directory), sample=lambda: UNSEEN)
    assert "are cut in another way" in capsys.readouterr().out
