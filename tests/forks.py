"""Python processes that start in a moment: forked from a server that has everything imported already.

A start costs nine CPU seconds of imports, and the tests start hundreds. What is forked is a process like any other: a
pid, signals, output, an exit code, an end of its own; it runs a script by its path as `python SCRIPT` would, or a
module as `python -m MODULE`; so does every Python process that it starts itself. What it cannot show is an import that
is missing, or what a library reads from its environment while it is imported: for those there are true starts
(`subprocess`, `deepspeed`), and with CTCD_TRUE_STARTS=1 every start is one.

As a script it is a server: `python tests/forks.py ADDRESS PID` serves until the process PID is gone. There are two of
them for all workers of pytest, so that two ranks do not hash strings with one seed.
"""

from __future__ import annotations

import errno
import gc
import importlib
import json
import os
import pkgutil
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

_POPEN = subprocess.Popen  # the true one
SERVERS = 2
OWNER = "CTCD_TESTS_OWNER"  # the process that all workers of this pytest belong to
# Libraries read these while they are imported, which was long ago in the server.
READ_ON_IMPORT = ("DS_ACCELERATOR", "HF_", "MPL", "OPENBLAS_", "PYTHON", "TRANSFORMERS_")
# Threads do not survive a fork, so no library may make any while it is imported (the second is for pyarrow's memory).
WITHOUT_THREADS = {"OMP_NUM_THREADS": "1", "JE_ARROW_MALLOC_CONF": "background_thread:false"}
LIBRARIES = (
    "accelerate",
    "datasets",
    "deepspeed.checkpoint.ds_to_universal",
    "deepspeed.ops.adam",
    "matplotlib.figure",
    "scipy.stats",
    "sklearn.metrics",
    "tensorboard.backend.event_processing.event_accumulator",
    "torch.utils.tensorboard",
    "transformers.models.bert.modeling_bert",
    "transformers.models.bert.tokenization_bert",
    "transformers.trainer",
)


class Forked:
    """A forked process, by the part of `subprocess.Popen` that tests use, and `subprocess.run`."""

    def __init__(self, channel: socket.socket, line: Sequence[str]) -> None:
        self._channel = channel
        self.args = line
        self.returncode: int | None = None
        self.pid = int(channel.recv(64))

    def poll(self) -> int | None:
        with suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            self._channel.settimeout(timeout)
            try:
                self.returncode = int(self._channel.recv(64))
            except (TimeoutError, BlockingIOError):
                raise subprocess.TimeoutExpired(self.args, timeout or 0) from None
            self._channel.close()
        return self.returncode

    def communicate(self, input: None = None, timeout: float | None = None) -> tuple[None, None]:
        self.wait(timeout)
        return None, None

    def __enter__(self) -> Forked:
        return self

    def __exit__(self, *_: object) -> None:
        self.wait()

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def start(
    line: Sequence[str],
    environment: Mapping[str, str],
    cwd: Path,
    stdout: IO[Any],
    stderr: IO[Any],
    server: int = 0,
    own_session: bool = False,
) -> Forked | subprocess.Popen[bytes]:
    """Starts `python LINE…`, LINE beginning with a script's path or `-m`. `server`: whose string hashes it has."""
    if "CTCD_TRUE_STARTS" in os.environ:
        whole = [sys.executable, *line]
        files = {"stdin": subprocess.DEVNULL, "stdout": stdout, "stderr": stderr}
        return _POPEN(whole, env=environment, cwd=cwd, start_new_session=own_session, **files)
    channel = _connect(server % SERVERS)
    wanted = {"line": list(line), "environment": dict(environment), "cwd": str(cwd), "own_session": own_session}
    request = json.dumps(wanted).encode()
    with Path(os.devnull).open() as nothing:
        socket.send_fds(channel, [request], [nothing.fileno(), stdout.fileno(), stderr.fileno()])
    return Forked(channel, line)


