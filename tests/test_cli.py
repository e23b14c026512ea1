"""What all commands share: options, help, and how they speak of mistakes."""

from __future__ import annotations

import errno
import shlex
import subprocess
import sys
from typing import Any

import pytest

from commands import ROOT, environment
from ctcd_ds import cli
from ctcd_ds.commands import NAMES

HEAVY = ("torch", "transformers", "deepspeed", "megatron", "datasets", "pyarrow", "matplotlib")


@pytest.mark.parametrize(
    ("words", "value"),
    [(["--batch-sizes", "1, 32"], [1, 32]), (["--batch_sizes=8"], [8]), (["--batch-sizes=8,1"], [8, 1]), ([], [4])],
)
def test_an_option_is_known_with_hyphens_too(words: list[str], value: list[int]) -> None:
    parser = cli.parser("Measures.")
    parser.add_argument("--batch_sizes", type=cli.whole_numbers, default="4")
    assert parser.parse_args(words).batch_sizes == value


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--batch_size", "1"], "--batch_size: there is no such option; did you mean '--batch_sizes'?"),
        (["--colour", "1"], "--colour: there is no such option; allowed: --batch_sizes, --help"),
        (["--batch_sizes", ""], "--batch_sizes: nothing stands behind it; is a variable of your shell not set?"),
        (["--batch_sizes="], "--batch_sizes=: nothing stands behind it"),
        (["--batch_sizes", "1", "more"], "unrecognized arguments: more"),
        (["--batch_sizes", "1;2"], "argument --batch_sizes: '1;2' is no comma-separated list of whole numbers"),
    ],
)
def test_a_wrong_option_is_one_message(words: list[str], said: str, capsys: Any) -> None:
    parser = cli.parser("Measures.")
    parser.add_argument("--batch_sizes", type=cli.whole_numbers)
    with pytest.raises(SystemExit) as end:
        parser.parse_args(words)
    err = capsys.readouterr().err
    assert end.value.code == cli.EXIT_MISTAKE and err.startswith(f"error: {said}") and err.count("\n") == 1


def test_a_reader_that_has_read_enough_gets_no_traceback() -> None:
    """`ctcd --help | head -1`"""
    line = [sys.executable, "-u", "-c", "from ctcd_ds.commands import main; main()"]
    ours = subprocess.Popen(
        line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(), cwd=ROOT
    )
    assert ours.stdout is not None and ours.stderr is not None
    ours.stdout.close()
    assert ours.stderr.read() == "interrupted: broken pipe\n" and ours.wait() == 141


@pytest.mark.parametrize(
    ("problem", "said"),
    [
        (OSError(errno.ENAMETOOLONG, "File name too long", "PLACE"), "error: PLACE: File name too long\n"),
        (OSError(errno.EMFILE, "Too many open files"), "error: this machine: Too many open files\n"),
        (FileNotFoundError(errno.ENOENT, "No such file", "OURS"), None),
    ],
)
def test_what_the_file_system_says_is_one_message_and_a_fault_of_ours_is_not(
    problem: OSError, said: str | None, capsys: Any
) -> None:
    def main() -> None:
        raise problem

    with pytest.raises(OSError if said is None else SystemExit) as end:
        cli.run(main)
    assert said is None or (getattr(end.value, "code", None), capsys.readouterr().err) == (cli.EXIT_MISTAKE, said)


@pytest.mark.parametrize(("end", "code", "said"), [(">&-", 0, ""), ("2>&-", 0, "done\n")])
def test_a_closed_end_is_no_traceback(end: str, code: int, said: str) -> None:
    program = "from ctcd_ds import cli; cli.run(lambda: print('done'))"
    line = f"set -o pipefail; (sleep 0.2; {shlex.quote(sys.executable)} -c {shlex.quote(program)}) {end}"
    done = subprocess.run(["bash", "-c", line], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout, done.stderr) == (code, said, "")


def test_a_command_is_shown_as_it_is_typed() -> None:
    assert cli.as_typed(cli.command("demo_data", "--output_dir", "my data")) == "ctcd demo-data --output_dir 'my data'"
    assert cli.as_typed(["deepspeed", "--module", "x"]) == "deepspeed --module x"


def test_help_of_every_command_imports_nothing_heavy_and_shows_no_empty_default() -> None:
    """In one process: a library that one of them imports stays."""
    program = f"""
import contextlib, importlib, sys
for name in {NAMES!r}:
    sys.argv = ["ctcd " + name, "--help"]
    with contextlib.suppress(SystemExit):
        importlib.import_module("ctcd_ds.commands." + name.replace("-", "_")).main()
    heavy = [library for library in {HEAVY!r} if library in sys.modules]
    assert not heavy, (name, heavy)
"""
    line = [sys.executable, "-c", program]
    done = subprocess.run(line, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage: ctcd ") == len(NAMES)
    assert "(default: None)" not in done.stdout and "(default: [])" not in done.stdout
