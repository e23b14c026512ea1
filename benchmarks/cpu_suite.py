"""Runs the CPU benchmarks one after another, each in a process of its own, into one list of rows.

Each waits until nothing else keeps the machine busy (load average of the last minute below --load), for at most
--patience minutes; its row says what the load was. Rows of an earlier list are replaced one by one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common

from ctcd_ds import cli
from ctcd_ds.manifest import write_atomic

THREE = ["--peers", "6x768,4x768,4x768", "--ways", "ours,alone"]
CAUSAL = ["--peers", "6x512,4x512", "--sequence_length", "512", "--rows", "2", "--vocab_size", "32000"]
COMMANDS: dict[str, list[str]] = {
    "two peers": ["step.py", "--ways", "naive,naive_kept,naive_selected,ours,alone"],
    "three peers": ["step.py", *THREE],
    "two causal peers": ["step.py", "--task", "clm", *CAUSAL, "--ways", "naive,naive_kept,ours,alone"],
    "hidden states and relations": ["step.py", "--ways", "bare,ours,hidden,relations"],
    "objective": ["objective.py"],
    "loader": ["loader.py"],
    "overhead": ["overhead.py"],
    "startup": ["startup.py"],
    "saving": ["saving.py"],
    "corpus, WordPiece": ["corpus.py"],
    "corpus, SentencePiece": ["corpus.py"],
}


def wait_for_quiet(load: float, minutes: float) -> None:
    """Returns when the machine is quiet, or when patience ends."""
    end = time.monotonic() + 60 * minutes
    while os.getloadavg()[0] >= load and time.monotonic() < end:
        time.sleep(2)


def run(command: list[str]) -> dict[str, Any]:
    """The row of one benchmark. Raises RunFailure where it has none."""
    with tempfile.TemporaryDirectory() as folder:
        row = Path(folder) / "row.json"
        line = [sys.executable, str(common.ROOT / "benchmarks" / command[0]), *command[1:], "--output", str(row)]
        done = subprocess.run([*line, "--device", "cpu"], stdout=subprocess.DEVNULL, check=False)
        if done.returncode:
            raise cli.RunFailure(f"{' '.join(command)} ended with {done.returncode}")
        found: dict[str, Any] = json.loads(row.read_text())
        return {**found, "command": " ".join(command)}


def main() -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("--output", type=Path, required=True, help="the list of rows, as JSON")
    parser.add_argument("--only", nargs="+", choices=COMMANDS, default=list(COMMANDS))
    parser.add_argument("--load", type=float, default=0.7, help="what counts as a quiet machine")
    parser.add_argument("--patience", type=float, default=10.0, help="minutes to wait for it, before each benchmark")
    parser.add_argument(
        "--text", nargs="+", metavar="F", help="for the corpus benchmarks; left out: prose that comes with Python"
    )
    parser.add_argument("--wordpiece", help="a vocab.txt or tokenizer directory for --text")
    parser.add_argument("--sentencepiece", help="a .model for --text; left out: that row is not made")
    arguments = parser.parse_args()
    if arguments.text and not (arguments.wordpiece or arguments.sentencepiece):
        raise cli.UserError("--text needs --wordpiece or --sentencepiece")
    extra = {"corpus, WordPiece": arguments.wordpiece, "corpus, SentencePiece": arguments.sentencepiece}
    rows = json.loads(arguments.output.read_text()) if arguments.output.exists() else []
    for name in arguments.only:
        if name == "corpus, SentencePiece" and not arguments.sentencepiece:
            continue
        given = ["--input", *arguments.text, "--tokenizer", extra[name]] if arguments.text and name in extra else []
        wait_for_quiet(arguments.load, arguments.patience)
        row = {"name": name, **run([*COMMANDS[name], *given])}
        rows = [*(other for other in rows if other["name"] != name), row]
        text = ",\n".join(json.dumps(row, allow_nan=False) for row in rows)
        write_atomic(arguments.output, f"[\n{text}\n]\n")
        print(f"{name}: load before {row['hardware']['load_before']}", flush=True)


if __name__ == "__main__":
    cli.run(main)
