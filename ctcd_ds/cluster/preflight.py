"""Are all hosts of a job fit to run it? Asked in seconds, before hours are spent; a host that is not is named.

Every rank says what it is and what it sees; rank 0 judges (checks.py) and prints one table. Whatever ranks wait for has
a limit, so that a host that is not there becomes a line of the table and not a hang.
"""

from __future__ import annotations

import base64
import json
import os
import secrets
import socket
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from ClusterShell.NodeSet import NodeSet  # type: ignore[import-untyped]

from ctcd_ds import cli
from ctcd_ds.cluster import probes
from ctcd_ds.cluster.bandwidth import all_reduce
from ctcd_ds.cluster.checks import Facts, Hosts, Job, common_mistake, judge
from ctcd_ds.cluster.meeting import Meeting
from ctcd_ds.cluster.network import Listener, own_address, reach
from ctcd_ds.cluster.ranks import Ranks
from ctcd_ds.cluster.verdict import table

FACTS_S = 60.0  # a rank that was heard may take so long to import, and to read its files


@dataclass(frozen=True)
class Question:
    """What the launcher's command says of the job, for this rank.

    understand: reads recipe, corpus and DeepSpeed config; called after the ranks have met, for it takes the longest.
    peak: FLOP/s of all ranks at a precision, or None where nobody knows; called by all ranks within a process group.
    """

    output_dir: Path
    understand: Callable[[], Job]
    peak: Callable[[torch.device, str], float | None]
    patience_s: float


def preflight(ranks: Ranks, question: Question) -> int:
    """Called by all ranks; all return the same exit code: 0 good, 1 a host is not, 2 the user's mistake.

    Raises RunFailure on a rank that does not reach rank 0.
    """
    meeting = Meeting(ranks, question.patience_s)
    address = own_address(os.environ["MASTER_ADDR"], ranks.world > ranks.local_world)
    listener = Listener(ranks.rank, address)
    here = {"host": socket.gethostname(), "address": address, "port": listener.port}
    came = meeting.gather("hello", here, question.patience_s)

    token: str = meeting.tell("token", lambda: secrets.token_hex(16))
    output = probes.OutputProbe(question.output_dir, ranks.rank, token)
    there = meeting.tell("there", lambda: _begin(output, came))
    job = question.understand()
    others = {int(rank): (where[0], where[1]) for rank, where in there.items() if int(rank) != ranks.rank}
    facts = _facts(ranks, job, others, output)
    heard = meeting.gather("facts", asdict(replace(facts, job=replace(job, work=None))), FACTS_S)
    verdict = meeting.tell("verdict", lambda: _judge(ranks, came, heard, output, question.patience_s))

    code = int(verdict["code"])
    if code == cli.EXIT_DONE and ranks.world > 1:
        code = all_reduce(ranks, job, meeting, question.peak)
    listener.close()
    if not ranks.first:
        output.end()
    meeting.gather("bye", None, 5.0)  # rank 0 is the last: the store goes with it, and the directory that it made
    if ranks.first:
        output.end()
    return code


def _begin(output: probes.OutputProbe, came: dict[int, Any]) -> dict[int, tuple[str, int]]:
    output.begin()
    return {rank: (hello["address"], hello["port"]) for rank, hello in came.items()}


def _facts(ranks: Ranks, job: Job, there: dict[int, tuple[str, int]], output: probes.OutputProbe) -> Facts:
    reached = reach(there)
    gpu, gpu_problem = probes.gpu(job.gpu) if job.accelerator == "cuda" else (None, None)
    return Facts(
        rank=ranks.rank,
        host=socket.gethostname(),
        versions=probes.versions(),
        job=job,
        unreached=reached.failures,
        ahead_s=reached.ahead_s,
        trip_s=reached.trip_s,
        output=output.look(write=ranks.local_rank == 0),
        free_bytes=output.free_bytes(),
        gpu=gpu,
        gpu_problem=gpu_problem,
    )


def _judge(
    ranks: Ranks, came: dict[int, Any], heard: dict[int, Any], output: probes.OutputProbe, patience_s: float
) -> dict[str, int]:
    """Rank 0's part: prints the table, or the user's mistake."""
    facts = [_read(said) for _, said in sorted(heard.items())]
    facts = [
        replace(f, output="writes to another directory of the same name: its file is not where rank 0 looks")
        if f.output is None and f.rank and f.rank % ranks.local_world == 0 and not output.sees(f.rank)
        else f
        for f in facts
    ]
    # Ranks are dealt out host by host; whoever came tells its host's name, and the launcher may know the others'.
    place = {number: f"host {number + 1}" for number in range(ranks.world)} | dict(enumerate(launcher_hosts()))
    place |= {rank // ranks.local_world: hello["host"] for rank, hello in came.items()}
    silent = {rank: place[rank // ranks.local_world] for rank in range(ranks.world) if rank not in heard}
    hosts = Hosts(facts, silent, patience_s)
    if not silent and (mistake := common_mistake(hosts)):
        print(f"error: {mistake}", file=sys.stderr, flush=True)
        return {"code": cli.EXIT_MISTAKE}
    findings = judge(hosts)
    print(table(hosts, findings), flush=True)
    return {"code": cli.EXIT_FAILED if findings else cli.EXIT_DONE}


def _read(said: dict[str, Any]) -> Facts:
    job = said["job"]
    mistake = tuple(job["mistake"]) if job["mistake"] else None
    unreached = {int(rank): why for rank, why in said["unreached"].items()}
    return Facts(**{**said, "job": Job(**{**job, "mistake": mistake}), "unreached": unreached})


def launcher_hosts() -> list[str]:
    """The hosts in the order of ranks, as SLURM or the `deepspeed` launcher names them; empty where nobody says.

    DeepSpeed tells its ranks numbers only; the names stand in its own command line, the parent's of this process.
    """
    if nodes := os.environ.get("SLURM_STEP_NODELIST"):
        return list(map(str, NodeSet(nodes)))
    try:
        words = Path(f"/proc/{os.getppid()}/cmdline").read_text().split("\0")
        [info] = [word.partition("=")[2] for word in words if word.startswith("--world_info=")]
        return list(json.loads(base64.urlsafe_b64decode(info)))
    except (OSError, ValueError):
        return []
