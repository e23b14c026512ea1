"""The model of step time (ctcd_ds/cluster/scaling.py) against whole runs with 1, 2 and 4 processes on this machine.

Each set of processes measures first, all of them at once: a process's GEMM rate, the rate of copying memory, gloo's
all-reduce. Then it trains under DeepSpeed, ZeRO 1 and 2, with and without accumulation, the same micro-batch
everywhere, one thread a process, timed by metrics.jsonl. What a micro-step adds to the step of one process under ZeRO
1 gives the share of the GEMM rate that the peers reach; all else is predicted. With more processes than cores the
measured rates are those of shared cores.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import common
import torch
import torch.distributed as dist
import workload
from tqdm import tqdm
from workload import Shape

from ctcd_ds import cli
from ctcd_ds.cluster.scaling import Cluster, Work, predict
from ctcd_ds.recipe.reading import load_recipe

MANY = 4  # accumulation steps, where there are several
WAYS = [(stage, accumulation) for stage in (1, 2) for accumulation in (1, MANY)]
WARM_UP = 1  # steps at the head of a run that are not counted


def one_rank(folder: Path) -> None:
    """What each process does: measures with the others, then trains all ways. Rank 0 writes what came out."""
    from ctcd_ds.cluster.ranks import find_ranks
    from ctcd_ds.training.engine import device_type, start_processes
    from ctcd_ds.training.plan import make_plan
    from ctcd_ds.training.run_directory import RunDirectory
    from ctcd_ds.training.trainer import train

    ranks = find_ranks()
    torch.set_num_threads(ranks.threads())
    start_processes(ranks)
    given = json.loads((folder / "given.json").read_text())
    found: dict[str, Any] = {"rates": rates(given["elements"]), "runs": []}
    for number, (stage, accumulation) in enumerate(WAYS):
        rows = given["rows"] * accumulation * ranks.world
        recipe = load_recipe(folder / "recipe.json", [f"training.global_batch_rows={rows}"])
        config = {"gradient_accumulation_steps": accumulation, "zero_optimization": {"stage": stage}}
        run = RunDirectory(folder / f"run-{ranks.world}-{number}")
        plan = make_plan(recipe, config, ranks.world, device_type(), run.path)
        with ExitStack() as ending:
            train(plan, ranks, run, ending)
        if ranks.first:
            steps = [json.loads(line) for line in run.metrics.read_text().splitlines()]
            seconds = [rows / step["rows_per_s"] for step in steps[WARM_UP:]]
            found["runs"].append({"work": asdict(plan.work), "seconds": seconds})
            shutil.rmtree(run.path)
        dist.barrier()
    if ranks.first:
        (folder / f"found-{ranks.world}.json").write_text(json.dumps(found))


def rates(elements: int) -> dict[str, float]:
    """What a process reaches while all do the same: FLOP/s, bytes/s of copies, and the two figures of α + bytes/β."""
    hops = 2 * (dist.get_world_size() - 1)  # messages of a ring's all-reduce
    gemm = common.Gemm(torch.device("cpu"), torch.float32, 1024)
    source, target, large, small = torch.ones(elements), torch.empty(elements), torch.ones(elements), torch.ones(1)
    found = {
        "flops": 2 * gemm.size**3 / together(gemm, 40),
        "memory": 2 * 4 * elements / together(lambda: target.copy_(source), 10),
    }
    if hops:
        latency = together(lambda: dist.all_reduce(small), 100) / hops
        message = together(lambda: dist.all_reduce(large), 5) / hops
        found |= {"latency": latency, "link": 4 * elements / dist.get_world_size() / (message - latency)}
    return found


def together(step: Callable[[], Any], repetitions: int) -> float:
    """Mean seconds of a step that all processes do at once; the total counts, as cores may be shared."""
    step()
    dist.barrier()
    started = time.perf_counter()
    for _ in range(repetitions):
        step()
    seconds = torch.tensor([(time.perf_counter() - started) / repetitions], dtype=torch.float64)
    dist.all_reduce(seconds)
    return float(seconds) / dist.get_world_size()


def launch(folder: Path, processes: int) -> dict[str, Any]:
    """Runs `one_rank` in so many processes; gives what rank 0 wrote."""
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    line += [str(Path(__file__).resolve()), "--one_rank_in", str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(common.ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(line, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise cli.RunFailure(f"{' '.join(line)} ended with {done.returncode}\n{(done.stdout + done.stderr)[-3000:]}")
    found: dict[str, Any] = json.loads((folder / f"found-{processes}.json").read_text())
    return found


def compare(found: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """The row's values from what each number of processes found; the first two runs of one process calibrate."""
    one, many = found[1]["runs"][:2]  # ZeRO 1: an added micro-step is computation and nothing else
    micro_step_s = (median(many["seconds"]) - median(one["seconds"])) / (MANY - 1)
    share = predict(Work(**one["work"]), cluster_of(1, found[1]["rates"], 1.0)).compute_s / micro_step_s
    steps = []
    for processes, result in found.items():
        cluster = cluster_of(processes, result["rates"], share)
        for run in result["runs"]:
            work, measured = Work(**run["work"]), median(run["seconds"])
            step = predict(work, cluster)
            steps.append(
                {
                    "processes": processes,
                    "stage": work.stage,
                    "accumulation": work.accumulation,
                    "measured_s": measured,
                    "predicted_s": step.step_s,
                    "predicted_over_measured": step.step_s / measured,
                    "compute_s": step.compute_s,
                    "memory_s": step.memory_s,
                    "communication_s": step.communication_s,
                    "seconds": [round(s, 4) for s in run["seconds"]],
                }
            )
    errors = [abs(step["predicted_over_measured"] - 1) for step in steps]
    return {
        "median_error": median(errors),
        "largest_error": max(errors),
        "share_of_gemm": share,
        "micro_step_s": micro_step_s,
        "micro_batch": work.micro_batch,
        "parameters": work.trained,
        "rates": {str(processes): result["rates"] for processes, result in found.items()},
        "steps": steps,
    }


