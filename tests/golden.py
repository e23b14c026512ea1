"""Six small runs whose every number is kept: what a change of structure must not move.

`python tests/golden.py VALUES.json` writes losses, gradient norms, held-out values and weight hashes of this commit on
this machine: two commits that should compute the same write equal files. `test_golden.py` holds them against the
values in golden.json with a tolerance, since processors differ in the last bits.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from runs import Job, bert, chain_corpus, final_weights, metrics, run_jobs

KEPT = ("loss/", "grad_norm/", "valid/")


def recipes(corpus: Path) -> dict[str, tuple[dict[str, Any], int]]:
    """Name → (recipe, gradient accumulation): every way in which a batch can be asked."""

    def pair(teacher: dict[str, Any], student: dict[str, Any]) -> dict[str, Any]:
        return {
            "teacher": {"model": bert(48, 3), "soft": {"student": 1.0}, **teacher},
            "student": {"model": bert(32, 2), "soft": {"teacher": 4.0}, **student},
        }

    own = pair({"label_noise": 0.2}, {"mask_seed": 7, "mask_fraction": 0.3})
    third = {"model": bert(16, 1), "mask_seed": 3, "label_noise": 0.3}
    made = {
        "targets": (pair({}, {}), "targets", 1),
        "all positions, accumulation 2": (pair({}, {}), "all", 2),
        "own masks and label noise, targets": (own, "targets", 2),
        "own masks and label noise, all positions": (own, "all", 1),
        "three peers": ({**pair({}, {}), "third": third}, "targets", 2),
        "no soft weight": (pair({"soft": {}}, {"soft": {}}), "targets", 1),
    }
    return {name: (_recipe(corpus, peers, where), accumulation) for name, (peers, where, accumulation) in made.items()}


def _recipe(corpus: Path, peers: dict[str, Any], soft_positions: str) -> dict[str, Any]:
    return {
        "corpus": {"path": str(corpus), "sequence_length": 32},
        "peers": peers,
        "objective": {"soft_positions": soft_positions},
        "optimizer": {"lr": 1e-3},
        "training": {"global_batch_rows": 16, "steps": 6, "log_every": 1, "valid_every": 3},
    }


def values(folder: Path) -> dict[str, Any]:
    """Runs the six recipes (fp32, ZeRO 2, one rank): each one's rows of metrics and the sha256 of its weights."""
    listed = recipes(chain_corpus(folder / "corpus"))
    jobs = {
        name: Job(
            recipe, folder / f"run{k}", {"gradient_accumulation_steps": pieces, "zero_optimization": {"stage": 2}}
        )
        for k, (name, (recipe, pieces)) in enumerate(listed.items())
    }
    run_jobs(list(jobs.values()), 1, folder)
    return {name: {"rows": _rows(job.output_dir), "weights": _hashes(job.output_dir)} for name, job in jobs.items()}


def _rows(run: Path) -> list[dict[str, float]]:
    return [{key: value for key, value in row.items() if key.startswith(KEPT)} for row in metrics(run).values()]


def _hashes(run: Path) -> dict[str, str]:
    from hashlib import sha256

    weights = final_weights(run)
    return {
        name: sha256(b"".join(tensor.detach().numpy().tobytes() for _, tensor in sorted(state.items()))).hexdigest()
        for name, state in weights.items()
    }


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        Path(sys.argv[1]).write_text(json.dumps(values(Path(temporary)), indent=1) + "\n")
