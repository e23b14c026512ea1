"""Writing a cache: a finished teacher is asked all that a recipe will ask, and a few drawn tokens of each answer kept.

A kill loses the file being written, no more: the same command goes on behind the last whole one, and in the end every
byte is as it would have been.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ctcd_ds.cli import UserError, did_you_mean
from ctcd_ds.corpus.hashing import CACHE_DRAWS, extended, hashed
from ctcd_ds.corpus.workplace import locked, same_plan
from ctcd_ds.kinds import folder_kind
from ctcd_ds.manifest import read_manifest, sampled_entry, sync_directory, write_manifest
from ctcd_ds.objective.cached import draw
from ctcd_ds.objective.course import value_at
from ctcd_ds.objective.projection import chunks, project
from ctcd_ds.peers.build import DTYPES, build_peer, weights_sha256
from ctcd_ds.peers.heads import project_positions
from ctcd_ds.recipe.mistakes import recipe_mistakes
from ctcd_ds.recipe.schema import Mistakes
from ctcd_ds.recipe.sections import Recipe
from ctcd_ds.tasks.cache import FORMAT, PROGRESS, VERSION, Cache, file_name, record, what_is_asked
from ctcd_ds.tasks.loader import Cut
from ctcd_ds.training.plan import Plan

FILE_BYTES = 2**25  # so much work may be lost


def refuse_recipe(recipe: Recipe, peer: str, output_dir: Path) -> None:
    """Raises UserError where a peer of the recipe is no finished teacher, or a cache could not take its place there."""
    section = recipe.peers.get(peer)
    if section is None or not section.frozen:
        frozen = [name for name, other in recipe.peers.items() if other.frozen]
        raise UserError(f"--peer {peer}: no frozen peer of the recipe; {did_you_mean(peer, frozen)}")
    if peer not in recipe.graph().distilling():
        raise UserError(f"--peer {peer}: nobody learns from it; give a peer a weight, e.g. peers.student.soft.{peer}=1")
    raw = recipe.resolved()
    del raw["peers"][peer]
    raw["cached_teachers"][peer] = str(output_dir)
    if mistakes := recipe_mistakes(raw):
        raise Mistakes(f"the recipe with cached_teachers.{peer} in place of the peer", mistakes)


def write_cache(plan: Plan, peer: str, draws: int, output_dir: Path, device: torch.device) -> Cache:
    """The cache of a frozen peer of the plan, whose recipe `refuse_recipe` has seen: written, or gone on with.

    Raises UserError where `output_dir` holds something else, saying what differs.
    """
    teacher = _teacher(plan, peer)
    vocab_size, micro_batch = plan.corpus.vocab_size, plan.deepspeed.micro_batch
    positions = plan.task.asked(plan.recipe, peer)
    row_bytes = positions * record(draws, vocab_size).itemsize
    content: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "asked": what_is_asked(plan.recipe, plan.corpus),
        "teacher": {"weights_sha256": weights_sha256(teacher), "precision": plan.deepspeed.precision},
        "draws": draws,
        "positions": positions,
        "vocab_size": vocab_size,
        "rows": plan.steps * plan.recipe.training.global_batch_rows,
        "file_rows": max(1, FILE_BYTES // (row_bytes * micro_batch)) * micro_batch,
    }
    if output_dir.is_file():
        raise UserError(f"--output_dir {output_dir} is a file; name a new directory")
    if _is_finished(output_dir, content):
        return Cache.open(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    with locked(output_dir, f"writing a cache in {output_dir}"):
        files = _begun(output_dir, content)
        teacher.to(device)
        firsts = range(0, content["rows"], content["file_rows"])
        with tqdm(total=content["rows"], desc=f"asking {peer}", unit=" rows", delay=2) as bar:
            for number, first in enumerate(firsts):
                count = min(content["file_rows"], content["rows"] - first)
                if (name := file_name(number)) not in files:
                    answers = _answers(plan, peer, teacher, draws, first // micro_batch, count // micro_batch, device)
                    files[name] = _write(output_dir / name, answers, bar, micro_batch)
                    write_manifest(output_dir / PROGRESS, {**content, "files": dict(sorted(files.items()))})
                else:
                    bar.update(count)
        write_manifest(output_dir / "manifest.json", {**content, "files": dict(sorted(files.items()))})
        (output_dir / PROGRESS).unlink()
    return Cache.open(output_dir)


def _teacher(plan: Plan, peer: str) -> Any:
    """The model as the run would read it."""
    auto, dtype = plan.task.auto_class(), DTYPES[plan.deepspeed.precision]
    return build_peer(peer, plan.sections[peer], plan.corpus, plan.recipe.seed, auto, dtype).eval()


def _is_finished(output_dir: Path, content: dict[str, Any]) -> bool:
    if folder_kind(output_dir) != "cache":
        return False
    there = read_manifest(output_dir / "manifest.json")
    same_plan(output_dir, _without_files(there), content, "a finished cache")
    (output_dir / PROGRESS).unlink(missing_ok=True)
    return True


def _begun(output_dir: Path, content: dict[str, Any]) -> dict[str, Any]:
    """The files that an earlier start has finished."""
    if not (output_dir / PROGRESS).exists():
        if any(output_dir.iterdir()):
            raise UserError(f"--output_dir {output_dir} is not empty and holds no cache; name a new directory")
        write_manifest(output_dir / PROGRESS, {**content, "files": {}})
    there = read_manifest(output_dir / PROGRESS)
    same_plan(output_dir, _without_files(there), content, "an unfinished cache")
    files: dict[str, Any] = there["files"]
    return {name: entry for name, entry in files.items() if _has_size(output_dir / name, entry["bytes"])}


def _without_files(manifest: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in manifest.items() if key not in ("files", "sha256")}


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _write(path: Path, pieces: Iterator[np.ndarray], bar: Any, rows: int) -> dict[str, Any]:
    """The pieces, of so many rows each, as a file that is whole or not there; its entry in the manifest."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        for piece in pieces:
            file.write(piece.tobytes())
            bar.update(rows)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_directory(path.parent)
    return sampled_entry(path)


