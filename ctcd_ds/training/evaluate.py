"""Held-out evaluation: each peer's loss and accuracy at the target positions, and how often two peers say the same."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ctcd_ds.corpus.loader import valid_batches
from ctcd_ds.corpus.masking import VALID_SEED
from ctcd_ds.objective.fused import CHUNK_BYTES, project
from ctcd_ds.peers.cotrain import CoTraining
from ctcd_ds.peers.heads import project_positions
from ctcd_ds.training.plan import Plan


@torch.no_grad()
def evaluate(engine: Any, plan: Plan, device: torch.device) -> dict[str, float]:
    """valid/<peer>/loss, valid/<peer>/accuracy and valid/agreement/<a>/<b> over the held-out rows of all ranks.

    Masks are the same at every call, in every run. Called by all ranks; empty where the corpus holds nothing out.
    """
    if plan.valid is None:
        return {}
    module: CoTraining = engine.module
    names, pairs = module.graph.names, list(combinations(range(len(module.graph.names)), 2))
    sums = torch.zeros(2 * len(names) + len(pairs) + 1, dtype=torch.float64, device=device)
    module.eval()
    for batch in valid_batches(
        plan.valid,
        plan.masking,
        VALID_SEED,
        plan.deepspeed.micro_batch,
        dist.get_rank(),
        dist.get_world_size(),
        max_rows=plan.recipe.training.valid_rows,
    ):
        input_ids, positions = batch.input_ids.to(device), batch.target_positions.to(device)
        with torch.compiler.set_stance("force_eager"):  # compiled encoders know one shape, and training mode
            sums += _sums(module, input_ids, positions, batch.targets.to(device), pairs)
    module.train()
    dist.all_reduce(sums)
    *values, count = sums.tolist()
    if not count:
        return {}
    keys = [f"valid/{name}/{what}" for what in ("loss", "accuracy") for name in names]
    keys += [f"valid/agreement/{names[a]}/{names[b]}" for a, b in pairs]
    return {key: value / count for key, value in zip(keys, values, strict=True)}


def _sums(
    module: CoTraining, input_ids: Tensor, positions: Tensor, targets: Tensor, pairs: list[tuple[int, int]]
) -> Tensor:
    """fp64: losses and right answers of each peer, equal answers of each pair, and the number of positions."""
    projections = [project_positions(peer, {"input_ids": input_ids}, positions) for peer in module.peers.values()]
    total = torch.zeros(2 * len(projections) + len(pairs) + 1, dtype=torch.float64, device=targets.device)
    chunk = max(1, CHUNK_BYTES // (4 * projections[0].width))
    for start in range(0, len(targets), chunk):
        rows = slice(start, start + chunk)
        logits = [project(p, rows)[:, : module.vocab_size] for p in projections]
        answers = [x.argmax(dim=1) for x in logits]
        losses = [torch.nn.functional.cross_entropy(x, targets[rows], reduction="sum") for x in logits]
        right = [(a == targets[rows]).sum() for a in answers]
        alike = [(answers[a] == answers[b]).sum() for a, b in pairs]
        total[:-1] += torch.stack([x.double() for x in (*losses, *right, *alike)])
    total[-1] = len(targets)
    return total
