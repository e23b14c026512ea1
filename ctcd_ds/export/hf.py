"""From a checkpoint to Hugging Face model directories that any tool of theirs loads, checked before it says done."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ctcd_ds.cli import Damage, RunFailure, UserError, did_you_mean
from ctcd_ds.corpus.mixture import open_corpus
from ctcd_ds.corpus.tokenizer import load_tokenizer, save_tokenizer, special_ids, tokenizer_identity
from ctcd_ds.export.model_card import write_card
from ctcd_ds.kinds import instead
from ctcd_ds.manifest import built
from ctcd_ds.peers.build import TOLERANCE, difference, one_line, save_and_reload, with_state
from ctcd_ds.peers.reading import as_inputs, fit_tokenizer
from ctcd_ds.peers.vocabulary import KEPT
from ctcd_ds.recipe.reading import load_recipe
from ctcd_ds.recipe.sections import Recipe
from ctcd_ds.tasks import TASKS
from ctcd_ds.tasks.loader import Cut, valid_batches
from ctcd_ds.training import checkpoint as checkpoints
from ctcd_ds.training.loading import consolidated
from ctcd_ds.training.run_directory import RunDirectory


def export(source: Path, peer: str, output_dir: Path, data_license: str | None = None) -> dict[str, Path]:
    """Writes one trained peer to `output_dir`, or with peer 'all' each to output_dir/<peer>/.

    Args:
        source: a run directory (its newest good checkpoint is taken) or one of its checkpoints.
        data_license: of the training text, as the model cards are to state it; never guessed.
    Returns: peer → directory. Raises UserError (wrong source, peer or output_dir), RunFailure where the reloaded
    model does not give the training weights' logits; nothing is left behind then.
    """
    run, checkpoint, manifest = _find(source)
    recipe = load_recipe(run.recipe)
    trained = [name for name, section in recipe.peers.items() if not section.frozen]
    if peer != "all" and peer not in trained:
        frozen = f" ({peer} is frozen: its model is {recipe.peers[peer].pretrained})" if peer in recipe.peers else ""
        raise UserError(f"--peer {peer}: no trained peer of this run{frozen}; {did_you_mean(peer, ['all', *trained])}")
    names = trained if peer == "all" else [peer]
    with built(output_dir) as folder:
        weights = consolidated(checkpoint)
        auto, inputs = TASKS[recipe.objective.task].auto_class(), _probe(recipe, manifest["vocab_size"])
        for name in names:
            place = folder / name if peer == "all" else folder
            _export_one(run, name, weights[name], manifest, place, auto, inputs)
            write_card(place, run, recipe, name, manifest, data_license)
    return {name: output_dir / name if peer == "all" else output_dir for name in names}


def _find(source: Path) -> tuple[RunDirectory, Path, dict[str, Any]]:
    """The run, the checkpoint and its verified manifest that `source` means."""
    if source.parent.name == "checkpoints" and (source / "manifest.json").exists():
        return RunDirectory(source.parent.parent), source, checkpoints.verify(source)
    run = RunDirectory(source)
    if not run.recipe.exists():
        raise UserError(f"--checkpoint {source} is neither a run nor one of its checkpoints: {instead(source, 'run')}")
    newest = checkpoints.newest(run.checkpoints)
    if newest is None:
        raise UserError(f"--checkpoint {source}: the run has no good checkpoint yet")
    return run, *newest


def _export_one(
    run: RunDirectory,
    name: str,
    state: Mapping[str, Tensor],
    manifest: dict[str, Any],
    place: Path,
    auto: Any,
    inputs: Mapping[str, Tensor],
) -> None:
    from transformers import logging

    logging.disable_progress_bar()
    vocab_size = manifest["vocab_size"]
    tokenizer = load_tokenizer(run.tokenizer)
    if len(tokenizer) != vocab_size:
        raise Damage(f"{run.tokenizer} has {len(tokenizer)} tokens, the checkpoint's manifest says {vocab_size}")
    exported = peer_model(run, name, state, auto, vocab_size)
    _let_generate(exported, tokenizer)
    reloaded = save_and_reload(exported, place, auto)
    identity = tokenizer_identity(tokenizer)
    fit_tokenizer(tokenizer, exported)
    save_tokenizer(tokenizer, place)

    inputs = {**as_inputs(exported.config, inputs["input_ids"]), **inputs}
    error, size = difference(reloaded, peer_model(run, name, state, auto), inputs)
    if not error <= TOLERANCE * max(1.0, size):
        raise RunFailure(f"peer {name}: the exported model's logits are off by {error:.3g} (logits up to {size:.3g})")
    if tokenizer_identity(load_tokenizer(place)) != identity:
        raise RunFailure(f"peer {name}: the exported tokenizer does not give the ids of {run.tokenizer}")


def _let_generate(model: Any, tokenizer: Any) -> None:
    """Gives a model that writes text, and its tokenizer, a padding token: the end of text, where there is no other."""
    if (settings := getattr(model, "generation_config", None)) is not None:
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.convert_ids_to_tokens(special_ids(tokenizer).end)
        settings.pad_token_id = tokenizer.pad_token_id


def peer_model(
    run: RunDirectory, name: str, state: Mapping[str, Tensor], auto: Any, vocab_size: int | None = None
) -> Any:
    """The peer with these weights, its vocabulary padded as in training.

    With `vocab_size` it is cut to that, or to as many rows as the checkpoint had that it began from, if these are more.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(run.peers / name, trust_remote_code=False)
        rows = vars(config).pop(KEPT, vocab_size)
        return with_state(config, state, auto, vocab_size and rows)
    except Exception as problem:  # transformers has no common base for what it raises
        raise Damage(f"{run.peers / name / 'config.json'} does not fit the weights: {one_line(problem)}") from None


def _probe(recipe: Recipe, vocab_size: int) -> Mapping[str, Tensor]:
    """Four rows to compare logits on: held-out ones as peers see them, or random ids where the corpus is not there."""
    length = recipe.corpus.sequence_length
    try:
        corpus = open_corpus(recipe.corpus)
        task = TASKS[recipe.objective.task].of(recipe, corpus)
        rows = task.rows("valid" if corpus.tokens("valid") else "train")
    except UserError:
        return {"input_ids": torch.randint(5, vocab_size, (4, length), generator=torch.Generator().manual_seed(0))}
    return next(valid_batches(rows, task, Cut(4), max_rows=4)).views[0].inputs
