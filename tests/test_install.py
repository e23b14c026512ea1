"""The wheel alone, in an environment that knows no checkout, trains and exports by the program `ctcd`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from commands import ROOT
from ctcd_ds.training.ops import settle_extensions


@pytest.fixture(scope="module")
def ctcd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program of an environment into which only the wheel was installed; torch and the like are lent."""
    folder = tmp_path_factory.mktemp("install")
    for name in ("ctcd_ds", "ds_configs", "launchers"):
        shutil.copytree(ROOT / name, folder / "source" / name, symlinks=True)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source" / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    offline = ["--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "wheel", *offline, "--wheel-dir", folder, folder / "source"], check=True, timeout=200)
    [wheel] = folder.glob("*.whl")
    shutil.rmtree(folder / "source")
    venv.create(folder / "venv", symlinks=True)
    python = folder / "venv" / "bin" / "python"
    subprocess.run([*pip, "--python", python, "install", *offline, wheel], check=True, timeout=200)
    [packages] = folder.glob("venv/lib/*/site-packages")
    (packages / "lent.pth").write_text(sysconfig.get_path("purelib") + "\n")  # its own .pth files are not read
    return python.with_name("ctcd")


def run(ctcd: Path, place: Path, *words: object) -> str:
    """What a command says, started in `place`."""
    settle_extensions()  # DeepSpeed's op is there already: this environment is another, and would build it anew
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    line = [str(word) for word in (ctcd, *words)]
    done = subprocess.run(line, cwd=place, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_wheel_goes_the_whole_way(ctcd: Path, tmp_path: Path) -> None:
    found = run(ctcd.with_name("python"), tmp_path, "-c", "import ctcd_ds; print(ctcd_ds.__file__)")
    assert Path(found.strip()).is_relative_to(ctcd.parents[1]), "not the checkout's"

    overview = run(ctcd, tmp_path)
    assert all(f"\n  {name} " in overview for name in ("tokenizer", "pretrain", "submit"))
    listed = run(ctcd, tmp_path, "recipes")
    run(ctcd, tmp_path, "recipes", "--output_dir", "configs")
    shipped = [path.relative_to(ROOT / "ds_configs") for path in (ROOT / "ds_configs").rglob("*.[yj]*")]
    assert {line.split()[0] for line in listed.splitlines()} == set(map(str, shipped))
    assert all(
        (tmp_path / "configs" / name).read_bytes() == (ROOT / "ds_configs" / name).read_bytes() for name in shipped
    )

    lines = [" ".join(f"w{n * k % 97}" for k in range(40)) for n in range(300)]
    (tmp_path / "text.txt").write_text("\n\n".join(lines) + "\n")
    run(ctcd, tmp_path, "tokenizer", "--input", "text.txt", "--vocab_size", 120, "--output_dir", "tokenizer")
    made = ("--tokenizer", "tokenizer", "--output_dir", "corpus", "--valid_fraction", 0.2)
    run(ctcd, tmp_path, "corpus", "--input", "text.txt", *made)
    meant = ("--recipe", "configs/recipes/demo.yaml", "--deepspeed_config", "configs/cpu.json", "--output_dir", "run")
    few = ("training.steps=5", "training.valid_every=5", "training.valid_rows=16")
    changes = ("--set", "corpus.path=corpus", "corpus.train_rows=null", *few)
    assert "set -uo pipefail" in run(ctcd, tmp_path, "submit", *meant, *changes, "--print")
    assert "finished: 5 steps" in run(ctcd, tmp_path, "pretrain", *meant, *changes)
    said = run(ctcd, tmp_path, "export", "--checkpoint", "run", "--output_dir", "hf")
    assert "exported student" in said and (tmp_path / "hf" / "student" / "model.safetensors").exists()
