"""A finished model and a corpus: whose token is which row of the model's tables.

Rows of tokens that both know are the checkpoint's. Rows that the checkpoint has beyond the corpus's tokens (Qwen3 has
151,936 for 151,669 tokens) stay, and are exported; their columns of the logits are padding. Tokens that the checkpoint
does not know begin as the mean of those it knows.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ctcd_ds.cli import UserError

KEPT = "exported_vocab_size"  # a config's key, in a run directory only: rows to export where they are not the corpus's


def new_tokens(theirs: Mapping[str, int], ours: Mapping[str, int], rows: int) -> list[int]:
    """The ids of the corpus's tokens (`ours`: token → id) that a checkpoint has no row for.

    `theirs`: of its tokenizer; `rows`: of its tables. Raises UserError where a token has different ids in the two, or
    an id different tokens: one of them may have more tokens, and that is all.
    """
    names = {number: token for token, number in theirs.items()}
    for token, number in sorted(ours.items(), key=lambda entry: entry[1]):
        if theirs.get(token, number) != number or names.get(number, token) != token:
            raise UserError(f"has {names.get(number)!r} as token {number}, the corpus's has {token!r}")
    return sorted(number for number in ours.values() if number not in names or number >= rows)


def set_vocabulary(config: Any, size: int) -> None:
    """Says the number of rows wherever a config says it: in its part for text, its encoder and decoder, and by other
    names (Marian's decoder_vocab_size, FSMT's src_vocab_size, Gemma's vocab_size_per_layer_input).
    """
    parts, old = parts_with_vocabulary(config), config.get_text_config().vocab_size
    for part in parts:
        for name in [n for n, value in vars(part).items() if "vocab_size" in n and value == old and n != KEPT]:
            setattr(part, name, size)
        part.vocab_size = size


def parts_with_vocabulary(config: Any) -> list[Any]:
    """The config, its part for text, and all configs inside that have as many tokens."""
    own = config.get_text_config()
    parts = {id(part): part for part in (config, own)}
    waiting = [config]
    while waiting:
        inside = [part for part in vars(waiting.pop()).values() if hasattr(part, "to_dict")]
        parts |= {id(part): part for part in inside if getattr(part, "vocab_size", None) == own.vocab_size}
        waiting += inside
    return list(parts.values())


def fit_tables(model: Any, size: int, tokens: int, auto: Any, new: Sequence[int] = ()) -> None:
    """Gives everything in a model that has a row for each token `size` of them, at least as many as now; in place.

    What comes on top is 0. Rows of `new` tokens become the mean of the other rows below `tokens`.
    """
    own = model.config.get_text_config().vocab_size
    if size == own and not new:
        return
    known = torch.tensor(sorted(set(range(min(own, tokens))) - set(new)))
    fitted: dict[int, Tensor] = {}  # tables that are one stay one
    for name, table, dim in _tables(model, size, auto):
        if id(table) not in fitted:
            fitted[id(table)] = _fitted(table, dim, size, known, torch.tensor(new, dtype=torch.int64))
        path, _, attribute = name.rpartition(".")
        part = model.get_submodule(path)
        setattr(part, attribute, fitted[id(table)])
        if isinstance(part, nn.Embedding):
            part.num_embeddings = len(part.weight)
        elif isinstance(part, nn.Linear):
            part.out_features, part.in_features = part.weight.shape
    for part in model.modules():
        if vars(part).get("vocab_size") == own:  # some keep the number, and Perceiver shapes its logits by it
            part.vocab_size = size
    set_vocabulary(model.config, size)


def _tables(model: Any, size: int, auto: Any) -> list[tuple[str, Tensor, int]]:
    """(name, tensor, dimension) of what has another size in a model of more tokens."""
    config = copy.deepcopy(model.config)
    set_vocabulary(config, size + 1)
    with torch.device("meta"):
        larger = auto.from_config(config).state_dict()
    return [
        (name, tensor, dim)
        for name, tensor in model.state_dict(keep_vars=True).items()
        for dim, (here, there) in enumerate(zip(tensor.shape, larger[name].shape, strict=True))
        if here != there
    ]


def _fitted(table: Tensor, dim: int, size: int, known: Tensor, new: Tensor) -> Tensor:
    values = table.detach()
    grown = values.new_zeros(*values.shape[:dim], size, *values.shape[dim + 1 :])
    grown.narrow(dim, 0, values.shape[dim]).copy_(values)
    if len(new):
        mean = values.index_select(dim, known).float().mean(dim, keepdim=True).to(values.dtype)
        grown.index_copy_(dim, new, mean.repeat_interleave(len(new), dim))
    return nn.Parameter(grown, table.requires_grad) if isinstance(table, nn.Parameter) else grown
