"""What is queued on SLURM: everything is checked first, nothing is left behind, and a job that gets nowhere ends."""

from __future__ import annotations

import json
import os
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from commands import ROOT, command
from ctcd_ds import cli
from ctcd_ds.cluster import job
from runs import bert, chain_corpus

SUBMIT = "launchers/submit.py"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("submit")
    recipe = {
        "corpus": {"path": str(chain_corpus(folder / "corpus")), "sequence_length": 32},
        "peers": {"one": {"model": bert(16, 1), "soft": {"two": 1.0}}, "two": {"model": bert(16, 1)}},
        "training": {"global_batch_rows": 32, "steps": 4},
    }
    (folder / "recipe.json").write_text(json.dumps(recipe))
    (folder / "d.json").write_text('{"zero_optimization": {"stage": 2}}')
    return folder


@pytest.fixture
def submit(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Any:
    monkeypatch.setenv("HOME", str(place))  # a user without a cluster file of his own

    def run(*options: object, name: str = "run") -> tuple[int, str, str]:
        words = ["--recipe", place / "recipe.json", "--deepspeed_config", place / "d.json"]
        return command(monkeypatch, capsys, SUBMIT, *words, "--output_dir", place / name, *options)

    return run


def test_the_printed_script_is_whole_and_nothing_is_written(submit: Any, place: Path) -> None:
    code, said, _ = submit("--nodes", 4, "--gpus_per_node", 8, "--time", "24:00:00", "--partition", "gpu", "--print")
    assert code == 0 and not (place / "run").exists()
    for line in ("nodes=4", "ntasks-per-node=8", "gres=gpu:8", "time=24:00:00", "partition=gpu", "signal=B:USR1@300"):
        assert f"#SBATCH --{line}\n" in said
    body = (ROOT / "launchers" / "pretrain.sbatch").read_text().split("# --- the job ---\n")[1]
    assert said.rstrip().endswith(body.rstrip())
    script = said.split("\n", 1)[1]
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0


def test_a_percent_sign_in_a_path_is_no_pattern_of_slurms(submit: Any, place: Path) -> None:
    _, said, _ = submit("--print", name="50%j of it")
    assert f"#SBATCH --output='{place}/50%%j of it/slurm/pretrain-%j.log'\n" in said


def test_a_chain_of_an_array_exports_each_run_and_compares_all_models(submit: Any, place: Path) -> None:
    (place / "glue").mkdir(exist_ok=True)
    chain = ("--seeds", "1,2", "--chain", "--glue_data", "hub")
    code, said, _ = submit(*chain, "--print")
    assert code == 0 and said.count("#SBATCH --array=0-1") == 2
    assert [f"/seed-{seed}/hf/{peer}" in said for seed in (1, 2) for peer in ("one", "two")] == [True] * 4


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--nodes", 3), "global_batch_rows"),
        (("--nodes", 0), "--nodes: '0' is not a whole number from 1"),
        (("--set", "peers.one.soft.tow=1"), "did you mean 'two'?"),
        (("--set", "corpus.path=nowhere"), "nowhere"),
        (("--then", "exprot"), "did you mean 'export'?"),
        (("--then", "glue"), "--then export,glue"),
        (("--chain",), "--glue_data"),
        (("--chain", "--glue_data", "nowhere"), "nowhere is no directory"),
        (("--chain", "--glue_data", "hub", "--glue_tasks", "cola,stt2"), "stt2"),
        (("--seeds", "1,x"), "--seeds: '1,x' is no comma-separated list"),
        (("--seeds", "1,1"), "two of the runs would be in one directory"),
        (("--gpus_per_node", -1), "--gpus_per_node -1"),
        (("--gpus_per_node", 4, "--tasks_per_node", 2), "one task per GPU"),
        (("--cluster", "nowhere.yaml"), "nowhere.yaml: no such file"),
    ],
)
def test_a_mistake_is_one_message_and_nothing_is_queued(
    submit: Any, place: Path, options: tuple[object, ...], said: str
) -> None:
    code, _, error = submit(*options)
    assert code == 2 and said in error, error
    assert not (place / "run").exists()


def test_a_cluster_file_is_typed(submit: Any, place: Path) -> None:
    file = place / "cluster.yaml"
    file.write_text("partiton: gpu\ngpus_per_node: many\nsetup: [module load cuda]\n")
    code, _, error = submit("--cluster", file)
    assert code == 2 and "did you mean 'partition'?" in error and "gpus_per_node = 'many'" in error
    file.write_text(
        "tasks_per_node: 2\ntime: 01:30:00\nsetup: [module load cuda]\npython: apptainer exec x.sif python\n"
    )
    code, said, _ = submit("--cluster", file, "--print")
    assert code == 0 and "ntasks-per-node=2\n" in said and "\nmodule load cuda\n" in said
    assert "#SBATCH --time=01:30:00\n" in said and "export PYTHON='apptainer exec x.sif python'\n" in said


