"""Measures the loader: rows a second in one process (reading, order, masking), and how long a step waits for data.

rows_per_s is what the loader gives to a consumer that does nothing else. wait_share is the share of the time that
real training steps of --peers spend waiting for their batch; the loader's thread competes with them for the cores.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import common
import torch
import workload
from workload import Shape

from ctcd_ds import cli
from ctcd_ds.corpus.rows import Corpus, Rows
from ctcd_ds.tasks.loader import Cut, TrainLoader


@contextmanager
def corpus_rows(shape: Shape, rows: int) -> Iterator[Rows]:
    """The training rows of a corpus that lives as long as the context."""
    with tempfile.TemporaryDirectory() as folder:
        path = workload.write_corpus(Path(folder) / "corpus", shape.vocab_size, rows, shape.length)
        yield replace(shape.task, corpus=Corpus.open(path)).rows("train")


def open_loader(rows: Rows, shape: Shape, batch: int, device: torch.device | None) -> TrainLoader:
    """Steps of one micro-batch of `batch` rows, one rank."""
    return TrainLoader(rows, shape.task, 1, Cut(batch), start_step=0, device=device)


def rows_per_second(rows: Rows, shape: Shape, batch: int, seconds: float) -> float:
    """The pace over `seconds`, with a consumer that does nothing."""
    loader = open_loader(rows, shape, batch, None)
    next(loader)
    started, taken = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - started) < seconds:
        next(loader)
        taken += batch
    loader.close()
    return taken / elapsed


def waiting(rows: Rows, shape: Shape, steps: int, device: torch.device, dtype: str) -> dict[str, float]:
    """Steps of the shape's peers on the loader's batches: the share of their time spent waiting, seconds of a step."""
    from step import optimised
    from torch.optim import AdamW

    models, graph = workload.build_models(shape), workload.full_graph(shape.names)
    module = workload.co_training(models, graph, shape.vocab_size).to(device, common.DTYPES[dtype])
    optimizer = AdamW(module.parameters(), fused=True)
    loader = open_loader(rows, shape, shape.rows, device if device.type == "cuda" else None)

    def loss() -> Any:
        [batch] = next(loader)
        return module(batch, 0, 0).total

    step = optimised(loss, optimizer)
    step()
    common.synchronise(device)
    started, waited = time.perf_counter(), loader.waited_s
    for _ in range(steps):
        step()
    common.synchronise(device)
    elapsed, waited = time.perf_counter() - started, loader.waited_s - waited
    loader.close()
    return {"wait_share": waited / elapsed, "step_s": elapsed / steps}


def measure(
    shape: Shape, batch: int, seconds: float, steps: int, repetitions: int, device: torch.device, dtype: str
) -> dict[str, Any]:
    """The row's values."""
    with corpus_rows(shape, 200_000 if seconds >= 1 else 2000) as rows:
        paces = [rows_per_second(rows, shape, batch, seconds) for _ in range(repetitions)]
        return {
            "rows_per_s": median(paces),
            "rounds": {"rows_per_s": [round(pace) for pace in paces]},
            "loader_batch_rows": batch,
            **waiting(rows, shape, steps, device, dtype),
        }


def main() -> None:
    parser = common.parser(__doc__)
    workload.add_shape_options(parser)
    parser.add_argument("--loader_rows", type=cli.positive, default=1024, help="rows in a step of rows_per_s")
    parser.add_argument("--seconds", type=float, default=3.0, help="length of a round of rows_per_s")
    parser.add_argument("--steps", type=cli.positive, default=5, help="training steps of wait_share")
    arguments = parser.parse_args()
    device, shape = common.begin(arguments), Shape.of(arguments)
    how = (arguments.loader_rows, arguments.seconds, arguments.steps, arguments.repetitions)
    common.write_row(arguments, measure(shape, *how, device, arguments.dtype))


if __name__ == "__main__":
    cli.run(main)
