"""What saving costs: whole runs under DeepSpeed that save after every step, by the runs' own account (summary.json).

`share_at_15_minutes` is the share of a run's time at the default interval, `share_at_90_seconds` ten times as often.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import common
import workload
from overhead import run_block
from workload import Shape

from ctcd_ds import cli
from ctcd_ds.recipe.reading import load_recipe

SAVES = 3
INTERVAL_S = 15 * 60


def measure(shape: Shape, repetitions: int, folder: Path) -> dict[str, Any]:
    """The row's values. A save: DeepSpeed's shards, fsync, sha256 of all, manifest, rename, pruning."""
    corpus = workload.write_corpus(folder / "corpus", shape.vocab_size, SAVES * shape.rows, shape.length)
    path = workload.recipe(folder, shape, corpus, SAVES, checkpoint_every=1, keep_checkpoints=1, valid_rows=1)
    seconds = []
    for number in range(repetitions):
        run = folder / f"run-{number}"
        run_block(load_recipe(path), run)
        seconds.append(json.loads((run / "summary.json").read_text())["saving_s"] / SAVES)
    [last] = (run / "checkpoints").glob("step-*")
    return {
        "save_s": (save := median(seconds)),
        "checkpoint_bytes": sum(file.stat().st_size for file in last.rglob("*") if file.is_file()),
        "share_at_15_minutes": save / (INTERVAL_S + save),
        "share_at_90_seconds": save / (INTERVAL_S / 10 + save),
        "rounds": {"save_s": [round(s, 3) for s in seconds]},
    }


def main() -> None:
    parser = common.parser(__doc__)
    workload.add_shape_options(parser)
    parser.set_defaults(repetitions=3)
    arguments = parser.parse_args()
    common.begin(arguments)
    with tempfile.TemporaryDirectory() as folder:
        common.write_row(arguments, measure(Shape.of(arguments), arguments.repetitions, Path(folder)))


if __name__ == "__main__":
    cli.run(main)
