"""What every command shares: how it parses, how it speaks of mistakes, and with which code it ends.

Exit codes: 0 done, 1 internal failure or damage found, 2 a user's mistake, 85 stopped early with all saved.
"""

from __future__ import annotations

import argparse
import difflib
import errno
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from io import TextIOWrapper
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

EXIT_DONE, EXIT_FAILED, EXIT_MISTAKE, EXIT_SAVED = 0, 1, 2, 85


class UserError(ValueError):
    """A user's mistake. Its text is all the user sees: the field, the value, and the fix; exit code 2."""

    exit_code = EXIT_MISTAKE


class Damage(UserError):
    """A file that is not as its manifest says. No typing mistake, but the user's to mend; exit code 1."""

    exit_code = EXIT_FAILED


class RunFailure(RuntimeError):
    """What ended a run and is nobody's typing mistake (a non-finite loss, a damaged file): one message, exit code 1."""


# What a file system says of itself, its user or a name: no fault of a program.
_OF_THE_MACHINE = {getattr(errno, name) for name in (
    "EACCES", "EPERM", "EROFS", "ENOSPC", "EDQUOT", "EFBIG", "EIO", "ESTALE", "EMFILE", "ENFILE", "ENOTDIR", "EISDIR",
    "ELOOP", "ENAMETOOLONG",
)}  # fmt: skip


def is_of_the_machine(problem: BaseException) -> bool:
    """Whether files, rights or room are the reason; libraries written in Rust say so in the text alone."""
    number = problem.errno if isinstance(problem, OSError) else re.search(r"\(os error (\d+)\)", str(problem))
    return (int(number[1]) if isinstance(number, re.Match) else number) in _OF_THE_MACHINE


def count(number: int, noun: str) -> str:
    """'one seed', '3 seeds'."""
    return f"one {noun}" if number == 1 else f"{number} {noun}s"


def some(names: Sequence[str]) -> str:
    """At most four of the names, and how many more there are."""
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def did_you_mean(word: object, allowed: Iterable[str]) -> str:
    """'did you mean …?' for a near miss, else what is allowed."""
    known = sorted(allowed)
    near = difflib.get_close_matches(str(word), known, n=1, cutoff=0.6)
    return f"did you mean {near[0]!r}?" if near else f"allowed: {', '.join(known) or 'none'}"


def one_folder(names: Iterable[str], folder: Callable[[str], str] = str) -> str:
    """'a and A' of the first two names whose folder is one, where a disk does not tell capitals apart; "" of none."""
    first: dict[str, str] = {}
    for name in names:
        if (place := folder(name).casefold()) in first:
            return f"{first[place]} and {name}"
        first[place] = name
    return ""


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The description as it is written, every default that says something, and values named by their kind."""

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        kinds = {int: "N", positive: "N", float: "X", whole_numbers: "N,N", names: "A,B"}
        kinds[Path] = "DIR" if action.dest.endswith("dir") else "FILE"
        return kinds.get(action.type, "X" if action.type else action.dest.upper())

    def _get_help_string(self, action: argparse.Action) -> str | None:
        says_something = action.default not in (None, False, "", [], argparse.SUPPRESS)
        return super()._get_help_string(action) if says_something else action.help


class _Parser(argparse.ArgumentParser):
    """Takes --a-b for --a_b, and says of an unknown option which one may be meant."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        words = sys.argv[1:] if args is None else list(args)
        for before, word in pairwise(["", *words]):
            if not word or (word.startswith("--") and word.endswith("=")):
                said = f"{word or before}: nothing stands behind it; is a variable of your shell not set?"
                self.exit(EXIT_MISTAKE, f"error: {said}\n")
        return super().parse_known_args([self._known(word) for word in words], namespace)

    def error(self, message: str) -> NoReturn:
        """One line, as of every other mistake, in place of all options."""
        self.exit(EXIT_MISTAKE, f"error: {message} (`{self.prog} --help` says more)\n")

    def _known(self, word: str) -> str:
        option, *value = word.split("=", 1)
        options = self._option_string_actions
        if not option.startswith("--") or option == "--" or option in options:
            return word
        if (underscored := "--" + option[2:].replace("-", "_")) not in options:
            near = did_you_mean(underscored, (name for name in options if name.startswith("--")))
            self.exit(EXIT_MISTAKE, f"error: {option}: there is no such option; {near}\n")
        return "=".join([underscored, *value])


