"""Rows: the stream cut into rows, the order in which they come, and what opening costs and refuses."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corpora import SPECIAL, framed, random_documents, write_corpus, write_corpus_manifest
from ctcd_ds.cli import UserError
from ctcd_ds.corpus.indexed import Header
from ctcd_ds.corpus.rows import Corpus, RowOrder, Rows, batch_rows, read_corpus_manifest
from ctcd_ds.manifest import read_manifest, write_manifest


def stream(shards: list[list[list[int]]]) -> list[int]:
    return [token for shard in shards for document in shard for token in [*document, SPECIAL.sep]]


def all_rows(rows: Rows) -> np.ndarray:
    return rows.read(np.arange(len(rows)))


# --- rows are the stream, cut --------------------------------------------------------------------------


@pytest.mark.parametrize("vocab_size", [1000, 70_000])
@pytest.mark.parametrize("length", [3, 10, 32, 129])
def test_rows_are_the_stream_across_documents_and_shards(tmp_path: Path, vocab_size: int, length: int) -> None:
    documents = random_documents(60, vocab_size)
    shards = [
        documents[:20],
        documents[20:21],
        [[]],
        [[], [7]],
        documents[21:],
    ]  # the small ones end inside a row
    rows = framed(Corpus.open(write_corpus(tmp_path / "c", shards, vocab_size=vocab_size)), "train", length)

    tokens, width = stream(shards), length - 2
    assert len(rows) == len(tokens) // width  # the tail is no row
    read = all_rows(rows)
    assert read.dtype == np.int32 and read.shape == (len(rows), length)
    assert (read[:, 0] == SPECIAL.cls).all() and (read[:, -1] == SPECIAL.sep).all()
    assert read[:, 1:-1].ravel().tolist() == tokens[: len(rows) * width]


def test_rows_come_as_asked_for(tmp_path: Path) -> None:
    documents = random_documents(100)
    rows = framed(Corpus.open(write_corpus(tmp_path / "c", [documents[:50], documents[50:]])), "train", 16)
    every, numbers = all_rows(rows), np.random.default_rng(0).integers(len(rows), size=300)
    assert (rows.read(numbers) == every[numbers]).all()
    assert rows.read(np.array([], np.int64)).shape == (0, 16)


def test_fewer_rows_are_spread_over_the_text_and_always_the_same(tmp_path: Path) -> None:
    rows = framed(Corpus.open(write_corpus(tmp_path / "c", [random_documents(100)])), "train", 16)
    every, whole = all_rows(rows), len(rows)
    for count in (1, 7, whole - 1, whole):
        fewer = rows.spread(count)
        assert len(fewer) == count and len(rows) == whole
        assert (all_rows(fewer) == every[np.arange(count) * whole // count]).all()
        assert (fewer.read(np.array([count - 1])) == every[[(count - 1) * whole // count]]).all()
    with pytest.raises(UserError, match=f"has {whole} rows, fewer than {whole + 1}"):
        rows.spread(whole + 1)


def test_the_splits_are_apart(tmp_path: Path) -> None:
    corpus = Corpus.open(write_corpus(tmp_path / "c", [[5] * 100], valid=[[6] * 50, [6] * 9]))
    assert set(all_rows(framed(corpus, "train", 12))[:, 1:-1].ravel()) == {5}
    assert 5 not in all_rows(framed(corpus, "valid", 12))
    assert (corpus.tokens("train"), corpus.documents("train")) == (101, 1)
    assert (corpus.tokens("valid"), corpus.documents("valid")) == (61, 2)


def test_megatron_reads_the_same_tokens(tmp_path: Path) -> None:
    """The oracle of the file format is megatron-core's own reader and writer."""
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

    documents = random_documents(80)
    path = write_corpus(tmp_path / "c", [documents[:30], documents[30:]])
    read = []
    for shard in Corpus.open(path).splits["train"]:
        dataset = IndexedDataset(str(path / shard.name))
        assert len(dataset) == shard.documents
        read += [dataset[number].tolist() for number in range(len(dataset))]
    assert read == [[*document, SPECIAL.sep] for document in documents]
    width = 30
    rows = framed(Corpus.open(path), "train", width + 2)
    assert all_rows(rows)[:, 1:-1].ravel().tolist() == list(itertools.chain(*read))[: len(rows) * width]

    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.uint16)
    for document in documents[:30]:
        builder.add_document(torch.tensor([*document, SPECIAL.sep]), [len(document) + 1])
    builder.finalize(str(tmp_path / "theirs.idx"))
    for kind in ("bin", "idx"):
        assert (tmp_path / f"theirs.{kind}").read_bytes() == (path / f"train-00000.{kind}").read_bytes()


