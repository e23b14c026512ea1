"""A run's end, tried before its beginning: a small twin of a peer reads, learns, is saved, loaded and compared.

What cannot end well then does not begin. The twin is the peer's config with two layers and a vocabulary that just holds
the special ids, so that this takes a second; where an architecture does not let itself be cut, it is the whole one.
"""

from __future__ import annotations

import contextlib
import copy
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from ctcd_ds.cli import UserError
from ctcd_ds.corpus.tokenizer import load_tokenizer, save_tokenizer, tokenizer_identity
from ctcd_ds.peers.build import (
    DTYPES,
    TOLERANCE,
    difference,
    hold_fixed,
    one_line,
    padded,
    quiet_transformers,
    save_and_reload,
    with_state,
)
from ctcd_ds.peers.checkpointing import checkpoint_layers
from ctcd_ds.peers.heads import project_positions
from ctcd_ds.peers.layers import depth_of, with_layers
from ctcd_ds.peers.reading import as_inputs, longest_row
from ctcd_ds.peers.vocabulary import set_vocabulary

LAYERS = 2
WORDS = 8  # of the small vocabulary, beside the special ids


def rehearse(
    config: Any,
    auto: Any,
    sequence_length: int,
    precision: str,
    device: str,
    unfit: Callable[[Any], str | None] = lambda model: None,
    checkpointing: bool = False,
) -> str | None:
    """Why a peer of this config could not be trained and exported, in one sentence; None where it can.

    Args:
        config: as `peer_config` gives it. auto: the task's Auto class.
        precision: fp32, bf16 or fp16, and device, cpu or cuda: of the run.
        unfit: why the task is nothing for a model, or None. checkpointing: whether its layers are to run again.
    """
    said = None
    with quiet_transformers(), torch.random.fork_rng([]):
        for twin in _twins(config):
            said = _rehearse(twin, auto, sequence_length, precision, device, unfit, checkpointing)
            if said is None:
                return None
    return said


def _twins(config: Any) -> Iterator[Any]:
    """The config with a small vocabulary: first with fewer layers, then as it is."""
    twin = copy.deepcopy(config)
    set_vocabulary(twin, max(_special_ids(twin), default=0) + WORDS)
    with contextlib.suppress(UserError):  # a few compute it from others
        if depth_of(twin) > LAYERS:
            yield with_layers(twin, range(LAYERS))
    yield twin


def _special_ids(config: Any) -> list[int]:
    settings = {**config.to_dict(), **config.get_text_config().to_dict()}
    ids = [value for key, value in settings.items() if key.endswith(("_token_id", "_index")) and isinstance(value, int)]
    return [value for value in ids if value < config.get_text_config().vocab_size]


def _rehearse(
    config: Any,
    auto: Any,
    length: int,
    precision: str,
    device: str,
    unfit: Callable[[Any], str | None],
    checkpointing: bool,
) -> str | None:
    kind, words = type(config).__name__.removesuffix("Config"), config.get_text_config().vocab_size
    inside = copy.deepcopy(config)
    set_vocabulary(inside, padded(words))
    try:
        model = auto.from_config(inside, dtype=torch.float32)
        hold_fixed(model)
        limit = longest_row(model)
        if checkpointing:
            checkpoint_layers(model)
    except Exception as problem:
        return f"{kind} cannot be built or cannot read a row: {one_line(problem)}"
    if limit is not None and length > limit:
        return (
            f"max_position_embeddings = {config.max_position_embeddings}: its positions are enough for rows of {limit} "
            f"tokens (they begin after the padding id), corpus.sequence_length = {length}; raise it or shorten the rows"
        )
    inputs = as_inputs(model.config, (words - WORDS + torch.arange(length) % WORDS).unsqueeze(0))
    if (said := _learns(model, inputs, torch.float32, "cpu")) is not None:
        return f"{kind} cannot learn from a row of {length} tokens: {said}"
    dtype = DTYPES[precision]
    usual = (dtype, device) == (torch.float32, "cpu")
    if not usual and (said := _learns(copy.deepcopy(model), inputs, dtype, device)) is not None:
        return f"{kind} cannot learn in {precision} on {device} ({said}); in fp32 on the CPU it can"
    _as_after_training(model)
    if (said := unfit(model)) is not None:
        return f"{kind}: {said}"
    return _export_mistake(model, config, auto, inputs, kind)


@torch.no_grad()
def _as_after_training(model: Any) -> None:
    """Gives all weights numbers: none of them stays zero."""
    for parameter in model.parameters():
        parameter.add_(torch.empty_like(parameter).uniform_(-0.02, 0.02))


def _learns(model: Any, inputs: dict[str, torch.Tensor], dtype: torch.dtype, device: str) -> str | None:
    """One forward and backward in training mode; what went wrong, or None."""
    try:
        model.to(device, dtype).train()
        there = {name: tensor.to(device) for name, tensor in inputs.items()}
        positions = torch.arange(0, inputs["input_ids"].numel(), 7, device=device)
        projection = project_positions(model, there, positions)
        logits = projection.hidden.float()
        if projection.weight is not None:
            logits = logits @ projection.weight.float().t()
        logits.square().mean().backward()
        model.zero_grad(set_to_none=True)
    except UserError as mistake:
        return str(mistake)
    except Exception as problem:
        return one_line(problem)
    return None


def _export_mistake(model: Any, config: Any, auto: Any, inputs: dict[str, torch.Tensor], kind: str) -> str | None:
    """What would be wrong with the exported model."""
    words = config.get_text_config().vocab_size
    try:
        with tempfile.TemporaryDirectory(prefix="rehearsal-") as place:
            exported = save_and_reload(with_state(model.config, model.state_dict(), auto, words), Path(place), auto)
            error, size = difference(exported, model, inputs)
    except Exception as problem:
        return f"{kind} could not be exported: {one_line(problem)}"
    if not error <= TOLERANCE * max(1.0, size):
        return (
            f"{kind} does not survive its own reload: the exported model's logits are off by {error:.2g} of {size:.2g}"
        )
    return None


def tokenizer_mistake(config: Any, tokenizer: Path) -> str | None:
    """Why a model of this config and the tokenizer in a directory could not be exported together; None where they can.

    For a few types (Qwen2's) transformers reads every tokenizer as one of the type's own class, whatever was saved.
    """
    with tempfile.TemporaryDirectory(prefix="rehearsal-") as place, quiet_transformers():
        ours = load_tokenizer(tokenizer)
        config.save_pretrained(place)
        save_tokenizer(ours, Path(place))
        try:
            theirs = load_tokenizer(place)
            if tokenizer_identity(theirs) == tokenizer_identity(ours):
                return None
            said = f"reads it as {type(theirs).__name__}, which gives other ids"
        except UserError as problem:
            said = f"cannot read it there: {problem}"
    return (
        f"{type(config).__name__.removesuffix('Config')} could not be exported with the corpus's tokenizer: beside a "
        f"{config.model_type} transformers {said}; prepare the corpus with this type's own tokenizer, or take another "
        "type"
    )
