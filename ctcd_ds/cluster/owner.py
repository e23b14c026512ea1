"""Who has a directory that a run writes: one job at a time, from its submission to its end, on one host or many.

A job that waits in SLURM's queue has it by its number in slurm/jobs.json, for as long as SLURM knows that job. A job
that runs has it by a POSIX lock on a file in it, which the kernel, or the file server, takes back whatever becomes of
the process: a lock never has to be removed by hand. docs/reliability.md says on which file systems hosts see each
other's locks.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ctcd_ds.cli import UserError
from ctcd_ds.manifest import write_atomic

FILE = ".owner"
JOBS = Path("slurm", "jobs.json")  # stage → job id, of the jobs that were queued last
_PATIENCE_S = 5.0  # a submission that ends, a killed process that is not quite gone
LEASE_S = 120.0  # until a file server takes back what a node held that is gone (NFS 4: 90 s unless set otherwise)


@contextmanager
def owned(directory: Path, patience_s: float = _PATIENCE_S) -> Iterator[None]:
    """Keeps all others out of `directory` until the context, or the process, ends; makes it where it is missing.

    What was made is removed at the end where nothing was put into it. Raises UserError where another still has it
    after `patience_s`, saying who, or where it cannot be written.
    """
    refuse_while_queued(directory)
    new = [path for path in (directory, *directory.parents) if not path.exists()]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        descriptor = _locked(directory / FILE, patience_s)
    except FileExistsError:
        raise UserError(f"output_dir {directory} is a file") from None
    except OSError as problem:
        raise UserError(f"output_dir {directory} cannot be written: {problem.strerror}") from None
    try:
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(_myself()).encode(), 0)
        yield
    finally:
        with suppress(OSError):
            (directory / FILE).unlink()
            for path in new:
                path.rmdir()  # as far as they are empty
        os.close(descriptor)


def _locked(file: Path, patience_s: float) -> int:
    """A descriptor of the file that holds its lock. Raises UserError where another process does."""
    end = time.monotonic() + patience_s
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if file.exists() and os.path.samestat(os.fstat(descriptor), file.stat()):
                return descriptor
        except OSError as problem:
            if problem.errno in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                print(f"{file.parent}: this file system has no locks; nothing keeps a second job out of it", flush=True)
                return descriptor
            if problem.errno not in (errno.EACCES, errno.EAGAIN):
                raise
            if time.monotonic() > end:
                said = _described(os.pread(descriptor, 4096, 0))
                os.close(descriptor)
                raise UserError(f"output_dir {file.parent} is in use by {said}") from None
        os.close(descriptor)  # held, or removed by its last holder just now
        time.sleep(0.1)


def _myself() -> dict[str, Any]:
    since = time.strftime("%F %T %Z")
    return {"host": platform.node(), "pid": os.getpid(), "parent": os.getppid(), "job": own_job(), "since": since}


def _described(record: bytes) -> str:
    """Who holds the lock, in words, and what to do."""
    try:
        other = json.loads(record)
        job = f", job {other['job']}" if other["job"] else ""
        said = f"process {other['pid']} on {other['host']}{job}, since {other['since']}"
    except (ValueError, KeyError, TypeError):
        return "another process. Wait for its end, or name another directory"
    if (other["host"], other["parent"]) == (platform.node(), os.getppid()):
        return (
            f"{said}, which process {os.getppid()} started as it started this one. If they are ranks of one run, their "
            "launcher is not known here: start them with deepspeed, torchrun, srun or mpirun"
        )
    return f"{said}. Wait for its end, or name another directory"


def own_job() -> str | None:
    """This process's job as `squeue` names it; None outside SLURM."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")


def refuse_while_queued(directory: Path) -> None:
    """Raises UserError where a job that was queued for this directory, and is not this one, still waits or runs."""
    try:
        jobs = json.loads((directory / JOBS).read_text(encoding="utf-8"))
        # An experiment's list is by cell, and it asks about that itself.
        listed = [job for job in jobs.values() if isinstance(job, str)]
    except (OSError, ValueError, AttributeError):
        return
    if own_job() in listed or shutil.which("squeue") is None:
        return
    if there := still_queued(listed):
        raise UserError(
            f"output_dir {directory} has job{'s' * (len(there) > 1)} {', '.join(there)} in the queue: wait for "
            f"{'them' if len(there) > 1 else 'it'}, or `scancel {' '.join(there)}`"
        )


def note_queued(directory: Path, jobs: Mapping[str, str]) -> None:
    """From now on the directory belongs to these jobs (stage → id), until the last of them has left the queue."""
    write_atomic(directory / JOBS, json.dumps(jobs, indent=1) + "\n")


def still_queued(jobs: Iterable[str]) -> list[str]:
    """Those of the jobs that wait or run; a task of an array is JOB_TASK. Raises UserError where SLURM is silent."""
    line = ["squeue", "--noheader", "--me", "--array", "--format=%i"]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"squeue does not answer: {done.stderr.strip()}")
    queued = set(done.stdout.split())
    return [job for job in jobs if job in queued]
