"""What a peer costs: parameters, FLOPs per token. Counted by torch as the model runs one row, without memory."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ctcd_ds.cli import UserError
from ctcd_ds.peers.build import one_line, quiet_transformers
from ctcd_ds.peers.checkpointing import can_checkpoint, repeated_layers
from ctcd_ds.peers.heads import Way, project_by
from ctcd_ds.peers.reading import as_inputs

Result = TypeVar("Result")


class Cost(NamedTuple):
    """Parameters with and without embeddings (tied output embeddings count once), and FLOPs per token.

    `forward_flops`: multiply-adds count two; the head where it is asked. Training costs three times that (backward is
    two forwards), a frozen peer once. `largest`: values of the largest parameter.
    `activations`: values per token that its layers put out, which backward needs; `checkpointed`: of these, what is
    there at once with activation checkpointing: all inputs of layers, one layer run again, and what lies outside them
    (None: transformers cannot). `head_flops`: of `forward_flops` those of the output embedding, where it is left to the
    objective; 0 where the model runs it itself.
    """

    parameters: int
    without_embeddings: int
    forward_flops: float
    largest: int
    activations: float
    checkpointed: float | None
    head_flops: float


def cost(config: Any, length: int, asked: int, auto: Any, decoder_length: int | None = None) -> Cost:
    """The cost of a model of the Auto class `auto` with this config, on rows of `length` tokens.

    `asked`: positions at which its head runs. `decoder_length`: tokens that a decoder with an encoder before it reads
    (None: as many). Attention counts in full, whatever its kernel, and of experts those that a token is sent to.
    Counted once for equal configs: experiments ask for many. Raises UserError where the model cannot run on such rows.
    """
    key = config.to_json_string(use_diff=False), length, asked, auto, decoder_length or length
    if key not in _COUNTED:
        _COUNTED[key] = _count(config, *key[1:])
    return _COUNTED[key]


_COUNTED: dict[tuple[str, int, int, Any, int], Cost] = {}


def _count(config: Any, length: int, asked: int, auto: Any, decoder_length: int) -> Cost:
    try:
        return without_memory(lambda: _counted(config, length, asked, auto, decoder_length))
    except Exception as problem:
        kind = type(config).__name__.removesuffix("Config")
        said = _odd_heads(config) or one_line(problem)
        raise UserError(f"{kind} cannot run on a row of {length} tokens: {said}") from None


def _odd_heads(config: Any) -> str | None:
    """The likeliest reason in a small model: where the config leaves the key heads out, its class has a large one's."""
    own = config.get_text_config()
    heads, keys = getattr(own, "num_attention_heads", None), getattr(own, "num_key_value_heads", None)
    if isinstance(heads, int) and isinstance(keys, int) and (keys < 1 or heads % keys):
        return f"num_key_value_heads = {keys} does not divide num_attention_heads = {heads}; give both"
    return None


def without_memory(look: Callable[[], Result]) -> Result:
    """What is found out about a model that `look` makes, which takes no memory where the model's code lets us.

    Raises what `look` raises where it has all the memory it wants.
    """
    problem: Exception | None = None
    for place in _places():
        try:
            with quiet_transformers(), place:
                return look()
        except Exception as found:  # its code asks for a value that is not there, or transformers has no such path
            problem = found
    assert problem is not None
    raise problem


def plain_model(config: Any, auto: Any) -> Any:
    """Attention and experts as plain matrix products: of fused kernels neither the cost is known nor where they run."""
    config = copy.deepcopy(config)
    return auto.from_config(config, attn_implementation="eager", experts_implementation="batched_mm")


def _places() -> Iterator[Any]:
    """Where a model is made: which of these its code lets us differs from type to type."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    yield torch.device("meta")
    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)  # it logs what it then raises
    yield FakeTensorMode()
    yield nullcontext()


def _counted(config: Any, length: int, asked: int, auto: Any, decoder_length: int) -> Cost:
    model = plain_model(config, auto)
    model.eval().requires_grad_(False)
    word = config.get_text_config().vocab_size // 2
    inputs = as_inputs(model.config, torch.full((1, length), word), torch.full((1, decoder_length), word))
    sizes = [p.numel() for p in model.parameters()]
    embeddings = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Embedding))
    values = _Values(model)
    flops, head = _flops(model, inputs, torch.arange(asked), values)
    everything = values.outside + sum(values.inside)
    at_once = values.outside + sum(values.entered) + max(values.inside, default=0)
    return Cost(
        sum(sizes),
        sum(sizes) - embeddings,
        flops / length,
        max(sizes),
        everything / length,
        at_once / length if can_checkpoint(model) else None,
        head / length,
    )


class _Values:
    """How many values the parts of a base model put out as it runs: in each of its repeated layers, and outside them.

    `entered`: values of what comes into each layer.
    """

    def __init__(self, model: Any) -> None:
        self.clear()
        for layer in repeated_layers(model.base_model):
            layer.register_forward_pre_hook(self._enter, with_kwargs=True)
            layer.register_forward_hook(self._leave)
        for part in model.base_model.modules():
            if part is not model.get_output_embeddings() and not list(part.children()):
                part.register_forward_hook(self._note)

    def clear(self) -> None:
        self.outside, self._within = 0, False
        self.inside: list[int] = []
        self.entered: list[int] = []

    def _enter(self, _layer: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        self._within = True
        self.inside.append(0)
        states = [value for value in (*arguments, *named.values()) if isinstance(value, Tensor)]
        self.entered.append(states[0].numel() if states else 0)  # masks and positions are the same for all layers

    def _leave(self, *_: Any) -> None:
        self._within = False

    def _note(self, _part: nn.Module, _arguments: Any, output: Any) -> None:
        size = output.numel() if isinstance(output, Tensor) else 0
        if self._within:
            self.inside[-1] += size
        else:
            self.outside += size


def _flops(model: Any, inputs: Mapping[str, Tensor], positions: Tensor, values: _Values) -> tuple[int, int]:
    """(of one forward with logits at `positions`, of these what the objective does of it); the fastest way that runs is
    the one that training takes."""
    from torch.utils.flop_counter import FlopCounterMode

    problem: Exception | None = None
    cut = model.base_model is not model
    for way in (Way(cut, True), Way(cut, False), Way(False, False)):
        values.clear()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            try:
                projection = project_by(way, model, inputs, positions)
            except Exception as found:
                problem = found
                continue
        if len(projection.hidden) == len(positions):  # ProphetNet's head has more rows: of several next tokens
            last = 0 if projection.weight is None else 2 * len(positions) * projection.weight.numel()
            return int(counter.get_total_flops()) + last, last
    assert problem is not None
    raise problem
