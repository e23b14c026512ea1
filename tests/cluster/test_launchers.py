"""Who am I, asked under the real srun, torchrun and mpirun: all ranks agree, and meet."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.hosts import skip_without
from cluster.slurm import PROGRAMS, Slurm

pytestmark = pytest.mark.cluster
WHOAMI = Path(__file__).with_name("whoami.py")
TORCHRUN = "torchrun --nnodes=2 --nproc-per-node=2 --rdzv-backend=c10d --rdzv-endpoint=node1:29400 --rdzv-id=1"

BY_HAND = "WORLD_SIZE=2 LOCAL_RANK=0 MASTER_ADDR=node1 MASTER_PORT=1"


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    skip_without(*PROGRAMS)
    with Slurm(2, tmp_path_factory.mktemp("launchers"), tmp_path_factory.getbasetemp()) as cluster:
        yield cluster


def said(folder: Path) -> list[dict[str, Any]]:
    """What the ranks found, by rank; each has met all others."""
    found = [json.loads((folder / f"rank-{n}.json").read_text()) for n in range(len(list(folder.iterdir())))]
    assert {rank["world"] for rank in found} == {len(found)}
    assert {rank["sum"] for rank in found} == {len(found) * (len(found) + 1) / 2}
    assert len({(rank["address"], rank["port"], rank["source"]) for rank in found}) == 1
    return found


def test_under_srun_every_task_is_a_rank(slurm: Slurm, tmp_path: Path) -> None:
    slurm.client("srun", "--nodes=2", "--ntasks-per-node=2", "--cpus-per-task=2", "python", WHOAMI, tmp_path)
    found = said(tmp_path)
    assert [(r["local_rank"], r["local_world"]) for r in found] == [(0, 2), (1, 2), (0, 2), (1, 2)]
    assert found[0]["source"] == "srun" and found[0]["address"] == "node1" and found[0]["cores"] == 2


def test_under_torchrun_in_tasks_of_srun_torchrun_numbers_the_ranks(slurm: Slurm, tmp_path: Path) -> None:
    slurm.client("srun", "--nodes=2", "--ntasks-per-node=1", *TORCHRUN.split(), WHOAMI, tmp_path)
    assert {(r["source"], r["local_world"]) for r in said(tmp_path)} == {("torchrun", 2)}


@pytest.mark.parametrize("mpirun", ["mpirun.openmpi --allow-run-as-root --oversubscribe", "mpiexec.mpich"])
def test_under_mpirun_all_ranks_meet(slurm: Slurm, tmp_path: Path, mpirun: str) -> None:
    if shutil.which(mpirun.split()[0]) is None:
        pytest.skip(f"not installed: {mpirun.split()[0]} (make test-cluster installs it as root)")
    slurm.login.run(*mpirun.split(), "-n", 3, "python", WHOAMI, tmp_path)
    assert {(r["source"], r["address"]) for r in said(tmp_path)} == {("mpirun", "127.0.0.1")}


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ("python {whoami} {out}", "SLURM_NTASKS = 2, and this process was not started by srun"),
        (f"export RANK=$SLURM_PROCID {BY_HAND}; srun python {{whoami}} {{out}}",
         "RANK = 0 of WORLD_SIZE = 2, and srun says SLURM_PROCID = 1 of SLURM_STEP_NUM_TASKS = 2"),
    ],
    ids=["no srun in the batch script", "RANK of the batch script"],
)  # fmt: skip
def test_the_classical_mistakes_are_messages(slurm: Slurm, tmp_path: Path, batch: str, message: str) -> None:
    line = "timeout 20 " * batch.startswith("python") + batch.format(whoami=WHOAMI, out=tmp_path)
    log = tmp_path / "log"
    options = ("--parsable", "--nodes=2", "--ntasks-per-node=1", f"--output={log}", "--time=1")
    number = slurm.client("sbatch", *options, "--wrap", line.replace("srun", "srun --kill-on-bad-exit=1")).strip()
    slurm.wait(number, "FAILED")
    assert message in log.read_text()
