"""Start-up: from the `deepspeed` launcher to the end of the first step, against an empty DeepSpeed script.

Both are launched in turns as a user launches them, one rank. The empty script makes an engine around one linear
layer and takes one step. The peers are small, so that it is the start that is measured and not the step.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import common
import workload
from tqdm import tqdm
from workload import Shape

from ctcd_ds import cli
from ctcd_ds.cluster.ranks import free_port

EMPTY = """
import sys
import deepspeed, torch

model = torch.nn.Linear(8, 8)
config = {"train_batch_size": 1, "zero_optimization": {"stage": 2}}
engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(model.parameters()), config=config)
engine.backward(engine(torch.zeros(1, 8, device=engine.device)).sum())
engine.step()
open(sys.argv[-1], "w").write("stepped\\n")
"""


def launch(arguments: list[object], appears: Path, device: str) -> float:
    """Launches a script with `deepspeed`; seconds until the file `appears` has content. Waits for its end."""
    environment = {**os.environ, "PYTHONPATH": str(common.ROOT)}
    if device == "cpu":
        environment["DS_ACCELERATOR"] = "cpu"
    command = ["deepspeed", "--num_accelerators", 1, "--master_port", free_port(), *arguments]
    with tempfile.TemporaryFile("w+") as said:
        started = time.perf_counter()
        process = subprocess.Popen([str(part) for part in command], env=environment, stdout=said, stderr=said)
        while process.poll() is None and not (appears.exists() and appears.stat().st_size):
            time.sleep(0.005)
        elapsed = time.perf_counter() - started
        if process.wait() or not appears.exists():
            said.seek(0)
            raise cli.RunFailure(
                f"{' '.join(map(str, command))} ended with {process.returncode}\n{said.read()[-3000:]}"
            )
    return elapsed


def measure(shape: Shape, warm_up: int, repetitions: int, device: str, folder: Path) -> dict[str, Any]:
    """The row's values; the first `warm_up` launches of each are not counted (they may build DeepSpeed's ops)."""
    corpus = workload.write_corpus(folder / "corpus", shape.vocab_size, 2 * shape.rows, shape.length)
    recipe, empty = workload.recipe(folder, shape, corpus, steps=1), folder / "empty.py"
    empty.write_text(EMPTY)
    seconds: dict[str, list[float]] = {"ours": [], "empty": []}
    for round_ in tqdm(range(-warm_up, repetitions), desc="launches", unit="pair", disable=None, leave=False):
        run, mark = folder / f"run-{round_}", folder / f"stepped-{round_}"
        pretrain = [common.ROOT / "launchers" / "pretrain.py", "--recipe", recipe, "--output_dir", run]
        pretrain += ["--deepspeed_config", common.ROOT / "ds_configs" / "cpu.json"]
        ours, other = launch(pretrain, run / "metrics.jsonl", device), launch([empty, mark], mark, device)
        if round_ >= 0:
            seconds["ours"].append(ours)
            seconds["empty"].append(other)
    return {
        "ours_minus_empty_s": median(a - b for a, b in zip(seconds["ours"], seconds["empty"], strict=True)),
        **{f"{name}_s": median(taken) for name, taken in seconds.items()},
        "rounds": {name: [round(s, 3) for s in taken] for name, taken in seconds.items()},
    }


def main() -> None:
    parser = common.parser(__doc__)
    workload.add_shape_options(parser, peers="2x128,1x128")
    parser.add_argument("--warm_up", type=int, default=1, help="launches of each that are not counted")
    parser.set_defaults(repetitions=3)
    arguments = parser.parse_args()
    common.begin(arguments)
    with tempfile.TemporaryDirectory() as folder:
        how = (arguments.warm_up, arguments.repetitions, arguments.device, Path(folder))
        values = measure(Shape.of(arguments), *how)
    common.write_row(arguments, values)


if __name__ == "__main__":
    cli.run(main)
