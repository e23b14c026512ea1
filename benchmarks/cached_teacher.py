"""How far the gradient from a cached teacher is from the live one's, by the bytes that are kept of it.

Two finished models, a teacher and a student, are asked the first rows of a corpus. The gradient of the soft loss by the
student's output embedding, with what is kept in the teacher's place, is compared with that of the whole prediction:
the difference as a share of it, `once` and of the mean over all --repetitions, each drawn anew as each epoch is, where
chance averages out and a bias stays. What is kept: `drawn`, as `ctcd cache-logits` does; `independent`, as many
independent draws; `largest`, as many of the largest probabilities as the bytes hold (an id and a 16-bit number each).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import common
import torch
from torch import Tensor

from ctcd_ds import cli
from ctcd_ds.corpus.mixture import open_corpus
from ctcd_ds.objective.cached import draw
from ctcd_ds.objective.projection import project
from ctcd_ds.peers.build import build_peers, quiet_transformers
from ctcd_ds.peers.heads import project_positions
from ctcd_ds.recipe.sections import Recipe
from ctcd_ds.tasks import TASKS
from ctcd_ds.tasks.cache import record
from ctcd_ds.tasks.loader import Cut


def ask(recipe: Recipe, rows: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """(the teacher's logits, the student's logits, both fp32 [P, V]; the student's last hidden states [P, E])."""
    corpus, kind = open_corpus(recipe.corpus), TASKS[recipe.objective.task]
    task = kind.of(recipe, corpus)
    with quiet_transformers():
        peers = build_peers(recipe.peers, corpus, recipe.seed, kind.auto_class())
    (batch,) = Cut(rows).batches(task.rows("train"), task, recipe.seed, 0)
    with torch.no_grad():
        seen = zip(peers.values(), batch.to(device).views, strict=True)
        teacher, student = (project_positions(p.eval().to(device), v.inputs, v.positions) for p, v in seen)
        logits = (project(p, slice(None))[:, : corpus.vocab_size] for p in (teacher, student))
        return (*logits, student.hidden)


def share_of(tokens: Tensor, like: Tensor) -> Tensor:
    """The share of each token among the kept ones [P, D]: [P, V]."""
    return torch.zeros_like(like).scatter_add_(
        1, tokens, torch.full_like(tokens, 1 / tokens.shape[1], dtype=like.dtype)
    )


def drawn(logits: Tensor, q: Tensor, draws: int) -> Tensor:
    return share_of(draw(logits, torch.rand(len(q), device=q.device), draws).tokens, q)


def independent(_logits: Tensor, q: Tensor, draws: int) -> Tensor:
    return share_of(torch.multinomial(q, draws, replacement=True), q)


def largest(_logits: Tensor, q: Tensor, kept: int) -> Tensor:
    top = q.topk(min(kept, q.shape[1]), dim=1)
    return torch.zeros_like(q).scatter_(1, top.indices, top.values / top.values.sum(dim=1, keepdim=True))


def errors(way: Callable[[], Tensor], q: Tensor, gradient: Callable[[Tensor], Tensor], rounds: int) -> dict[str, float]:
    """How far the gradient with q̂ is from that with q, once and for the mean of q̂, as shares of the latter."""
    right = gradient(q)
    mean, once = torch.zeros_like(q), 0.0
    for _ in range(rounds):
        kept = way()
        mean += kept / rounds
        once += float((gradient(kept) - right).norm() / right.norm()) / rounds
    return {"once": once, "mean": float((gradient(mean) - right).norm() / right.norm())}


def measure(recipe: Recipe, rows: int, draws: list[int], rounds: int, device: torch.device) -> dict[str, Any]:
    """The row's values; `by_draws` has one entry a number of draws."""
    torch.manual_seed(0)
    logits, student, hidden = ask(recipe, rows, device)
    q, p = (torch.softmax(z.double(), dim=1) for z in (logits, student))
    states = hidden.double()

    def gradient(kept: Tensor) -> Tensor:
        return (p - kept).t() @ states / len(p)

    table = []
    for number in draws:
        size = record(number, q.shape[1]).itemsize
        ways = {"drawn": partial(drawn, logits, q, number), "independent": partial(independent, logits, q, number)}
        found = {name: errors(way, q, gradient, rounds) for name, way in ways.items()}
        found["largest"] = errors(partial(largest, logits, q, size // 4), q, gradient, 1)
        per_token = size * len(p) / rows / recipe.corpus.sequence_length
        table.append({"draws": number, "bytes_a_position": size, "bytes_a_token": round(per_token, 2), **found})
    return {
        "positions": len(p),
        "vocab_size": q.shape[1],
        "teacher_entropy": float(torch.special.entr(q).sum(dim=1).mean()),
        "kl": float((q * (q / p).log()).sum(dim=1).mean()),
        "whole_bytes_a_position": 2 * q.shape[1],
        "by_draws": table,
    }


def main() -> None:
    parser = common.parser(__doc__)
    add = parser.add_argument
    add("--teacher", type=Path, required=True, metavar="DIR", help="a finished model")
    add("--student", type=Path, required=True, metavar="DIR", help="another one")
    add("--corpus", type=Path, required=True, metavar="DIR", help="of their tokenizer")
    add("--task", choices=sorted(TASKS), default="mlm")
    add("--sequence_length", type=cli.positive, default=128)
    add("--rows", type=cli.positive, default=64)
    add("--draws", type=cli.whole_numbers, default=[1, 4, 16, 64, 256])
    parser.set_defaults(repetitions=64)
    arguments = parser.parse_args()
    device = common.begin(arguments)
    raw = {
        "corpus": {"path": str(arguments.corpus), "sequence_length": arguments.sequence_length},
        "objective": {"task": arguments.task},
        "peers": {
            "teacher": {"pretrained": str(arguments.teacher), "frozen": True},
            "student": {"pretrained": str(arguments.student), "soft": {"teacher": 1.0}},
        },
        "training": {"steps": 1},
    }
    recipe = Recipe.model_validate(raw)
    common.write_row(arguments, measure(recipe, arguments.rows, arguments.draws, arguments.repetitions, device))


if __name__ == "__main__":
    cli.run(main)
