"""What test_cuda_path.py looks at, run on the GPU of fake_gpu.py: prints one JSON object, or the model of a step.

export CTCD_FAKE_GPU=$(python tests/fake_gpu.py FOLDER)
python tests/fake_gpu_runs.py combinations   forward and backward in every precision, with every kind of batch
python tests/fake_gpu_runs.py engine RANKS   the paper's pair through DeepSpeed, with every shipped JSON
python tests/fake_gpu_runs.py model          docs/performance.md's table of a step on an H100, by part
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import fake_gpu  # before torch

# isort: split
import numpy as np
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from transformers import AutoModelForMaskedLM

from architectures import tiny
from corpora import SPECIAL
from ctcd_ds.corpus.rows import Corpus
from ctcd_ds.objective.batch import Batch
from ctcd_ds.objective.fused import fused_objective
from ctcd_ds.objective.graph import DistillationGraph
from ctcd_ds.objective.projection import Projection
from ctcd_ds.peers.build import DTYPES, build_peer
from ctcd_ds.peers.cotrain import CoTraining
from ctcd_ds.peers.heads import Way, find_way
from ctcd_ds.recipe.sections import PeerSection, Recipe
from ctcd_ds.tasks import TASKS
from ctcd_ds.tasks.masking import Masking
from ctcd_ds.tasks.mlm import MaskedLM, PeerMasks
from ctcd_ds.training import engine as engine_room
from ctcd_ds.training.deepspeed_config import read_config
from ctcd_ds.training.evaluate import evaluate
from ctcd_ds.training.optimizer import PeerGradients
from ctcd_ds.training.plan import Plan, make_plan
from ctcd_ds.training.step import exchange, forward_and_backward
from fake_gpu import CUDA, Count, Kernel
from runs import ROOT, bert, chain_corpus

VIEWS = ("targets", "all positions", "own masks")
LENGTH_OF_FEW = 32  # tokens of a row where the shapes do not matter
ROWS, LENGTH, WIDTH, VOCABULARY = 128, 128, 768, 30522  # the paper's step
PAIR = {"teacher": 6, "student": 4}  # layers


def small_corpus(vocabulary: int) -> Corpus:
    return Corpus(Path(), "", SPECIAL, vocabulary, "", "", "uint16", {}, ((), ()))


def full_graph(names: tuple[str, ...]) -> DistillationGraph:
    soft = tuple(tuple(float(i != j) for j in names) for i in names)
    return DistillationGraph(names, (1.0,) * len(names), soft, (True,) * len(names))


def on_the_gpu(batch: Batch, device: torch.device) -> Batch:
    """In place of Batch.to, which would copy numbers."""
    return batch.mapped(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device=device))


def batch_of(views: str, names: tuple[str, ...], rows: int, length: int, vocabulary: int) -> Batch:
    """A micro-batch as the task makes it, on the GPU."""
    masking = Masking(0.15, SPECIAL, vocabulary)
    masks = {name: PeerMasks(masking, seed if views == "own masks" else None) for seed, name in enumerate(names)}
    tokens = np.random.default_rng(0).integers(5, vocabulary, (rows, length), dtype=np.int32)
    tokens[:, 0], tokens[:, -1] = SPECIAL.cls, SPECIAL.sep
    numbers = np.arange(rows)
    task = MaskedLM(small_corpus(vocabulary), length, masking, masks, views == "all positions")
    [batch] = task.batches(tokens, 1, np.zeros_like(numbers), numbers, rows)
    return batch.to(CUDA)


def seen() -> dict[str, list[str]]:
    """What is noted of operations that wait for the device, and of one that does not."""

    def read() -> None:
        try:
            torch.zeros(1, device=CUDA).tolist()
        except DataDependentOutputException as problem:
            count.waits.append(type(problem).__name__)

    found, attempts = (
        {},
        {
            "a tensor from a number": lambda: torch.tensor(1.0, device=CUDA),
            "a copy to the device": lambda: torch.zeros(3).to(CUDA),
            "a copy into a tensor": lambda: torch.zeros(3, device=CUDA).copy_(torch.zeros(3)),
            "a value that is read": read,
            "a fill": lambda: torch.full((), 2.0, device=CUDA).mul_(3.0),
        },
    )
    for name, attempt in attempts.items():
        with FakeTensorMode(), Count() as count:
            attempt()
        found[name] = count.waits
    return found


def combinations() -> list[dict[str, Any]]:
    """Every precision × number of peers × kind of batch × temperature: what is wrong with its gradients, its waits."""
    found = []
    for peers in (1, 2, 3):
        names = tuple("abc"[:peers])
        sections = {name: PeerSection(model=bert(64, layers)) for name, layers in zip(names, (2, 1, 1), strict=False)}
        models = {
            name: build_peer(name, section, small_corpus(1000), 1, AutoModelForMaskedLM)
            for name, section in sections.items()
        }
        module = CoTraining(models, full_graph(names), 1000).train()  # finds each model's way, with numbers
        for precision, views, tau in product(DTYPES, VIEWS, (1.0, 2.0)):
            module.graph = replace(module.graph, temperature=tau)
            module.compiled = tau == 2.0  # then with numbers as tensors, and nothing compiled
            with FakeTensorMode(), Count() as count:
                fake_gpu.move(module, DTYPES[precision])
                module(batch_of(views, names, 4, LENGTH_OF_FEW, 1000), 0).total.backward()
            case = {"precision": precision, "peers": peers, "views": views, "temperature": tau}
            found.append({**case, "wrong": without_gradient(module), "waits": count.waits})
    return found


def without_gradient(module: CoTraining) -> list[str]:
    """Weights of peers that learn, whose gradient is not there, or not in their dtype on the GPU."""
    learning = [name for name, trained in zip(module.graph.names, module.graph.trained, strict=True) if trained]
    return [
        f"{peer}.{name}"
        for peer in learning
        for name, weight in module.peers[peer].named_parameters()
        if weight.grad is None or weight.grad.dtype != weight.dtype or not weight.grad.is_cuda
    ]


def other_tasks() -> list[dict[str, Any]]:
    """Causal models, one of them frozen; sequence-to-sequence models with a Jensen-Shannon divergence."""
    special = replace(SPECIAL, sentinels=tuple(range(1000, 1100)))
    corpus, found = replace(small_corpus(1100), special=special), []
    for kind, models, width in (("clm", ("llama", "gpt2"), LENGTH_OF_FEW + 1), ("span", ("t5", "bart"), None)):
        peers: dict[str, Any] = {name: {"model": tiny(name)} for name in models}
        peers[models[0]]["soft"], peers[models[1]]["soft"] = {models[1]: 1.0}, {models[0]: 4.0}
        objective = {"task": kind, "temperature": 2.0, "divergence": "jsd" if kind == "span" else "kl"}
        recipe = Recipe.model_validate(
            {
                "corpus": {"path": "", "sequence_length": LENGTH_OF_FEW},
                "peers": peers,
                "objective": objective,
                "training": {"steps": 1},
            }
        )
        task, graph = TASKS[kind].of(recipe, corpus), recipe.graph()
        if kind == "clm":
            graph = replace(graph, hard=(0.0, 1.0), soft=((0.0, 0.0), (4.0, 0.0)), trained=(False, True))
        built = {
            name: build_peer(name, section, corpus, 1, task.auto_class()) for name, section in recipe.peers.items()
        }
        module = CoTraining(built, replace(graph, temperature=2.0), corpus.vocab_size).train()
        tokens = np.random.default_rng(0).integers(5, 1000, (4, width or task.spans.row), dtype=np.int32)
        [batch] = task.batches(tokens, 1, np.zeros(4, np.int64), np.arange(4), 4)
        with FakeTensorMode(), Count() as count:
            fake_gpu.move(module, torch.bfloat16)
            module(batch.to(CUDA), 0).total.backward()
        found.append({"task": kind, "wrong": without_gradient(module), "waits": count.waits})
    return found


def objective(peers: int) -> list[Kernel]:
    """The objective alone, forward and backward, on the paper's batch in bf16."""
    names = tuple("abc"[:peers])
    with FakeTensorMode(), Count() as count:
        batch = batch_of("targets", names, ROWS, LENGTH, VOCABULARY)
        columns, positions = -(-VOCABULARY // 64) * 64, len(batch.views[0].targets)
        shapes = ((positions, WIDTH), (columns, WIDTH), (columns,))
        projections = [
            Projection(*(torch.empty(s, dtype=torch.bfloat16, device=CUDA, requires_grad=True) for s in shapes))
            for _ in names
        ]
        count.kernels.clear()
        fused_objective(projections, batch, full_graph(names), VOCABULARY).total.backward()
    return count.kernels


def logit_bytes(peers: int) -> float:
    """Bytes that the objective moves a logit, but for its GEMMs."""
    logits = peers * ROWS * Masking(0.15, SPECIAL, VOCABULARY).count(LENGTH) * VOCABULARY
    return sum(kernel.bytes for kernel in objective(peers) if not kernel.flops) / logits


@cache
def way() -> Way:
    """How a BERT's logits are had: found with numbers, on a small one."""
    return find_way(build_peer("small", PeerSection(model=bert(64, 1)), small_corpus(1000), 1, AutoModelForMaskedLM))


def peers_on_the_gpu(plan: Plan) -> dict[str, Any]:
    """The plan's peers at full size, without memory."""
    with torch.device("meta"):
        models = {name: AutoModelForMaskedLM.from_config(config) for name, config in plan.configs.items()}
    for model in models.values():
        model._way = way()
        fake_gpu.move(model, DTYPES[plan.deepspeed.precision])
    return models


def plans(world: int, folder: Path) -> dict[str, Plan]:
    """The paper's step with each shipped JSON, by its name."""
    way()  # before there are only tensors without numbers
    sizes = {"model_type": "bert", "hidden_size": WIDTH, "num_attention_heads": 12, "intermediate_size": 4 * WIDTH}
    peers: dict[str, Any] = {name: {"model": {**sizes, "num_hidden_layers": n}} for name, n in PAIR.items()}
    peers["teacher"]["soft"], peers["student"]["soft"] = {"student": 1.0}, {"teacher": 4.0}
    training = {"global_batch_rows": ROWS * world, "steps": 10, "valid_rows": ROWS}
    corpus = {"path": str(chain_corpus(folder / "corpus", VOCABULARY)), "sequence_length": LENGTH}
    recipe = Recipe.model_validate({"corpus": corpus, "peers": peers, "training": training})
    shipped = sorted((ROOT / "ds_configs").glob("*.json"))
    return {path.name: make_plan(recipe, read_config(path), world, "cuda", folder / "run") for path in shipped}


@dataclass
class Step:
    """What one step of a plan did, and a look at held-out rows after it."""

    engine: Any
    kernels: list[Kernel]
    waits: list[str]
    collectives: list[tuple[str, int, str]]
    reads_of_a_look: list[str]


def second_step(plan: Plan, runtime: fake_gpu.Runtime) -> Step:
    """The plan's second step through DeepSpeed, as in `trainer.train`."""
    recipe, names = plan.recipe, tuple(plan.recipe.peers)
    with FakeTensorMode(allow_non_fake_inputs=True):
        engine_room.build_peers = lambda *_: peers_on_the_gpu(plan)  # type: ignore[assignment]
        engine = engine_room.build_engine(plan)
        gradients = PeerGradients(engine.optimizer, names, CUDA)
        settings = {name: recipe.optimizer_of(name) for name in names}
        batch = batch_of("targets", names, ROWS, LENGTH, plan.corpus.vocab_size)
        for step in range(2):
            runtime.waits.clear()
            runtime.collectives.clear()
            with Count() as count:
                count.phase = "forward and backward"
                seen = forward_and_backward(engine, [batch], step, 0, recipe.graph())
                count.phase = "exchange"
                _, _, norms, _, _ = exchange(seen, gradients, False, None)
                count.phase = "step"
                gradients.clip(norms, settings)
                gradients.allow_step(True)
                engine.step()
        waits, collectives = runtime.waits + count.waits, list(runtime.collectives)
        runtime.waits.clear()
        evaluate(engine, plan, CUDA)
    return Step(engine, count.kernels, waits, collectives, list(runtime.waits))


def engine(world: int) -> dict[str, Any]:
    """By JSON: dtypes, kernels of a step by phase, waits, and what went to other ranks."""
    runtime, found = fake_gpu.Runtime(world), {}
    with tempfile.TemporaryDirectory() as folder:
        for name, plan in plans(world, Path(folder)).items():
            step = second_step(plan, runtime)
            masters = step.engine.optimizer.single_partition_of_fp32_groups
            found[name] = {
                "precision": plan.deepspeed.precision,
                "weights": sorted({f"{p.dtype} {p.device.type}" for p in step.engine.module.parameters()}),
                "masters": sorted({f"{p.dtype} {p.device.type}" for p in masters}),
                "kernels": Counter(kernel.phase for kernel in step.kernels),
                "waits": step.waits,
                "collectives": step.collectives,
                "reads of a look": step.reads_of_a_look,
                "trained": plan.trained,
            }
    return found


def model() -> str:
    """The paper's step on one H100 as shipped (zero2_bf16.json), by part: a Markdown table."""
    runtime = fake_gpu.Runtime(1)
    with tempfile.TemporaryDirectory() as folder:
        plan = plans(1, Path(folder))["zero2_bf16.json"]
        whole = second_step(plan, runtime).kernels
    names = tuple(plan.recipe.peers)
    with FakeTensorMode(allow_non_fake_inputs=True), Count() as count:
        module = CoTraining(peers_on_the_gpu(plan), plan.recipe.graph(), plan.corpus.vocab_size).train()
        batch = batch_of("targets", names, ROWS, LENGTH, plan.corpus.vocab_size)
        count.kernels.clear()
        module(batch, 0).total.backward()
    bare, losses = count.kernels, objective(len(names))
    passes = [kernel for kernel in whole if kernel.phase == "forward and backward"]
    parts = [
        ("encoders, forward and backward", bare, losses),
        ("objective, forward and backward", losses, []),
        ("DeepSpeed in the backward", passes, bare),
        ("exchange", [kernel for kernel in whole if kernel.phase == "exchange"], []),
        ("clipping, AdamW, weights", [kernel for kernel in whole if kernel.phase == "step"], []),
        ("**all**", whole, []),
    ]
    lines = ["| part of a step | kernels | GB | ms |", "|---|---:|---:|---:|"]
    for name, with_it, without in parts:
        number = len(with_it) - len(without)
        gigabytes, ms = (
            sum(map(of, with_it)) - sum(map(of, without))
            for of in (lambda kernel: kernel.bytes / 1e9, lambda kernel: kernel.seconds * 1e3)
        )
        lines.append(f"| {name} | {number:,} | {gigabytes:.1f} | {ms:.1f} |")
    seconds = sum(kernel.seconds for kernel in whole)
    pace, share = plan.tokens_per_step / seconds, plan.tokens_per_step * plan.flops_per_token / seconds / 989e12
    return "\n".join([*lines, "", f"That is {pace / 1e3:.0f}k tokens/s, {share:.0%} of the GPU's peak, at best."])


if __name__ == "__main__":
    torch.nn.functional.scaled_dot_product_attention = fake_gpu.flash_attention
    Batch.to = on_the_gpu  # type: ignore[method-assign]
    torch.nn.Module._apply = lambda self, *_, **__: self  # type: ignore[method-assign, assignment]
    torch.compiler.set_stance("force_eager")  # nothing here could be compiled for the GPU
    match sys.argv[1:]:
        case ["combinations"]:
            found = {"seen": seen(), "cases": combinations(), "tasks": other_tasks()}
            found["bytes a logit"] = {peers: logit_bytes(peers) for peers in (1, 2, 3)}
            print(json.dumps(found), flush=True)
        case ["engine", world]:
            print(json.dumps(engine(int(world))), flush=True)
        case ["model"]:
            print(model(), flush=True)
    os._exit(0)