def test_without_slurm_it_says_so_and_leaves_nothing(submit: Any, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    code, _, error = submit()
    assert code == 2 and "sbatch is not here" in error and not (place / "run").exists()


def test_where_slurm_refuses_a_later_job_the_earlier_ones_are_cancelled(
    submit: Any, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second sbatch fails: an exotic case that a real SLURM cannot be asked for, so here sbatch is a script."""
    for name, text in (
        ("sbatch", 'case "$*" in *export*) echo "no such quota" >&2; exit 1;; *) echo 77;; esac'),
        ("scancel", f'echo "$*" > {tmp_path}/cancelled'),
    ):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    code, _, error = submit("--then", "export")
    assert code == 2 and "sbatch refused export.sbatch: no such quota" in error
    assert (tmp_path / "cancelled").read_text() == "77\n" and not (place / "run").exists()


def test_a_second_submission_is_refused_and_what_waits_stays_as_it_is(
    submit: Any, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same on a real SLURM: tests/cluster/test_slurm.py."""
    for name, text in (("sbatch", "echo 77"), ("squeue", "echo 77")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert submit(name="twice")[0] == 0
    before = (place / "twice" / "slurm" / "recipe.yaml").read_text()
    code, _, error = submit("--set", "seed=9", name="twice")
    assert code == 2 and "job 77 in the queue" in error
    assert (place / "twice" / "slurm" / "recipe.yaml").read_text() == before
    assert {path.name for path in (place / "twice").iterdir()} == {"slurm"}


def progress(run: Path, step: int) -> None:
    (run / "checkpoints").mkdir(parents=True, exist_ok=True)
    (run / "checkpoints" / "latest").write_text(f"step-{step:08d}\n")


def ends_as(run: Path, state: str) -> None:
    """What a start of the run leaves."""
    (run / "environment.json").write_text("{}")
    (run / "exit.json").unlink(missing_ok=True)
    (run / "exit.json").write_text(json.dumps({"state": state, "step": 0, "reason": "because"}))
    _later(run / "exit.json")
    _later(run / "environment.json")


def _later(path: Path) -> None:
    """Writes in one instant have one time; real starts are seconds apart."""
    _later.now += 10**9  # type: ignore[attr-defined]
    os.utime(path, ns=(_later.now, _later.now))  # type: ignore[attr-defined]


_later.now = 10**18  # type: ignore[attr-defined]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["saved", "failed", "killed"]), st.booleans()), max_size=30))
def test_a_job_goes_on_while_it_gets_further_and_ends_when_it_does_not(
    tmp_path_factory: pytest.TempPathFactory, starts: list[tuple[str, bool]]
) -> None:
    """Whatever happens to its starts, none begins after 2 failures or 5 starts of any kind from one step."""
    run = tmp_path_factory.mktemp("job")
    step, here = 0, 0
    for what, further in starts:
        if here >= job.STARTS:
            with pytest.raises(cli.RunFailure, match=f"has started 5 times from step {step}"):
                job.begin(run, "7")
            return
        job.begin(run, "7")
        here += 1
        if further:
            step, here = step + 10, 0
            progress(run, step)
        if what == "killed":
            continue  # with its node: the script could ask nothing
        ends_as(run, what)
        code, said = job.end(run, "7", asked_to_stop=False)
        over = here >= (job.FAILURES if what == "failed" else job.STARTS)
        assert code == (cli.EXIT_FAILED if over else cli.EXIT_SAVED), said
        if over:
            return


def test_only_what_this_start_wrote_is_trusted(tmp_path: Path) -> None:
    ends_as(tmp_path, "saved")
    job.begin(tmp_path, "7")
    assert job.end(tmp_path, "7", False)[0] == cli.EXIT_MISTAKE, "an old exit.json, and the run did not begin"
    assert job.end(tmp_path, "7", True)[0] == cli.EXIT_SAVED, "told to stop before it could begin"
    _later(tmp_path / "environment.json")
    code, said = job.end(tmp_path, "7", False)
    assert code == cli.EXIT_SAVED and "without a word" in said, "it began, and was killed: once more"
    ends_as(tmp_path, "finished")
    assert job.end(tmp_path, "7", False)[0] == cli.EXIT_DONE
    assert job.is_finished(tmp_path) and not job.is_finished(tmp_path / "nowhere")
