"""Tokenizers and corpora on real text: Wikipedia, novels, BERT's vocabulary, a SentencePiece model from elsewhere."""

from __future__ import annotations

import lzma
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
import sentencepiece
from transformers import AutoTokenizer, BertTokenizer

from ctcd_ds.corpus.prepare import Settings, prepare
from ctcd_ds.corpus.sources import Reading, documents, find_sources, sample_lines
from ctcd_ds.corpus.tokenizer import bring_tokenizer, continuations
from ctcd_ds.corpus.tokenizer_training import train_tokenizer

pytestmark = pytest.mark.data


@pytest.fixture(scope="module")
def vocabulary(shared_data: Path) -> Path:
    return shared_data / "vocab/bert-base-uncased-vocab.txt"


def lines(shared_data: Path, name: str, count: int) -> list[str]:
    with lzma.open(shared_data / "corpus" / name, "rt", encoding="utf-8") as file:
        return [line.rstrip("\n") for line in islice(file, 5000, 5000 + count)]


def test_the_corpus_is_the_tokenizers_output_on_real_text(shared_data: Path, vocabulary: Path, tmp_path: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    source = str(shared_data / "corpus/wiki_en.txt.xz")
    settings = Settings(fraction=0.02, valid_fraction=0)
    prepare([source], str(vocabulary), tmp_path / "corpus", settings, Reading(), workers=2)
    tokenizer, bert = AutoTokenizer.from_pretrained(tmp_path / "corpus/tokenizer"), BertTokenizer(vocab=str(vocabulary))
    stored = IndexedDataset(str(tmp_path / "corpus/train-00000"))
    found = {tuple(stored[number].tolist()) for number in range(len(stored))}
    seen = 0
    for text in islice(documents(find_sources([source]), Reading()), 3000):
        expected = bert(text).input_ids
        assert tokenizer(text).input_ids == expected
        seen += (*expected[1:-1], tokenizer.sep_token_id) in found
    assert abs(seen - 60) < 30 and len(found) > 300


def test_berts_vocabulary_is_uncased_and_knows_its_continuations(vocabulary: Path) -> None:
    tokenizer = bring_tokenizer(str(vocabulary))
    assert tokenizer.tokenize("Embeddings") == ["em", "##bed", "##ding", "##s"]
    assert continuations(tokenizer).sum() == sum(token.startswith("##") for token in tokenizer.get_vocab())


@pytest.mark.parametrize("name", ("wiki_en.txt.xz", "books_en.txt.xz"))
def test_a_sentencepiece_model_from_elsewhere_agrees_on_real_text(shared_data: Path, name: str) -> None:
    path = shared_data / "vocab/tiny_spm_1000.model"
    native = sentencepiece.SentencePieceProcessor(model_file=str(path))
    text = lines(shared_data, name, 5000)
    tokenizer = bring_tokenizer(str(path), sample=lambda: text)
    encodings = tokenizer(text, add_special_tokens=False).input_ids
    assert encodings == native.encode(text)


@pytest.mark.parametrize(
    ("kind", "lowercase"),
    [
        ("unigram", False),
        ("bpe", True),
        pytest.param("unigram", True, marks=pytest.mark.nightly),
        pytest.param("bpe", False, marks=pytest.mark.nightly),
    ],
)
def test_trained_sentencepiece_agrees_on_text_it_has_not_seen(
    kind: str, lowercase: bool, shared_data: Path, tmp_path: Path
) -> None:
    seen, unseen = lines(shared_data, "wiki_en.txt.xz", 8000), lines(shared_data, "books_en.txt.xz", 8000)

    def texts(caption: str) -> Iterator[str]:
        return iter(seen)

    train_tokenizer(kind, texts, 4000, lowercase, tmp_path / "t")
    native = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "t/spiece.model"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "t")
    assert tokenizer(unseen, add_special_tokens=False).input_ids == native.encode(unseen)


def test_a_sample_comes_from_every_source(shared_data: Path) -> None:
    sources = find_sources([str(shared_data / "corpus/*.xz")])
    sample = sample_lines(sources, Reading(), 1000)
    assert 1000 <= len(sample) < 1200
    for name in ("wiki_en.txt.xz", "books_en.txt.xz"):
        with lzma.open(shared_data / "corpus" / name, "rt", encoding="utf-8") as file:
            assert file.readline().rstrip("\n") in sample
