"""Every file that a command reads, as random bytes, cut, empty, or of wrong types: a message and an exit code.

Never a traceback, never a hang, nothing half-written. Code 0 where what is left is a good file (a text that was cut),
2 where a file cannot be used, 1 where it is not what its manifest says.
"""

from __future__ import annotations

import csv
import gzip
import json
import lzma
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import zstandard

from commands import ROOT, command
from ctcd_ds.manifest import canonical_sha256
from runs import Job, bert, run_jobs

pytestmark = pytest.mark.faults
WORDS = ["the", "cat", "sat", "on", "mat", "while", "it", "was", "raining", "old", "towns", "rivers", "people", "bread"]


def texts(number: int = 400) -> list[str]:
    chance = random.Random(1)
    return [" ".join(chance.choices(WORDS, k=chance.randint(8, 40))) + "." for _ in range(number)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of everything: texts in all forms, tokenizers, a corpus, a finished run, an exported model, GLUE files."""
    import pyarrow
    from pyarrow import parquet

    from ctcd_ds.corpus.prepare import Settings, prepare
    from ctcd_ds.corpus.sources import Reading
    from ctcd_ds.corpus.tokenizer_training import train_tokenizer
    from ctcd_ds.export.hf import export

    folder, documents = tmp_path_factory.mktemp("made"), texts()
    plain = "\n\n".join(documents).encode()
    (folder / "a.txt").write_bytes(plain)
    (folder / "a.txt.gz").write_bytes(gzip.compress(plain))
    (folder / "a.txt.xz").write_bytes(lzma.compress(plain))
    (folder / "a.txt.zst").write_bytes(zstandard.compress(plain))
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    parquet.write_table(pyarrow.table({"text": documents}), folder / "a.parquet")
    train_tokenizer("wordpiece", lambda caption: iter(documents), 60, True, folder / "tokenizer")
    vocabulary = json.loads((folder / "tokenizer" / "tokenizer.json").read_text())["model"]["vocab"]
    (folder / "vocab.txt").write_text("\n".join(sorted(vocabulary, key=vocabulary.get)))
    train_tokenizer("unigram", lambda caption: iter(documents), 36, True, folder / "unigram")
    for model in (folder / "unigram").glob("*.model"):
        shutil.copy(model, folder / "sp.model")
    prepare(
        [str(folder / "a.txt")], str(folder / "tokenizer"), folder / "corpus", Settings(valid_fraction=0.05), Reading()
    )
    recipe = {
        "corpus": {"path": str(folder / "corpus"), "sequence_length": 32},
        "peers": {"only": {"model": bert(16, 1)}},
        "training": {"global_batch_rows": 4, "steps": 2, "checkpoint_every": 1},
    }
    run_jobs([Job(recipe, folder / "run")], 1, folder)
    export(folder / "run", "only", folder / "hf")
    learner = {**recipe, "peers": {"student": {"pretrained": str(folder / "hf")}}}
    (folder / "recipe.yaml").write_text(json.dumps(learner, indent=1))
    (folder / "recipe.json").write_text(json.dumps(recipe))
    (folder / "d.json").write_text('{"zero_optimization": {"stage": 2}, "train_batch_size": "auto"}')
    (folder / "glue" / "RTE").mkdir(parents=True)
    for first, name in enumerate(("train", "dev")):
        with (folder / "glue" / "RTE" / f"{name}.tsv").open("w", newline="") as file:
            rows = csv.writer(file, delimiter="\t")
            rows.writerow(["index", "sentence1", "sentence2", "label"])
            rows.writerows(
                [n, documents[n + first], documents[n + 2], ("entailment", "not_entailment")[n % 2]] for n in range(8)
            )
    return folder


def prepare(source: str, tokenizer: str = "tokenizer") -> list[str]:
    return [
        "tools/prepare_corpus.py",
        "--input",
        source,
        "--tokenizer",
        tokenizer,
        "--output_dir",
        "new",
        "--workers",
        "1",
    ]


def pretrain(recipe: str = "recipe.yaml", *more: str) -> list[str]:
    return ["launchers/pretrain.py", "--recipe", recipe, "--deepspeed_config", "d.json", *(more or DRY)]


DRY = ("--output_dir", "new", "--dry_run")
OTHER = ("--output_dir", "run", "--resume", "--set", "seed=2")  # refused in the end, after all was read
GLUE = [
    "tools/run_glue.py",
    "--model",
    "hf",
    "--tasks",
    "rte",
    "--data_dir",
    "glue",
    "--output_dir",
    "new",
    "--epochs",
    "1",
]
ADOPT = ["tools/prepare_corpus.py", "--adopt", "corpus/train-00000", "--tokenizer", "tokenizer", "--output_dir", "new"]
EXPORT = ["tools/export_hf.py", "--checkpoint", "run", "--output_dir", "new"]
STEP = "run/checkpoints/step-00000002"
READS: list[tuple[str, list[str]]] = [
    ("a.txt", prepare("a.txt")),
    ("a.txt.gz", prepare("a.txt.gz")),
    ("a.txt.xz", prepare("a.txt.xz")),
    ("a.txt.zst", prepare("a.txt.zst")),
    ("a.jsonl", prepare("a.jsonl")),
    ("a.parquet", prepare("a.parquet")),
    ("tokenizer/tokenizer.json", prepare("a.txt")),
    ("tokenizer/tokenizer_config.json", prepare("a.txt")),
    ("vocab.txt", prepare("a.txt", "vocab.txt")),
    ("sp.model", prepare("a.txt", "sp.model")),
    ("a.txt", ["tools/train_tokenizer.py", "--input", "a.txt", "--vocab_size", "60", "--output_dir", "new"]),
    ("corpus/train-00000.idx", ADOPT),
    ("corpus/train-00000.bin", ADOPT),
    ("recipe.yaml", pretrain()),
    ("recipe.json", pretrain("recipe.json")),
    ("d.json", pretrain()),
    ("corpus/manifest.json", pretrain()),
    ("corpus/train-00000.idx", pretrain()),
    ("corpus/tokenizer/tokenizer.json", pretrain()),
    ("hf/config.json", pretrain()),
    ("hf/tokenizer.json", pretrain()),
    ("run/exit.json", pretrain("recipe.json", *OTHER)),
    ("run/recipe.yaml", pretrain("recipe.json", *OTHER)),
    (f"{STEP}/manifest.json", pretrain("recipe.json", *OTHER)),
    (f"{STEP}/manifest.json", EXPORT),
    (f"{STEP}/deepspeed/mp_rank_00_model_states.pt", EXPORT),
    ("run/recipe.yaml", EXPORT),
    ("run/peers/only/config.json", EXPORT),
    ("run/tokenizer/tokenizer.json", EXPORT),
    (f"{STEP}/manifest.json", ["tools/verify.py", "run"]),
    ("corpus/manifest.json", ["tools/verify.py", "corpus"]),
    ("corpus/train-00000.bin", ["tools/verify.py", "corpus"]),
    ("glue/RTE/train.tsv", GLUE),
    ("glue/RTE/dev.tsv", GLUE),
    ("hf/config.json", GLUE),
    ("hf/tokenizer.json", GLUE),
    ("hf/model.safetensors", GLUE),
]  # fmt: skip


def noise(content: bytes) -> bytes:
    return random.Random(len(content)).randbytes(max(64, len(content) // 2))


def cut(content: bytes) -> bytes:
    return content[: len(content) * 2 // 3]


def flipped(content: bytes) -> bytes:
    chance, changed = random.Random(1), bytearray(content)
    for _ in range(20):
        changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def empty(_: bytes) -> bytes:
    return b""


WRONG = (None, 7, "x", [1], {"a": {}})


def wrong_types(content: bytes, each: int) -> Iterator[bytes]:
    """The same JSON with one value of another type, `each` of them for each of its first keys, and no object at all."""
    whole = json.loads(content)
    signed = whole.pop("sha256", None) is not None
    yield b"[1, 2]"
    yield b"null"
    for number, key in enumerate(list(whole)[:12]):
        for place in range(number, number + each):
            changed = {**whole, key: WRONG[place % len(WRONG)]}
            signature = {"sha256": canonical_sha256(changed)} if signed else {}  # else only that is wrong
            yield json.dumps({**changed, **signature}).encode()


@contextmanager
def replaced(path: Path, content: bytes) -> Iterator[None]:
    before = path.read_bytes()
    path.write_bytes(content)
    try:
        yield
    finally:
        path.write_bytes(before)


def check(made: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, line: list[str], name: str, content: bytes) -> int:
    monkeypatch.chdir(made)
    with replaced(made / name, content):
        code, out, err = command(monkeypatch, capsys, *line)
    assert code in (0, 1, 2), (code, err)
    assert "Traceback" not in err
    if code:
        assert err.strip() or "problem" in out, "it ended without a word"
        left = sorted(path.name for path in made.glob("new*")) + sorted(path.name for path in made.glob(".new*"))
        assert line == GLUE or not left, f"left behind: {left}"
    for path in (*made.glob("new*"), *made.glob(".new*")):
        shutil.rmtree(path)
    return code


def label(case: tuple[str, list[str]]) -> str:
    return f"{Path(case[1][0]).stem}-{case[0].replace('/', '.')}"


@pytest.mark.parametrize("case", READS, ids=label)
@pytest.mark.parametrize("damage", [noise, cut, flipped, empty], ids=lambda f: f.__name__)
def test_a_broken_file_is_a_message(
    made: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, case: tuple[str, list[str]], damage: Callable[..., bytes]
) -> None:
    name, line = case
    code = check(made, monkeypatch, capsys, line, name, damage((made / name).read_bytes()))
    # An older checkpoint is exported; a dry run does not look into the corpus.
    harmless = name.startswith(("run/exit.json", "run/recipe.yaml", STEP, "corpus/tokenizer")) or line == GLUE
    if damage in (noise, empty) and not harmless:
        assert code, f"{name} as {damage.__name__} went through"


@pytest.mark.parametrize("each", [2, pytest.param(len(WRONG), marks=pytest.mark.nightly)])
@pytest.mark.parametrize("case", [case for case in READS if case[0].endswith(".json")], ids=label)
def test_a_json_file_of_wrong_types_is_a_message(
    made: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, case: tuple[str, list[str]], each: int
) -> None:
    name, line = case
    for content in wrong_types((made / name).read_bytes(), each):
        check(made, monkeypatch, capsys, line, name, content)


def test_what_is_not_broken_goes_through(made: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """The other tests would prove nothing if every command failed anyway."""
    for line in (prepare("a.txt"), prepare("a.txt", "sp.model"), pretrain(), pretrain("recipe.json"), EXPORT, GLUE):
        assert check(made, monkeypatch, capsys, line, "d.json", (made / "d.json").read_bytes()) == 0, line
    assert (
        check(made, monkeypatch, capsys, pretrain("recipe.json", *OTHER), "d.json", (made / "d.json").read_bytes()) == 2
    )
    assert ROOT.is_dir()
