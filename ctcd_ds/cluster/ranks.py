"""Who am I among the processes of this job? One place that learns it, whoever started this process.

Asked in this order, the nearest to the process first:

    torchrun, deepspeed    RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT (also set by hand)
    mpirun, mpiexec        OMPI_COMM_WORLD_*: Open MPI. MV2_COMM_WORLD_*, MVP_COMM_WORLD_*: MVAPICH. PMI_*: MPICH,
                           Intel MPI and their kin, where srun does not number the same processes
    srun                   SLURM_PROCID and its kin: one task of a step is one rank
    alone                  nothing of these

Where two of them count the same processes and disagree, or one of them cannot be true, that is a UserError: ranks that
take each other for somebody else hang, or train on the same rows.
"""

from __future__ import annotations

import os
import re
import socket
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

from ctcd_ds.cli import UserError

# The variables of rank, number of ranks, and both on this machine.
_MPI = (
    *(tuple(f"{kind}_COMM_WORLD_{what}" for what in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"))
      for kind in ("OMPI", "MV2", "MVP")),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    ("PMI_RANK", "PMI_SIZE", "PMI_LOCAL_RANK", "PMI_LOCAL_SIZE"),
)  # fmt: skip
# Ports for SLURM and MPI, below the range that Linux gives to clients (32768 and up). A prime number of them, so
# that jobs that run at the same time and on the same node meet only if their ids differ by a multiple of it.
_FIRST_PORT, _PORTS = 10007, 20011
_STEPS_OF_A_JOB = 101  # each step of a job has its own port: the one before may still hold the last


@dataclass(frozen=True)
class Ranks:
    """`rank` of `world` processes; `local_rank` of `local_world` on this machine; `source` says who told.

    `address` and `port`: where rank 0 waits for the others. Port 0 is any free one, for a process alone.
    """

    rank: int
    world: int
    local_rank: int
    local_world: int
    source: str
    address: str = "127.0.0.1"
    port: int = 0
    cores: int | None = None  # of this rank, where the launcher says so

    @property
    def first(self) -> bool:
        """Rank 0 speaks and writes."""
        return self.rank == 0

    def threads(self) -> int:
        """Threads this process may use: OMP_NUM_THREADS, else an equal share of the cores."""
        stated = os.environ.get("OMP_NUM_THREADS")
        if stated is None:
            return self.cores or max(1, len(os.sched_getaffinity(0)) // self.local_world)
        first = stated.split(",")[0].strip()  # OpenMP takes a number for each level of nesting: the first is ours
        if not first.isdecimal() or int(first) < 1:
            raise UserError(f"OMP_NUM_THREADS = {stated!r}: must be a whole number from 1")
        return int(first)

    @classmethod
    def alone(cls) -> Ranks:
        """A process that nobody launched."""
        return cls(0, 1, 0, 1, "alone")

    def describe(self) -> str:
        """One line: how many there are, who said so, where they meet."""
        if self.source == "alone":
            return "1, started alone"
        here = "" if self.local_world == self.world else f", {self.local_world} on this machine"
        return f"{self.world}{here}, as {self.source} says; they meet at {self.address}:{self.port}"

    def announce(self) -> None:
        """Says it in the variables that torch.distributed and DeepSpeed read, whoever this was learned from.

        Raises UserError where rank 0's own address is none that it knows: torch would look for it for half an hour.
        """
        try:
            if self.first:
                socket.getaddrinfo(self.address, None)
        except OSError as problem:
            reason = f"rank 0 waits there for the others, and knows no such host ({problem.strerror})"
            raise UserError(f"MASTER_ADDR = {self.address!r}: {reason}") from None
        said = {"RANK": self.rank, "WORLD_SIZE": self.world, "LOCAL_RANK": self.local_rank}
        said |= {"LOCAL_WORLD_SIZE": self.local_world, "MASTER_PORT": self.port or free_port()}
        os.environ.update({key: str(value) for key, value in said.items()}, MASTER_ADDR=self.address)


def free_port() -> int:
    """A TCP port of this machine that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def find_ranks(environment: Mapping[str, str] | None = None) -> Ranks:
    """Reads the launcher's variables. Raises UserError where they are incomplete, impossible or contradictory."""
    env = os.environ if environment is None else environment
    if any(name in env for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")):
        found = _from_variables(env)
    elif (mpi := _mpi(env)) is not None:
        found = _from_mpi(env, mpi)
    elif _is_step(env):
        found = _from_slurm(env)
    elif (tasks := env.get("SLURM_NTASKS", "1")) != "1":
        raise UserError(
            f"SLURM_NTASKS = {tasks}, and this process was not started by srun: it would train alone. Write "
            "`srun python …` (pretrain.sbatch does), or take SLURM_NTASKS away: env -u SLURM_NTASKS python …"
        )
    else:
        return Ranks.alone()
    for name, number, count in (("rank", found.rank, found.world), ("local rank", found.local_rank, found.local_world)):
        if not 0 <= number < count:
            raise UserError(f"{found.source} says {name} {number} of {count}: it must be from 0 to {count - 1}")
    if found.local_world > found.world:
        raise UserError(f"{found.source} says {found.local_world} ranks on this machine, and {found.world} in all")
    return found


def _from_variables(env: Mapping[str, str]) -> Ranks:
    """What torchrun, the `deepspeed` launcher or a person set."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    if missing := [name for name in names if not env.get(name)]:
        given = [name for name in names if name not in missing]
        raise UserError(f"{', '.join(given)} set but not {', '.join(missing)}: start with `deepspeed` or `torchrun`")
    rank, world, local_rank = (_number(env, name) for name in names[:3])
    if "TORCHELASTIC_RUN_ID" in env:
        source = "torchrun"
    elif "CROSS_SIZE" in env:
        source = "deepspeed"
    else:
        source = "RANK"
        _same_as_theirs(env, rank, world)
    local_name = next((name for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE") if name in env), "WORLD_SIZE")
    return Ranks(rank, world, local_rank, _number(env, local_name), source, env["MASTER_ADDR"], _port(env))


def _same_as_theirs(env: Mapping[str, str], rank: int, world: int) -> None:
    """RANK set by hand counts the same processes as the srun or mpirun that started this one.

    The classical mistake is `export RANK=$SLURM_PROCID` in the batch script: it is 0 there, and then everywhere.
    """
    for launcher, rank_name, world_name in (
        *(("mpirun", *names[:2]) for names in _MPI),
        ("srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
    ):
        if rank_name not in env or world_name not in env or _number(env, world_name) == 1:
            continue
        theirs = _number(env, rank_name), _number(env, world_name)
        if theirs != (rank, world):
            raise UserError(
                f"RANK = {rank} of WORLD_SIZE = {world}, and {launcher} says {rank_name} = {theirs[0]} of {world_name} "
                f"= {theirs[1]}: take RANK, WORLD_SIZE and LOCAL_RANK away, {launcher}'s are enough"
            )


def _mpi(env: Mapping[str, str]) -> tuple[str, ...] | None:
    """The names of an MPI launcher's variables, where one started this process and srun did not.

    `srun --mpi=pmi2` sets PMI_* too, and knows more: the nodes. mpiexec inside a job has its own ranks started by srun.
    """
    present = [names for names in _MPI if names[0] in env]
    if not present or (
        _is_step(env) and [env.get(name) for name in present[0][:2]] == [env.get(name) for name in _OF_A_STEP]
    ):
        return None
    return max(present, key=lambda names: sum(name in env for name in names))


def _from_mpi(env: Mapping[str, str], names: tuple[str, ...]) -> Ranks:
    rank, world, local_rank, local_world = (_number(env, name) for name in names)
    if not (address := env.get("MASTER_ADDR")):
        if local_world != world:
            raise UserError(
                f"mpirun started {world} ranks on several machines and does not say where rank 0 is: "
                "mpirun -x MASTER_ADDR=HOST … (MPICH, Intel MPI: mpiexec -genv MASTER_ADDR HOST …), the first host "
                "of the list"
            )
        address = "127.0.0.1"
    # The same for all ranks of an mpirun, and different for every mpirun; MPICH and MVAPICH tell nothing of the kind.
    job = next((env[n] for n in ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", "I_MPI_HYDRA_UUID") if env.get(n)), "")
    port = _port(env) if "MASTER_PORT" in env else _FIRST_PORT + zlib.crc32(job.encode()) % _PORTS
    return Ranks(rank, world, local_rank, local_world, "mpirun", address, port)


_OF_A_STEP = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")


def _is_step(env: Mapping[str, str]) -> bool:
    """Whether srun started this process. The batch script has SLURM_PROCID too, but is no numbered step."""
    return "SLURM_PROCID" in env and "SLURM_STEP_NUM_TASKS" in env and env.get("SLURM_STEP_ID", "").isdigit()


def _from_slurm(env: Mapping[str, str]) -> Ranks:
    names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_JOB_ID", "SLURM_STEP_ID")
    rank, world, local_rank, node, job, step = (_number(env, name) for name in names)
    local_world = tasks_of_nodes(env["SLURM_STEP_TASKS_PER_NODE"])[node]
    address, here = env.get("MASTER_ADDR"), env.get("SLURMD_NODENAME")
    if not address:
        address = first_node(env["SLURM_STEP_NODELIST"])
        if rank == 0 and here is not None and here != address:
            raise UserError(
                f"task 0 of this step runs on {here}, and the first node of SLURM_STEP_NODELIST = "
                f"{env['SLURM_STEP_NODELIST']} is {address}: export MASTER_ADDR={here} before srun"
            )
    port = _port(env) if "MASTER_PORT" in env else slurm_port(job, step)
    cores = _number(env, "SLURM_CPUS_PER_TASK") if "SLURM_CPUS_PER_TASK" in env else None
    return Ranks(rank, world, local_rank, local_world, "srun", address, port, cores)


def slurm_port(job: int, step: int) -> int:
    """The port at which the ranks of a job's step meet, the same on every node and another for every job and step."""
    return _FIRST_PORT + (job * _STEPS_OF_A_JOB + step) % _PORTS


def tasks_of_nodes(text: str) -> list[int]:
    """SLURM_STEP_TASKS_PER_NODE, one number a node: '2(x3),1' is [2, 2, 2, 1]."""
    tasks: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if found is None:
            raise UserError(f"SLURM_STEP_TASKS_PER_NODE = {text!r} is not as SLURM writes it, e.g. 2(x3),1")
        tasks += [int(found[1])] * int(found[2] or 1)
    return tasks


def first_node(nodelist: str) -> str:
    """The first name of a SLURM node list: 'node[08-10,12]' is 'node08'."""
    from ClusterShell.NodeSet import NodeSet, NodeSetParseError  # type: ignore[import-untyped]

    # Task 0 is on the first as SLURM lists them; NodeSet sorts, so it gets the first entry only.
    entry = re.match(r"(?:[^,\[]|\[[^\]]*\])+(?=,|$)", nodelist)
    try:
        return str(NodeSet(entry[0] if entry else nodelist)[0])
    except (NodeSetParseError, IndexError) as problem:
        raise UserError(f"SLURM_STEP_NODELIST = {nodelist!r} cannot be expanded: {problem}") from None


def _number(env: Mapping[str, str], name: str) -> int:
    text = env.get(name, "")
    if not text.isdecimal():
        raise UserError(f"{name} = {text!r}: must be a whole number from 0; the launcher sets it")
    return int(text)


def _port(env: Mapping[str, str]) -> int:
    port = _number(env, "MASTER_PORT")
    if port > 65535:
        raise UserError(f"MASTER_PORT = {port}: ports end at 65535")
    return port
