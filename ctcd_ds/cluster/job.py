"""What a SLURM job's script asks about its run: may this start begin, how did it end, is the run finished?

    python -m ctcd_ds.cluster.job begin RUN                      0: go on
    python -m ctcd_ds.cluster.job end RUN [--asked_to_stop]      0: finished, 85: to be requeued, 1 or 2: it is over
    python -m ctcd_ds.cluster.job finished RUN                   0: all steps are done

RUN/exit.json is what is trusted, and only where this start wrote it. Every start is one line of RUN/slurm/starts.jsonl,
so that a job that never gets further ends: a run that fails is tried once more, and one that dies without a word (nodes
lost, preempted before it could save) is started five times from the same step.
"""

from __future__ import annotations

import json
import os
import re
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from ctcd_ds import cli
from ctcd_ds.cluster.owner import LEASE_S, owned
from ctcd_ds.ending import ending, is_finished

FAILURES, STARTS = 2, 5


@dataclass(frozen=True)
class Start:
    """One start of a job: the step it began at, and the files that say how far a run is, as they were then (ns)."""

    job: str
    step: int
    exit_written: int
    environment_written: int
    time: float


def begin(run: Path, job: str) -> str:
    """Notes a start; says so. Raises RunFailure where the job has started too often from this step, and
    UserError where the run is another's."""
    with owned(run, LEASE_S):  # in vain, srun need not be asked
        pass
    step = saved_step(run)
    tries = _tries(run, job, step)
    if tries >= STARTS:
        raise cli.RunFailure(
            f"job {job} has started {tries} times from step {step} and never saved a later one. Look into "
            f"{run / 'slurm' / 'logs'}, and go on with --resume"
        )
    start = Start(job, step, _written(run / "exit.json"), _written(run / "environment.json"), time.time())
    log = _log(run)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file:
        file.write(json.dumps(asdict(start)) + "\n")
    return f"start {tries + 1} from step {step}"


def end(run: Path, job: str, asked_to_stop: bool) -> tuple[int, str]:
    """(exit code of the job, why). 85: requeue it.

    asked_to_stop: the job was told to end (time limit, preemption), so that ranks that died before they could save are
    no failure.
    """
    start = _starts(run, job)[-1]
    state, reason = "failed", "the ranks ended without a word: killed, or out of memory"
    if _written(run / "exit.json") != start.exit_written and (ended := ending(run)) is not None:
        state, reason = ended.state, ended.reason
    elif _written(run / "environment.json") == start.environment_written and not asked_to_stop:
        return cli.EXIT_MISTAKE, "the run did not begin: rank 0's log says why"
    if state == "finished":
        return cli.EXIT_DONE, f"finished: {reason}"
    step = saved_step(run)
    tries, limit = _tries(run, job, step), FAILURES if state == "failed" and not asked_to_stop else STARTS
    said = f"{state} at step {step}: {reason}"
    if tries >= limit:
        return cli.EXIT_FAILED, f"{said}. {tries} starts from this step and no step saved since: not requeued"
    return cli.EXIT_SAVED, f"{said}. To be requeued"


def saved_step(run: Path) -> int:
    """The step of the newest checkpoint, as checkpoints/latest says; 0 where there is none."""
    try:
        found = re.fullmatch(r"step-(\d{8})", (run / "checkpoints" / "latest").read_text().strip())
    except OSError:
        return 0
    return int(found[1]) if found else 0


def _log(run: Path) -> Path:
    return run / "slurm" / "starts.jsonl"


def _starts(run: Path, job: str) -> list[Start]:
    lines = _log(run).read_text().splitlines() if _log(run).exists() else []
    return [start for line in lines if (start := Start(**json.loads(line))).job == job]


def _tries(run: Path, job: str, step: int) -> int:
    """How often this job has started from this step."""
    return sum(start.step == step for start in _starts(run, job))


def _written(path: Path) -> int:
    """When a file was written; 0 where there is none. Only ever compared for being another."""
    return path.stat().st_mtime_ns if path.exists() else 0


def main() -> int:
    parser = cli.parser(__doc__)
    parser.add_argument("question", choices=("begin", "end", "finished"))
    parser.add_argument("run", type=Path, help="the run directory")
    parser.add_argument("--asked_to_stop", action="store_true", help="the job was told to end")
    arguments = parser.parse_args()
    run, job = arguments.run.resolve(), os.environ.get("SLURM_JOB_ID", "alone")
    if arguments.question == "finished":
        if not is_finished(run):
            raise cli.RunFailure(f"{run} is not finished ({run / 'exit.json'} says how it ended)")
        return cli.EXIT_DONE
    code, said = (cli.EXIT_DONE, begin(run, job)) if arguments.question == "begin" else end(
        run, job, arguments.asked_to_stop
    )  # fmt: skip
    print(f"{run.name}: {said}", flush=True)
    return code


if __name__ == "__main__":
    cli.run(main)
