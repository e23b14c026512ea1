"""Times one training step (forward, backward, optimizer) in several ways that compute the same thing.

naive           Hugging Face models as they come: logits at every position, F.cross_entropy and F.kl_div, AdamW;
                on the CPU in a process of its own, where freed memory goes back to the system as glibc does it
naive_kept      the same with what CTCD-DS does for the CPU beside its mathematics: freed memory is kept
                (ctcd_ds/memory.py), dropout draws its masks faster (ctcd_ds/peers/dropout.py)
naive_selected  the same as naive_kept, but logits are selected at the targets before the softmax
ours            CTCD-DS: heads at the targets, the fused objective, fused AdamW
alone           CTCD-DS with each peer by itself, hard loss only; their sum

and what recipe keys add to it, which are nothing to a step without them:

bare            ours by hand: heads and objective called one after another, nothing that knows of such keys
hidden          ours, and the last peer learns from the first one's hidden states too, `layers: even`
relations       ours, and from its last layer's attention
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from multiprocessing.connection import Connection
from statistics import median
from typing import Any

import common
import torch
import workload
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from workload import Shape

from ctcd_ds import cli
from ctcd_ds.objective.batch import Batch
from ctcd_ds.objective.fused import fused_objective
from ctcd_ds.objective.graph import DistillationGraph
from ctcd_ds.objective.signals import Hidden, Relations, Signal
from ctcd_ds.peers.build import seed_of
from ctcd_ds.peers.cotrain import CoTraining
from ctcd_ds.peers.heads import project_positions
from ctcd_ds.recipe.sections import OptimizerSection

KEYS = ("hidden", "relations")
WAYS = ("naive", "naive_kept", "naive_selected", "ours", "alone", "bare", *KEYS)
RATIOS = (
    ("naive", "ours"), ("naive_kept", "ours"), ("naive_selected", "ours"), ("ours", "alone"), ("ours", "bare"),
    *((key, "ours") for key in KEYS),
)  # fmt: skip
TOLERANCE = 1e-4


def naive_loss(
    models: Mapping[str, Any], graph: DistillationGraph, collated: Mapping[str, Tensor], select_first: bool = False
) -> Tensor:
    """CTCD's loss as one writes it down with Hugging Face and torch.nn.functional."""
    inputs = {key: tensor for key, tensor in collated.items() if key != "labels"}
    logits = [models[name](**inputs).logits.flatten(0, 1) for name in graph.names]
    return naive_objective(logits, collated["labels"].flatten(), graph, select_first)


def naive_objective(
    logits: Sequence[Tensor], labels: Tensor, graph: DistillationGraph, select_first: bool = False
) -> Tensor:
    """From logits [T, V] at every position; labels are −100 where there is no target."""
    chosen = labels != -100
    if select_first:
        logits, labels, chosen = [z[chosen] for z in logits], labels[chosen], chosen[chosen]
    logits = [z.float() for z in logits]
    total = torch.zeros((), device=labels.device)
    for i in graph.hard_peers():
        total = total + graph.hard[i] * F.cross_entropy(logits[i], labels)
    for i, j, weight in graph.edges():
        learner, teacher = F.log_softmax(logits[i], dim=-1), F.softmax(logits[j].detach(), dim=-1)
        divergence = F.kl_div(learner, teacher, reduction="none").sum(dim=-1)
        total = total + weight * divergence[chosen].mean()
    return total


def same_maths(
    module: CoTraining, graph: DistillationGraph, batch: Batch, collated: Mapping[str, Tensor]
) -> dict[str, float]:
    """How far the naive way (on `graph`) and ours are apart in fp32 without dropout: total loss, gradients by norm.

    Raises RunFailure beyond 1e-4: two ways that compute different things are not compared.
    """
    module.eval()
    parameters = [p for p in module.parameters() if p.requires_grad]
    losses, gradients = [], []
    for select_first in (False, True):
        losses.append(naive_loss(module.peers, graph, collated, select_first))
        gradients.append(torch.autograd.grad(losses[-1], parameters))
    losses.append(module(batch, 0, 0).total)
    gradients.append(torch.autograd.grad(losses[-1], parameters))
    module.train()
    *naive, ours = torch.stack([loss.detach().double() for loss in losses]).tolist()
    *others, exact = gradients

    def norm(tensors: Any) -> float:
        return float(torch.stack([t.double().norm() for t in tensors]).norm())

    apart = {
        "loss_difference": max(abs(loss - ours) for loss in naive) / max(1.0, abs(ours)),
        "gradient_difference": max(norm(a - b for a, b in zip(g, exact, strict=True)) for g in others) / norm(exact),
    }
    if max(apart.values()) > TOLERANCE:
        raise cli.RunFailure(f"the naive way and ours do not compute the same: {apart}; more than {TOLERANCE}")
    return apart