def cluster_of(processes: int, measured: dict[str, float], share: float) -> Cluster:
    """Processes of one machine as the model's GPUs of one node."""
    return Cluster(
        nodes=1,
        gpus=processes,
        flops=share * measured["flops"],
        memory=measured["memory"],
        node_link=measured.get("link", 1.0),
        node_latency=measured.get("latency", 0.0),
        link=1.0,
    )


def measure(shape: Shape, processes: list[int], timed: int, elements: int, folder: Path) -> dict[str, Any]:
    """The row's values. `shape.rows` is the micro-batch of a process."""
    steps, most = WARM_UP + timed, max(accumulation for _, accumulation in WAYS) * max(processes) * shape.rows
    corpus = workload.write_corpus(folder / "corpus", shape.vocab_size, most, shape.length)
    workload.recipe(folder, shape, corpus, steps, valid_rows=1)
    (folder / "given.json").write_text(json.dumps({"rows": shape.rows, "elements": elements}))
    found = {}
    for number in tqdm(processes, desc="processes", disable=None, leave=False):
        found[number] = launch(folder, number)
    return compare(found)


def process_counts(text: str) -> list[int]:
    """'1,2,4' as an option's type; 1 is always among them, as it calibrates."""
    return sorted({1, *(cli.positive(part) for part in text.split(","))})


def main() -> None:
    parser = common.parser(__doc__)
    workload.add_shape_options(parser, peers="4x512,3x512")
    parser.add_argument("--processes", type=process_counts, default="1,2,4")
    parser.add_argument("--elements", type=cli.positive, default=2**25, help="fp32 values copied and all-reduced")
    parser.add_argument("--one_rank_in", type=Path, help=argparse.SUPPRESS)
    parser.set_defaults(repetitions=3, rows=4, threads=1)
    arguments = parser.parse_args()
    if arguments.one_rank_in is not None:
        return one_rank(arguments.one_rank_in)
    if arguments.device != "cpu":
        raise cli.UserError("--device cuda: processes of one machine are compared on its CPU; use --device cpu")
    common.begin(arguments)
    with tempfile.TemporaryDirectory() as folder:
        how = (arguments.processes, arguments.repetitions, arguments.elements, Path(folder))
        values = measure(Shape.of(arguments), *how)
    common.write_row(arguments, values)


if __name__ == "__main__":
    cli.run(main)
