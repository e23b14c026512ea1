"""The commands: each module is one, with its main(). `ctcd NAME` is the same as `python -m ctcd_ds.commands.NAME`."""

from __future__ import annotations

import ast
import importlib
import sys
from pathlib import Path
from typing import NoReturn

import ctcd_ds
from ctcd_ds import cli

# In the order in which they are met.
NAMES = ("demo", "tokenizer", "corpus", "recipes", "cache-logits", "pretrain", "verify", "export", "glue", "lm-eval",
         "speed", "experiment", "report", "preflight", "submit", "demo-data")  # fmt: skip


def main() -> NoReturn:
    """The program `ctcd`: runs the command that is its first word."""
    word, *words = sys.argv[1:] or ["--help"]
    name = word.replace("_", "-")
    if name in NAMES:
        sys.argv = [f"ctcd {name}", *words]
        cli.run(lambda: importlib.import_module(f"ctcd_ds.commands.{name.replace('-', '_')}").main())
    cli.run(lambda: _about(word))


def _about(word: str) -> None:
    if word == "--version":
        print(f"ctcd {ctcd_ds.__version__}")
    elif word in ("-h", "--help"):
        print(f"{ctcd_ds.__doc__}\n\nusage: ctcd COMMAND …      `ctcd COMMAND --help` says more\n")
        print(*(f"  {name:<13}{_purpose(name)}" for name in NAMES), sep="\n")
    else:
        raise cli.UserError(f"ctcd {word}: there is no such command; {cli.did_you_mean(word, NAMES)}")


def _purpose(name: str) -> str:
    """The first line of a command's docstring, read without importing it."""
    source = Path(__file__).with_name(f"{name.replace('-', '_')}.py").read_text(encoding="utf-8")
    return (ast.get_docstring(ast.parse(source)) or "").splitlines()[0]
