#!/usr/bin/env python
"""Runs an experiment: a grid of recipes, each cell pretrained, exported and scored; then results.json and the report.

python tools/run_experiment.py --experiment ds_configs/experiments/weights.yaml --size tiny --output_dir runs/weights

Cells that are finished are not run again with --resume; a cell that fails does not stop the others.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from ctcd_ds import cli

REPORT = Path(__file__).with_name("report.py")


def main() -> int:
    parser = cli.parser(__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--experiment", type=Path, required=True, help="the experiment file, YAML or JSON")
    add("--output_dir", type=Path, required=True, help="for cells/, results.json and the report")
    add("--size", default="full", help="full, or tiny: a rehearsal for 2 cores on the demo text")
    add("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="changes the base recipe")
    add("--data_dir", metavar="DIR|hub", help="GLUE's files, instead of the experiment's glue.data_dir")
    add("--seeds", help="comma-separated, instead of the experiment's")
    add("--max_parallel", type=int, metavar="N", help="cells at once; left out: one-rank cells fill GPUs or cores")
    add("--resume", action="store_true", help="goes on with the experiment in output_dir")
    add("--dry_run", action="store_true", help="checks all cells, prints them and their cost, and stops")
    options = parser.parse_args()
    if options.max_parallel is not None and options.max_parallel < 1:
        raise cli.UserError(f"--max_parallel {options.max_parallel}: must be a whole number from 1")

    try:
        seeds = None if options.seeds is None else list(dict.fromkeys(map(int, options.seeds.split(","))))
    except ValueError:
        raise cli.UserError(f"--seeds: {options.seeds!r} is no comma-separated list of whole numbers") from None

    from ctcd_ds.experiments.experiment import run_experiment

    directory = options.output_dir.resolve()
    code = run_experiment(
        options.experiment,
        directory,
        options.size,
        options.set,
        options.data_dir,
        seeds,
        options.max_parallel,
        options.resume,
        options.dry_run,
    )
    if REPORT.exists() and not options.dry_run and code != cli.EXIT_SAVED:
        words = [sys.executable, REPORT, directory, "--output_dir", directory / "report"]
        code = max(code, min(1, subprocess.run(list(map(str, words)), check=False).returncode))
    return code


if __name__ == "__main__":
    cli.run(main)
