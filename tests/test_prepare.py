"""The corpus: what the tokenizer says, document by document, whatever the input's form, the workers, or a kill."""

from __future__ import annotations

import gzip
import json
import lzma
import os
import re
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import datasets
import numpy as np
import pyarrow
import pytest
import torch
import zstandard
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder
from pyarrow import parquet
from transformers import AutoTokenizer

import forks
from commands import ROOT, environment, run
from ctcd_ds.cli import UserError
from ctcd_ds.commands import verify
from ctcd_ds.commands.corpus import held_out_sets
from ctcd_ds.corpus.adopt import adopt
from ctcd_ds.corpus.prepare import Settings, dtype_for, prepare, share
from ctcd_ds.corpus.sources import Reading
from ctcd_ds.corpus.tokenizer_training import train_tokenizer
from ctcd_ds.manifest import read_manifest, sampled_entry

TEXT = [text for _, text in sorted(topics.items())]
ALL = Settings(valid_fraction=0)
# One paragraph a document here, so that every form of input can say the same documents.
DOCUMENTS = [" ".join(part.split()) for text in TEXT[:30] for part in text.split("\n\n") if part.strip()]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer") / "wordpiece"
    train_tokenizer("wordpiece", lambda caption: iter(TEXT), 2000, lowercase=True, output_dir=directory)
    return directory


@pytest.fixture
def make(tokenizer: Path, tmp_path: Path) -> Callable[..., Path]:
    """Makes a corpus of files or of documents; returns its directory."""

    def made(inputs: Sequence[Any], settings: Settings = ALL, name: str = "corpus", **options: Any) -> Path:
        if inputs and not isinstance(inputs[0], Path):
            (tmp_path / "text.txt").write_text("\n\n".join(inputs) + "\n", encoding="utf-8")
            inputs = [tmp_path / "text.txt"]
        reading = options.pop("reading", Reading())
        source = options.pop("tokenizer", tokenizer)
        prepare([str(path) for path in inputs], str(source), tmp_path / name, settings, reading, **options)
        return tmp_path / name

    return made


def stored(corpus: Path, split: str = "train") -> list[list[int]]:
    """All documents of a split as megatron-core reads them."""
    found = []
    for shard in read_manifest(corpus / "manifest.json")["splits"][split]:
        data = IndexedDataset(str(corpus / shard["name"]))
        assert len(data) == len(data.document_indices) - 1 == shard["documents"]
        assert sum(map(int, data.sequence_lengths)) == shard["tokens"]
        found += [data[number].tolist() for number in range(len(data))]
    return found


