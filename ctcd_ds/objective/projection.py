"""The last map of a peer, from hidden states to logits, for some positions and some tokens at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor


class Projection(NamedTuple):
    """The last map of a peer: logits = softcap(scale · hidden · weightᵀ) + bias, softcap(z) = cap · tanh(z / cap).

    hidden: [P, E]; weight: [V, E]; bias: [V] or None; cap: None is no cap. `weight` is None where an architecture is
    only known by its logits (the general path): then `hidden` holds the logits [P, V] themselves. V may exceed the
    vocabulary.
    """

    hidden: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None
    scale: float = 1.0
    cap: float | None = None

    @property
    def width(self) -> int:
        """Columns of the logits: the vocabulary with its padding."""
        return self.hidden.shape[1] if self.weight is None else self.weight.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """What gradients by the logits are rounded to before they are multiplied on."""
        return torch.float32 if self.weight is None else self.weight.dtype


def project(projection: Projection, rows: slice, columns: slice = slice(None)) -> Tensor:
    """fp32 logits [rows, columns] of some positions and tokens, always in a buffer of their own.

    The GEMM accumulates in fp32 anyway and is asked to give it out: p_i − p_j is a difference of nearly
    equal numbers, and logits rounded to bf16 put 4 to 20 % error into it.
    """
    hidden, weight, bias, scale, cap = projection
    if weight is None:
        return hidden[rows, columns].to(torch.float32, copy=True)
    logits = mm(hidden[rows], weight[columns].t())
    if scale != 1.0:
        logits.mul_(scale)
    if cap is not None:
        logits.div_(cap).tanh_().mul_(cap)
    return logits if bias is None else logits.add_(bias[columns])


def chunks(positions: int, width: int) -> Iterator[slice]:
    """Positions to evaluate at once: their fp32 logits of `width` columns are 128 MiB at most."""
    size = max(1, 2**27 // (4 * width))
    return (slice(start, min(start + size, positions)) for start in range(0, positions, size))


def slope_of(projection: Projection, logits: Tensor, tile: slice) -> float | Tensor:
    """Derivative of a tile of the logits by hidden · weightᵀ: scale · (1 − tanh²)."""
    if projection.cap is None:
        return projection.scale
    capped = logits if projection.bias is None else logits - projection.bias[tile]
    return (1.0 - (capped / projection.cap).square_()).mul_(projection.scale)


def mm(a: Tensor, b: Tensor) -> Tensor:
    """a · b with fp32 output, whatever the inputs' dtype (torch offers fp32 output of 16-bit GEMMs on CUDA only)."""
    if a.dtype == torch.float32:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()
