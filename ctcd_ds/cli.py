"""What every command shares: how it parses, how it speaks of mistakes, and with which code it ends.

Exit codes: 0 done, 1 internal failure or damage found, 2 a user's mistake, 85 stopped early with all saved.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from io import TextIOWrapper
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


def parser(description: str | None) -> argparse.ArgumentParser:
    """An argument parser that shows every default and takes no abbreviations."""
    return argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )


@contextmanager
def outlive_the_listener() -> Iterator[None]:
    """What is printed within may be lost, and is no failure: a rank must save though pdsh or ssh no longer listens."""
    with redirect_stdout(_Unheard(sys.stdout)), redirect_stderr(_Unheard(sys.stderr)):
        yield


class _Unheard:
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


def typed() -> list[str]:
    """This process' command, so that it can be typed again."""
    program, *words = sys.argv
    if module := getattr(sys.modules["__main__"], "__spec__", None):
        return ["python", "-m", module.name, *words]
    return [*(program.split() if program.startswith("ctcd ") else ["python", program]), *words]


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """The options that say which run is meant: the same for training and for what looks at its hosts before."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--recipe", type=Path, required=True, help="the recipe, YAML or JSON")
    parser.add_argument("--deepspeed_config", type=Path, required=True, help='DeepSpeed\'s JSON; "auto" is resolved')
    parser.add_argument("--output_dir", type=Path, required=True, help="the run directory")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="changes the recipe")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher's


def run(main: Callable[[], int | None]) -> NoReturn:
    """Runs a command's `main` and ends the process: a UserError is one message without traceback."""
    for stream in (sys.stdout, sys.stderr):  # a terminal without UTF-8 shows ? where it has no letter
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        code = main()
    except UserError as mistake:
        print(f"error: {mistake}", file=sys.stderr, flush=True)
        code = mistake.exit_code
    except RunFailure as failure:
        print(f"failed: {failure}", file=sys.stderr, flush=True)
        code = EXIT_FAILED
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        code = 130
    sys.exit(code or EXIT_DONE)
