"""A model that begins as some layers of another one: the config with fewer layers, the weights renumbered.

No table knows an architecture: what is numbered as often as there are layers are the layers, and every weight must find
its own.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ctcd_ds.cli import UserError, count

# What configs call the number of layers, beside num_hidden_layers (which most translate): of an encoder, of a decoder.
_DEPTHS = ("num_hidden_layers", "encoder_layers", "num_encoder_layers", "decoder_layers", "num_decoder_layers")
_NUMBERED = re.compile(r"(.*?\.)(\d+)(\..*)")  # bert.encoder.layer. 3 .output.dense.bias: the first number only


def depth_of(config: Any) -> int:
    """How many layers may be chosen from; of an encoder and a decoder the fewer. UserError where none are counted."""
    own = config.get_text_config()
    depths = [value for name in _DEPTHS if type(value := getattr(own, name, None)) is int]
    if not depths:
        raise UserError(f"the config of {config.model_type} does not say how many layers there are")
    return min(depths)


def with_layers(config: Any, layers: Sequence[int]) -> Any:
    """A copy of the config that has only these layers, and the kinds of just these where it lists them (layer_types).

    Raises UserError where one is beyond the depth, or the config's class does not let its depth be changed.
    """
    config, depth = copy.deepcopy(config), depth_of(config)
    own = config.get_text_config()
    if layers[-1] >= depth:
        raise UserError(f"layer {layers[-1]}: there are {count(depth, 'layer')}, 0 to {depth - 1}")
    try:
        for name, value in [(name, getattr(own, name, None)) for name in _DEPTHS]:
            if type(value) is int:
                setattr(own, name, len(layers))
        for name, value in list(vars(own).items()):
            if "layer" in name and isinstance(value, list | tuple) and len(value) == depth:
                setattr(own, name, [value[layer] for layer in layers])
    except Exception as problem:  # computed from other settings, or judged by its class
        raise UserError(f"the number of layers of {config.model_type} is not its own to set: {problem}") from None
    return config


def from_layers(source: Any, layers: Sequence[int], auto: Any) -> Any:
    """A new fp32 model of the Auto class `auto` that has these layers of `source`, and all that is no layer."""
    model = auto.from_config(with_layers(source.config, layers), dtype=torch.float32)
    model.load_state_dict(chosen(model.state_dict(), source.state_dict(), layers, depth_of(source.config)))
    return model


def chosen(
    student: Mapping[str, Tensor], source: Mapping[str, Tensor], layers: Sequence[int], depth: int
) -> dict[str, Tensor]:
    """The tensors of a source of `depth` layers under the names of a student, which has just these layers.

    Only names and shapes are looked at: models without memory do. Raises UserError where the layers cannot be told from
    the names, or a layer is not like the one whose place it is to take.
    """
    few, many = _lengths(student), _lengths(source)
    numbered = {name for name, length in few.items() if length == len(layers) < many.get(name, 0)}
    if not numbered and len(layers) < depth:
        raise UserError("its layers cannot be told from the names of its weights")
    found = {}
    for name, tensor in student.items():
        part = _NUMBERED.fullmatch(name)
        there = f"{part[1]}{layers[int(part[2])]}{part[3]}" if part and part[1] in numbered else name
        if there not in source or source[there].shape != tensor.shape:
            raise UserError(
                f"{name} would be {there}, and there is none of its shape: that layer cannot be in this place"
            )
        found[name] = there
    for there in source.keys() - set(found.values()):
        part = _NUMBERED.fullmatch(there)
        if not part or part[1] not in numbered or int(part[2]) in layers:
            raise UserError(f"{there} has no place in the model with fewer layers")
    return {name: source[there] for name, there in found.items()}


def _lengths(names: Iterable[str]) -> dict[str, int]:
    """How many numbers there are behind each beginning of a name."""
    numbers: dict[str, set[int]] = {}
    for name in names:
        if part := _NUMBERED.fullmatch(name):
            numbers.setdefault(part[1], set()).add(int(part[2]))
    return {beginning: len(found) for beginning, found in numbers.items()}
