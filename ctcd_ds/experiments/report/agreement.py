"""Do peers copy each other's mistakes? What two models answer at the same held-out positions.

Two models that learned from the same text are wrong at the same hard places anyway. So the share of common mistakes
says nothing by itself: it is to be read beside that of the same two models trained alone.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ctcd_ds.cli import UserError
from ctcd_ds.corpus.mixture import open_corpus
from ctcd_ds.corpus.rows import Corpus
from ctcd_ds.export.hf import peer_model
from ctcd_ds.objective.batch import View
from ctcd_ds.objective.projection import chunks, project
from ctcd_ds.peers.heads import project_positions
from ctcd_ds.recipe.reading import load_recipe
from ctcd_ds.recipe.sections import Recipe
from ctcd_ds.tasks import TASKS
from ctcd_ds.tasks.loader import Cut, valid_batches
from ctcd_ds.training import checkpoint as checkpoints
from ctcd_ds.training.loading import consolidated
from ctcd_ds.training.run_directory import RunDirectory

_ROWS_AT_ONCE = 16


@dataclass(frozen=True)
class Agreement:
    """How many held-out target positions fall into each of five kinds; they add up to `positions`."""

    both_right: int
    only_first_right: int
    only_second_right: int
    same_wrong: int
    different_wrong: int

    @property
    def positions(self) -> int:
        one = self.only_first_right + self.only_second_right
        return self.both_right + one + self.same_wrong + self.different_wrong

    @property
    def common_mistakes(self) -> float | None:
        """The share (0 to 1) of the positions where both are wrong at which they give the same wrong answer."""
        both_wrong = self.same_wrong + self.different_wrong
        return self.same_wrong / both_wrong if both_wrong else None


@dataclass(frozen=True)
class Answers:
    """What the peers of one run answer: int64 [N] each, in the order of `targets`, int64 [N], the right answers."""

    targets: np.ndarray
    peers: dict[str, np.ndarray]


def compare_answers(first: np.ndarray, second: np.ndarray, targets: np.ndarray) -> Agreement:
    """Counts the positions by who is right; all three are int [N] in the same order."""
    one, two, alike = first == targets, second == targets, first == second
    counts = (one & two, one & ~two, ~one & two, ~one & ~two & alike, ~one & ~two & ~alike)
    return Agreement(*(int(kind.sum()) for kind in counts))


def held_out_answers(run: RunDirectory, rows: int) -> Answers:
    """Each peer's likeliest token at the target positions of the first `rows` held-out rows.

    Masks are those of every held-out evaluation. A peer is read from RUN/hf where it was exported, else from the
    newest checkpoint; a frozen one from where it came. Runs on the GPU where there is one. Raises UserError where the
    corpus holds nothing out or is gone, or where there are no weights.
    """
    recipe = load_recipe(run.recipe)
    corpus = open_corpus(recipe.corpus)
    if not corpus.tokens("valid"):
        raise UserError(f"{corpus.path} holds no documents out")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    task = TASKS[recipe.objective.task].of(recipe, corpus)
    batches = valid_batches(task.rows("valid"), task, Cut(_ROWS_AT_ONCE), max_rows=rows)
    views = [batch.to(device).views[0] for batch in batches]
    found = {
        name: np.concatenate([_likeliest(model, view, corpus) for view in views])
        for name, model in _models(run, recipe, device)
    }
    return Answers(torch.cat([view.targets for view in views]).cpu().numpy(), found)


@torch.no_grad()
def _likeliest(model: Any, view: View, corpus: Corpus) -> np.ndarray:
    projection = project_positions(model, view.inputs, view.positions)
    parts = chunks(len(view.targets), projection.width)
    likeliest = [project(projection, part)[:, : corpus.vocab_size].argmax(dim=1) for part in parts]
    return torch.cat(likeliest).cpu().numpy()


def _models(run: RunDirectory, recipe: Recipe, device: torch.device) -> Iterator[tuple[str, Any]]:
    """The run's peers one after another, so that one is in memory at a time."""
    from transformers import logging

    logging.disable_progress_bar()
    exports = {name: run.path / "hf" / name for name in recipe.peers}
    exports |= {name: Path(peer.pretrained or "") for name, peer in recipe.peers.items() if peer.frozen}
    missing = [name for name, place in exports.items() if not (place / "config.json").is_file()]
    states = _checkpointed(run, missing) if missing else {}
    auto_class = TASKS[recipe.objective.task].auto_class()
    for name, place in exports.items():
        if name in states:
            model = peer_model(run, name, states[name], auto_class)
        else:
            model = auto_class.from_pretrained(place, dtype=torch.float32, trust_remote_code=False)
        yield name, model.eval().to(device)


def _checkpointed(run: RunDirectory, names: Sequence[str]) -> dict[str, Any]:
    newest = checkpoints.newest(run.checkpoints)
    with contextlib.redirect_stderr(io.StringIO()):  # DeepSpeed shows a bar for each
        states = consolidated(newest[0]) if newest is not None else {}
    if absent := [name for name in names if name not in states]:
        raise UserError(f"{run.path}: no weights of {', '.join(absent)} (neither an export in hf/ nor a checkpoint)")
    return states
