"""What would run on a GPU, run through without one: where it breaks, what it launches, where the host waits.

The means, and what cannot be seen by them (streams, times, numbers), are in fake_gpu.py.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import fake_gpu
from commands import PATIENCE_S
from runs import ROOT

pytestmark = [
    pytest.mark.cuda_path,
    pytest.mark.skipif(torch.version.cuda is not None, reason="this torch knows CUDA: its own device cannot be faked"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to build tests/fake_gpu.cpp"),
]

# What must not grow; lower it with every improvement. Kernels of one step of the paper's pair (6x768 + 4x768, 128 rows
# of 128, 19 targets a row) without compilation: ATen operations that write on the GPU and are no views, a fused or
# foreach one being one. Bytes a logit: what the objective's operations read and write, its GEMMs left out, by the
# number of peers.
MOST_KERNELS = {
    1: {"cpu.json": 1083, "zero1_bf16.json": 911, "zero2_bf16.json": 911, "zero2_fp16.json": 915},
    8: {"cpu.json": 943, "zero1_bf16.json": 911, "zero2_bf16.json": 934, "zero2_fp16.json": 938},
}
MOST_BYTES_A_LOGIT = {1: 92, 2: 152, 3: 212}

Runs = Callable[..., Any]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """What fake_gpu_runs.py says to these words, once for all tests."""
    library = fake_gpu.build(tmp_path_factory.mktemp("fake_gpu"))
    environment = {**os.environ, fake_gpu.LIBRARY: str(library), "OMP_NUM_THREADS": "1"}

    @cache
    def said(*words: object) -> Any:
        line = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("fake_gpu_runs.py")), *map(str, words)]
        done = subprocess.run(line, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.splitlines()[-1])

    return said


def test_what_waits_for_the_device_is_seen(runs: Runs) -> None:
    """Else the tests below could not fail."""
    assert runs("combinations")["seen"] == {
        "a tensor from a number": ["_to_copy"],
        "a copy to the device": ["_to_copy"],
        "a copy into a tensor": ["copy_"],
        "a value that is read": ["DataDependentOutputException"],
        "a fill": [],
    }


def test_every_combination_gives_every_gradient_and_waits_for_nothing(runs: Runs) -> None:
    """Precision × peers × kinds of batch × temperature, half of them with the objective's numbers as tensors."""
    cases = runs("combinations")["cases"]
    assert len(cases) == 3 * 3 * 3 * 2
    assert [case for case in cases if case["wrong"] or case["waits"]] == []


def test_other_tasks_frozen_peers_and_divergences_run_there_too(runs: Runs) -> None:
    assert runs("combinations")["tasks"] == [{"task": task, "wrong": [], "waits": []} for task in ("clm", "span")]


def test_the_objective_moves_no_more_bytes_a_logit(runs: Runs) -> None:
    found = {int(peers): size for peers, size in runs("combinations")["bytes a logit"].items()}
    assert found.keys() == MOST_BYTES_A_LOGIT.keys()
    assert all(found[peers] <= most for peers, most in MOST_BYTES_A_LOGIT.items()), found


@pytest.mark.parametrize("ranks", MOST_KERNELS)
def test_every_shipped_config_takes_a_step_that_waits_once(runs: Runs, ranks: int) -> None:
    """Through DeepSpeed's engine: the losses and norms are the only values that the host reads."""
    shipped = runs("engine", ranks)
    assert sorted(shipped) == sorted(path.name for path in (ROOT / "ds_configs").glob("*.json"))
    for name, found in shipped.items():
        dtype = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}[found["precision"]]
        assert found["weights"] == [f"torch.{dtype} cuda"] and found["masters"] == ["torch.float32 cuda"], name
        assert found["waits"] == found["reads of a look"] == ["tolist"], name
        assert found["kernels"].keys() == {"forward and backward", "exchange", "step"}
        assert sum(found["kernels"].values()) <= MOST_KERNELS[ranks][name], (name, found["kernels"])
        wire = "float32" if ranks > 1 else dtype
        gathers = [dtype for _ in range(4)] if ranks > 1 else []  # two groups a peer; alone there is nothing to gather
        reduced, exchanged, *gathered = found["collectives"]
        assert reduced == ["all_reduce", found["trained"], f"torch.{wire}"], name
        assert exchanged[0] == "all_reduce" and exchanged[1] < 16
        assert [(what, of) for what, _, of in gathered] == [("all_gather_into_tensor", f"torch.{of}") for of in gathers]