def optimised(loss: Any, optimizer: torch.optim.Optimizer) -> common.Step:
    """A whole step: `loss()`, backward, the optimizer."""

    def step() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def our_step(module: CoTraining, batch: Batch) -> common.Step:
    """A whole step as training does it, without DeepSpeed."""
    groups = module.parameter_groups(dict.fromkeys(module.graph.names, OptimizerSection()))
    return optimised(lambda: module(batch, 0, 0).total, torch.optim.AdamW(groups, fused=True))


def bare_step(module: CoTraining, batch: Batch) -> common.Step:
    """`our_step` without the container's forward."""

    def loss() -> Tensor:
        projections = []
        for name, view in zip(module.graph.names, batch.views, strict=True):
            torch.manual_seed(seed_of(module.seed, "dropout", name, 0, 0))
            projections.append(project_positions(module.peers[name], view.inputs, view.positions))
        return fused_objective(projections, batch, module.graph, module.vocab_size).total

    groups = module.parameter_groups(dict.fromkeys(module.graph.names, OptimizerSection()))
    return optimised(loss, torch.optim.AdamW(groups, fused=True))


def with_key(module: CoTraining, key: str) -> CoTraining:
    """The same peers with a graph in which the last learns from the inside of the first too."""
    learner = len(module.graph.names) - 1
    heads = math.gcd(*(peer.config.num_attention_heads for peer in module.peers.values()))
    causal = not any(peer.config.model_type == "bert" for peer in module.peers.values())
    signal: Signal = Hidden(learner, 0, 1.0, layers="even")
    if key == "relations":
        signal = Relations(learner, 0, 1.0, heads=heads, causal=causal)
    made = workload.co_training(module.peers, replace(module.graph, signals=(signal,)), module.vocab_size)
    return made.to(next(module.parameters()))


class _Operations(TorchDispatchMode):
    """Counts torch's operations by their names."""

    def __init__(self) -> None:
        super().__init__()
        self.counted: Counter[str] = Counter()

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counted[str(operation)] += 1
        return operation(*args, **(kwargs or {}))


def operations(step: common.Step) -> Counter[str]:
    """Those of torch that a step calls, backward and optimizer too."""
    with _Operations() as seen:
        step()
    return seen.counted


def naive_step(
    models: Mapping[str, Any], graph: DistillationGraph, collated: Mapping[str, Tensor], select: bool = False
) -> common.Step:
    """A whole step of the naive way, with AdamW as it comes."""
    optimizer = torch.optim.AdamW([p for model in models.values() for p in model.parameters()], lr=5e-4)
    return optimised(lambda: naive_loss(models, graph, collated, select), optimizer)


