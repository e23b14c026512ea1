"""`tools/verify.py` finds whatever is not as it was written, and names it."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from commands import ROOT, command
from corpora import write_shard
from ctcd_ds.cli import UserError
from ctcd_ds.commands import verify
from ctcd_ds.corpus.rows import read_corpus_manifest
from ctcd_ds.manifest import read_manifest, sampled_sha256, write_manifest
from ctcd_ds.training import checkpoint
from runs import Job, bert, chain_corpus, run_jobs


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus and a run with two checkpoints."""
    folder = tmp_path_factory.mktemp("made")
    chain_corpus(folder / "corpus")
    recipe = {
        "corpus": {"path": str(folder / "corpus"), "sequence_length": 32},
        "peers": {"only": {"model": bert(16, 1)}},
        "training": {"global_batch_rows": 8, "steps": 2, "checkpoint_every": 1},
    }
    run_jobs([Job(recipe, folder / "run")], 1, folder)
    return folder


PARTS = {
    "corpus": "train-00000.bin",
    "run": "checkpoints/step-00000001/deepspeed/mp_rank_00_model_states.pt",
    "run/checkpoints/step-00000002": "deepspeed/mp_rank_00_model_states.pt",
}


def flip(path: Path) -> str:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return "the manifest says"


def remove(path: Path) -> str:
    path.unlink()
    return "missing"


def truncate(path: Path) -> str:
    path.write_bytes(path.read_bytes()[:-1])
    return "bytes, the manifest says"


def add(path: Path) -> str:
    path.with_name("stranger.pt").write_bytes(b"x")
    return "no file of the manifest's"


def change_manifest(path: Path) -> str:
    manifest = next(folder / "manifest.json" for folder in path.parents if (folder / "manifest.json").exists())
    manifest.write_text(manifest.read_text().replace('"version": ', '"version": 1'))
    return "was changed or damaged"


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("damage", [flip, remove, truncate, add, change_manifest], ids=lambda f: f.__name__)
def test_any_damage_is_found_and_named(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, part: str, damage: Any
) -> None:
    shutil.copytree(made / part, tmp_path / part)
    code, out, err = command(monkeypatch, capsys, "tools/verify.py", tmp_path / part)
    assert (code, "all as it was written" in out) == (0, True), out + err
    said = damage(tmp_path / part / PARTS[part])
    code, out, _ = command(monkeypatch, capsys, "tools/verify.py", tmp_path / part)
    assert code == 1 and said in out and str(tmp_path) in out


