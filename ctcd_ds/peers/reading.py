"""How a model reads a row of tokens: how long it may be, and whether it tells sentences apart."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ctcd_ds.cli import UserError

FEW = 8  # tokens that every model reads


def few_tokens(model: Any, rows: int, tokens: int) -> dict[str, Tensor]:
    """What a model's forward takes, of seven ids from the middle of its vocabulary, where no special ones are."""
    count = torch.arange(rows * tokens, device=next(model.parameters()).device)
    ids = (model.config.get_text_config().vocab_size // 2 + count % 7).view(rows, tokens)
    return as_inputs(model.config, ids)


def as_inputs(config: Any, ids: Tensor, decoder_ids: Tensor | None = None) -> dict[str, Tensor]:
    """These ids [B, L] as the model's forward takes them; its decoder, where it has one, reads the same or its own."""
    decoder = ids if decoder_ids is None else decoder_ids
    return {"input_ids": ids, "decoder_input_ids": decoder} if config.is_encoder_decoder else {"input_ids": ids}


def uncached(model: Any) -> dict[str, Any]:
    """What keeps a forward from filling a cache for the tokens to come, where the model would.

    Training has no use for one, and with one transformers does not look where documents begin (position_ids).
    """
    takes = dict(inspect.signature(model.forward).parameters)
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in takes.values()):  # what it hands on to its base
        takes |= inspect.signature(model.base_model.forward).parameters
    return {"use_cache": False} if "use_cache" in takes else {}


def sees_the_future(model: Any) -> bool:
    """Whether another last token changes the logits of the positions before it. `model` runs twice, on a short row."""
    inputs = few_tokens(model, 1, FEW)
    other = {name: ids.clone() for name, ids in inputs.items()}
    for ids in other.values():
        ids[:, -1] -= 1
    return _changes(model, inputs, other, slice(0, FEW - 1))


def keeps_apart(model: Any) -> bool:
    """Whether a document's logits do not depend on the one before it, where position_ids begin again."""
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return False
    [(name, ids)] = few_tokens(model, 1, 2 * FEW).items()
    ids[:, FEW:] = ids[:, :FEW]
    other = ids.clone()
    other[:, 1 : FEW - 1] -= 1
    places = (torch.arange(2 * FEW, device=ids.device) % FEW).unsqueeze(0)
    row, changed = ({name: tokens, "position_ids": places} for tokens in (ids, other))
    return not _changes(model, row, changed, slice(FEW, 2 * FEW))


@torch.no_grad()
def _changes(model: Any, inputs: Mapping[str, Tensor], other: Mapping[str, Tensor], positions: slice) -> bool:
    """Whether two rows have different logits at these positions."""
    was, found = model.training, list[Tensor]()
    model.eval()
    with torch.random.fork_rng([]):
        for row in (inputs, other):
            torch.manual_seed(0)
            found.append(model(**row, **uncached(model)).logits[:, positions].float())
    model.train(was)
    first, second = found
    return float((first - second).abs().max()) > 1e-5 * float(first.abs().max())


def longest_row(model: Any) -> int | None:
    """How many tokens its tables of positions allow, None where it has none. `model` runs twice, on a short row.

    RoBERTa and its like begin after the padding id, which takes as many positions away; found by looking which
    entry of which embedding a longer row asks for.
    """
    short, long = _last_rows_read(model, FEW), _last_rows_read(model, FEW + 1)
    limits = [entries - (last + 1 - FEW) for (table, entries), last in short.items()
              if long.get((table, entries)) == last + 1]  # fmt: skip
    return min(limits, default=None)


def reads_segments(model: Any) -> bool:
    """Whether it tells a first from a second sentence by token_type_ids."""
    takes = "token_type_ids" in inspect.signature(model.forward).parameters
    return takes and getattr(model.config, "type_vocab_size", 0) > 1


def row_limit(model: Any) -> int | None:
    """How many tokens a row may have: by its tables of positions, else as its config says; None: nothing says it."""
    stated = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return longest_row(model) or (stated if isinstance(stated, int) and stated > 0 else None)


def refuse_foreign(tokenizer: Any, model: Any, path: Path) -> None:
    """Raises UserError where a tokenizer makes ids that the model has no embedding for: it is another model's."""
    known, embedded = tokenizer.vocab_size, model.get_input_embeddings().num_embeddings
    if known > embedded:
        raise UserError(
            f"--model: {path}: its tokenizer has {known:,} tokens and its embedding {embedded:,}: not of one model"
        )


def fit_tokenizer(tokenizer: Any, model: Any, max_length: int | None = None) -> None:
    """Lets a tokenizer give what the model takes, wherever both are saved: inputs by name, rows cut to a length.

    `max_length`: tokens of a row to which `truncation=True` cuts; left out, as many as the model can read.
    """
    takes = inspect.signature(model.forward).parameters
    tokenizer.model_input_names = [
        "input_ids",
        *(["token_type_ids"] if reads_segments(model) else []),
        *(["attention_mask"] if "attention_mask" in takes else []),
    ]
    tokenizer.model_max_length = max_length or row_limit(model) or tokenizer.model_max_length
    for name in ("model_input_names", "model_max_length"):
        tokenizer.init_kwargs[name] = getattr(tokenizer, name)


@torch.no_grad()
def _last_rows_read(model: Any, tokens: int) -> dict[tuple[int, int], int]:
    """Embedding (address, entries) → the last entry that a row of few different tokens asks for."""
    inputs = few_tokens(model, 1, tokens)
    was = model.training
    model.eval()
    with _Lookups() as lookups, torch.random.fork_rng([]):
        try:
            model(**inputs, **uncached(model))
        except Exception:  # a head may ask for more of a row, T5's classifier for an end token
            model.base_model(**inputs, **uncached(model.base_model))
    model.train(was)
    return lookups.last


class _Lookups(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.last: dict[tuple[int, int], int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.embedding.default:
            self._note(args[0], args[1])
        return function(*args, **(kwargs or {}))

    def _note(self, table: Tensor, entries: Tensor) -> None:
        if entries.numel() == entries.shape[-1]:  # relative positions are asked for in pairs
            key = table.data_ptr(), len(table)
            self.last[key] = max(int(entries.max()), self.last.get(key, 0))
