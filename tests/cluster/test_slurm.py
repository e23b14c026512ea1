"""On a real SLURM: nodes are ranks, and whatever SLURM does to a job, the run ends as if nothing had happened."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.hosts import skip_without, wait_for
from cluster.slurm import PROGRAMS, Slurm, exit_state
from commands import PATIENCE_S
from runs import bert, chain_corpus, final_weights
from test_glue import write_glue

pytestmark = pytest.mark.cluster
STEPS = 300  # enough that all that is done to a run happens before its end


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Corpus, recipe, DeepSpeed config, GLUE files and the cluster's file, as a user has them."""
    folder = tmp_path_factory.mktemp("slurm")
    recipe = {
        "corpus": {"path": str(chain_corpus(folder / "corpus")), "sequence_length": 32},
        "peers": {
            "teacher": {"model": bert(32, 2), "soft": {"student": 1.0}},
            "student": {"model": bert(16, 1), "soft": {"teacher": 4.0}},
        },
        "training": {"global_batch_rows": 8, "steps": STEPS, "log_every": 1, "valid_every": STEPS,
                     "checkpoint_every": 20, "step_timeout_s": 60.0},
    }  # fmt: skip
    (folder / "recipe.json").write_text(json.dumps(recipe))
    (folder / "d.json").write_text('{"zero_optimization": {"stage": 2}}')
    (folder / "cluster.yaml").write_text("partition: low\nenvironment: {DS_ACCELERATOR: cpu}\n")
    (folder / "trusted.yaml").write_text((folder / "cluster.yaml").read_text() + "preflight: false\n")
    write_glue(folder / "glue")
    return folder