def test_every_byte_is_covered(made: Path, tmp_path: Path) -> None:
    """A bit flipped anywhere in any file is found, and the file is named; exit.json and TensorBoard's are not ours."""
    for part in ("corpus", "run"):
        shutil.copytree(made / part, tmp_path / part)
        files = [path for path in (tmp_path / part).rglob("*") if path.is_file()]
        free = {path for path in files if path.name == "exit.json" or path.parent.name == "tensorboard"}
        assert len(set(files) - free) > 6 and not list(verify_all(tmp_path / part))
        for file in set(files) - free:
            written = file.read_bytes()
            for place in {0, len(written) // 3, len(written) - 1}:
                file.write_bytes(written[:place] + bytes([written[place] ^ 1]) + written[place + 1 :])
                assert any(str(file) in said for said in verify_all(tmp_path / part)), (file, place)
            if file != tmp_path / "corpus" / "manifest.json":  # without it, it is none
                file.unlink()
                assert any(str(file) in said for said in verify_all(tmp_path / part)), file
            file.write_bytes(written)


def verify_all(path: Path) -> list[str]:
    return [problem for place in verify.find(path) for problem in verify.problems(place)]


def test_another_tokenizer_in_a_corpus_is_found(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    shutil.copytree(made / "corpus", tmp_path / "corpus")
    shutil.rmtree(tmp_path / "corpus" / "tokenizer")
    other = chain_corpus(tmp_path / "other", vocab_size=200)
    shutil.copytree(other / "tokenizer", tmp_path / "corpus" / "tokenizer")
    code, out, _ = command(monkeypatch, capsys, "tools/verify.py", tmp_path / "corpus")
    assert code == 1 and "its identity is" in out


READERS = {"corpus": read_corpus_manifest, "run/checkpoints/step-00000002": checkpoint.read}
many = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.parametrize("part", READERS)
@given(place=st.floats(0, 1, exclude_max=True), cut=st.integers(0, 40), put=st.binary(max_size=40))
@many
def test_a_manifest_is_what_was_written_or_is_refused(
    made: Path, tmp_path: Path, part: str, place: float, cut: int, put: bytes
) -> None:
    """Any bytes anywhere in it replaced by any others: never read as something else."""
    written = (made / part / "manifest.json").read_bytes()
    at = int(place * len(written))
    (tmp_path / "manifest.json").write_bytes(written[:at] + put + written[at + cut :])
    try:
        assert READERS[part](tmp_path) == READERS[part](made / part)  # nothing but white space was touched
    except UserError as said:
        assert str(tmp_path) in str(said)


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=5,
)


@pytest.mark.parametrize("part", READERS)
@given(data=st.data(), value=anything)
@many
def test_a_manifest_with_a_good_hash_and_a_wrong_value_is_a_message(
    made: Path, tmp_path: Path, part: str, data: st.DataObject, value: Any
) -> None:
    """Any value in it replaced by any other, and signed anew: read, or a message; never a crash."""
    manifest = read_manifest(made / part / "manifest.json")
    del manifest["sha256"]
    holder: Any = manifest
    while True:
        keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        key = data.draw(st.sampled_from(keys))
        if not (isinstance(holder[key], (dict, list)) and holder[key] and data.draw(st.booleans())):
            break
        holder = holder[key]
    holder[key] = value
    write_manifest(tmp_path / "manifest.json", manifest)
    try:
        READERS[part](tmp_path)
    except UserError as said:
        assert str(tmp_path) in str(said)


def test_what_has_no_manifest_is_a_mistake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    code, _, err = command(monkeypatch, capsys, "tools/verify.py", tmp_path)
    assert code == 2 and "neither a run" in err and "it is a folder; `ctcd pretrain` makes one" in err


def large_corpus(directory: Path, documents: int) -> Path:
    """Shards larger than all sampled blocks together."""
    made = chain_corpus(directory)
    tokens = np.random.default_rng(0).integers(5, 300, (documents, 200))
    manifest = read_manifest(made / "manifest.json")
    del manifest["sha256"]
    manifest["splits"]["train"] = [write_shard(made, "train-00000", tokens.tolist(), 300, sep=3)]
    write_manifest(made / "manifest.json", manifest)
    return made


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "sampled"])
def test_a_damaged_corpus_is_found_before_the_first_step(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, whole: bool
) -> None:
    """With both hashes and its path, exit code 1, and no run directory is made. Large corpora are read in samples."""
    corpus = large_corpus(tmp_path / "corpus", 6000)
    victim = corpus / "train-00000.bin"
    assert victim.stat().st_size > 2 * 2**20
    if not whole:
        monkeypatch.setattr("ctcd_ds.corpus.damage.READ_WHOLE_BYTES", 0)
    content = bytearray(victim.read_bytes())
    if whole:
        content[len(content) // 2 + 12345] ^= 1
    else:  # a torn copy: nothing after its middle
        content[len(content) // 2 :] = bytes(len(content) - len(content) // 2)
    victim.write_bytes(content)
    recipe = {
        "corpus": {"path": str(corpus), "sequence_length": 32},
        "peers": {"only": {"model": bert(16, 1)}},
        "training": {"global_batch_rows": 8, "steps": 2},
    }
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    files = ("--recipe", tmp_path / "recipe.json", "--deepspeed_config", ROOT / "ds_configs" / "cpu.json")
    line = ("launchers/pretrain.py", *files, "--output_dir", tmp_path / "run")
    code, _, err = command(monkeypatch, capsys, *line)
    assert code == 1 and f"{victim}: sha256" in err and "the manifest says" in err
    assert not (tmp_path / "run").exists()


def test_checking_samples_reads_little(tmp_path: Path) -> None:
    """A file of 100 GB, nearly all of it a hole, is sampled in a moment; its ends are in it."""
    path = tmp_path / "huge.bin"
    with path.open("wb") as file:
        file.truncate(10**11)
    begun, before = time.monotonic(), sampled_sha256(path)
    assert time.monotonic() - begun < 1
    for place in (0, 10**11 - 1):
        with path.open("r+b") as file:
            file.seek(place)
            file.write(b"x")
        after = sampled_sha256(path)
        assert after != before
        before = after
