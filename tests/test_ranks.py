"""Who am I: every launcher's variables give one consistent answer to all ranks, or one clear message."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctcd_ds.cli import UserError
from ctcd_ds.cluster.ranks import Ranks, find_ranks, first_node, slurm_port, tasks_of_nodes
from ctcd_ds.training.run_directory import environment

BY_HAND = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "29500"}
OPEN_MPI = {f"OMPI_COMM_WORLD_{key}": value for key, value in
            {"RANK": "1", "SIZE": "4", "LOCAL_RANK": "1", "LOCAL_SIZE": "4"}.items()}  # fmt: skip
MVAPICH = {name.replace("OMPI", "MV2"): value for name, value in OPEN_MPI.items()}
HYDRA = {"PMI_RANK": "1", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "4"}  # as MPICH 4.0 sets them
CRAY = {"PMI_RANK": "1", "PMI_SIZE": "4", "PMI_LOCAL_RANK": "1", "PMI_LOCAL_SIZE": "4"}


def step(layout: list[int], rank: int, job: int = 7, step: int = 0) -> dict[str, str]:
    """What srun tells task `rank` of a step with layout[i] tasks on node i, in blocks, as SLURM writes it."""
    node = next(n for n in range(len(layout)) if rank < sum(layout[: n + 1]))
    runs: list[list[int]] = []
    for tasks in layout:
        if runs and runs[-1][0] == tasks:
            runs[-1][1] += 1
        else:
            runs.append([tasks, 1])
    return {
        "SLURM_JOB_ID": str(job),
        "SLURM_STEP_ID": str(step),
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank - sum(layout[:node])),
        "SLURM_NODEID": str(node),
        "SLURM_NTASKS": str(sum(layout)),
        "SLURM_STEP_NUM_TASKS": str(sum(layout)),
        "SLURM_STEP_NODELIST": f"node[{98:03}-{98 + len(layout) - 1:03}]" if len(layout) > 1 else "node098",
        "SLURM_STEP_TASKS_PER_NODE": ",".join(f"{n}(x{k})" if k > 1 else str(n) for n, k in runs),
        "SLURMD_NODENAME": f"node{98 + node:03}",
    }


@given(st.lists(st.integers(1, 9), min_size=1, max_size=20))
def test_the_tasks_of_a_step_are_its_ranks_and_meet_at_one_place(layout: list[int]) -> None:
    found = [find_ranks(step(layout, rank)) for rank in range(sum(layout))]
    assert [r.rank for r in found] == list(range(sum(layout)))
    assert {(r.world, r.source, r.address, r.port) for r in found} == {
        (sum(layout), "srun", "node098", slurm_port(7, 0))
    }
    assert [r.local_world for r in found] == [n for n in layout for _ in range(n)]
    assert [r.local_rank for r in found] == [local for n in layout for local in range(n)]


@given(st.integers(1, 2**31), st.integers(1, 2000), st.integers(0, 100), st.integers(0, 100))
def test_jobs_that_run_together_and_steps_of_a_job_meet_at_other_ports(job: int, later: int, a: int, b: int) -> None:
    assert slurm_port(job, a) != slurm_port(job + later, a)
    assert (slurm_port(job, a) == slurm_port(job, b)) == (a == b)
    assert 10000 < slurm_port(job, a) < 32768, "below the ports that Linux gives to clients"


def test_node_lists_are_expanded() -> None:
    assert first_node("gpu[08-10,12]") == "gpu08"
    assert first_node("rack2-n7,rack10-n[1-3]") == "rack2-n7"
    assert tasks_of_nodes("2(x3),1") == [2, 2, 2, 1]
    with pytest.raises(UserError, match=r"SLURM_STEP_NODELIST = 'a\[1-'"):
        first_node("a[1-")
    with pytest.raises(UserError, match="2x3"):
        tasks_of_nodes("2x3")


def test_the_nearest_launcher_counts() -> None:
    """torchrun or `deepspeed` inside one task of srun or mpirun numbers its own processes."""
    inside = step([1, 1], 1)
    assert find_ranks({**inside, **BY_HAND, "TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "2"}) == Ranks(
        1, 4, 1, 2, "torchrun", "a", 29500
    )
    found = find_ranks({**inside, **BY_HAND, "CROSS_SIZE": "2", "LOCAL_SIZE": "2"})
    assert (found.source, found.world, found.local_world) == ("deepspeed", 4, 2)
    assert find_ranks({**inside, **OPEN_MPI}).source == "mpirun"
    assert find_ranks({}) == Ranks(0, 1, 0, 1, "alone")
    assert find_ranks({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}).source == "alone"
    assert find_ranks({**step([2, 2], 3), "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "5"}).port == 5
    assert find_ranks({**step([2, 2], 3), "SLURM_CPUS_PER_TASK": "6"}).cores == 6


def test_one_mpirun_meets_at_one_port_and_another_elsewhere() -> None:
    first = [find_ranks({**OPEN_MPI, "OMPI_COMM_WORLD_RANK": str(rank), "PMIX_NAMESPACE": "1"}) for rank in range(4)]
    assert {(r.address, r.port, r.world) for r in first} == {("127.0.0.1", first[0].port, 4)}
    assert find_ranks({**OPEN_MPI, "PMIX_NAMESPACE": "2"}).port != first[0].port


@pytest.mark.parametrize("theirs", [OPEN_MPI, MVAPICH, HYDRA, CRAY, {**HYDRA, **MVAPICH}])
def test_every_mpi_tells_its_ranks(theirs: dict[str, str]) -> None:
    found = find_ranks(theirs)
    assert (found.rank, found.world, found.local_rank, found.local_world, found.source) == (1, 4, 1, 4, "mpirun")
    assert found.port > 0, "all ranks must meet at one that is known before"
    inside = {**step([1, 1], 1), **theirs}  # mpiexec starts a proxy a node, by srun
    assert find_ranks({**inside, "MASTER_ADDR": "a"}).world == 4


def test_srun_with_pmi_knows_more_than_pmi() -> None:
    found = find_ranks({**step([2, 2], 3), "PMI_RANK": "3", "PMI_SIZE": "4"})
    assert (found.source, found.address, found.local_rank) == ("srun", "node098", 1)


@pytest.mark.parametrize(("stated", "threads"), [("4", 4), ("4,2", 4), (" 3 , 1", 3)])
def test_threads_are_those_of_the_first_level(stated: str, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", stated)
    assert find_ranks({}).threads() == threads


def test_where_no_number_is_stated_the_ranks_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(6)))
    threads = [Ranks(0, ranks, 0, ranks, "torchrun").threads() for ranks in (1, 2, 4, 8)]
    assert threads == [6, 3, 1, 1]


@pytest.mark.parametrize("stated", ["", "many", "0", ",2", "-1"])
def test_threads_that_are_no_number_are_a_message(stated: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", stated)
    with pytest.raises(UserError, match="OMP_NUM_THREADS"):
        find_ranks({}).threads()


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({**step([2, 2], 3), **BY_HAND}, "RANK = 1 of WORLD_SIZE = 4, and srun says SLURM_PROCID = 3"),
        ({**step([4, 4], 1), **BY_HAND}, "SLURM_STEP_NUM_TASKS = 8"),
        ({**OPEN_MPI, **BY_HAND, "RANK": "0"}, "mpirun says OMPI_COMM_WORLD_RANK = 1"),
        ({**BY_HAND, "RANK": "4"}, "rank 4 of 4: it must be from 0 to 3"),
        ({**BY_HAND, "LOCAL_WORLD_SIZE": "1"}, "local rank 1 of 1"),
        ({**BY_HAND, "LOCAL_WORLD_SIZE": "8"}, "8 ranks on this machine, and 4 in all"),
        ({**BY_HAND, "RANK": "-1"}, "RANK = '-1'"),
        ({**BY_HAND, "MASTER_PORT": "70000"}, "MASTER_PORT = 70000"),
        ({"RANK": "0", "WORLD_SIZE": "1"}, "RANK, WORLD_SIZE set but not LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, "not started by srun"),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8"}, "srun python"),
        ({**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, "mpirun -x MASTER_ADDR=HOST"),
        ({**HYDRA, "MPI_LOCALNRANKS": "2"}, "mpiexec -genv MASTER_ADDR HOST"),
        ({"PMI_RANK": "1", "PMI_SIZE": "4"}, "MPI_LOCALRANKID = ''"),
        ({**HYDRA, **BY_HAND, "RANK": "0"}, "mpirun says PMI_RANK = 1"),
        ({**step([2, 2], 0), "SLURMD_NODENAME": "node099"}, "export MASTER_ADDR=node099"),
    ],
)
def test_a_contradiction_is_one_clear_message(environment: dict[str, str], said: str) -> None:
    with pytest.raises(UserError) as found:
        find_ranks(environment)
    assert said in str(found.value)


MODULE = "ctcd_ds.commands.pretrain"


@pytest.mark.parametrize("script", ["launchers/pretrain.py", MODULE])
@pytest.mark.parametrize(("world", "local_world"), [(2, 2), (8, 4)])
def test_the_command_of_a_resumed_run_is_the_one_that_repeats_it(
    script: str, world: int, local_world: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Told from what a launcher made of it, and taken by that launcher's own parser: ranks, script, our words."""
    from deepspeed.launcher.runner import parse_args
    from torch.distributed.run import get_args_parser

    asked = ["--recipe", "a b.yaml", "--output_dir", "run", "--set", "seed=2"]
    main = ModuleType("__main__")
    main.__spec__ = ModuleSpec(script, None) if script == MODULE else None
    monkeypatch.setitem(sys.modules, "__main__", main)

    def said(source: str) -> list[str]:
        return environment(Ranks(0, world, 0, local_world, source), "cpu")["command"]

    monkeypatch.setattr(sys, "argv", [script, "--local_rank=0", *asked, "--resume"])
    program, *words = said("deepspeed")
    ours = parse_args(words)
    assert program == "deepspeed" and (ours.user_script, ours.user_args) == (script, asked)
    assert (ours.num_gpus, ours.num_nodes) == (local_world, world // local_world if world > local_world else -1)
    assert ours.module == (script == MODULE)

    monkeypatch.setattr(sys, "argv", [script, *asked, "--resume"])
    program, *words = said("torchrun")
    theirs = get_args_parser().parse_args(words)
    assert program == "torchrun" and (theirs.training_script, theirs.training_script_args) == (script, asked)
    assert (theirs.nnodes, theirs.nproc_per_node) == (str(world // local_world), str(local_world))
    assert theirs.module == (script == MODULE)

    plain = ["python", *(["-m"] if script == MODULE else []), script, *asked]
    assert said("srun") == ["srun", "-n", str(world), *plain] and said("mpirun") == ["mpirun", "-n", str(world), *plain]
    assert said("alone") == plain


def test_rank_0_knows_where_it_waits() -> None:
    with pytest.raises(UserError, match=r"MASTER_ADDR = 'nowhere\.invalid': rank 0 waits there .* knows no such host"):
        Ranks(0, 2, 0, 1, "torchrun", "nowhere.invalid", 29500).announce()