@pytest.fixture(scope="module")
def slurm(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    skip_without(*PROGRAMS)
    (place / "slurm").mkdir()
    with Slurm(4, place / "slurm", tmp_path_factory.getbasetemp()) as cluster:
        yield cluster


def job(place: Path, name: str, *options: object) -> list[object]:
    """The words after `python launchers/submit.py` for a run called `name`."""
    words = ["--recipe", place / "recipe.json", "--deepspeed_config", place / "d.json", "--output_dir", place / name]
    return [*words, "--cluster", place / "trusted.yaml", *options]


@pytest.fixture(scope="module")
def reference(slurm: Slurm, place: Path) -> dict[str, Any]:
    """The weights of the run that nothing happens to: two ranks on one node, one for each of its GPUs."""
    ids = slurm.submit(*job(place, "reference", "--gpus_per_node", 2))
    slurm.wait(ids["pretrain"], "COMPLETED")
    return final_weights(place / "reference")


def assert_equal(expected: dict[str, Any], run: Path) -> None:
    assert exit_state(run)["state"] == "finished"
    found = final_weights(run)
    assert all(bool((expected[peer][key] == found[peer][key]).all()) for peer in expected for key in expected[peer])


def logged(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def starts(run: Path) -> list[int]:
    """The steps that the job's starts began at."""
    return [json.loads(line)["step"] for line in (run / "slurm" / "starts.jsonl").read_text().splitlines()]


def under_way(slurm: Slurm, place: Path, name: str, *options: object, steps: int = 10) -> tuple[Path, str]:
    """A run on two nodes that has done a few steps, and its job."""
    ids = slurm.submit(*job(place, name, "--nodes", 2, *options))
    wait_for(lambda: logged(place / name) > steps, PATIENCE_S, "first steps")
    return place / name, ids["pretrain"]


def test_a_chain_on_two_nodes_ends_with_the_table_and_the_weights_of_one_node(
    slurm: Slurm, place: Path, reference: dict[str, Any]
) -> None:
    """Preflight, pretrain, export, GLUE; two nodes with one rank each are the two ranks of one node, bit for bit."""
    glue = ("--cluster", place / "cluster.yaml", "--chain", "--glue_data", place / "glue", "--glue_tasks", "cola,rte")
    ids = slurm.submit(*job(place, "chain", "--nodes", 2, *glue))
    slurm.wait(ids["pretrain"], "COMPLETED", "FAILED")
    run = place / "chain"
    assert_equal(reference, run)
    assert "2, 1 on this machine, as srun says" in json.loads((run / "environment.json").read_text())["ranks"]
    looked = (run / "slurm" / f"pretrain-{ids['pretrain']}.log").read_text()
    assert all(f"{name}  " in looked for name in ("node1", "node2")) and "all-reduce of" in looked, looked
    slurm.wait(ids["glue"], "COMPLETED")
    table = (run / "slurm" / f"glue-{ids['glue']}.log").read_text()
    assert "teacher" in table and "student" in table and "average" in table
    assert set(json.loads((run / "glue" / "results.json").read_text())["models"]) == {"teacher", "student"}


@pytest.mark.timeout(1500)  # four starts, one after another, on a machine that may be busy
def test_signal_preemption_and_power_cut_cost_no_more_than_the_steps_since_a_checkpoint(
    slurm: Slurm, place: Path, reference: dict[str, Any]
) -> None:
    """One run meets all three, is requeued each time, and ends with the weights of the run that met nothing."""
    run, number = under_way(slurm, place, "disturbed")
    slurm.client("scancel", "--batch", "--signal=USR1", number)  # as before the time limit
    wait_for(lambda: len(starts(run)) == 2, PATIENCE_S, "the start after the signal")
    assert starts(run)[1] > 10
    assert "saved" in next((run / "slurm").glob("pretrain-*.log")).read_text()

    before = logged(run)
    wait_for(lambda: logged(run) > before, PATIENCE_S, "steps after the signal")
    wrap = ("--partition=high", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap", "sleep 3")
    urgent = slurm.client("sbatch", "--parsable", *wrap).strip()
    slurm.wait(urgent, "RUNNING", "COMPLETED")
    assert exit_state(run)["state"] == "saved" and slurm.job(number)["JobState"] == "PENDING"
    saved = exit_state(run)["step"]
    wait_for(lambda: len(starts(run)) == 3, PATIENCE_S, "the start after preemption")
    assert starts(run)[2] == saved

    wait_for(lambda: logged(run) > saved + 25, PATIENCE_S, "steps after preemption")  # with a checkpoint among them
    [lost] = slurm.client("scontrol", "show", "hostnames", slurm.job(number)["NodeList"]).split()[1:]
    slurm.network[lost].kill()
    assert slurm.wait(number, "COMPLETED", "FAILED")["Restarts"] == "3"
    assert lost not in slurm.job(number)["NodeList"]
    assert starts(run)[0] == 0 and starts(run)[3] > saved
    assert_equal(reference, run)
    slurm.network[lost].boot()
    slurm.start_node(lost)


def test_three_seeds_are_an_array(slurm: Slurm, place: Path) -> None:
    ids = slurm.submit(*job(place, "seeds", "--seeds", "1,2,3", "--set", "training.steps=4"))
    for task in range(3):
        slurm.wait(f"{ids['pretrain']}_{task}", "COMPLETED")
    losses = {
        json.loads((place / "seeds" / f"seed-{n}" / "summary.json").read_text())["loss/teacher/hard"] for n in (1, 2, 3)
    }
    assert len(losses) == 3


def test_a_run_that_always_fails_at_the_same_step_is_not_requeued_for_ever(slurm: Slurm, place: Path) -> None:
    changes = ("optimizer.lr=1e30", "optimizer.max_grad_norm=0")
    ids = slurm.submit(*job(place, "hopeless", "--set", *changes, "--then", "export"))
    assert slurm.wait(ids["pretrain"], "COMPLETED", "FAILED")["Restarts"] == "1"
    assert slurm.job(ids["pretrain"])["JobState"] == "FAILED" and exit_state(place / "hopeless")["state"] == "failed"
    said = (place / "hopeless" / "slurm" / f"pretrain-{ids['pretrain']}.log").read_text()
    assert "2 starts from this step" in said
    slurm.wait(ids["export"], "CANCELLED")


def test_a_run_has_one_owner_from_submission_to_its_end(slurm: Slurm, place: Path) -> None:
    """Waiting, running, and begun without submit.py: a second start on any host is refused and told who has it.

    It ends cancelled: saved, and not requeued.
    """
    (place / "held.yaml").write_text((place / "trusted.yaml").read_text() + "sbatch: [--hold]\n")
    steps = ("--set", "training.steps=20000")
    submission = [*job(place, "owned", "--nodes", 2), "--cluster", place / "held.yaml", *steps]
    number, run = slurm.submit(*submission)["pretrain"], place / "owned"
    direct = ["launchers/pretrain.py", *job(place, "owned")[:6], *steps, "--resume"]

    def refusal(*words: object) -> str:
        return slurm.client("sh", "-c", '"$@" 2>&1', "sh", "python", *words, check=False, DS_ACCELERATOR="cpu")

    before = (run / "slurm" / "recipe.yaml").read_text()
    for line in (["launchers/submit.py", *submission, "--set", "seed=9"], direct):
        assert f"has job {number} in the queue" in refusal(*line)
    assert (run / "slurm" / "recipe.yaml").read_text() == before
    slurm.client("scontrol", "release", number)
    wait_for(lambda: logged(run) > 3, PATIENCE_S, "first steps")
    assert f"has job {number} in the queue" in refusal(*direct)
    (run / "slurm" / "jobs.json").unlink()  # as sbatch by hand leaves none
    said = refusal(*direct)
    first = slurm.client("scontrol", "show", "hostnames", slurm.job(number)["NodeList"]).split()[0]
    assert f"on {first}, job {number}, since" in said, said
    assert not (run / "exit.json").exists(), "nobody disturbed it"
    slurm.client("scancel", number)
    slurm.wait(number, "CANCELLED")
    wait_for(lambda: exit_state(run), PATIENCE_S, "exit.json")
    # SLURM tells the ranks and the script alike, and the script hands on USR1: either may come first.
    assert exit_state(run)["state"] == "saved" and exit_state(run)["reason"] in ("SIGTERM", "SIGUSR1")
    time.sleep(1)
    assert slurm.job(number)["JobState"] == "CANCELLED"


def test_what_cannot_run_is_refused_before_anything_is_queued(slurm: Slurm, place: Path) -> None:
    before = slurm.client("squeue", "-h")
    line = ("python", "launchers/submit.py", *job(place, "wrong", "--nodes", 3))
    said = slurm.login.run("sh", "-c", '"$@" 2>&1', "sh", *line, check=False)
    assert "global_batch_rows" in said and "3" in said and not (place / "wrong").exists()
    assert slurm.client("squeue", "-h") == before
    line = ("python", "launchers/submit.py", *job(place, "wrong", "--partition", "hihg"))
    said = slurm.client("sh", "-c", '"$@" 2>&1', "sh", *line, check=False)
    assert "sbatch refused pretrain.sbatch" in said and "invalid partition" in said and not (place / "wrong").exists()


def test_an_experiment_is_a_chain_for_every_cell_and_a_job_that_collects(slurm: Slurm, place: Path) -> None:
    """A cell waits for the export of its teacher; one that fails takes with it only the cell that needs it."""
    short = {"training.steps": 6, "training.valid_every": 6}

    def frozen(cell: str) -> dict[str, Any]:
        return {"peers.teacher": {"pretrained": {"cell": cell, "peer": "teacher"}, "frozen": True}}

    hopeless = {"optimizer.lr": 1e30, "optimizer.max_grad_norm": 0, "training.steps": 40, "training.valid_every": 40}
    alone = {"peers.student": None, "peers.teacher.soft": None}
    experiment = {
        "question": "Does it run?", "recipe": "recipe.json", "deepspeed_config": "d.json", "seeds": [1], "set": short,
        "cells": {"alone": {"set": alone}, "kd": {"set": frozen("alone")},
                  "hopeless": {"set": {**alone, **hopeless}}, "without": {"set": frozen("hopeless")}},
        "compare": [{"peer": "student", "against": "kd"}],
        "glue": {"tasks": "rte", "epochs": 1.0, "data_dir": str(place / "glue")},
    }  # fmt: skip
    (place / "e.json").write_text(json.dumps(experiment))
    out = place / "experiment"
    words = ["python", "tools/run_experiment.py", "--experiment", place / "e.json", "--output_dir", out]
    queued = [*words, "--slurm", "--nodes", 2, "--cluster", place / "trusted.yaml"]
    (place / "wrong.yaml").write_text("partition: hihg\n")
    refused = [*words, "--slurm", "--cluster", place / "wrong.yaml"]
    said = slurm.client("sh", "-c", '"$@" 2>&1', "sh", *refused, check=False)
    assert "invalid partition" in said and "nothing is queued" in said and not out.exists()

    said = slurm.client(*queued)
    jobs = json.loads((out / "slurm" / "jobs.json").read_text())
    assert list(jobs) == ["alone-seed-1", "hopeless-seed-1", "kd-seed-1", "without-seed-1", "collect"]
    assert all(number in said for stages in jobs.values() for number in stages.values())
    again = slurm.client("sh", "-c", '"$@" 2>&1', "sh", *queued, "--resume", check=False)
    assert "are still in the queue" in again

    slurm.wait(jobs["collect"]["collect"], "COMPLETED", "FAILED")
    results = json.loads((out / "results.json").read_text())
    cells = {cell["condition"]: cell for cell in results["cells"]}
    states = {name: cell["state"] for name, cell in cells.items()}
    assert states == {"alone": "finished", "kd": "finished", "hopeless": "failed", "without": "waiting"}
    assert cells["kd"]["peers"]["teacher"]["frozen"] and "rte stand-in" in cells["kd"]["peers"]["student"]["glue"]
    assert "--slurm" in results["command"], "the report tells the command that repeats it"
    assert (out / "report" / "report.html").exists()
    environment = json.loads((out / cells["kd"]["run"] / "environment.json").read_text())
    assert environment["world"] == 2

    before = (out / cells["kd"]["run"] / "glue" / "results.json").stat().st_mtime_ns
    slurm.client(*queued, "--resume")
    jobs = json.loads((out / "slurm" / "jobs.json").read_text())
    assert list(jobs) == ["hopeless-seed-1", "without-seed-1", "collect"], "what is done is not queued again"
    slurm.wait(jobs["collect"]["collect"], "COMPLETED", "FAILED")
    assert (out / cells["kd"]["run"] / "glue" / "results.json").stat().st_mtime_ns == before
