"""A real SLURM on hosts of this machine: slurmctld and munged on `login`, a slurmd on each node; no systemd."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from cluster.hosts import Host, Network, wait_for

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun")

# Short intervals, so that tests are quick: a lost node is noticed after 10 s, a requeued job may start after 5 s (its
# credentials must have expired; munge's default makes it 2 minutes).
_CONF = """
ClusterName=tests
SlurmctldHost=login
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmdSpoolDir={folder}/spool.%n
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
GresTypes=gpu
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0,sched_min_interval=0
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
MinJobAge=3600
ReturnToService=2
SlurmdTimeout=10
SlurmctldTimeout=10
InactiveLimit=0
KillWait=20
JobRequeue=1
NodeName={nodes} CPUs=4 RealMemory=8000 Gres=gpu:2 State=UNKNOWN
PartitionName=low Nodes={nodes} Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=30
PartitionName=high Nodes={nodes} MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


class Slurm:
    """A cluster of `number` nodes with 4 cores and 2 (imagined) GPUs each, and a login host. Close it.

    `folder` is seen by all hosts; `shared`: what else of /tmp they see (pytest's base of all folders).
    """

    def __init__(self, number: int, folder: Path, shared: Path) -> None:
        self.folder, self._variables = folder, {"SLURM_CONF": folder / "slurm.conf", "OMP_NUM_THREADS": 1}
        names = [f"node{n + 1}" for n in range(number)]
        (folder / "state").mkdir()
        (folder / "slurm.conf").write_text(_CONF.format(folder=folder, nodes=f"node[1-{number}]"))
        for gpu in range(2):
            (folder / f"gpu{gpu}").symlink_to("/dev/null")
        (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-1]\n")
        (folder / "munge.key").write_bytes(os.urandom(1024))
        (folder / "munge.key").chmod(0o400)
        folder.chmod(0o755)
        self.network = Network(shared, ["login", *names])
        try:
            self._start_controller()
            for name in names:
                self.start_node(name)
            wait_for(lambda: self.client("sinfo", "-h", "-t", "idle", "-o", "%D").strip() == str(number), 30, "nodes")
        except BaseException:
            self.network.close()
            raise

    def __enter__(self) -> Slurm:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.network.close()

    def _start_controller(self) -> None:
        f = self.folder
        files = {"socket": "socket", "key-file": "key", "pid-file": "pid", "seed-file": "seed", "log-file": "log"}
        munge = [f"--{option}={f}/munge.{end}" for option, end in files.items()]
        self.login.start("munged", "--foreground", "--force", *munge, log=f / "munged.out")
        wait_for((f / "munge.socket").exists, 10, "munged")
        self.login.start("slurmctld", "-D", "-i", log=f / "slurmctld.out", **self._variables)

    @property
    def login(self) -> Host:
        """Where users type."""
        return self.network["login"]

    def start_node(self, name: str) -> None:
        """Starts slurmd on a host that is switched on."""
        log = self.folder / f"slurmd.{name}.out"
        self.network[name].start("slurmd", "-D", "-N", name, log=log, **self._variables)

    def client(self, *words: object, check: bool = True, **variables: object) -> str:
        """Runs a command on the login host; its output."""
        return self.login.run(*words, check=check, timeout=120, **{**self._variables, **variables})

    def submit(self, *options: object) -> dict[str, str]:
        """`python launchers/submit.py …`; name → job id."""
        said = self.client("python", "launchers/submit.py", *options)
        return dict(re.findall(r"^(\w+) +job (\d+)", said, re.MULTILINE))

    def job(self, number: str) -> dict[str, str]:
        """What `scontrol show job` says of a job (of the last task of an array)."""
        said = self.client("scontrol", "show", "job", "-o", number).strip().splitlines()[-1]
        return dict(re.findall(r"(\w+)=(\S*)", said))

    def wait(self, number: str, *states: str, seconds: float = 500) -> dict[str, str]:
        """Waits until a job is in one of the states, and says all about it."""
        end, found = time.monotonic() + seconds, self.job(number)
        while found["JobState"] not in states:
            assert time.monotonic() < end, f"job {number} is {found['JobState']}, not {states}\n{self.words()}"
            time.sleep(0.2)
            found = self.job(number)
        return found

    def words(self) -> str:
        """The ends of all logs below the shared folder of the test's runs: what to show where a test fails."""
        logs = sorted(self.folder.parent.glob("**/slurm/**/*.log"))
        return "\n".join(f"== {log}\n{log.read_text()[-1500:]}" for log in logs)


def exit_state(run: Path) -> dict[str, Any]:
    """RUN/exit.json; empty where there is none."""
    path = run / "exit.json"
    return json.loads(path.read_text()) if path.exists() else {}


def version() -> str:
    """SLURM's."""
    return subprocess.run(["sinfo", "--version"], capture_output=True, text=True, check=True).stdout.strip()
