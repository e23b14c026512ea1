"""From hidden states to logits, at chosen positions only.

A masked-LM head is a small transform and then the projection onto the vocabulary, by far the dearest map of a
small model: at 15 % targets, running it everywhere is six times the work. Known architectures take their
transform from the table below; any other gives full logits, and the positions are gathered from those.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn.functional import gelu

from ctcd_ds.objective.fused import Projection


def _bert(model: Any, hidden: Tensor) -> Tensor:
    return model.cls.predictions.transform(hidden)


def _roberta(model: Any, hidden: Tensor) -> Tensor:
    return model.lm_head.layer_norm(gelu(model.lm_head.dense(hidden)))


def _distilbert(model: Any, hidden: Tensor) -> Tensor:
    return model.vocab_layer_norm(model.activation(model.vocab_transform(hidden)))


def _electra(model: Any, hidden: Tensor) -> Tensor:
    return model.generator_predictions(hidden)


def _modernbert(model: Any, hidden: Tensor) -> Tensor:
    return model.head(hidden)


TRANSFORMS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "bert": _bert,
    "roberta": _roberta,
    "xlm-roberta": _roberta,
    "camembert": _roberta,
    "distilbert": _distilbert,
    "electra": _electra,
    "modernbert": _modernbert,
}


def project_positions(model: Any, input_ids: Tensor, positions: Tensor) -> Projection:
    """Runs a Hugging Face masked LM over full rows and returns its last projection at `positions`.

    Args:
        input_ids: int64 [B, L], no padding: no attention mask is needed or made.
        positions: int64 [P], flat indices into B·L.
    """
    transform = TRANSFORMS.get(model.config.model_type)
    if transform is None:
        return Projection(model(input_ids=input_ids).logits.flatten(0, 1)[positions])
    hidden = model.base_model(input_ids=input_ids)[0].flatten(0, 1)[positions]
    decoder = model.get_output_embeddings()
    return Projection(transform(model, hidden), decoder.weight, decoder.bias)