def test_the_test_tokenizer_is_a_real_one(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(Corpus.open(write_corpus(tmp_path / "c", [[5] * 99])).tokenizer_path)
    assert tokenizer("w17 w999 nothing").input_ids == [17, 999, SPECIAL.unk]
    assert (tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.mask_token_id) == (2, 3, 4)


# --- the order of rows ---------------------------------------------------------------------------------

SIZES = [1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 97, 101, 1023, 1024, 1025, 4999, 65_535, 65_536, 65_537, 99_991]


@pytest.mark.parametrize("count", SIZES)
def test_the_order_is_a_permutation(count: int) -> None:
    positions = np.arange(count)
    for seed, epoch in [(0, 0), (0, 1), (1, 0), (2**63, 12_345)]:
        assert (np.sort(RowOrder(seed, count).rows(epoch, positions)) == positions).all()


@given(count=st.integers(1, 3000), seed=st.integers(0, 2**64 - 1), epoch=st.integers(0, 2**40))
@settings(max_examples=60, deadline=None)
def test_the_order_is_a_permutation_for_any_seed(count: int, seed: int, epoch: int) -> None:
    order = RowOrder(seed, count).rows(epoch, np.arange(count))
    assert order.dtype == np.int64 and set(order.tolist()) == set(range(count))


def test_the_order_differs_by_epoch_and_seed() -> None:
    positions = np.arange(5000)
    orders = [RowOrder(seed, 5000).rows(epoch, positions) for seed in range(4) for epoch in range(4)]
    for number, one in enumerate(orders):
        for other in [*orders[:number], positions]:
            assert (one == other).mean() < 0.005  # two random orders agree once in 5000


def test_the_order_looks_random() -> None:
    order = RowOrder(3, 50_000).rows(0, np.arange(50_000))
    assert abs(np.corrcoef(np.arange(50_000), order)[0, 1]) < 0.02
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.02
    # Small corpora too: over many epochs each of 5 rows stands at each of 5 places equally often.
    orders = np.stack([RowOrder(7, 5).rows(epoch, np.arange(5)) for epoch in range(4000)])
    counts = np.stack([np.bincount(orders[:, place], minlength=5) for place in range(5)])
    assert (abs(counts - 800) < 5 * math.sqrt(4000 * 0.2 * 0.8)).all()


def test_an_epoch_may_differ_from_position_to_position() -> None:
    order, positions = RowOrder(1, 100), np.arange(100)
    mixed = order.rows(positions % 3, positions)
    for epoch in range(3):
        assert (mixed[positions % 3 == epoch] == order.rows(epoch, positions)[positions % 3 == epoch]).all()


def test_the_order_needs_no_memory_that_grows() -> None:
    order, positions = RowOrder(1, 10**12), np.arange(10**12 - 1000, 10**12)
    tracemalloc.start()
    rows = order.rows(3, positions)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200_000
    assert len(set(rows.tolist())) == 1000 and rows.min() >= 0 and rows.max() < 10**12


@given(rows=st.integers(1, 60), batch=st.integers(1, 150), steps=st.integers(1, 8))
@settings(max_examples=100, deadline=None)
def test_batches_are_the_epochs_one_after_another(rows: int, batch: int, steps: int) -> None:
    drawn = [batch_rows(5, rows, step, batch) for step in range(steps)]
    epochs = np.concatenate([epoch for epoch, _ in drawn])
    numbers = np.concatenate([row for _, row in drawn])
    assert (epochs == np.arange(steps * batch) // rows).all()
    for epoch in range(steps * batch // rows):  # each finished epoch has each row once
        assert sorted(numbers[epochs == epoch].tolist()) == list(range(rows))


def test_the_order_stays_what_it_is() -> None:
    """Resuming a run under a later version must read the same rows: these numbers may never change."""
    epochs, rows = batch_rows(seed=1, rows=1000, step=124, global_batch=12)
    assert epochs.tolist() == [1] * 12
    assert rows.tolist() == [547, 117, 58, 65, 18, 618, 315, 839, 72, 104, 339, 723]


# --- opening -------------------------------------------------------------------------------------------


def test_a_corpus_says_who_made_it(tmp_path: Path) -> None:
    path = write_corpus(tmp_path / "c", random_documents(20), vocab_size=1000)
    corpus = Corpus.open(path)
    manifest = json.loads((path / "manifest.json").read_text())
    assert corpus.fingerprint == manifest["sha256"]
    assert (corpus.special, corpus.vocab_size, corpus.dtype) == (SPECIAL, 1000, "uint16")
    assert (corpus.tokenizer_fingerprint, corpus.vocabulary) == ("f" * 64, "e" * 64)
    assert corpus.tokenizer_path == path / "tokenizer"


def test_a_billion_rows_open_at_once(tmp_path: Path) -> None:
    """A sparse corpus of 2 × 126 GB opens and is read in a process of its own, timed and weighed."""
    tokens, documents, path = 126 * 10**9 // 2, 10**8, tmp_path / "huge"
    path.mkdir()
    (path / "tokenizer").mkdir()
    shards = []
    for name in ("train-00000", "train-00001"):
        sizes = {"bin": 2 * tokens, "idx": 34 + 12 * documents + 8 * (documents + 1)}
        for kind, size in sizes.items():
            (path / f"{name}.{kind}").write_bytes(Header(8, documents, documents + 1).write() if kind == "idx" else b"")
            os.truncate(path / f"{name}.{kind}", size)
        files = {kind: {"bytes": size, "sha256": "0" * 64} for kind, size in sizes.items()}
        shards.append({"name": name, "documents": documents, "tokens": tokens, **files})
    write_corpus_manifest(path, {"train": shards, "valid": []}, vocab_size=1000)

    program = f"""
import sys, time
from pathlib import Path
import numpy as np
from ctcd_ds.corpus.rows import Corpus, batch_rows
started = time.perf_counter()
rows = Corpus.open(Path({str(path)!r})).rows("train", 128, before=(2,), after=(3,))
opened = time.perf_counter() - started
for step in range(8):
    _, numbers = batch_rows(1, len(rows), step, 128)
    rows.read(numbers)
peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(len(rows), opened, time.perf_counter() - started - opened, peak)
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    rows, opened, read, kilobytes = map(float, done.stdout.split())
    assert rows == 10**9 and opened < 5 and kilobytes < 200_000
    assert read < 5  # with the system's read-ahead these thousand rows took some 20 s


def test_opening_leaves_contents_alone(tmp_path: Path) -> None:
    """Hashes are for `ctcd verify`: a changed token is not found here, an impossible one on reading."""
    path = write_corpus(tmp_path / "c", [[5] * 100], vocab_size=1000)
    np.full(101, 1000, np.uint16).tofile(path / "train-00000.bin")
    rows = framed(Corpus.open(path), "train", 12)
    with pytest.raises(UserError, match=r"row 2 of split 'train' holds token ids outside 0 … 999"):
        rows.read(np.array([2, 3]))


def test_too_little_text_says_what_to_do(tmp_path: Path) -> None:
    corpus = Corpus.open(write_corpus(tmp_path / "c", [[5] * 100], valid=[[6] * 9]))
    assert len(framed(corpus, "valid", 12)) == 1  # 9 tokens and a [SEP] just fill it
    with pytest.raises(UserError, match=r"'valid' holds 10 tokens.*sequence_length 13.*--valid_fraction"):
        framed(corpus, "valid", 13)
    with pytest.raises(UserError, match=r"'train' holds 101 tokens.*more text, or lower sequence_length"):
        framed(corpus, "train", 128)
    without = Corpus.open(write_corpus(tmp_path / "d", [[5] * 100]))
    with pytest.raises(UserError, match=r"'valid' holds 0 tokens"):
        framed(without, "valid", 12)


def test_no_corpus_no_directory_not_finished(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file or directory"):
        Corpus.open(tmp_path / "nowhere")
    path = write_corpus(tmp_path / "c", [[5] * 100])
    (path / "manifest.json").rename(path / "aside")
    with pytest.raises(UserError, match=r"was `ctcd corpus` finished"):
        Corpus.open(path)
    write_manifest(path / "manifest.json", {"format": "ctcd_ds.checkpoint", "version": 1})
    with pytest.raises(UserError, match=r"not a corpus.*'ctcd_ds\.checkpoint'"):
        Corpus.open(path)
    write_manifest(path / "manifest.json", {"format": "ctcd_ds.corpus", "version": 3})
    with pytest.raises(UserError, match="version 3, this program reads versions 1 and 2"):
        Corpus.open(path)


def test_a_changed_manifest_is_refused(tmp_path: Path) -> None:
    path = write_corpus(tmp_path / "c", [[5] * 100])
    manifest = path / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"vocab_size": 1000', '"vocab_size": 2000'))
    with pytest.raises(UserError, match="changed or damaged"):
        Corpus.open(path)


@pytest.mark.parametrize("damage", ["missing", "shorter", "longer"])
@pytest.mark.parametrize("name", ["train-00001.bin", "train-00001.idx"])
def test_damaged_shards_are_named(tmp_path: Path, name: str, damage: str) -> None:
    path = write_corpus(tmp_path / "c", [random_documents(9), random_documents(9)])
    file = path / name
    if damage == "missing":
        file.unlink()
    else:
        os.truncate(file, file.stat().st_size + (2 if damage == "longer" else -2))
    with pytest.raises(UserError, match=f"damaged at {re.escape(str(file))}"):
        Corpus.open(path)


def test_wrong_index_headers_are_named(tmp_path: Path) -> None:
    path = write_corpus(tmp_path / "c", random_documents(9))
    file = path / "train-00000.idx"
    whole = file.read_bytes()
    for header in [Header(4, 9, 10).write(), Header(8, 9, 9).write(), b"X" * 34]:
        file.write_bytes(header + whole[34:])
        with pytest.raises(UserError, match=r"train-00000\.idx: "):
            Corpus.open(path)


def test_a_missing_tokenizer_is_named(tmp_path: Path) -> None:
    path = write_corpus(tmp_path / "c", [[5] * 100])
    (path / "tokenizer").rename(path / "elsewhere")
    with pytest.raises(UserError, match="folder tokenizer/ is missing"):
        Corpus.open(path)


def test_a_corpus_of_version_1_is_read_as_it_was(tmp_path: Path) -> None:
    """Special ids stood beside the tokenizer's sizes, and neither separator nor frame was named."""
    path = write_corpus(tmp_path / "c", random_documents(20))
    now = all_rows(framed(Corpus.open(path), "train", 16))
    manifest = read_manifest(path / "manifest.json")
    for key in ("sha256", "separator", "frame"):
        del manifest[key]
    manifest["tokenizer"] |= manifest["tokenizer"].pop("special")
    write_manifest(path / "manifest.json", {**manifest, "version": 1})
    assert (all_rows(framed(Corpus.open(path), "train", 16)) == now).all()
    assert read_corpus_manifest(path)["tokenizer"]["special"] == SPECIAL.present
