"""What a peer costs: parameters, FLOPs per token. Counted by torch as the model runs one row, without memory."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ctcd_ds.cli import UserError
from ctcd_ds.peers.build import one_line
from ctcd_ds.peers.heads import Way, project_by
from ctcd_ds.peers.reading import as_inputs


class Cost(NamedTuple):
    """Parameters with and without embeddings (tied output embeddings count once), and FLOPs per token.

    `forward_flops`: multiply-adds count two; the head at `head_fraction` of the positions (and the decoder of a
    sequence-to-sequence model, which is asked at all of its own). Training costs three times that (backward is two
    forwards), a frozen peer once. `largest`: values of the largest parameter.
    `activations`: values per token that its layers put out, which backward needs.
    """

    parameters: int
    without_embeddings: int
    forward_flops: float
    largest: int
    activations: float


def cost(config: Any, sequence_length: int, head_fraction: float, auto: Any) -> Cost:
    """The cost of a model of the Auto class `auto` with this config at this row length.

    Attention counts in full, whatever its kernel, and of experts those that a token is sent to. Counted once for equal
    configs: experiments ask for many. Raises UserError where the model cannot run on a row of tokens.
    """
    key = config.to_json_string(use_diff=False), sequence_length, round(head_fraction * sequence_length), auto
    if key not in _COUNTED:
        _COUNTED[key] = _count(config, *key[1:])
    return _COUNTED[key]


_COUNTED: dict[tuple[str, int, int, Any], Cost] = {}


def _count(config: Any, sequence_length: int, positions: int, auto: Any) -> Cost:
    problem: Exception | None = None
    for place in _places():
        try:
            with place:
                return _counted(copy.deepcopy(config), auto, sequence_length, positions)
        except Exception as found:  # its code asks for a value that is not there, or transformers has no such path
            problem = found
    assert problem is not None
    kind = type(config).__name__.removesuffix("Config")
    raise UserError(f"{kind} cannot run on a row of {sequence_length} tokens: {one_line(problem)}") from None


def _places() -> Iterator[Any]:
    """Where a model is made: without memory where its code lets us, which differs from type to type."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    yield torch.device("meta")
    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)  # it logs what it then raises
    yield FakeTensorMode()
    yield nullcontext()


def _counted(config: Any, auto: Any, length: int, positions: int) -> Cost:
    from transformers import AutoModelForSeq2SeqLM

    # Attention and experts as plain matrix products: a fused kernel's cost would not be known, or depend on the kernel.
    model = auto.from_config(config, attn_implementation="eager", experts_implementation="batched_mm")
    model.eval().requires_grad_(False)
    word = config.get_text_config().vocab_size // 2
    written = positions if auto is AutoModelForSeq2SeqLM else length
    inputs = as_inputs(model.config, torch.full((1, length), word), torch.full((1, written), word))
    sizes = [p.numel() for p in model.parameters()]
    embeddings = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Embedding))
    values = _values_put_out(model)
    flops = _flops(model, inputs, torch.arange(positions), values)
    return Cost(sum(sizes), sum(sizes) - embeddings, flops / length, max(sizes), sum(values) / length)


def _values_put_out(model: Any) -> list[int]:
    """Grows by the size of what each layer of the base model puts out as it runs."""
    sizes: list[int] = []
    for layer in model.base_model.modules():
        if layer is not model.get_output_embeddings() and not list(layer.children()):
            layer.register_forward_hook(
                lambda _layer, _arguments, output: sizes.append(output.numel() if isinstance(output, Tensor) else 0)
            )
    return sizes


def _flops(model: Any, inputs: Mapping[str, Tensor], positions: Tensor, values: list[int]) -> int:
    """Of one forward with logits at `positions`; the fastest way that runs is the one that training takes."""
    from torch.utils.flop_counter import FlopCounterMode

    for tap in (True, False):
        values.clear()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            try:
                projection = project_by(Way(model.base_model is not model, tap), model, inputs, positions)
            except Exception:
                if not tap:
                    raise
                continue
        last = 0 if projection.weight is None else 2 * len(positions) * projection.weight.numel()
        return int(counter.get_total_flops()) + last
    raise AssertionError("unreachable")
