"""Checkpoints: which are kept, what a dead process leaves, a full disk, files of strangers."""

from __future__ import annotations

import copyreg
import enum
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import forks
from ctcd_ds.cli import RunFailure, UserError
from ctcd_ds.manifest import file_entry, read_manifest, write_manifest
from ctcd_ds.recipe.sections import TrainingSection
from ctcd_ds.training import checkpoint
from ctcd_ds.training.loading import consolidated, refuse_code
from ctcd_ds.training.saving import stage_as_number
from runs import FP16, FP32, ROOT, Job, bert, chain_corpus, metrics, run_jobs


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chain_corpus(tmp_path_factory.mktemp("corpus") / "chain")


def recipe(corpus: Path, steps: int, width: int = 16, **training: Any) -> dict[str, Any]:
    return {
        "corpus": {"path": str(corpus), "sequence_length": 32},
        "peers": {
            "teacher": {"model": bert(width, 2), "soft": {"student": 1.0}},
            "student": {"model": bert(width, 1), "soft": {"teacher": 4.0}},
        },
        "training": {"global_batch_rows": 8, "steps": steps, "log_every": 1, "valid_every": 1000, **training},
    }


@pytest.fixture(scope="module")
def runs(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three short runs: every checkpoint kept, some of them kept, and one in fp16."""
    folder = tmp_path_factory.mktemp("runs")
    every = recipe(corpus, 4, checkpoint_every=1, keep_checkpoints=9)
    some = recipe(corpus, 12, checkpoint_every=1, keep_checkpoints=2, keep_every=5, keep_best=True, valid_every=2)
    some["optimizer"] = {"lr": 0.02}
    some["schedule"] = {"type": "constant", "warmup_fraction": 0.0}
    run_jobs(
        [Job(every, folder / "every"), Job(some, folder / "some"), Job(recipe(corpus, 4), folder / "fp16", FP16)],
        2,
        folder,
    )
    return folder


def tags(run: Path) -> list[int]:
    return [int(path.name[5:]) for path in sorted((run / "checkpoints").glob("step-*"))]


@pytest.fixture
def run(runs: Path, tmp_path: Path) -> Path:
    """A copy of the run with checkpoints 1, 2, 3, 4, to be damaged."""
    return Path(shutil.copytree(runs / "every", tmp_path / "run"))


def test_kept_are_the_newest_every_fifth_and_the_best_of_each_peer(runs: Path) -> None:
    rows = metrics(runs / "some")
    measured = {step: row for step, row in rows.items() if "valid/teacher/loss" in row}
    best = {min(measured, key=lambda s: measured[s][f"valid/{peer}/loss"]) for peer in ("teacher", "student")}
    assert tags(runs / "some") == sorted({11, 12, 5, 10} | best)
    for step in best:
        manifest = checkpoint.read(runs / "some" / "checkpoints" / f"step-{step:08d}")
        assert manifest["valid"]["teacher"] == measured[step]["valid/teacher/loss"]


def test_an_improvement_is_saved_when_it_is_seen(corpus: Path, tmp_path: Path) -> None:
    """With keep_best, without any interval: the best checkpoint is there although nothing else asked for it."""
    plan = recipe(corpus, 6, keep_checkpoints=1, keep_best=True, valid_every=2)
    plan["optimizer"], plan["schedule"] = {"lr": 0.5, "max_grad_norm": 0.0}, {"warmup_fraction": 0.5}
    run_jobs([Job(plan, tmp_path / "run")], 1, tmp_path)
    losses = {s: r["valid/student/loss"] for s, r in metrics(tmp_path / "run").items() if "valid/student/loss" in r}
    assert min(losses, key=lambda s: losses[s]) in tags(tmp_path / "run")


def test_pruning_counts_good_ones_only(run: Path) -> None:
    """Two newer checkpoints have lost their manifests: they do not push the last good one out."""
    for step in (3, 4):
        (run / "checkpoints" / f"step-{step:08d}" / "manifest.json").unlink()
    (run / "checkpoints" / "step-00000001-by-hand").mkdir()
    checkpoint.prune(run / "checkpoints", TrainingSection(steps=4, keep_checkpoints=1))
    assert sorted(path.name for path in (run / "checkpoints").glob("step-*")) == [
        "step-00000001-by-hand",
        "step-00000002",
        "step-00000003",
        "step-00000004",
    ]


def test_the_newest_good_one_is_taken_and_the_others_are_named(run: Path, capsys: Any) -> None:
    flipped = run / "checkpoints" / "step-00000004" / "deepspeed" / "mp_rank_00_model_states.pt"
    content = bytearray(flipped.read_bytes())
    content[100] ^= 1
    flipped.write_bytes(content)
    (run / "checkpoints" / "step-00000003" / "manifest.json").write_text("{")
    found = checkpoint.newest(run / "checkpoints")
    assert found is not None and found[0].name == "step-00000002"
    said = capsys.readouterr().out
    assert f"{flipped}: sha256 " in said and "the manifest says" in said and "step-00000003" in said


def test_where_none_is_good_nothing_begins_anew(run: Path) -> None:
    for path in (run / "checkpoints").glob("step-*/deepspeed/*.pt"):
        path.write_bytes(b"")
    with pytest.raises(RunFailure, match=r"none of its 4 checkpoints is good: \S*step-00000004 is damaged"):
        checkpoint.newest(run / "checkpoints", say=lambda text: None)


def test_what_a_dead_process_left_is_removed_and_nothing_else(run: Path) -> None:
    place = run / "checkpoints"
    for name in (".step-00000005.tmp", ".step-00000004.universal", ".step-00000001.removed"):
        (place / name / "deepspeed").mkdir(parents=True)
    (place / ".latest.123.tmp").write_text("step")
    (place / ".mine").mkdir()
    assert checkpoint.newest(place) is not None
    checkpoint.clean(place)
    assert sorted(path.name for path in place.iterdir() if path.name.startswith(".")) == [".mine"]
    assert tags(run) == [1, 2, 3, 4]


def test_the_size_is_known_before_it_is_written(runs: Path) -> None:
    """What the space check asks for is what a checkpoint takes, within a mebibyte a rank."""
    [said] = [line for line in describe(runs).splitlines() if line.startswith("checkpoints")]
    size = sum(path.stat().st_size for path in (runs / "every" / "checkpoints" / "step-00000004").rglob("*.pt"))
    assert said.endswith(f"about {needed(runs) / 2**20:.0f} MiB each")
    assert 0 <= needed(runs) - size <= 3 * 2**20


def needed(runs: Path) -> int:
    from ctcd_ds.training.plan import checkpoint_bytes

    return checkpoint_bytes(plan_of(runs))


def describe(runs: Path) -> str:
    from ctcd_ds.training.plan import describe

    return describe(plan_of(runs))


def plan_of(runs: Path) -> Any:
    from ctcd_ds.recipe.reading import load_recipe
    from ctcd_ds.training.plan import make_plan

    return make_plan(load_recipe(runs / "every" / "recipe.yaml"), FP32, 2, "cpu", runs)


# ---- a disk that does not take it


def ranks_line(corpus: Path, folder: Path, run: Path, **training: Any) -> list[str]:
    import json

    (folder / "recipe.json").write_text(json.dumps(recipe(corpus, 30, width=64, **training)))
    (folder / "d.json").write_text('{"zero_optimization": {"stage": 2}}')
    line = [ROOT / "launchers" / "pretrain.py", "--recipe", folder / "recipe.json", "--deepspeed_config"]
    return [*map(str, [*line, folder / "d.json", "--output_dir", run])]


def alone(line: list[str], *before: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if not before:
        return forks.run(line, environment, ROOT)
    line = [*before, sys.executable, *line]
    return subprocess.run(line, capture_output=True, text=True, env=environment, timeout=500, check=False)


def test_a_full_disk_is_found_before_saving(corpus: Path, tmp_path: Path) -> None:
    """A file system of its own with room for one checkpoint and not for two."""
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(place)], check=False)
    if mounted.returncode:
        pytest.skip("no file system may be mounted here")
    try:
        line = ranks_line(corpus, tmp_path, place / "run", checkpoint_every=4, keep_checkpoints=9)
        done = alone(line)
        assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr[-2000:]
        assert "the checkpoint of step 8 was not written: [rank 0] not enough free space" in done.stderr
        assert (
            "It needs about " in done.stderr
            and "bytes are free. The checkpoint step-00000004 is as it was" in done.stderr
        )
        assert tags(place / "run") == [4]
        checkpoint.verify(place / "run" / "checkpoints" / "step-00000004")
        # With room again, --resume goes on from there.
        subprocess.run(["mount", "-o", "remount,size=200m", str(place)], check=True)
        done = alone([*line, "--resume"])
        assert done.returncode == 0 and "going on from" in done.stdout, done.stderr[-2000:]
    finally:
        subprocess.run(["umount", str(place)], check=False)


LONGER = ["--resume", "--set", "training.steps=30", "schedule.type=constant", "schedule.warmup_fraction=0"]


def begun(corpus: Path, folder: Path, run: Path) -> list[str]:
    """The command of a run that is at its first checkpoint, of step 4, and has 26 steps to go."""
    line = ranks_line(corpus, folder, run, checkpoint_every=4)
    first = alone([*line, *LONGER[1:], "training.steps=4"])
    assert first.returncode == 0, first.stderr[-2000:]
    return [*line, *LONGER]


def is_as_it_was(run: Path, step: int = 4) -> None:
    """Nothing but the old checkpoint is there, and it is whole."""
    assert tags(run) == [step] and not list((run / "checkpoints").glob(".*"))
    checkpoint.verify(run / "checkpoints" / f"step-{step:08d}")


def test_a_write_that_fails_halfway_leaves_the_old_checkpoint(corpus: Path, tmp_path: Path) -> None:
    """The system refuses files beyond a size: the shard is cut in its middle."""
    if not shutil.which("prlimit"):
        pytest.skip("no prlimit here")
    run = tmp_path / "run"
    done = alone(begun(corpus, tmp_path, run), "prlimit", f"--fsize={600 * 1024}")
    assert done.returncode == 1 and "the checkpoint of step 8 was not written: [rank 0] " in done.stderr, done.stderr
    assert "File too large" in done.stderr and "Traceback" not in done.stderr
    is_as_it_was(run)


@pytest.mark.parametrize("what", ["the checkpoints", "the whole run directory"])
def test_a_read_only_file_system_is_said_and_the_run_goes_on_later(corpus: Path, tmp_path: Path, what: str) -> None:
    run = tmp_path / "run"
    line, place = begun(corpus, tmp_path, run), run / "checkpoints" if what == "the checkpoints" else run
    if subprocess.run(["mount", "--bind", place, place], check=False).returncode:
        pytest.skip("no file system may be mounted here")
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", place], check=True)
        done = alone(line)
    finally:
        subprocess.run(["umount", place], check=True)
    ends_with = 1 if what == "the checkpoints" else 2  # that nothing can be written there is seen before the start
    assert done.returncode == ends_with and "Read-only file system" in done.stderr, done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    if what == "the checkpoints":
        assert "the checkpoint of step 8 was not written" in done.stderr and "bytes are free" in done.stderr
    is_as_it_was(run)
    done = alone(line)
    assert done.returncode == 0 and "going on from" in done.stdout, done.stderr[-2000:]


@pytest.mark.nightly
def test_a_quota_is_said_and_the_old_checkpoint_stays(corpus: Path, tmp_path: Path) -> None:
    """The disk has room, the folder's quota (of btrfs, on a file) has not."""
    if not shutil.which("mkfs.btrfs"):
        pytest.skip("no mkfs.btrfs here (btrfs-progs)")
    image, place = tmp_path / "image", tmp_path / "place"
    place.mkdir()
    with image.open("wb") as file:
        file.truncate(200 << 20)
    subprocess.run(["mkfs.btrfs", "-q", image], check=True)
    if subprocess.run(["mount", "-o", "loop", image, place], check=False).returncode:
        pytest.skip("no file system may be mounted here")

    def btrfs(*words: object) -> None:
        subprocess.run(["btrfs", *map(str, words)], check=True, stdout=subprocess.DEVNULL)

    try:
        btrfs("quota", "enable", place)
        btrfs("subvolume", "create", place / "mine")
        run = place / "mine" / "run"
        line = begun(corpus, tmp_path, run)
        btrfs("qgroup", "limit", "5M", place / "mine")
        done = alone(line)
        assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr[-2000:]
        assert "the checkpoint of step 8 was not written" in done.stderr and "bytes are free" in done.stderr
        assert "Disk quota exceeded" in done.stderr, done.stderr[-2000:]
        is_as_it_was(run)
        btrfs("qgroup", "limit", "none", place / "mine")
        done = alone(line)
        assert done.returncode == 0 and "going on from" in done.stdout, done.stderr[-2000:]
    finally:
        subprocess.run(["umount", place], check=True)


# ---- files of strangers


class Evil:
    """Unpickled, it leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.mark}",)


def hide(run: Path, name: str, content: Any, **how: Any) -> Path:
    """Puts `content` in the place of a shard of step 4, with a manifest that says so."""
    place = run / "checkpoints" / "step-00000004"
    torch.save(content, place / "deepspeed" / name, **how)
    manifest = read_manifest(place / "manifest.json")
    del manifest["sha256"]
    manifest["files"][f"deepspeed/{name}"] = file_entry(place / "deepspeed" / name)
    write_manifest(place / "manifest.json", manifest)
    checkpoint.verify(place)
    return place


@pytest.mark.parametrize("name", ["mp_rank_00_model_states.pt", "zero_pp_rank_1_mp_rank_00_optim_states.pt"])
@pytest.mark.parametrize("old_format", [False, True])
def test_code_hidden_in_a_checkpoint_does_not_run(run: Path, tmp_path: Path, name: str, old_format: bool) -> None:
    how = {"_use_new_zipfile_serialization": not old_format}
    place = hide(run, name, {"module": {}, "evil": Evil(tmp_path / "mark")}, **how)
    with pytest.raises(RunFailure, match="is not loaded"):
        consolidated(place)
    assert not (tmp_path / "mark").exists()


def test_a_resumed_run_refuses_hidden_code(run: Path, corpus: Path, tmp_path: Path) -> None:
    hide(run, "zero_pp_rank_0_mp_rank_00_optim_states.pt", {"evil": Evil(tmp_path / "mark")})
    plan = recipe(corpus, 4, checkpoint_every=1, keep_checkpoints=9)
    for world in (2, 1):  # loaded as it is, and converted for another number of ranks
        with pytest.raises(AssertionError, match=r"it asks for (posix|os|nt)\.system"):
            run_jobs([Job(plan, run, resume=True)], world, tmp_path)
    assert not (tmp_path / "mark").exists()


def test_names_built_while_unpickling_are_refused_too(run: Path, tmp_path: Path) -> None:
    """The name of what is imported is put together on the pickle's stack, where no list of names sees it."""
    import zipfile

    place = hide(run, "mp_rank_00_model_states.pt", {"module": {}})
    path = place / "deepspeed" / "mp_rank_00_model_states.pt"
    mark = tmp_path / "mark"
    code = (
        b"\x80\x04\x8c\x02os\x8c\x06system\x94\x30\x8c\x06system\x93"
        + pickle.dumps(f"touch {mark}", 4)[2:-1]
        + b"\x85R."
    )
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in parts.items():
            archive.writestr(name, code if name.endswith("data.pkl") else content)
    with pytest.raises(RunFailure, match="is not loaded"):
        consolidated(place)
    assert not mark.exists()


def test_every_precisions_own_files_are_let_through(runs: Path) -> None:
    for run in ("every", "some", "fp16"):
        latest = (runs / run / "checkpoints" / "latest").read_text().strip()
        assert consolidated(runs / run / "checkpoints" / latest).keys() == {"teacher", "student"}


def test_a_python_that_pickles_enums_by_name_writes_what_is_let_through(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Debian 12's, 3.11.2: there the checkpoints of every run were refused."""
    from deepspeed.runtime.zero.config import ZeroStageEnum

    monkeypatch.setattr(enum.Enum, "__reduce_ex__", lambda self, _: (getattr, (type(self), self.name)))
    content = {"optimizer_state_dict": {"zero_stage": ZeroStageEnum.gradients}}
    monkeypatch.delitem(copyreg.dispatch_table, ZeroStageEnum, raising=False)
    place = hide(run, "zero_pp_rank_0_mp_rank_00_optim_states.pt", content)
    with pytest.raises(RunFailure, match=r"asks for builtins\.getattr"):
        refuse_code(place)
    stage_as_number()
    refuse_code(hide(run, "zero_pp_rank_0_mp_rank_00_optim_states.pt", content))


def test_a_pretrained_model_of_a_stranger_runs_nothing(corpus: Path, tmp_path: Path) -> None:
    """Pickled weights with code in them, and a config that brings Python files."""
    import json

    from transformers import AutoModelForMaskedLM

    from ctcd_ds.corpus.rows import Corpus
    from ctcd_ds.peers.build import build_peer, peer_config
    from ctcd_ds.recipe.sections import PeerSection

    mark, model = tmp_path / "mark", tmp_path / "model"
    model.mkdir()
    config = {"vocab_size": 300, "architectures": ["BertForMaskedLM"], **bert(16, 1)}
    (model / "config.json").write_text(json.dumps(config))
    torch.save({"bert.embeddings.word_embeddings.weight": Evil(mark)}, model / "pytorch_model.bin")
    section = PeerSection(pretrained=str(model))
    with pytest.raises(Exception, match=r"(?i)weights_only|unpickl|unsupported"):
        build_peer("teacher", section, Corpus.open(corpus), 1, AutoModelForMaskedLM)
    assert not mark.exists()

    config |= {"model_type": "theirs", "auto_map": {"AutoConfig": "theirs.Theirs"}}
    (model / "config.json").write_text(json.dumps(config))
    (model / "theirs.py").write_text(f"open({str(mark)!r}, 'w')\nclass Theirs: pass\n")
    with pytest.raises(UserError, match="custom code"):
        peer_config(section, Corpus.open(corpus), AutoModelForMaskedLM)
    assert not mark.exists()