def parser(description: str | None) -> argparse.ArgumentParser:
    """An argument parser that takes no abbreviations."""
    return _Parser(description=description, formatter_class=_Help, allow_abbrev=False)


def positive(text: str) -> int:
    """A whole number from 1, as an option's type."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)


def names(text: str) -> list[str]:
    """Comma-separated names, as an option's type."""
    return [name.strip() for name in text.split(",") if name.strip()]


def whole_numbers(text: str) -> list[int]:
    """Comma-separated whole numbers, as an option's type."""
    if not all(name.isdecimal() for name in names(text)) or not names(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no comma-separated list of whole numbers")
    return list(map(int, names(text)))


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Cells as lines of equal columns, a rule under the first."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]


@contextmanager
def ignore_broken_pipe() -> Iterator[None]:
    """What is printed within may be lost, and is no failure: a rank must save though pdsh or ssh no longer listens."""
    with redirect_stdout(_ForgivingStream(sys.stdout)), redirect_stderr(_ForgivingStream(sys.stderr)):
        yield


class _ForgivingStream:
    """A stream that drops what it cannot write."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def command(name: str, *words: object) -> list[str]:
    """The line that runs another of our commands in this environment."""
    return [sys.executable, "-m", f"ctcd_ds.commands.{name}", *map(str, words)]


def as_typed(line: Sequence[str]) -> str:
    """A line of `command` as a user types it; any other as it is."""
    if list(line[:2]) == [sys.executable, "-m"]:
        line = ["ctcd", line[2].rpartition(".")[2].replace("_", "-"), *line[3:]]
    return shlex.join(line)


def next_command(name: str, *words: object) -> str:
    """'next: ctcd NAME …', what a command says at its end."""
    return f"next: {as_typed(command(name, *words))}"


def typed() -> list[str]:
    """This process' command, so that it can be typed again."""
    program, *words = sys.argv
    if module := getattr(sys.modules["__main__"], "__spec__", None):
        return ["python", "-m", module.name, *words]
    return [*(program.split() if program.startswith("ctcd ") else ["python", program]), *words]


def add_run_options(parser: argparse.ArgumentParser, output: str = "the run directory") -> None:
    """The options that say which run is meant: the same for training and for what looks at its hosts before."""
    add = parser.add_argument
    add("--recipe", type=Path, required=True, help="the recipe, YAML or JSON")
    parser.add_argument(
        "--deepspeed_config", type=Path, required=True, help='DeepSpeed\'s JSON file; "auto" is filled in'
    )
    add("--output_dir", type=Path, required=True, help=output)
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="change these keys of the recipe"
    )
    add("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher's


def run(main: Callable[[], int | None]) -> NoReturn:
    """Runs a command's `main` and ends the process: a UserError is one message without traceback."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed, by >&-
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
    for stream in (sys.stdout, sys.stderr):  # a terminal without UTF-8 shows ? where it has no letter
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        code = main()
        sys.stdout.flush()
    except UserError as mistake:
        print(f"error: {mistake}", file=sys.stderr, flush=True)
        code = mistake.exit_code
    except RunFailure as failure:
        print(f"failed: {failure}", file=sys.stderr, flush=True)
        code = EXIT_FAILED
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python writes at its end
        print("interrupted: broken pipe", file=sys.stderr, flush=True)
        code = 141  # as a shell says of what SIGPIPE ended
    except OSError as problem:
        if not is_of_the_machine(problem):
            raise
        print(f"error: {problem.filename or 'this machine'}: {problem.strerror}", file=sys.stderr, flush=True)
        code = EXIT_MISTAKE
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        code = 130
    sys.exit(code or EXIT_DONE)