class OwnProcess:
    """The naive step in a process of its own, which asks nothing special of the C library's memory; a `Step`."""

    def __init__(self, shape: Shape, dtype: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._asking, answering = context.Pipe()
        arguments = (shape, dtype, torch.get_num_threads(), answering)
        self._process = context.Process(target=_naive_elsewhere, args=arguments, daemon=True)
        self._process.start()
        answering.close()
        self.peak_bytes: int = self._asking.recv()

    def __call__(self) -> None:
        self._asking.send("step")
        self._asking.recv()

    def close(self) -> None:
        """Ends the process."""
        self._asking.close()
        self._process.join()


def _naive_elsewhere(shape: Shape, dtype: str, threads: int, answering: Connection) -> None:
    """Says its peak bytes, then takes one step for each thing that comes, until the other end is closed."""
    torch.set_num_threads(threads)
    device = torch.device("cpu")
    models = {name: model.to(common.DTYPES[dtype]).train() for name, model in workload.build_models(shape).items()}
    step = naive_step(models, workload.full_graph(shape.names), workload.random_batch(shape, device)[1])
    answering.send(common.peak_bytes(step, device))
    while True:
        try:
            answering.recv()
        except EOFError:
            return
        answering.send(step())


def make_ways(
    wanted: list[str], module: CoTraining, batch: Batch, collated: Mapping[str, Tensor]
) -> dict[str, common.Step]:
    """The steps to time in this process. All work on the same models; `alone` is one way a peer, 'alone/NAME'."""
    graph, models, ways = module.graph, module.peers, {}
    for name in wanted:
        if name == "alone":
            for peer in graph.names:
                single = DistillationGraph((peer,), (1.0,), ((0.0,),), (True,))
                own = replace(batch, views=batch.views[:1])
                ways[f"alone/{peer}"] = our_step(workload.co_training(models, single, module.vocab_size), own)
        elif name == "bare":
            ways[name] = bare_step(module, batch)
        elif name in ("ours", *KEYS):
            ways[name] = our_step(with_key(module, name) if name in KEYS else module, batch)
        else:
            ways[name] = naive_step(dict(models.items()), graph, collated, select=name == "naive_selected")
    return ways


def measure(shape: Shape, wanted: list[str], repetitions: int, device: torch.device, dtype: str) -> dict[str, Any]:
    """The row's values for a shape, all ways interleaved with a large matrix product."""
    models = workload.build_models(shape)
    module = workload.co_training(models, workload.full_graph(shape.names), shape.vocab_size).to(device)
    batch, collated = workload.random_batch(shape, device)
    naive = any(name.startswith("naive") for name in wanted)
    apart = same_maths(module, module.graph, batch, collated) if naive else {}
    module.to(common.DTYPES[dtype])

    ways, gemm = make_ways(wanted, module, batch, collated), common.Gemm(device, common.DTYPES[dtype])
    with ExitStack() as ending:
        if "naive" in wanted and device.type == "cpu":
            ways["naive"] = naive = OwnProcess(shape, dtype)
            ending.callback(naive.close)
        peaks = {name: _peak_bytes(step, device) for name, step in ways.items()}
        seconds = common.interleaved({**ways, "gemm": gemm}, repetitions, device)
        counted = {name: operations(ways[name]) for name in ("bare", "ours", *KEYS) if name in ways and "bare" in ways}
    rate = gemm.rate(seconds.pop("gemm"))
    if "alone" in wanted:
        alone = [name for name in ways if name.startswith("alone/")]
        seconds["alone"] = common.total([seconds[name] for name in alone])
        peaks["alone"] = max(peaks[name] for name in alone)
    return {**_summary(shape, seconds, rate, device, dtype), **_peaks(peaks, wanted), **_counts(counted), **apart}


def _peak_bytes(step: common.Step, device: torch.device) -> int:
    return step.peak_bytes if isinstance(step, OwnProcess) else common.peak_bytes(step, device)


def _summary(
    shape: Shape, seconds: dict[str, list[float]], rate: float, device: torch.device, dtype: str
) -> dict[str, Any]:
    values: dict[str, Any] = {f"{name}_s": median(rounds) for name, rounds in seconds.items()}
    for above, below in RATIOS:
        if above in seconds and below in seconds:
            values[f"{above}_over_{below}"] = common.ratio(seconds[above], seconds[below])
    values |= {"flops_per_step": shape.flops(), "gemm_flops_per_s": rate}
    if "ours" in seconds:
        reached = values["flops_per_step"] / values["ours_s"]
        values["gemm_share"] = reached / rate
        values["tokens_per_s"] = shape.rows * shape.length / values["ours_s"]
        if device.type == "cuda" and (peak := common.peak_flops(torch.cuda.get_device_name(device), dtype)):
            values["mfu"] = reached / peak
    return {**values, "rounds": {name: [round(s, 6) for s in rounds] for name, rounds in seconds.items()}}


def _counts(counted: Mapping[str, Counter[str]]) -> dict[str, Any]:
    """How many of torch's operations each way calls; whether ours calls the same ones as by hand."""
    if not {"bare", "ours"} <= counted.keys():
        return {}
    found: dict[str, Any] = {f"{name}_operations": each.total() for name, each in counted.items()}
    return {**found, "ours_calls_what_bare_calls": counted["ours"] == counted["bare"]}


def _peaks(peaks: dict[str, int], wanted: list[str]) -> dict[str, int]:
    """Beyond weights and optimizer states: gradients, activations, logits. `peak_bytes` itself is that of ours."""
    first = "ours" if "ours" in wanted else wanted[0]
    return {"peak_bytes": peaks[first], **{f"{name}_peak_bytes": peaks[name] for name in wanted if name != first}}


def ways(text: str) -> list[str]:
    """'naive,ours' as an option's type."""
    wanted = text.split(",")
    if unknown := sorted(set(wanted) - set(WAYS)):
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: the ways are {', '.join(WAYS)}")
    return wanted


def main() -> None:
    parser = common.parser(__doc__)
    workload.add_shape_options(parser)
    parser.add_argument("--ways", type=ways, default=list(WAYS), help="which, separated by commas")
    arguments = parser.parse_args()
    device, shape = common.begin(arguments), Shape.of(arguments)
    common.write_row(arguments, measure(shape, arguments.ways, arguments.repetitions, device, arguments.dtype))


if __name__ == "__main__":
    cli.run(main)
