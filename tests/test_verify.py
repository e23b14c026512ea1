"""`tools/verify.py` finds whatever is not as it was written, and names it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from commands import command
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
    manifest.write_text(manifest.read_text().replace('"version": 1', '"version": 2'))
    return "was changed or damaged"


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("damage", [flip, remove, truncate, add, change_manifest], ids=lambda f: f.__name__)
def test_any_damage_is_found_and_named(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, part: str, damage: Any
) -> None:
    shutil.copytree(made / part, tmp_path / part)
    code, out, err = command(monkeypatch, capsys, "tools/verify.py", tmp_path / part)
    assert (code, "0 problems" in out) == (0, True), out + err
    said = damage(tmp_path / part / PARTS[part])
    code, out, _ = command(monkeypatch, capsys, "tools/verify.py", tmp_path / part)
    assert code == 1 and said in out and str(tmp_path) in out


def test_another_tokenizer_in_a_corpus_is_found(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    shutil.copytree(made / "corpus", tmp_path / "corpus")
    shutil.rmtree(tmp_path / "corpus" / "tokenizer")
    other = chain_corpus(tmp_path / "other", vocab_size=200)
    shutil.copytree(other / "tokenizer", tmp_path / "corpus" / "tokenizer")
    code, out, _ = command(monkeypatch, capsys, "tools/verify.py", tmp_path / "corpus")
    assert code == 1 and "its identity is" in out


def test_what_has_no_manifest_is_a_mistake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    code, _, err = command(monkeypatch, capsys, "tools/verify.py", tmp_path)
    assert code == 2 and "neither a run" in err
