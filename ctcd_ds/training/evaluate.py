"""Held-out evaluation: each peer's loss and accuracy at the target positions, and how often two peers say the same."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import nullcontext
from itertools import combinations
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ctcd_ds.objective.batch import Batch
from ctcd_ds.objective.projection import chunks, project
from ctcd_ds.peers.cotrain import CoTraining
from ctcd_ds.peers.heads import project_positions
from ctcd_ds.tasks.loader import Cut, valid_batches
from ctcd_ds.training.plan import Plan


@torch.no_grad()
def evaluate(engine: Any, plan: Plan, device: torch.device) -> dict[str, float]:
    """valid/<peer>/loss, valid/<peer>/accuracy and valid/agreement/<a>/<b> over the held-out rows of all ranks.

    The same of each held-out set and each source of a mixture: valid/<name>/<peer>/loss …; what has no name is their
    mean, each with its weight in `Corpus.held_out`. Where the targets are the text itself, bits_per_byte too. Rows are
    asked the same at every call, in every run. Called by all ranks; empty where the corpus holds nothing out.
    """
    if not plan.valid:
        return {}
    module: CoTraining = engine.module
    names, pairs = list(module.peers), list(combinations(range(len(module.peers)), 2))
    sums = torch.zeros(len(plan.valid), 2 * len(names) + len(pairs) + 1, dtype=torch.float64, device=device)
    module.eval()
    cut = Cut(plan.deepspeed.micro_batch, rank=dist.get_rank(), world=dist.get_world_size())
    for total, rows in zip(sums, plan.valid.values(), strict=True):
        for batch in valid_batches(rows, plan.task, cut, plan.recipe.training.valid_rows):
            # Compiled encoders know one shape, and training mode.
            with torch.compiler.set_stance("force_eager") if module.compiled else nullcontext():
                total += _sums(module, batch.to(device), pairs)
    module.train()
    dist.all_reduce(sums)
    keys = [f"{name}/{what}" for what in ("loss", "accuracy") for name in names]
    keys += [f"agreement/{names[a]}/{names[b]}" for a, b in pairs]
    found = {}
    for split, (*values, count) in zip(plan.valid, sums.tolist(), strict=True):
        if count:
            found[split] = {key: value / count for key, value in zip(keys, values, strict=True)}
            if size := plan.task.bytes_per_target(split):
                bits = {f"{n}/bits_per_byte": found[split][f"{n}/loss"] / math.log(2) / size for n in names}
                found[split] |= bits
    return _named(found, plan.corpus.held_out)


def _named(found: Mapping[str, Mapping[str, float]], weights: Mapping[str, float]) -> dict[str, float]:
    """Split → key → value as valid/NAME/KEY; as valid/KEY what stands for all, or else the splits' mean by weight."""
    named = {split.replace(".", "/", 1): values for split, values in found.items()}
    counted = {split: weights[split] for split in found if weights[split]}
    if counted and "valid" not in found:
        whole = sum(counted.values())
        common = [key for key in found[next(iter(counted))] if all(key in found[split] for split in counted)]
        mean = {key: sum(weight * found[split][key] for split, weight in counted.items()) / whole for key in common}
        named = {"valid": mean, **named}
    return {f"{name}/{key}": value for name, values in named.items() for key, value in values.items()}


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
