"""What a checkpoint is: an envelope around DeepSpeed's files that is either whole or not there.

    checkpoints/step-00000120/     manifest.json · deepspeed/…
    checkpoints/latest             the newest tag, for people; --resume trusts manifests only

A tag without a valid manifest does not exist. `saving` writes checkpoints, `loading` reads them.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from ctcd_ds.cli import Damage, RunFailure, UserError
from ctcd_ds.manifest import FileEntry, check_shape, file_problems, read_manifest
from ctcd_ds.recipe.mistakes import recipe_mistakes
from ctcd_ds.recipe.sections import TrainingSection

FORMAT, VERSION = "ctcd_ds.checkpoint", 1
INSIDE = "deepspeed"  # DeepSpeed's own tag: the folder of its files

Manifest = dict[str, Any]


class _Shape(TypedDict):
    step: int
    world: int
    recipe: dict[str, Any]
    corpus: str
    tokenizer: str
    vocab_size: int
    precision: str
    steps: int
    frozen: dict[str, str]
    valid: dict[str, float]
    files: dict[str, FileEntry]


def tag_of(step: int) -> str:
    """The directory name of a checkpoint after `step` steps."""
    return f"step-{step:08d}"


def read(checkpoint: Path) -> Manifest:
    """The checkpoint's manifest; its files are not looked at. Raises UserError where it has no good one."""
    manifest = read_manifest(checkpoint / "manifest.json")
    if manifest.get("format") != FORMAT or manifest.get("version") != VERSION:
        raise UserError(
            f"{checkpoint} is {manifest.get('format')} of version {manifest.get('version')}, this program reads "
            f"{FORMAT} of version {VERSION}: use the ctcd_ds that wrote it"
        )
    check_shape(checkpoint / "manifest.json", manifest, _Shape)
    if mistakes := recipe_mistakes(manifest["recipe"]):
        raise Damage(f"{checkpoint / 'manifest.json'}: recipe.{mistakes[0]}")
    return manifest


def verify(checkpoint: Path) -> Manifest:
    """Reads the manifest and every file it lists. Raises Damage with every file that is not as it says."""
    manifest = read(checkpoint)
    if problems := list(file_problems(checkpoint, manifest["files"])):
        raise Damage(f"{checkpoint} is damaged:\n  " + "\n  ".join(problems))
    return manifest


def newest(
    directory: Path, judge: Callable[[Path], Manifest] = verify, say: Callable[[str], Any] = print
) -> tuple[Path, Manifest] | None:
    """The newest checkpoint that `judge` finds good, and its manifest; says which were skipped and why.

    None where there is no checkpoint at all. Raises RunFailure where there are some and none is good: to begin anew
    there would lose what may be mended.
    """
    found, reasons = _tags(directory), []
    for checkpoint in reversed(found):
        try:
            return checkpoint, judge(checkpoint)
        except UserError as problem:
            say(f"skipping checkpoint {checkpoint.name}: {problem}")
            reasons.append(str(problem).split("\n")[0])
    if found:
        raise RunFailure(
            f"{directory}: none of its {len(found)} checkpoints is good: {reasons[0]} (`ctcd verify` lists all). "
            "Restore one from a copy, or start again in another output_dir"
        )
    return None


def best_losses(directory: Path) -> dict[str, float]:
    """The lowest held-out loss of each peer among the checkpoints."""
    best: dict[str, float] = {}
    for _, manifest in _readable(directory):
        for peer, loss in manifest["valid"].items():
            best[peer] = min(loss, best.get(peer, loss))
    return best


def prune(directory: Path, training: TrainingSection) -> None:
    """Removes what the recipe does not keep: the newest ones stay, every keep_every-th, and the best of each peer.

    Checkpoints without a good manifest are not counted and not touched: the last good one is never removed for them.
    """
    found = dict(_readable(directory))
    kept = set(list(found)[-training.keep_checkpoints :])
    if training.keep_every is not None:
        kept |= {path for path, manifest in found.items() if manifest["step"] % training.keep_every == 0}
    if training.keep_best:
        for peer, loss in best_losses(directory).items():
            kept.add(next(path for path, manifest in found.items() if manifest["valid"].get(peer) == loss))
    for path in found.keys() - kept:
        # The name goes first, at once: a half-removed checkpoint must not look like a damaged one.
        removed = path.with_name(f".{path.name}.removed")
        shutil.rmtree(removed, ignore_errors=True)
        path.rename(removed)
        shutil.rmtree(removed)


def clean(directory: Path) -> None:
    """Removes what a killed process left: half-written, half-converted and half-removed checkpoints."""
    for leftover in directory.glob(".*"):
        if re.fullmatch(r"\.step-\d{8}\.(tmp|universal|removed)", leftover.name):
            shutil.rmtree(leftover)
        elif re.fullmatch(r"\.latest\.\d+\.tmp", leftover.name):
            leftover.unlink()


def _tags(directory: Path) -> list[Path]:
    return sorted(path for path in directory.glob("step-*") if re.fullmatch(r"step-\d{8}", path.name))


def _readable(directory: Path) -> Iterator[tuple[Path, Manifest]]:
    """The checkpoints with a good manifest, oldest first."""
    for path in _tags(directory):
        try:
            yield path, read(path)
        except UserError:
            continue
