"""Measures heads + objective of two peers by themselves: gradient error against the fp64 oracle, memory and time.

Memory is the peak of forward and backward from hidden states at every token: the naive way makes logits at all of
them, ours at the targets, chunk by chunk. Both are straight lines in the number of tokens (the naive one from the
start, ours until it has a full chunk and from there on), so the naive way's need at --extrapolate_to tokens is read
off its line where it does not fit, and measured where it does. Where Liger-Kernel is installed, its fused linear
loss is timed beside ours on the same questions (each direction by itself; on a GPU compiled, as it is meant to be).
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any, NamedTuple

import common
import numpy as np
import step
import torch
import workload
from torch import Tensor
from workload import Shape, Size

from ctcd_ds import cli
from ctcd_ds.objective.batch import Batch
from ctcd_ds.objective.fused import fused_objective
from ctcd_ds.objective.graph import DistillationGraph
from ctcd_ds.objective.projection import Projection, project
from ctcd_ds.objective.reference import reference_objective

ROW = 128  # tokens in a row: decides how many of them are targets


class Heads(NamedTuple):
    """Two peers' heads, hidden states [T, E] for them, and where the targets are."""

    models: list[Any]
    graph: DistillationGraph
    hidden: list[Tensor]
    batch: Batch
    labels: Tensor

    @classmethod
    def make(cls, width: int, vocab_size: int, tokens: int, device: torch.device, dtype: torch.dtype) -> Heads:
        """Random hidden states of norm-ed size; the heads as they are initialised, ten times as sure."""
        shape = Shape((Size(1, width),) * 2, ROW, -(-tokens // ROW), vocab_size)
        models = workload.build_models(shape)
        batch, collated = workload.random_batch(shape, device)
        hidden = []
        for model in models.values():
            with torch.no_grad():
                model.get_output_embeddings().weight.mul_(3)  # logits of a trained model spread over several units
            model.to(device, dtype)
            hidden.append(torch.randn(shape.rows * ROW, width, device=device).to(dtype).requires_grad_())
        graph, labels = workload.full_graph(shape.names), collated["labels"].flatten()
        return cls(list(models.values()), graph, hidden, batch, labels)

    @property
    def vocab_size(self) -> int:
        """Columns of the logits, none of them padding."""
        return int(self.models[0].config.vocab_size)

    def projections(self) -> list[Projection]:
        """The last map of each peer at the targets."""
        return [self._projection(model, hidden) for model, hidden in zip(self.models, self.hidden, strict=True)]

    def _projection(self, model: Any, hidden: Tensor) -> Projection:
        decoder = model.get_output_embeddings()
        return Projection(
            model.cls.predictions.transform(hidden[self.batch.views[0].positions]), decoder.weight, decoder.bias
        )

    def ours(self) -> None:
        """Forward and backward, our way."""
        fused_objective(self.projections(), self.batch, self.graph, self.vocab_size).total.backward()
        self._forget()

    def naive(self) -> None:
        """Forward and backward, the naive way."""
        logits = [model.cls(hidden) for model, hidden in zip(self.models, self.hidden, strict=True)]
        step.naive_objective(logits, self.labels, self.graph).backward()
        self._forget()

    def liger(self) -> None:
        """Forward and backward by Liger-Kernel's fused linear loss (β 0: KL), a peer at a time, at the targets."""
        loss, view = liger_loss(), self.batch.views[0]
        flat = self.projections()
        total = torch.zeros((), device=self.labels.device)
        for i, own in enumerate(flat):
            for _, j, weight in (edge for edge in self.graph.edges() if edge[0] == i):
                other = [None if tensor is None else tensor.detach() for tensor in flat[j][:3]]
                settings = {"weight_hard_loss": self.graph.hard[i], "weight_soft_loss": weight, "beta": 0.0}
                apart = loss(**settings, compiled=self.labels.is_cuda)
                total = total + apart(own.hidden, own.weight, *other[:2], view.targets, own.bias, other[2])
        total.backward()
        self._forget()

    def _forget(self) -> None:
        for tensor in (*self.hidden, *(p for model in self.models for p in model.parameters())):
            tensor.grad = None


def liger_loss() -> Any:
    """Liger-Kernel's loss class. Raises ImportError where it does not run."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    return LigerFusedLinearJSDLoss


def gradient_errors(heads: Heads) -> dict[str, float]:
    """Relative errors (L2, the larger one of both peers) of the gradient with respect to the logits.

    The truth is the fp64 oracle on the same weights and hidden states. `ours`: our fp32 logits and our objective;
    `naive`: logits in the models' dtype, separate losses; `soft…`: without hard losses, where p_i − p_j stands
    alone; `hidden`: ours on its whole way back through the projection, rounded to the models' dtype there.
    """
    errors: dict[str, float] = {}
    soft_only = heads.graph.__class__(heads.graph.names, (0.0, 0.0), heads.graph.soft, (True, True))
    projections = [Projection(*(t.detach() for t in p[:3] if t is not None)) for p in heads.projections()]
    targets = heads.batch.views[0].targets
    for prefix, graph in (("", heads.graph), ("soft_", soft_only)):
        exact_hidden = [p.hidden.double().cpu().requires_grad_() for p in projections]
        exact = [
            h @ p.weight.double().cpu().t() + p.bias.double().cpu()  # type: ignore[union-attr]
            for h, p in zip(exact_hidden, projections, strict=True)
        ]
        for logits in exact:
            logits.retain_grad()
        reference_objective(exact, targets.cpu(), graph)[0].backward()

        ours = [project(p, slice(None)).requires_grad_() for p in projections]
        fused_objective([Projection(z) for z in ours], heads.batch, graph, heads.vocab_size).total.backward()
        naive = [torch.nn.functional.linear(*p[:3]).requires_grad_() for p in projections]
        step.naive_objective(naive, targets, graph).backward()
        whole = [Projection(p.hidden.clone().requires_grad_(), p.weight, p.bias) for p in projections]
        fused_objective(whole, heads.batch, graph, heads.vocab_size).total.backward()

        errors[f"{prefix}ours"] = _worst(ours, exact)
        errors[f"{prefix}naive"] = _worst(naive, exact)
        errors[f"{prefix}hidden"] = _worst([p.hidden for p in whole], exact_hidden)
    return errors


def _worst(found: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    def relative(mine: Tensor | None, true: Tensor | None) -> float:
        assert mine is not None and true is not None
        return float((mine.double().cpu() - true).norm() / true.norm())

    return max(relative(a.grad, b.grad) for a, b in zip(found, exact, strict=True))


def memory(
    width: int, vocab_size: int, tokens: Sequence[int], far: int, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """Peak bytes of both ways at each number of tokens, and at `far` tokens: naive by its line, ours measured."""
    peaks: dict[str, list[int]] = {"naive": [], "ours": []}
    for count in tokens:
        heads = Heads.make(width, vocab_size, count, device, dtype)
        peaks["naive"].append(common.peak_bytes(heads.naive, device))
        peaks["ours"].append(common.peak_bytes(heads.ours, device))
    ours = common.peak_bytes(Heads.make(width, vocab_size, far, device, dtype).ours, device)
    slope, intercept = np.polyfit(tokens, peaks["naive"], 1) if len(tokens) > 1 else (peaks["naive"][0] / tokens[0], 0)
    naive = int(slope * far + intercept)
    return {
        "memory_ratio": ours / naive,
        "memory": {
            "tokens": [*tokens, far],
            "naive_peak_bytes": [*peaks["naive"], naive],
            "ours_peak_bytes": [*peaks["ours"], ours],
            "naive_is_extrapolated_at": far,
            "naive_bytes_per_token": [peak / count for peak, count in zip(peaks["naive"], tokens, strict=True)],
        },
    }


def measure(
    width: int, vocab_size: int, tokens: Sequence[int], far: int, repetitions: int, device: torch.device
) -> dict[str, Any]:
    """The row's values."""
    values: dict[str, Any] = {}
    for name, dtype in common.DTYPES.items():
        torch.manual_seed(1)
        values[name] = gradient_errors(Heads.make(width, vocab_size, tokens[0], device, dtype))
    errors = {"gradient_error": max(found["ours"] for found in values.values()), "gradient_errors": values}
    heads = Heads.make(width, vocab_size, tokens[0], device, torch.float32)
    ways = {"naive": heads.naive, "ours": heads.ours}
    try:
        liger_loss()
        ways["liger"] = heads.liger
        skipped = {}
    except ImportError as problem:
        skipped = {"liger_skipped": f"Liger-Kernel is not there (pip install liger-kernel): {problem}"}
    seconds = common.interleaved(ways, repetitions, device)
    times: dict[str, Any] = {f"{name}_s": median(rounds) for name, rounds in seconds.items()} | skipped
    times |= {f"{name}_over_ours": common.ratio(seconds[name], seconds["ours"]) for name in ways if name != "ours"}
    return {**errors, **memory(width, vocab_size, tokens, far, device, torch.float32), **times}


def numbers(text: str) -> list[int]:
    """'2048,4096' as an option's type."""
    return [cli.positive(part) for part in text.split(",")]


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--width", type=cli.positive, default=768, help="hidden size of both peers")
    parser.add_argument("--vocab_size", type=cli.positive, default=30522, help="rounded up to a multiple of 64")
    parser.add_argument("--tokens", type=numbers, default=[2048, 4096], help="where both ways are measured")
    parser.add_argument("--extrapolate_to", type=cli.positive, default=16384, help="tokens of memory_ratio")
    arguments = parser.parse_args()
    device, vocabulary = common.begin(arguments), workload.padded(arguments.vocab_size)
    shape = (arguments.width, vocabulary, arguments.tokens, arguments.extrapolate_to)
    common.write_row(arguments, measure(*shape, arguments.repetitions, device))


if __name__ == "__main__":
    cli.run(main)
