"""Held-out evaluation: each peer's loss and accuracy at the target positions, and how often two peers say the same."""

from __future__ import annotations

import math
from itertools import combinations
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ctcd_ds.objective.batch import Batch
from ctcd_ds.objective.fused import chunks, project
from ctcd_ds.peers.cotrain import CoTraining
from ctcd_ds.peers.heads import project_positions
from ctcd_ds.tasks.loader import Cut, valid_batches
from ctcd_ds.training.plan import Plan


@torch.no_grad()
def evaluate(engine: Any, plan: Plan, device: torch.device) -> dict[str, float]:
    """valid/<peer>/loss, valid/<peer>/accuracy and valid/agreement/<a>/<b> over the held-out rows of all ranks.

    Where the targets are the text itself, valid/<peer>/bits_per_byte too. Rows are asked the same at every call, in
    every run. Called by all ranks; empty where the corpus holds nothing out.
    """
    if plan.valid is None:
        return {}
    module: CoTraining = engine.module
    names, pairs = module.graph.names, list(combinations(range(len(module.graph.names)), 2))
    sums = torch.zeros(2 * len(names) + len(pairs) + 1, dtype=torch.float64, device=device)
    module.eval()
    cut = Cut(plan.deepspeed.micro_batch, rank=dist.get_rank(), world=dist.get_world_size())
    for batch in valid_batches(plan.valid, plan.task, cut, plan.recipe.training.valid_rows):
        with torch.compiler.set_stance("force_eager"):  # compiled encoders know one shape, and training mode
            sums += _sums(module, batch.to(device), pairs)
    module.train()
    dist.all_reduce(sums)
    *values, count = sums.tolist()
    if not count:
        return {}
    keys = [f"valid/{name}/{what}" for what in ("loss", "accuracy") for name in names]
    keys += [f"valid/agreement/{names[a]}/{names[b]}" for a, b in pairs]
    found = {key: value / count for key, value in zip(keys, values, strict=True)}
    if size := plan.task.bytes_per_target("valid"):
        found |= {f"valid/{n}/bits_per_byte": found[f"valid/{n}/loss"] / math.log(2) / size for n in names}
    return found


def _sums(module: CoTraining, batch: Batch, pairs: list[tuple[int, int]]) -> Tensor:
    """fp64: losses and right answers of each peer, equal answers of each pair, and the number of positions."""
    seen = zip(module.peers.values(), batch.views, strict=True)
    projections = [project_positions(peer, view.inputs, view.positions) for peer, view in seen]
    targets = batch.views[0].targets
    total = torch.zeros(2 * len(projections) + len(pairs) + 1, dtype=torch.float64, device=targets.device)
    for rows in chunks(len(targets), projections[0].width):
        logits = [project(p, rows)[:, : module.vocab_size] for p in projections]
        answers = [x.argmax(dim=1) for x in logits]
        losses = [torch.nn.functional.cross_entropy(x, targets[rows], reduction="sum") for x in logits]
        right = [(a == targets[rows]).sum() for a in answers]
        alike = [(answers[a] == answers[b]).sum() for a, b in pairs]
        total[:-1] += torch.stack([x.double() for x in (*losses, *right, *alike)])
    total[-1] = len(targets)
    return total