@torch.no_grad()
def _answers(
    plan: Plan, peer: str, teacher: Any, draws: int, first: int, count: int, device: torch.device
) -> Iterator[np.ndarray]:
    """The records of `count` micro-batches from number `first` on, each [rows · positions]."""
    cut, seed, tau = Cut(plan.deepspeed.micro_batch), plan.recipe.seed, value_at(plan.recipe.graph().temperature, 0.0)
    peers, positions, vocab_size = list(plan.recipe.peers), plan.task.asked(plan.recipe, peer), plan.corpus.vocab_size
    for number in range(first, first + count):
        (batch,) = cut.batches(plan.rows, plan.task, seed, number)
        shifts = _shifts(seed, *plan.rows.batch(seed, number, cut.global_batch), positions).to(device)
        view = batch.to(device).views[peers.index(peer)]
        # Where soft losses are at all text, their number varies: records are kept for all positions.
        where = view.positions if batch.shared == len(shifts) else None
        projection = project_positions(teacher, view.inputs, where)
        records = np.empty(len(shifts), record(draws, vocab_size))
        for rows in chunks(len(shifts), 4 * projection.width):  # fp64, several times
            drawn = draw(project(projection, rows)[:, :vocab_size], shifts[rows], draws, tau)
            records["tokens"][rows], records["entropy"][rows] = drawn.tokens.cpu(), drawn.entropy.cpu()
        yield records


def _shifts(seed: int, epochs: np.ndarray, rows: np.ndarray, positions: int) -> Tensor:
    """A number in (0, 1) for each position of these rows, fp64 [rows · positions]: by a hash, as all that is random."""
    keys = extended(hashed(seed, CACHE_DRAWS, epochs, rows)[:, None], np.arange(positions))
    return torch.from_numpy(((keys >> np.uint64(32)).astype(np.float64) + 0.5).ravel() / 2**32)