def contents(directory: Path) -> dict[str, bytes]:
    files = (path for path in sorted(directory.rglob("*")) if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


def test_every_document_is_the_tokenizers_ids_and_one_sep(make: Callable[..., Path]) -> None:
    corpus = make(TEXT[:30])
    tokenizer = AutoTokenizer.from_pretrained(corpus / "tokenizer")
    paragraphs = [part for text in TEXT[:30] for part in text.split("\n\n") if part.strip()]
    assert stored(corpus) == [[*tokenizer(text).input_ids[1:-1], tokenizer.sep_token_id] for text in paragraphs]


def test_the_manifest_tells_the_truth(make: Callable[..., Path]) -> None:
    corpus = make(DOCUMENTS, Settings(valid_fraction=0.2, shard_megabytes=0.02))
    manifest = read_manifest(corpus / "manifest.json")
    tokenizer = AutoTokenizer.from_pretrained(corpus / "tokenizer")
    assert manifest["tokenizer"]["vocab_size"] == len(tokenizer) == 2000
    assert [manifest["tokenizer"]["special"][role] for role in ("pad", "unk", "cls", "sep", "mask")] == [0, 1, 2, 3, 4]
    assert len(manifest["splits"]["train"]) > 3
    listed = {"manifest.json", "preparation.json", "tokenizer"}
    for split, shards in manifest["splits"].items():
        assert [shard["name"] for shard in shards] == [f"{split}-{number:05d}" for number in range(len(shards))]
        for shard in shards:
            for suffix in ("bin", "idx"):
                assert shard[suffix] == sampled_entry(corpus / f"{shard['name']}.{suffix}")
                listed.add(f"{shard['name']}.{suffix}")
    assert {path.name for path in corpus.iterdir()} == listed
    assert str(corpus.parent) not in (corpus / "manifest.json").read_text()


def test_workers_change_nothing(make: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    settings = Settings(valid_fraction=0.1, fraction=0.7, shard_megabytes=0.03)
    one, three = (make(DOCUMENTS, settings, f"with-{n}", workers=n) for n in (1, 3))
    assert contents(one) == contents(three)
    assert os.environ["TOKENIZERS_PARALLELISM"] == "true", "set while it works, and put back"


def write_all_forms(folder: Path) -> dict[str, tuple[list[Path], Reading]]:
    blank = "\ufeff" + "\r\n\r\n\r\n".join(DOCUMENTS)  # a BOM, Windows line ends, more blank lines than one
    jsonl = "".join(json.dumps({"id": 1, "body": text}) + "\n" for text in DOCUMENTS)
    lines, half = "\n".join(DOCUMENTS), len(DOCUMENTS) // 2
    table = pyarrow.table({"text": DOCUMENTS, "id": range(len(DOCUMENTS))})
    (folder / "a.txt").write_bytes(blank.encode())
    (folder / "lines.txt").write_bytes(lines.encode())
    (folder / "a.jsonl").write_bytes(jsonl.encode())
    (folder / "a.txt.gz").write_bytes(gzip.compress(blank.encode()))
    (folder / "a.txt.xz").write_bytes(lzma.compress(blank.encode()))
    (folder / "a.jsonl.zst").write_bytes(zstandard.compress(jsonl.encode()))
    (folder / "part1.txt").write_text("\n\n".join(DOCUMENTS[:half]))
    (folder / "part2.txt").write_text("\n\n".join(DOCUMENTS[half:]))
    parquet.write_table(table, folder / "a.parquet", row_group_size=100)
    datasets.Dataset(table).save_to_disk(folder / "saved")
    datasets.DatasetDict({"train": datasets.Dataset(table)}).save_to_disk(folder / "dict")
    plain, body, by_line = Reading(), Reading(text_field="body"), Reading(text_layout="lines")
    forms = {name: ([folder / name], plain) for name in ("a.txt.gz", "a.txt.xz", "a.parquet", "saved", "dict")}
    forms |= {"lines": ([folder / "lines.txt"], by_line)}
    forms |= {name: ([folder / name], body) for name in ("a.jsonl", "a.jsonl.zst")}
    return forms | {
        "glob": ([folder / "part*.txt"], plain),
        "several": ([folder / "part2.txt", folder / "part1.txt"], plain),
    }


def test_every_form_of_input_gives_the_same_corpus(make: Callable[..., Path], tmp_path: Path) -> None:
    forms = write_all_forms(tmp_path)
    expected = read_manifest(make([tmp_path / "a.txt"], Settings(valid_fraction=0.1)) / "manifest.json")
    for name, (inputs, reading) in forms.items():
        corpus = make(inputs, Settings(valid_fraction=0.1), f"corpus-{name}", reading=reading)
        assert read_manifest(corpus / "manifest.json") == expected, name


def test_fractions_are_of_documents_and_nested(make: Callable[..., Path]) -> None:
    def splits(name: str, **settings: Any) -> list[set[tuple[int, ...]]]:
        corpus = make(DOCUMENTS, Settings(**settings), name)
        return [{tuple(document) for document in stored(corpus, split)} for split in ("train", "valid")]

    whole_train, whole_valid = splits("whole", valid_fraction=0.2)
    half_train, half_valid = splits("half", valid_fraction=0.2, fraction=0.5)
    documents = len(DOCUMENTS)
    taken = sum(share(1, "take", number) < 0.5 for number in range(documents))
    assert abs(taken / documents - 0.5) < 0.1 and taken < documents
    assert half_train <= whole_train and half_valid <= whole_valid
    assert 0.1 < len(whole_valid) / (len(whole_train) + len(whole_valid)) < 0.3
    assert splits("other", valid_fraction=0.2, seed=2) != [whole_train, whole_valid]


@pytest.mark.parametrize("documents", (2, 3, 10))
def test_few_documents_still_give_one_to_hold_out(documents: int, make: Callable[..., Path]) -> None:
    everything = stored(make(DOCUMENTS[:documents], ALL, "all"))
    corpus = make(DOCUMENTS[:documents], Settings(valid_fraction=1e-9))
    train, valid = stored(corpus), stored(corpus, "valid")
    assert len(valid) == 1
    everything.remove(valid[0])
    assert train == everything


def test_special_tokens_written_in_the_text_stay_text(make: Callable[..., Path]) -> None:
    corpus = make(["one [SEP] two [MASK] [PAD] [CLS]", "plain"])
    first, _ = stored(corpus)
    assert not set(first[:-1]) & {0, 2, 3, 4} and first[-1] == 3
    assert AutoTokenizer.from_pretrained(corpus / "tokenizer").decode(first).startswith("one [ sep ] two [ mask ]")


@pytest.mark.parametrize("size", (2, 65499, 65500, 65536, 200000))
def test_the_dtype_is_the_one_that_megatron_would_take(size: int) -> None:
    assert dtype_for(size) == DType.optimal_dtype(size).__name__


# ---- again, after a kill, with something else


def test_a_killed_run_goes_on_behind_its_finished_shards(
    make: Callable[..., Path], tokenizer: Path, tmp_path: Path
) -> None:
    settings = Settings(valid_fraction=0.05, shard_megabytes=0.05)
    whole = make(TEXT * 4, settings, "whole")
    output = tmp_path / "killed"
    words = ("--input", tmp_path / "text.txt", "--tokenizer", tokenizer, "--output_dir", output)
    options = ("--valid_fraction", 0.05, "--shard_megabytes", 0.05, "--workers", 2)
    line = [str(ROOT / "tools/prepare_corpus.py"), *map(str, (*words, *options))]
    with Path(os.devnull).open("w") as nothing:
        process = forks.start(line, environment(), ROOT, nothing, nothing, own_session=True)
    progress = output / ".unfinished/progress.json"
    while process.poll() is None and not (progress.exists() and json.loads(progress.read_text())["documents"]):
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (output / "manifest.json").exists()
    finished = [shard["name"] for shard in json.loads(progress.read_text())["shards"]["train"]]
    before = {name: (progress.parent / f"{name}.bin").stat() for name in finished}

    with pytest.raises(UserError, match=r"settings.seed is 1 there and 2 here"):
        make([tmp_path / "text.txt"], Settings(2, 1.0, 0.05, 0.05), "killed")
    make([tmp_path / "text.txt"], settings, "killed", workers=1)
    assert len(read_manifest(output / "manifest.json")["splits"]["train"]) > len(finished) > 0
    for name, stat in before.items():
        now = (output / f"{name}.bin").stat()
        assert (now.st_ino, now.st_mtime_ns) == (stat.st_ino, stat.st_mtime_ns)
    assert contents(output) == contents(whole)


def test_a_finished_corpus_is_left_as_it_is(
    make: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = make(DOCUMENTS)
    before = {path: path.stat().st_mtime_ns for path in corpus.rglob("*")}
    make([tmp_path / "text.txt"])
    assert "finished already" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"fraction is 1\.0 there and 0\.5 here"):
        make([tmp_path / "text.txt"], Settings(valid_fraction=0, fraction=0.5))
    with pytest.raises(UserError, match=r"sources\[0\].bytes"):
        make(DOCUMENTS[:-1])
    assert before == {path: path.stat().st_mtime_ns for path in corpus.rglob("*")}


def test_held_out_sets_are_their_files_whole_and_move_nothing_else(
    make: Callable[..., Path], tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ctcd_ds.corpus import prepare as module

    (tmp_path / "law.txt").write_text("\n\n".join(DOCUMENTS[40:60]))
    (tmp_path / "news.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS[60:64]))
    sets = {"law": [str(tmp_path / "law.txt")], "news": [str(tmp_path / "news.jsonl")]}
    settings = Settings(valid_fraction=0.1, shard_megabytes=0.02)
    plain = make(DOCUMENTS[:40], settings, "plain")
    corpus = make(DOCUMENTS[:40], settings, "corpus", valid_inputs=sets)
    splits, before = (read_manifest(place / "manifest.json")["splits"] for place in (corpus, plain))
    assert list(splits) == ["train", "valid", "valid.law", "valid.news"]
    assert {split: splits[split] for split in before} == before
    words = AutoTokenizer.from_pretrained(corpus / "tokenizer")
    for split, texts in {"valid.law": DOCUMENTS[40:60], "valid.news": DOCUMENTS[60:64]}.items():
        assert stored(corpus, split) == [[*words(text).input_ids[1:-1], words.sep_token_id] for text in texts]
    assert list(verify.problems(corpus)) == []
    with (corpus / "valid-law-00000.bin").open("r+b") as file:
        file.write(b"\7\7")
    assert any("valid-law-00000.bin" in problem for problem in verify.problems(corpus))

    def killed(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(module, "_tokenise", killed)
        make([tmp_path / "text.txt"], settings, "again", valid_inputs=sets)
    law = (tmp_path / "again" / ".unfinished" / "valid-law-00000.bin").stat()
    again = make([tmp_path / "text.txt"], settings, "again", valid_inputs=sets)
    assert (again / "valid-law-00000.bin").stat().st_ino == law.st_ino
    assert read_manifest(again / "manifest.json") == read_manifest(corpus / "manifest.json")
    with pytest.raises(UserError, match="valid_sources is"):
        make([tmp_path / "text.txt"], settings, "again")


def test_a_foreign_directory_is_not_touched(make: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus/thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="not empty"):
        make(DOCUMENTS)
    assert contents(tmp_path / "corpus") == {"thesis.tex": b"years of work"}


# ---- mistakes


def bad_inputs(folder: Path) -> dict[str, tuple[str, Reading, str]]:
    """Name of an input, how it is read, and what the message must say."""
    (folder / "good.txt").write_text("text")
    (folder / "empty.txt").write_text(" \n\n\t\n")
    (folder / "latin.txt").write_bytes(b"fine\nalso fine\ncaf\xe9\n")
    (folder / "utf16.txt").write_bytes("text".encode("utf-16"))
    (folder / "broken.txt.gz").write_bytes(gzip.compress(b"text" * 1000)[:-12])
    (folder / "no.txt.xz").write_bytes(b"not xz")
    (folder / "no.txt.zst").write_bytes(b"not zstandard")
    (folder / "no.parquet").write_bytes(b"not parquet")
    (folder / "other.pdf").write_bytes(b"%PDF")
    (folder / "field.jsonl").write_text('{"text": "a"}\n{"txt": "b"}\n')
    (folder / "null.jsonl").write_text('{"text": null}\n')
    (folder / "torn.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (folder / "list.jsonl").write_text('["a"]\n')
    (folder / "folder").mkdir()
    parquet.write_table(pyarrow.table({"content": ["a"]}), folder / "field.parquet")
    datasets.DatasetDict({"test": datasets.Dataset.from_dict({"text": ["a"]})}).save_to_disk(folder / "split")
    plain = Reading()
    return {
        "goood.txt": ("goood.txt", plain, "does not exist; did you mean .*good.txt"),
        "pattern": ("nothing*.txt", plain, "no file matches"),
        "empty": ("empty.txt", plain, "--input holds no text"),
        "latin": ("latin.txt", plain, "not UTF-8: byte 0xe9 in line 3, at byte offset 18"),
        "utf16": ("utf16.txt", plain, "is UTF-16, not UTF-8"),
        "truncated": ("broken.txt.gz", plain, "damaged"),
        "xz": ("no.txt.xz", plain, "damaged"),
        "zst": ("no.txt.zst", plain, "damaged"),
        "parquet": ("no.parquet", plain, "not readable as parquet"),
        "format": ("other.pdf", plain, "format is not known"),
        "field": ("field.jsonl", plain, "line 2: there is no field 'text', .* did you mean --text_field txt"),
        "null": ("null.jsonl", plain, "line 1: the field 'text' holds NoneType"),
        "torn": ("torn.jsonl", plain, "line 2: no valid JSON"),
        "list": ("list.jsonl", plain, "not one record a line"),
        "folder": ("folder", plain, "not a dataset saved"),
        "column": ("field.parquet", plain, "no field 'text', there are 'content'"),
        "split": ("split", plain, "no split 'train', it has 'test'"),
    }


def test_every_bad_input_is_named_and_leaves_nothing(make: Callable[..., Path], tmp_path: Path) -> None:
    for name, (path, reading, message) in bad_inputs(tmp_path).items():
        before = contents(tmp_path)
        with pytest.raises(UserError, match=message):
            make([tmp_path / path], name="deep/corpus", reading=reading)
        assert contents(tmp_path) == before and not (tmp_path / "deep").exists(), name


def test_mistakes_of_options_are_named_and_leave_nothing(make: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "good.txt").write_text("one\n\ntwo")
    (tmp_path / "empty.txt").write_text(" \n")
    good, absent, empty = (tmp_path / name for name in ("good.txt", "absent", "empty.txt"))
    for inputs, settings, options, message in (
        ([good, good], ALL, {}, "twice"),
        ([tmp_path / "g*.txt", good], ALL, {}, "twice"),
        ([good], Settings(fraction=0), {}, "--fraction 0"),
        ([good], Settings(valid_fraction=1), {}, "--valid_fraction 1"),
        ([good], Settings(shard_megabytes=0), {}, "--shard_megabytes 0"),
        ([good], Settings(fraction=1e-9), {}, "nothing of the input's 2 documents"),
        ([good], Settings(valid_fraction=1 - 1e-9), {}, "cannot be divided"),
        ([good], ALL, {"workers": 0}, "--workers 0"),
        ([good], ALL, {"tokenizer": absent}, "no such file or directory"),
        ([good], ALL, {"lowercase": False}, "contradicts"),
        ([good], ALL, {"valid_inputs": {"law": [str(absent)]}}, "--valid_input law: .*absent does not exist"),
        ([good], ALL, {"valid_inputs": {"law": [str(good)]}}, "--valid_input law: holds a file of --input"),
        ([good], ALL, {"valid_inputs": {"law": [str(empty)]}}, "--valid_input law: no text in any of its files"),
    ):
        with pytest.raises(UserError, match=message):
            make(inputs, settings, **options)
        assert not (tmp_path / "corpus").exists(), message
    good.write_text("one document")
    with pytest.raises(UserError, match="cannot be divided"):
        make([good], Settings(valid_fraction=0.5))
    assert not (tmp_path / "corpus").exists()


def test_a_mistake_late_in_the_text_leaves_nothing_of_the_shards_before_it(
    make: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "late.txt").write_bytes("\n\n".join(TEXT).encode() + b"\n\n\xff")
    with pytest.raises(UserError, match="not UTF-8"):
        make([tmp_path / "late.txt"], Settings(shard_megabytes=0.05), workers=2)
    assert not (tmp_path / "corpus").exists()


def test_the_command_ends_with_2_and_one_message(tokenizer: Path, tmp_path: Path) -> None:
    line = ("--input", tmp_path / "none.txt", "--tokenizer", tokenizer, "--output_dir", tmp_path / "c")
    done = run("tools/prepare_corpus.py", *line)
    assert done.returncode == 2
    assert done.stderr == f"error: --input {tmp_path / 'none.txt'} does not exist\n"
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["law.txt"], "--valid_input law.txt: write NAME=FILE"),
        (["law="], "--valid_input law=: write NAME=FILE"),
        (["2=law.txt"], "--valid_input 2=law.txt: a name is letters"),
        (["agreement=law.txt"], "this name is taken"),
        (["Law=a.txt", "law=b.txt"], "Law and law would be one file"),
    ],
)
def test_held_out_sets_have_names(words: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        held_out_sets(words)
    assert held_out_sets(["law=a.txt", "law=b=c.txt", "news=d.txt"]) == {"law": ["a.txt", "b=c.txt"], "news": ["d.txt"]}


# ---- what Megatron made


def megatron_pair(prefix: Path, documents: Sequence[Sequence[Sequence[int]]], dtype: Any = np.int32) -> str:
    """A pair as preprocess_data writes it: documents of one or more sentences."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for document in documents:
        for sentence in document:
            builder.add_item(torch.tensor(sentence))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def test_adopted_pairs_become_a_corpus_with_every_document_ended_once(tokenizer: Path, tmp_path: Path) -> None:
    first = megatron_pair(tmp_path / "p0", [[[5, 6], [7]], [[8, 9, 3]]])  # sentences; the second has its [SEP]
    second = megatron_pair(tmp_path / "p1", [[[10, 11]], [[12]]], np.uint16)
    before = contents(tmp_path)
    adopt([second + ".bin", first], str(tokenizer), tmp_path / "corpus", ALL)
    assert stored(tmp_path / "corpus") == [[5, 6, 7, 3], [8, 9, 3], [10, 11, 3], [12, 3]]
    manifest = read_manifest(tmp_path / "corpus/manifest.json")
    assert manifest["dtype"] == "uint16" and [s["name"] for s in manifest["splits"]["train"]] == [
        "train-00000",
        "train-00001",
    ]
    assert before.items() <= contents(tmp_path).items()


def test_a_pair_that_the_shell_names_by_both_its_files_is_one(tokenizer: Path, tmp_path: Path) -> None:
    pair = megatron_pair(tmp_path / "x", [[[5, 6]], [[7]]])
    adopt([f"{pair}.bin", f"{pair}.idx"], str(tokenizer), tmp_path / "corpus", ALL)
    assert stored(tmp_path / "corpus") == [[5, 6, 3], [7, 3]]


def test_what_makes_a_corpus_worth_less_than_it_looks_is_said(
    make: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, text in (
        ("a.txt", "the <unk> of \U0001f600\U0001f600"),
        ("b.txt", ""),
        ("c.txt", "the <unk> of \U0001f600\U0001f600"),
    ):
        (tmp_path / name).write_text("\n\n".join([text] * 20))
    make([tmp_path / "a.txt", tmp_path / "b.txt", tmp_path / "c.txt"], Settings(valid_fraction=0.2))
    said = capsys.readouterr()
    assert f"warning: {tmp_path / 'a.txt'} and {tmp_path / 'c.txt'} hold the same; their text is read twice" in said.out
    assert re.search(r"of the tokens are unknown; in \d+ lines, most often '\U0001f600\U0001f600'", said.out)
    assert "The text itself has <unk> written in it" in said.out
    assert "held-out rows of 128 are few" in said.out
    assert f"{tmp_path / 'b.txt'} holds no text" in said.err


def test_a_corpus_of_ours_is_adopted_byte_for_byte(make: Callable[..., Path], tokenizer: Path, tmp_path: Path) -> None:
    ours = make(DOCUMENTS)
    adopt([str(ours / "train-00000")], str(tokenizer), tmp_path / "adopted", ALL)
    for name in ("train-00000.bin", "train-00000.idx"):
        assert (tmp_path / "adopted" / name).read_bytes() == (ours / name).read_bytes()
    adopt([str(ours / "train-00000")], str(tokenizer), tmp_path / "split", Settings(valid_fraction=0.1))
    train, valid = stored(tmp_path / "split"), stored(tmp_path / "split", "valid")
    assert valid and sorted(train + valid) == sorted(stored(ours))


def test_pairs_that_do_not_fit_are_refused(tokenizer: Path, tmp_path: Path) -> None:
    large = megatron_pair(tmp_path / "large", [[[5, 2000]]])
    short = megatron_pair(tmp_path / "short", [[[5, 6, 7]]])
    (tmp_path / "short.bin").write_bytes(b"\0" * 4)
    odd = megatron_pair(tmp_path / "odd", [[[5]]])
    (tmp_path / "odd.idx").write_bytes(b"no index")
    for prefix, message in (
        (large, "holds the id 2000, the tokenizer has 2000 tokens"),
        (short, "lie outside its 4 bytes"),
        (odd, "not an index"),
        (str(tmp_path / "none"), "none.idx does not exist"),
    ):
        with pytest.raises(UserError, match=message):
            adopt([prefix], str(tokenizer), tmp_path / "corpus", ALL)
        assert not (tmp_path / "corpus").exists()
