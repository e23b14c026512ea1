"""Activation checkpointing: of each layer only its input is kept, and the backward pass runs the layer again.

torch gives the second run the random state of the first one, from which all dropout draws, ours too: losses and
gradients are the same bit for bit.
"""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn


def repeated_layers(model: nn.Module) -> list[nn.Module]:
    """The layers of a model that transformers can run again, none of them inside another."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    found: list[nn.Module] = []
    inside: set[int] = set()
    for part in model.modules():  # what holds others comes before them
        if isinstance(part, GradientCheckpointingLayer) and id(part) not in inside:
            found.append(part)
            inside.update(id(inner) for inner in part.modules())
    return found


def can_checkpoint(model: Any) -> bool:
    """Whether transformers can run the layers of this model again."""
    return bool(model.supports_gradient_checkpointing and repeated_layers(model))


def checkpoint_layers(model: Any) -> None:
    """Lets a model keep only what enters its layers, in training mode."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # its name in transformers 6 is not in 5.0
        model.gradient_checkpointing_enable({"use_reentrant": False})