def run(
    line: Sequence[str], environment: Mapping[str, str], cwd: Path, timeout: float = 500
) -> subprocess.CompletedProcess[str]:
    """`start` to its end, like `subprocess.run(…, capture_output=True, text=True)`."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = start(line, environment, cwd, out, err)
        try:
            process.wait(timeout)
        finally:
            process.kill()
        out.seek(0)
        err.seek(0)
        return subprocess.CompletedProcess(line, process.wait(), out.read(), err.read())


def _connect(server: int) -> socket.socket:
    """A connection to a server, which is started where there is none."""
    owner = os.environ[OWNER]
    address = f"\0ctcd-tests-{owner}-{server}"
    starting: subprocess.Popen[bytes] | None = None
    while True:
        channel = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            channel.connect(address)
            return channel
        except ConnectionRefusedError:
            channel.close()
        if starting is None:
            line = [sys.executable, __file__, address[1:], owner]
            quiet = {**os.environ, **WITHOUT_THREADS}
            starting = subprocess.Popen(line, env=quiet, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        elif starting.poll():
            raise RuntimeError(f"{' '.join(starting.args)} ended with {starting.returncode}")  # type: ignore[arg-type]
        time.sleep(0.05)


def _serve(address: str, owner: int) -> dict[str, Any]:
    """Forks a process for each request until the owner is gone. Returns the request in each new process."""
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        listening.bind("\0" + address)
    except OSError as taken:
        sys.exit(0 if taken.errno == errno.EADDRINUSE else 1)  # another worker was quicker: its server serves us too
    _import_everything()
    assert len(list(Path("/proc/self/task").iterdir())) == 1, "a thread does not survive a fork"
    gc.collect()
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # keepers are waited for by nobody
    listening.listen(64)
    listening.settimeout(1)
    while Path(f"/proc/{owner}").exists():
        with suppress(TimeoutError):
            channel, _ = listening.accept()
            channel.settimeout(None)
            message, files, _, _ = socket.recv_fds(channel, 2**18, 3)
            if message and not os.fork():
                listening.close()
                _keep(channel, files)
                return dict(json.loads(message))
            channel.close()
            for file in files:
                os.close(file)
    sys.exit(0)


def _keep(channel: socket.socket, files: Sequence[int]) -> None:
    """Forks once more and returns in the child, with its files; the parent stays, and tells how the child ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    child = os.fork()
    if child:
        for file in files:
            os.close(file)
        channel.send(str(child).encode())
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        with suppress(OSError):
            channel.send(str(code).encode())
        os._exit(0)
    channel.close()
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)


def _import_everything() -> None:
    import ctcd_ds

    for name in LIBRARIES:
        importlib.import_module(name)
    for module in pkgutil.walk_packages(ctcd_ds.__path__, "ctcd_ds."):
        importlib.import_module(module.name)


_LAUNCHER = str(Path(sys.executable).with_name("deepspeed"))


def popen(line: Any, **options: Any) -> Any:
    """subprocess.Popen, also in what is forked; but Python without pipes is forked, and `deepspeed` likewise."""
    words = [] if isinstance(line, str) else list(map(str, line))
    outputs = [options.get(name) or getattr(sys, f"__{name}__") for name in ("stdout", "stderr")]
    plain = options.keys() <= {"env", "cwd", "stdout", "stderr", "start_new_session"}
    if words[:1] not in ([sys.executable], [_LAUNCHER], ["deepspeed"]) or not plain or int in map(type, outputs):
        return _POPEN(line, **options)
    if words[0] == sys.executable:
        words = words[2 if words[1] == "-u" else 1 :]
    else:
        words[0] = _LAUNCHER
    environment, place = options.get("env") or os.environ, Path(options.get("cwd") or Path.cwd())
    server, own_session = int(environment.get("RANK", 0)), options.get("start_new_session", False)
    return start(words, environment, place, *outputs, server, own_session)


def _run(line: Sequence[str]) -> None:
    """As the interpreter does with these words."""
    if line[0] == "-m":
        sys.modules.pop(line[1], None)  # it becomes __main__
        sys.argv[:] = line[1:]
        sys.path[0] = str(Path.cwd())
        runpy.run_module(line[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv[:] = line
        sys.path[0] = str(Path(line[0]).resolve().parent)
        runpy.run_path(line[0], run_name="__main__")


if __name__ == "__main__":
    request = _serve(sys.argv[1], int(sys.argv[2]))
    for key in {*request["environment"], *os.environ}:
        read = key.startswith(READ_ON_IMPORT) and key != "PYTHONPATH"
        if read and request["environment"].get(key) != os.environ.get(key):
            sys.exit(f"{key} was read while importing: what sets it needs a true start")
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["cwd"])
    if request["own_session"]:
        os.setsid()
    sys.modules["numpy"].random.seed()
    subprocess.Popen = popen  # type: ignore[assignment,misc]
    _run(request["line"])
