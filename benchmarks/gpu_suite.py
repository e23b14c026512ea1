"""Everything worth knowing about one GPU in at most 25 minutes, as one JSON and a Markdown table beside it.

A machine with torch and transformers that reaches nothing: first, where pip works, --make_wheels DIR; then there,
from a checkout, --wheels DIR. Each part writes its result as soon as it is there; the same command goes on with what
has none. A part whose packages are missing, or that would begin after --minutes, is skipped with the reason; a
part that fails says so, the others go on, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import wheels  # what stands at the top is all that a bare machine has


def before_anything_is_imported() -> None:
    """Makes wheels and ends, or goes on in a process that has them, where that is asked."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--make_wheels", type=Path)
    parser.add_argument("--wheels", type=Path)
    parser.add_argument("--python", default="3.12")
    arguments, _ = parser.parse_known_args()
    if arguments.make_wheels is not None:
        wheels.make(arguments.make_wheels.resolve(), arguments.python)
        print(
            f"{arguments.make_wheels}: copy it beside a checkout; there: gpu_suite.py --wheels {arguments.make_wheels}"
        )
        sys.exit(0)
    if arguments.wheels is not None:
        wheels.use(arguments.wheels)


def attempt(part: Callable[[], Any], began: float, minutes: float) -> dict[str, Any]:
    """One part's result with its seconds, or why there is none."""
    import torch
    from gpu_parts import Skipped

    started = time.monotonic()
    if started - began > 60 * minutes:
        return {"skipped": f"the {minutes:g} minutes were over"}
    try:
        result = {"result": part()}
    except Skipped as reason:
        return {"skipped": str(reason)}
    except Exception as problem:  # a part must not take the others' results with it
        result = {"failed": f"{type(problem).__name__}: {problem}", "traceback": traceback.format_exc()[-2000:]}
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return {**result, "seconds": round(time.monotonic() - started, 1)}


def markdown(found: Mapping[str, Any]) -> str:
    """A table of every number of the parts that have a result, longer ones left to the JSON."""
    lines = ["| part | what | value |", "|---|---|---:|"]
    for part, outcome in found.items():
        if "result" not in outcome:
            lines.append(f"| {part} | {'skipped' if 'skipped' in outcome else 'failed'} | |")
            continue
        for name, value in _numbers(outcome["result"]):
            lines.append(f"| {part} | {name} | {value:.6g} |")
    return "\n".join(lines) + "\n"


def _numbers(values: Mapping[str, Any], before: str = "") -> list[tuple[str, float]]:
    found = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            found += _numbers(value, f"{before}{name} ")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found.append((before + str(name), float(value)))
    return found


def main() -> int:
    import common
    from gpu_parts import FULL, PARTS, TINY, Suite

    from ctcd_ds import cli
    from ctcd_ds.manifest import write_atomic

    parser = common.parser(__doc__)
    parser.add_argument("--size", choices=("full", "tiny"), default="full", help="tiny: whether it runs at all")
    parser.add_argument("--minutes", type=float, default=25.0, help="no part begins later than this")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--make_wheels", type=Path, metavar="DIR", help="only makes what a bare machine lacks")
    parser.add_argument("--python", default="3.12", help="that machine's Python, for --make_wheels")
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="what --make_wheels made")
    arguments = parser.parse_args()
    device, began = common.begin(arguments), time.monotonic()
    suite = Suite(FULL if arguments.size == "full" else TINY, device)
    found: dict[str, Any] = {}
    if arguments.output is not None and arguments.output.exists():
        before = json.loads(arguments.output.read_text())["parts"]
        found = {name: part for name, part in before.items() if "result" in part}
    for name in arguments.parts:
        if name not in found:
            found[name] = attempt(getattr(suite, name), began, arguments.minutes)
        common.write_row(arguments, {"parts": found, "seconds": round(time.monotonic() - began, 1)}, show=False)
        what = next(key for key in ("result", "skipped", "failed") if key in found[name])
        print(f"{name}: {'done' if what == 'result' else found[name]}", flush=True)
    if arguments.output is not None:
        write_atomic(arguments.output.with_suffix(".md"), markdown(found))
    return cli.EXIT_FAILED if any("failed" in part for part in found.values()) else cli.EXIT_DONE


if __name__ == "__main__":
    before_anything_is_imported()
    import common  # noqa: F401  (puts the checkout on the path: a bare machine has it installed nowhere)

    from ctcd_ds import cli

    cli.run(main)
