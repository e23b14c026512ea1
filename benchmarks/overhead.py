"""What DeepSpeed and our loop cost: whole training steps through both, against a bare torch loop of the same maths.

`deepspeed` is a real run (loader, engine, exchange, clipping, metrics.jsonl), timed by its own metrics.jsonl; `bare`
is forward, backward, clipping of each peer, AdamW on the same batches. One rank; both take turns, a block of steps
each. Saving and validation are not counted. `host_ms` is the same at a width of 16 and one short row: as many layers,
tiles and calls, and next to no arithmetic, so what is left is the host's time, which a GPU would wait for.
"""

from __future__ import annotations

import json
import tempfile
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import common
import torch
import workload
from tqdm import tqdm
from workload import Shape

from ctcd_ds import cli
from ctcd_ds.cluster.ranks import Ranks
from ctcd_ds.corpus.rows import Corpus
from ctcd_ds.recipe.reading import load_recipe
from ctcd_ds.recipe.sections import Recipe
from ctcd_ds.tasks.loader import Cut, TrainLoader

CONFIG = {"zero_optimization": {"stage": 2}}
WARM_UP = 1  # steps at the head of a block that are not counted
HOST_STEPS = 30


def run_block(recipe: Recipe, run_path: Path, config: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    """A whole run through DeepSpeed in this process, one rank; gives the rows of its metrics.jsonl."""
    from ctcd_ds.training.engine import device_type
    from ctcd_ds.training.plan import make_plan
    from ctcd_ds.training.run_directory import RunDirectory
    from ctcd_ds.training.trainer import train

    plan = make_plan(recipe, config or CONFIG, 1, device_type(), run_path)
    with ExitStack() as ending:
        train(plan, Ranks.alone(), RunDirectory(run_path), ending)
    return [json.loads(line) for line in (run_path / "metrics.jsonl").read_text().splitlines()]


def bare_block(recipe: Recipe, shape: Shape, device: torch.device) -> tuple[list[float], list[float]]:
    """The same steps in a plain loop: their seconds, and each step's total loss."""
    models = workload.build_models(shape)
    module = workload.co_training(models, recipe.graph(), shape.vocab_size).to(device)
    settings = {name: recipe.optimizer_of(name) for name in recipe.peers}
    optimizer = torch.optim.AdamW(module.parameter_groups(settings), fused=True)
    rows = replace(shape.task, corpus=Corpus.open(Path(recipe.corpus.path))).rows("train")
    where = device if device.type == "cuda" else None
    loader = TrainLoader(rows, shape.task, recipe.seed, Cut(shape.rows), 0, device=where)
    seconds, losses = [], []
    for step in range(recipe.training.steps or 0):
        started = time.perf_counter()
        [batch] = next(loader)
        losses_of_step = module(batch, step, 0)
        losses_of_step.total.backward()
        for name, peer in module.peers.items():
            torch.nn.utils.clip_grad_norm_(peer.parameters(), settings[name].max_grad_norm)
        losses.append(float(losses_of_step.total.detach()))
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - started)
    loader.close()
    return seconds, losses


def total_loss(recipe: Recipe, row: dict[str, Any]) -> float:
    """The weighted sum of a row's losses."""
    graph = recipe.graph()
    return float(sum(weight * row[name] for name, weight in zip(graph.terms(), graph.weights(), strict=True)))


def measure(shape: Shape, steps: int, repetitions: int, device: torch.device, folder: Path) -> dict[str, Any]:
    """The row's values. Raises RunFailure where the two do not begin alike (their first losses differ)."""
    corpus = workload.write_corpus(folder / "corpus", shape.vocab_size, steps * shape.rows, shape.length)
    # A learning rate of nearly zero: all blocks then time the same weights.
    recipe = load_recipe(workload.recipe(folder, shape, corpus, steps), ["optimizer.lr=1e-9", "training.valid_rows=1"])
    seconds: dict[str, list[float]] = {"bare": [], "deepspeed": []}
    for round_ in tqdm(range(repetitions), desc="bare deepspeed", unit="round", disable=None, leave=False):
        own, losses = bare_block(recipe, shape, device)
        rows = run_block(recipe, folder / f"run-{round_}")
        if abs((found := total_loss(recipe, rows[0])) - losses[0]) > 1e-4 * losses[0]:
            raise cli.RunFailure(f"the two loops do not compute the same: first losses {losses[0]} and {found}")
        seconds["bare"].append(median(own[WARM_UP:]))
        seconds["deepspeed"].append(median(shape.rows / row["rows_per_s"] for row in rows[WARM_UP:]))
    return {
        "deepspeed_over_bare": common.ratio(seconds["deepspeed"], seconds["bare"]),
        **{f"{name}_s": median(blocks) for name, blocks in seconds.items()},
        "steps_in_a_block": steps - WARM_UP,
        "rounds": {name: [round(s, 6) for s in blocks] for name, blocks in seconds.items()},
    }


def host_only(shape: Shape) -> Shape:
    """The shape with next to no arithmetic: its layers, vocabulary and task, narrow, over one short row."""
    return replace(shape, peers=tuple(replace(size, width=16) for size in shape.peers), length=8, rows=1)


def main() -> None:
    parser = common.parser(__doc__)
    workload.add_shape_options(parser)
    parser.add_argument("--steps", type=cli.positive, default=6, help="steps of a block; the first is not counted")
    parser.set_defaults(repetitions=3)
    arguments = parser.parse_args()
    if arguments.steps <= WARM_UP:
        raise cli.UserError(f"--steps {arguments.steps}: must be at least {WARM_UP + 1}, the first is not counted")
    device, shape = common.begin(arguments), Shape.of(arguments)
    with tempfile.TemporaryDirectory() as folder:
        values = measure(shape, arguments.steps, arguments.repetitions, device, Path(folder, "whole"))
        host = measure(host_only(shape), HOST_STEPS, arguments.repetitions, device, Path(folder, "host"))
        values["host_ms"] = {name: round(1e3 * host[f"{name}_s"], 2) for name in ("bare", "deepspeed")}
    common.write_row(arguments, values)


if __name__ == "__main__":
    cli.run(main)
