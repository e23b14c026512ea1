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
from argparse import Namespace
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ClusterShell.NodeSet import NodeSet  # type: ignore[import-untyped]

from ctcd_ds import cli
from ctcd_ds.cluster.network import own_address
from ctcd_ds.cluster.ranks import Ranks
from ctcd_ds.corpus.mixture import open_corpus
from ctcd_ds.preflight import probes
from ctcd_ds.preflight.checks import Facts, Hosts, common_mistake, judge
from ctcd_ds.preflight.meeting import Meeting
from ctcd_ds.preflight.reach import Listener, reach
from ctcd_ds.preflight.verdict import host_table
from ctcd_ds.recipe.reading import flat, load_recipe

if TYPE_CHECKING:
    from ctcd_ds.training.plan import Plan

FACTS_S = 60.0  # a rank that was heard may take so long to import, and to read its files


def preflight(ranks: Ranks, asked: Namespace) -> int:
    """Called by all ranks; all return the same exit code: 0 good, 1 a host is not, 2 the user's mistake.

    `asked`: the command's options. Raises RunFailure on a rank that does not reach rank 0.
    """
    meeting = Meeting(ranks, asked.patience_s)
    address = own_address(os.environ["MASTER_ADDR"], ranks.world > ranks.local_world)
    listener = Listener(ranks.rank, address)
    here = {"host": socket.gethostname(), "address": address, "port": listener.port}
    came = meeting.gather("hello", here, asked.patience_s)

    token: str = meeting.tell("token", lambda: secrets.token_hex(16))
    output = probes.OutputProbe(asked.output_dir.resolve(), ranks.rank, token)
    there = meeting.tell("there", lambda: _begin(output, came))
    plan, understood = _understand(ranks, asked)  # after the ranks have met, for it takes the longest
    others = {int(rank): (where[0], where[1]) for rank, where in there.items() if int(rank) != ranks.rank}
    facts = _facts(ranks, understood, others, output)
    heard = meeting.gather("facts", asdict(facts), FACTS_S)
    verdict = meeting.tell("verdict", lambda: _judge(ranks, came, heard, output, asked.patience_s))

    code = int(verdict["code"])
    if code == cli.EXIT_DONE and ranks.world > 1 and plan is not None:
        from ctcd_ds.preflight.bandwidth import all_reduce

        code = all_reduce(ranks, plan, meeting)
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


def _understand(ranks: Ranks, asked: Namespace) -> tuple[Plan | None, dict[str, Any]]:
    """The plan of the job, and what Facts says of it. A mistake in the files is an answer too: it may be here only."""
    check = "recipe"
    try:
        from ctcd_ds.training.deepspeed_config import read_config
        from ctcd_ds.training.engine import device_number, device_type
        from ctcd_ds.training.plan import checkpoint_bytes, make_plan

        recipe, config = load_recipe(asked.recipe, asked.set), read_config(asked.deepspeed_config)
        check = "corpus"
        open_corpus(recipe.corpus)
        check = "recipe"
        plan = make_plan(recipe, config, ranks.world, device_type(), asked.output_dir)
    except cli.UserError as mistake:
        return None, {"mistake": (check, str(mistake))}
    except ImportError as missing:
        return None, {"mistake": ("versions", str(missing))}
    gpu, gpu_problem = probes.gpu(device_number(ranks)) if device_type() == "cuda" else (None, None)
    return plan, {
        "settings": flat({"recipe": recipe.resolved(), "deepspeed": config}),
        "corpus": plan.corpus.fingerprint,
        "checkpoint_bytes": checkpoint_bytes(plan),
        "checkpoints": _checkpoints_to_come(plan, asked.output_dir),
        "accelerator": device_type(),
        "gpu": gpu,
        "gpu_problem": gpu_problem,
    }


def _checkpoints_to_come(plan: Plan, output_dir: Path) -> int:
    """How many checkpoints will lie there at the same time, at most, beyond those that do; the next one at least."""
    training = plan.recipe.training
    trained = sum(not section.frozen for section in plan.recipe.peers.values())
    kept = training.keep_checkpoints + (plan.steps // training.keep_every if training.keep_every else 0)
    there = len(list((output_dir / "checkpoints").glob("step-*")))
    return max(1, kept + (trained if training.keep_best else 0) + 1 - there)


def _facts(
    ranks: Ranks, understood: dict[str, Any], there: dict[int, tuple[str, int]], output: probes.OutputProbe
) -> Facts:
    reached = reach(there)
    return Facts(
        rank=ranks.rank,
        host=socket.gethostname(),
        versions=probes.versions(),
        unreached=reached.failures,
        ahead_s=reached.ahead_s,
        trip_s=reached.trip_s,
        output=output.look(write=ranks.local_rank == 0),
        free_bytes=output.free_bytes(),
        **understood,
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
    print(host_table(hosts, findings), flush=True)
    return {"code": cli.EXIT_FAILED if findings else cli.EXIT_DONE}


def _read(said: dict[str, Any]) -> Facts:
    mistake = tuple(said["mistake"]) if said["mistake"] else None
    unreached = {int(rank): why for rank, why in said["unreached"].items()}
    return Facts(**{**said, "mistake": mistake, "unreached": unreached})


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
