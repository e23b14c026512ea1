"""What a model makes on the way to its logits: hidden states, and the queries, keys and values of its attention.

Nothing here knows an architecture. Hidden states are those that Hugging Face gives out (`output_hidden_states`); what
enters attention is seen at transformers' attention interface, through which all its kernels are called. A model that
calls its own code there has no queries, keys and values for us, and those who ask for them are told so.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ctcd_ds.cli import UserError
from ctcd_ds.objective.relations import Attention
from ctcd_ds.peers.accounting import plain_model, without_memory
from ctcd_ds.peers.build import one_line
from ctcd_ds.peers.heads import twin
from ctcd_ds.peers.reading import few_tokens, uncached

_STACKS = ("hidden_states", "encoder_hidden_states", "decoder_hidden_states")


@dataclass
class States:
    """What was seen. hidden: for each stack (an encoder, a decoder, or the only one) layer → [B, L, E].

    attention: layer → queries, keys and values [B, heads, L, width of a head], positions in (rotary). Layers count
    from 1; 0 is what comes into the first.
    """

    hidden: list[dict[int, Tensor]] = field(default_factory=list)
    attention: dict[int, Attention] = field(default_factory=dict)


class Shapes(NamedTuple):
    """hidden: for each stack the width of every layer, and of what comes into the first. attention: for each layer the
    widths of queries, keys and values, of all heads together."""

    hidden: list[list[int]]
    attention: list[tuple[int, int, int]]


@contextmanager
def watching(model: Any, hidden: Collection[int] | None, attention: Collection[int] | None) -> Iterator[States]:
    """Notes what these layers make as the model runs; None is all of them."""
    seen = States()

    def ask(_model: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, {**named, "output_hidden_states": True}

    def note(_model: nn.Module, _args: Any, output: Any) -> None:
        stacks = [stack for name in _STACKS if (stack := getattr(output, name, None)) is not None]
        seen.hidden = [{n: x for n, x in enumerate(stack) if hidden is None or n in hidden} for stack in stacks]

    hooks = []
    if hidden is None or hidden:
        hooks = [model.register_forward_pre_hook(ask, with_kwargs=True), model.register_forward_hook(note)]
    try:
        with _attention_noted(model, seen.attention, attention):
            yield seen
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _attention_noted(model: Any, seen: dict[int, Attention], wanted: Collection[int] | None) -> Iterator[None]:
    """Layers are the calls of an attention kernel that the model's parts make, in order."""
    from transformers.modeling_utils import AttentionInterface

    if wanted is not None and not wanted:
        yield
        return
    plain, calls, own = AttentionInterface.get_interface, 0, {id(part) for part in model.modules()}

    def noting(interface: Any, name: str, default: Callable[..., Any]) -> Callable[..., Any]:
        kernel = plain(interface, name, default)

        def call(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **named: Any) -> Any:
            nonlocal calls
            calls += id(module) in own
            if id(module) in own and (wanted is None or calls in wanted):
                seen[calls] = query, key, value
            return kernel(module, query, key, value, *args, **named)

        return call

    AttentionInterface.get_interface = noting
    try:
        yield
    finally:
        AttentionInterface.get_interface = plain


def planned_shapes(config: Any, auto: Any) -> Shapes:
    """`shapes_of` a model that is not built yet. Raises UserError where it gives out no hidden states.

    Without a twin: a copy of tensors that have no memory (torch's FakeTensorMode) would write where none is.
    """
    try:
        return without_memory(lambda: _shapes(plain_model(config, auto)))
    except UserError:
        raise
    except Exception as problem:  # whatever an architecture says when it is asked for its hidden states
        raise UserError(f"it gives out no hidden states: {one_line(problem)}") from None


def shapes_of(model: Any) -> Shapes:
    """What a model gives to learn from, seen on a few tokens; the model itself is not touched.

    Raises UserError where it gives out no hidden state for each of its tokens.
    """
    return _shapes(twin(model))


def _shapes(model: Any) -> Shapes:
    inputs, kind = few_tokens(model.eval(), rows=2, tokens=8), type(model).__name__
    with torch.no_grad(), torch.random.fork_rng([]), watching(model, None, None) as seen:
        model(**inputs, **uncached(model))
    hidden = [list(stack.values()) for stack in seen.hidden]
    if not hidden or not all(isinstance(x, Tensor) and x.shape[:-1] == (2, 8) for stack in hidden for x in stack):
        raise UserError(
            f"{kind} gives out no hidden state for each of its tokens (output_hidden_states); learn from predictions"
        )
    widths = [tuple(x.shape[1] * x.shape[3] for x in layer) for layer in seen.attention.values()]
    return Shapes([[x.shape[-1] for x in stack] for stack in hidden], widths)  # type: ignore[arg-type]
