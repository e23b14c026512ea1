"""The objective's memory is bounded whatever the vocabulary: counted on torch's meta device, at full size."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ctcd_ds.objective.batch import Batch, View
from ctcd_ds.objective.fused import fused_objective
from ctcd_ds.objective.graph import DistillationGraph
from ctcd_ds.objective.projection import Projection

VOCABULARY, WIDTH, MIB = 151_936, 896, 2**20


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that operations made and that are still there, and their peak."""

    def __init__(self, given: list[torch.Tensor]) -> None:
        super().__init__()
        self._sizes = {tensor.untyped_storage()._cdata: 0 for tensor in given}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and (key := tensor.untyped_storage()._cdata) not in self._sizes:
                self._sizes[key] = tensor.untyped_storage().nbytes()
                self.now += self._sizes[key]
                self.peak = max(self.peak, self.now)
                weakref.finalize(tensor.untyped_storage(), self._forget, key)
        return out

    def _forget(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("positions", [8192, 1000, 110])  # logits are kept for the backward pass of the last one only
def test_beyond_weights_and_their_gradients_it_takes_at_most_256_mib(positions: int, dtype: torch.dtype) -> None:
    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta").requires_grad_()

    peers = [Projection(empty(positions, WIDTH), empty(VOCABULARY, WIDTH), empty(VOCABULARY)) for _ in range(2)]
    targets = torch.empty(positions, dtype=torch.int64, device="meta")
    batch = Batch((View({}, targets, targets, positions),) * 2, positions, torch.empty((), device="meta"), np.arange(1))
    graph = DistillationGraph(("a", "b"), (1.0, 1.0), ((0.0, 1.0), (4.0, 0.0)), (True, True))
    given = [tensor for peer in peers for tensor in (peer.hidden, peer.weight, peer.bias) if tensor is not None]
    with LiveBytes([*given, targets, batch.soft_count]) as memory:
        fused_objective(peers, batch, graph, VOCABULARY).total.backward()
    gradients = sum(tensor.grad.numel() * tensor.grad.element_size() for tensor in given if tensor.grad is not None)
    assert memory.now >= gradients > 2 * VOCABULARY * WIDTH * dtype.itemsize, "all gradients are there, and counted"
    assert memory.peak - gradients < 256 * MIB
