"""Real training runs for tests: several runs one after another in one set of rank processes (importing costs once).

As a script it is one rank: `python tests/runs.py jobs.json` with RANK, WORLD_SIZE, LOCAL_RANK, MASTER_* set.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

import forks
from corpora import SPECIAL, write_corpus
from ctcd_ds.cluster.ranks import free_port
from ctcd_ds.corpus.tokenizer import load_tokenizer, tokenizer_identity
from ctcd_ds.manifest import read_manifest, write_manifest

Process: TypeAlias = "subprocess.Popen[bytes] | forks.Forked"
ROOT = Path(__file__).resolve().parents[1]
FP32: dict[str, Any] = {"zero_optimization": {"stage": 2}}
FP16: dict[str, Any] = {
    "fp16": {"enabled": True, "initial_scale_power": 24, "hysteresis": 1},
    "zero_optimization": {"stage": 2},
}
BF16: dict[str, Any] = {"bf16": {"enabled": True}, "zero_optimization": {"stage": 2}}


@dataclass(frozen=True)
class Job:
    """One run: a recipe as plain data, a DeepSpeed config, where it goes."""

    recipe: dict[str, Any]
    output_dir: Path
    deepspeed: dict[str, Any] = field(default_factory=lambda: FP32)
    resume: bool = False


def bert(width: int, layers: int, **settings: Any) -> dict[str, Any]:
    """A small BERT's config."""
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "intermediate_size": 2 * width}
    return {"model_type": "bert", "max_position_embeddings": 64, "num_attention_heads": 4, **sizes, **settings}


def chain_documents(number: int, vocab_size: int, seed: int = 0) -> list[list[int]]:
    """Documents of a Markov chain with three likely next tokens: something that a model can learn."""
    random = np.random.default_rng(seed)
    following = np.random.default_rng(0).integers(5, vocab_size, (vocab_size, 3))
    documents = []
    for _ in range(number):
        token = int(random.integers(5, vocab_size))
        document = [token]
        for choice in random.choice(3, size=random.integers(20, 120), p=(0.7, 0.2, 0.1)):
            token = int(following[token, choice])
            document.append(token)
        documents.append(document)
    return documents


def finish(model: Any, corpus: Path, place: Path) -> Path:
    """Saves a model, with the corpus's tokenizer, that knows something else than what it was initialised with."""
    import torch

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.empty_like(parameter).normal_(0, 0.05))
    model.save_pretrained(place)
    load_tokenizer(corpus / "tokenizer").save_pretrained(place)
    return place


def chain_corpus(directory: Path, vocab_size: int = 300, sentinels: int = 0, documents: int = 300) -> Path:
    """A small corpus that a model can learn, with the identity of its own tokenizer in the manifest.

    `sentinels`: how many tokens more are <extra_id_0>, …
    """
    write_corpus(
        directory,
        chain_documents(documents, vocab_size, seed=1),
        chain_documents(40, vocab_size, seed=2),
        vocab_size=vocab_size + sentinels,
        special=replace(SPECIAL, sentinels=tuple(range(vocab_size, vocab_size + sentinels))),
    )
    manifest = read_manifest(directory / "manifest.json")
    del manifest["sha256"]
    manifest["tokenizer"] = tokenizer_identity(load_tokenizer(directory / "tokenizer"))
    write_manifest(directory / "manifest.json", manifest)
    return directory


def drop_checkpoint(run: Path, step: int) -> None:
    """As if the run had been killed before this checkpoint."""
    shutil.rmtree(run / "checkpoints" / f"step-{step:08d}")
    (run / "exit.json").unlink(missing_ok=True)


def run_jobs(jobs: Sequence[Job], world: int, folder: Path) -> None:
    """Runs the jobs in order with `world` ranks of one thread each. Fails with the ranks' output."""
    listed = folder / f"jobs-{os.urandom(4).hex()}.json"
    listed.write_text(json.dumps([{**asdict(job), "output_dir": str(job.output_dir)} for job in jobs]))
    processes = start_ranks([__file__, str(listed)], world, folder / listed.stem)
    try:
        while not any(codes := [process.poll() for process in processes]) and None in codes:
            time.sleep(0.02)
        codes = [process.wait(30 if any(codes) else 0) for process in processes]  # the others see that one failed
    except subprocess.TimeoutExpired:
        codes = [process.poll() for process in processes]
    finally:
        for process in processes:
            process.kill()
    if any(codes):
        logs = "\n".join(p.read_text()[-3000:] for p in sorted(folder.glob(f"{listed.stem}-rank*.log")))
        raise AssertionError(f"exit codes {codes}\n{logs}")


def start_ranks(
    script: Sequence[object], world: int, log: Path, before: Sequence[Sequence[str]] = (), **variables: object
) -> list[Process]:
    """Starts `python SCRIPT…` once a rank, one thread each, without a launcher; output goes to LOG-rank0.log …

    They are forked, but for those that a command of `before` starts somewhere else (another network namespace).
    `variables`: added to its environment.
    """
    common = {"WORLD_SIZE": world, "LOCAL_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    processes: list[Process] = []
    for rank in range(world):
        own = {**common, "RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": 1, **variables}
        environment = {**os.environ, **{key: str(value) for key, value in own.items()}}
        with log.with_name(f"{log.name}-rank{rank}.log").open("w") as file:
            line = list(map(str, script))
            if before:
                line = [*before[rank], sys.executable, *line]
                processes.append(subprocess.Popen(line, env=environment, cwd=ROOT, stdout=file, stderr=file))
            else:
                processes.append(forks.start(line, environment, ROOT, file, file, server=rank))
    return processes


def metrics(run: Path) -> dict[int, dict[str, Any]]:
    """metrics.jsonl by step; the later row of a step counts."""
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row for row in rows}


def final_weights(run: Path) -> dict[str, dict[str, Any]]:
    """The fp32 weights of every trained peer at the end of a run."""
    from ctcd_ds.training.loading import consolidated

    return consolidated(run / "checkpoints" / (run / "checkpoints" / "latest").read_text().strip())


def _main() -> None:
    import torch
    from deepspeed.accelerator import get_accelerator

    from ctcd_ds.cluster.ranks import find_ranks
    from ctcd_ds.recipe.reading import load_recipe
    from ctcd_ds.training.engine import device_type, settle_arithmetic
    from ctcd_ds.training.plan import make_plan
    from ctcd_ds.training.run_directory import RunDirectory
    from ctcd_ds.training.trainer import train

    ranks = find_ranks()
    torch.set_num_threads(ranks.threads())
    for job in json.loads(Path(sys.argv[1]).read_text()):
        path = Path(job["output_dir"])
        written = path.with_name(f"{path.name}-rank{ranks.rank}.json")
        written.write_text(json.dumps(job["recipe"]))
        recipe, run = load_recipe(written), RunDirectory(path)
        settle_arithmetic(recipe.training.deterministic)
        device = device_type()
        if (
            "fp16" in job["deepspeed"]
        ):  # DeepSpeed refuses fp16 on the CPU, where torch can do it: enough for loss scaling
            get_accelerator().is_fp16_supported = lambda: True
            device = "any"
        saved = run.saved_configs if job["resume"] else None
        plan = make_plan(recipe, job["deepspeed"], ranks.world, device, path, saved)
        run.refuse_or_resume(plan, job["resume"])
        if torch.distributed.is_initialized():
            torch.distributed.barrier()  # rank 0 writes when all have looked (the first start waits by itself)
        with ExitStack() as ending:
            train(plan, ranks, run, ending)


if __name__ == "__main__":
    _main()
