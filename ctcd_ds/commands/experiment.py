"""Runs a grid of recipes: every cell is pretrained, exported and scored. Writes results.json and a report.

ctcd experiment --experiment ds_configs/experiments/weights.yaml --size tiny --output_dir runs/weights

Cells that are finished are not run again with --resume; a cell that fails does not stop the others. With --slurm every
cell is a chain of jobs (pretraining, export, scores), and the last job collects them and writes the report.
"""

from __future__ import annotations

import argparse
import subprocess
from pathlib import Path

from ctcd_ds import cli
from ctcd_ds.cluster.slurm import DEFAULTS, load_cluster


def main() -> int:
    parser = cli.parser(__doc__)
    add = parser.add_argument
    add("--experiment", type=Path, required=True, help="the experiment file, YAML or JSON")
    add("--output_dir", type=Path, required=True, help="for cells/, results.json and the report")
    add("--size", default="full", help="full, or tiny: a rehearsal for 2 cores on the demo text")
    add("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="change base recipe keys")
    add("--data_dir", metavar="DIR|hub", help="the tasks' files, in place of the experiment's own")
    add("--cells", nargs="+", metavar="CELL", help="only these conditions, and those they need")
    add("--seeds", type=cli.whole_numbers, help="in place of the experiment's")
    add("--max_parallel", type=cli.positive, help="cells at once; left out: as many as fill GPUs or cores")
    add("--resume", action="store_true", help="go on with the experiment in --output_dir")
    add("--slurm", action="store_true", help="queue the cells as jobs and return; on a login node")
    add("--nodes", type=cli.positive, default=1, help="nodes of each cell's run, with --slurm")
    add("--cluster", type=Path, metavar="FILE", help=f"for --slurm; left out: {DEFAULTS}, if there")
    add("--collect", action="store_true", help="run nothing; make results.json and the report of what is there")
    add("--dry_run", action="store_true", help="check all cells, print them and their cost; run nothing")
    options = parser.parse_args()
    if not options.slurm and (options.nodes > 1 or options.cluster):
        raise cli.UserError("--nodes and --cluster are for --slurm")
    if options.slurm and options.collect:
        raise cli.UserError("--slurm queues a job that collects; --collect alone does so now")

    from ctcd_ds.experiments.experiment import Request, Slurm, run_experiment

    directory = options.output_dir.resolve()
    code = run_experiment(
        Request(
            path=options.experiment,
            directory=directory,
            size=options.size,
            overrides=options.set,
            data_dir=options.data_dir,
            cells=options.cells,
            seeds=options.seeds and list(dict.fromkeys(options.seeds)),
            max_parallel=options.max_parallel,
            resume=options.resume,
            dry_run=options.dry_run,
            only_collect=options.collect,
            slurm=Slurm(load_cluster(options.cluster), options.nodes, collecting(options)) if options.slurm else None,
        )
    )
    if not options.slurm and not options.dry_run and code != cli.EXIT_SAVED:
        code = max(code, show(directory))
    return code


def show(directory: Path) -> int:
    """The speed of each size of model, once, and the report: by the commands that a user types."""
    from ctcd_ds.evaluation.speed import can_classify, read_speed
    from ctcd_ds.experiments.collecting import shapes
    from ctcd_ds.experiments.results import read_results

    results, place = read_results(directory), directory / "speed"
    lines: list[list[str]] = []
    models = [model for export in shapes(results) if can_classify(model := directory / export)]
    known = read_speed(place).models if (place / "speed.json").exists() else []
    if models and [Path(model.path) for model in known] != models:
        length = min(cell.tokens // cell.rows for cell in results.cells if cell.tokens and cell.rows)
        size = ["--sequence_lengths", length, "--seconds", 5]
        lines.append(cli.command("speed", "--model", *models, *size, "--output_dir", place))
    lines.append(cli.command("report", directory, "--output_dir", directory / "report"))
    codes = [subprocess.run(line, check=False).returncode for line in lines]
    return min(1, max(codes))


def collecting(options: argparse.Namespace) -> list[str]:
    """The words after `python` that collect this experiment, from the folder where this was typed."""
    words: list[object] = ["--collect", "--experiment", options.experiment]
    words += ["--output_dir", options.output_dir, "--size", options.size]
    words += ["--set", *options.set] if options.set else []
    words += ["--data_dir", options.data_dir] if options.data_dir else []
    words += ["--cells", *options.cells] if options.cells else []
    words += ["--seeds", ",".join(map(str, options.seeds))] if options.seeds else []
    return cli.command("experiment", *words)[1:]


if __name__ == "__main__":
    cli.run(main)
