"""From a Hugging Face language model to its last projection at chosen positions, whatever its architecture.

The projection onto the vocabulary is by far the dearest map of a small model: at 15 % targets, running it everywhere
is six times the work. Two hooks keep it to the wanted positions and know nothing of the model:

    cut   the base model's output is cut to the wanted positions, so the head that follows runs there only;
    tap   what enters the output embedding is noted, and the embedding itself runs on no rows at all.

What the model's own code does after its output embedding is probed once, and the way is taken only where its logits
are those of the plain forward.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ctcd_ds.cli import UserError
from ctcd_ds.objective.projection import Projection, project
from ctcd_ds.peers.checkpointing import repeated_layers
from ctcd_ds.peers.reading import few_tokens, uncached

TOLERANCE = 1e-4  # of the logits' own size, in fp32


class Way(NamedTuple):
    """How a model's logits at positions are had.

    `cut`: its base model's output can be cut to the positions. `tap`: its output embedding is one linear map, and
    logits = softcap(scale · map) + bias (see `Projection`), where `bias` names a parameter or buffer outside the map.
    With neither, all logits are made and then gathered.
    """

    cut: bool
    tap: bool
    bias: str | None = None
    scale: float = 1.0
    cap: float | None = None


def project_positions(model: Any, inputs: Mapping[str, Tensor], positions: Tensor | None) -> Projection:
    """Runs a Hugging Face language model over full rows and returns its last projection at `positions`.

    Args:
        model: masked, causal or sequence-to-sequence, with its head. How it is done is found at the first call and
            kept with it (`way_of`).
        inputs: what its forward takes, e.g. input_ids, int64 [B, L]; no padding: no attention mask is needed or made.
        positions: int64 [P], flat indices into B·L (L: of the decoder, where there is one); None: all, in order.
    """
    return project_by(way_of(model), model, inputs, positions)


def way_of(model: Any) -> Way:
    """The model's way, found the first time it is asked for. Raises UserError where the model has no logits."""
    way = model.__dict__.get("_way")
    if way is None:
        model._way = way = find_way(model)
    return way


def compilable(model: Any) -> list[Any]:
    """The parts of a model whose forward may be compiled: none of the hooks comes to lie inside them.

    Layers where transformers marks them: alike, they are compiled once. And what stands before them stays as it is: the
    attention mask, which transformers leaves out for whole rows unless it is traced (it keeps the attention off its
    fast kernels), and the embeddings, whose compiled gradient is another in each run on a GPU.
    """
    if layers := repeated_layers(model):
        return list(layers)
    if model.base_model is not model:
        return [model.base_model]
    return [part for part in model.children() if part is not model.get_output_embeddings()]


class _Unfit(Exception):
    """A way does not suit a model, and why."""


def project_by(way: Way, model: Any, inputs: Mapping[str, Tensor], positions: Tensor | None) -> Projection:
    cut = way.cut and positions is not None
    tapped: list[Tensor] = []

    def cut_to_positions(_module: nn.Module, _arguments: Any, output: Any) -> Any:
        return _with_first(output, output[0].flatten(0, 1)[positions].unsqueeze(0))

    def tap(_module: nn.Module, arguments: tuple[Tensor, ...]) -> Tensor:
        tapped.append(arguments[0])
        return arguments[0][..., :0, :]

    decoder = model.get_output_embeddings()
    with ExitStack() as hooks:
        if cut:
            hooks.callback(model.base_model.register_forward_hook(cut_to_positions).remove)
        if way.tap:
            hooks.callback(decoder.register_forward_pre_hook(tap).remove)
        output = model(**inputs, **uncached(model))
    if way.tap and len(tapped) != 1:
        raise _Unfit(f"the output embedding ran {len(tapped)} times")
    rows = (tapped[0] if way.tap else _logits(output)).flatten(0, -2)
    if positions is not None and not cut:
        rows = rows[positions]
    if not way.tap:
        return Projection(rows)
    bias = decoder.bias if way.bias is None else _named_tensors(model)[way.bias].flatten()
    return Projection(hidden=rows, weight=decoder.weight, bias=bias, scale=way.scale, cap=way.cap)


def _with_first(output: Any, value: Tensor) -> Any:
    """A base model's output with another first entry: a tuple, or one of transformers' ordered mappings."""
    if isinstance(output, tuple):
        return (value, *output[1:])
    output[next(iter(output))] = value
    return output


def _logits(output: Any) -> Tensor:
    """[B, L, V] of a whole model's output."""
    logits = output[0] if isinstance(output, tuple) else getattr(output, "logits", None)
    if logits is None or logits.ndim != 3:
        raise _Unfit("it gives no logits [rows, tokens, vocabulary]")
    return logits


def find_way(model: Any) -> Way:
    """The fastest way whose logits agree with the plain forward, tried on a few tokens. `way_of` keeps it.

    The model itself is not touched: it runs as a copy that shares its weights, since some models change as they run
    (BigBird gives up its sparse attention for good at the first short row).
    """
    double, tensor = twin(model).eval(), next(model.parameters())
    inputs = few_tokens(double, rows=2, tokens=8)
    positions = torch.tensor([0, 3, 4, 6, 9, 15], device=tensor.device)
    tolerance = max(TOLERANCE, 8 * torch.finfo(tensor.dtype).eps)
    with torch.random.fork_rng([tensor.device] if tensor.is_cuda else []):
        ways = list(_ways(double, inputs, tolerance))
        try:
            with torch.no_grad():
                torch.manual_seed(0)
                expected = _logits(double(**inputs, **uncached(double))).flatten(0, 1)[positions].float()
        except Exception as problem:  # whatever an architecture says about a row of tokens
            raise UserError(f"{type(model).__name__} cannot be a peer: {' '.join(str(problem).split())}") from None
        for way in ways:
            try:
                with torch.no_grad():
                    torch.manual_seed(0)
                    found = project(project_by(way, double, inputs, positions), slice(None))
            except Exception:  # its head cannot run on [1, P, E]; the next way may do
                continue
            if found.shape == expected.shape and _near(found, expected, tolerance):
                return way
    raise UserError(f"{type(model).__name__} cannot be a peer: it gives other logits each time it runs")


def twin(model: Any) -> Any:
    """A copy that shares the model's weights, all but those that the probe fills: some models change as they run."""
    own = {id(tensor) for tensor in _of_vocabulary_size(model).values()}
    shared = {id(tensor): tensor for tensor in _named_tensors(model).values() if id(tensor) not in own}
    return copy.deepcopy(model, shared)


def _ways(model: Any, inputs: Mapping[str, Tensor], tolerance: float) -> Iterator[Way]:
    """From the fastest to the one that always is one."""
    cuts = (True, False) if model.base_model is not model else (False,)
    try:
        after = _after_decoder(model, inputs, tolerance)
    except _Unfit:
        pass
    else:
        yield from (Way(cut, True, *after) for cut in cuts)
    yield from (Way(cut, False) for cut in cuts)


def _after_decoder(
    model: Any, inputs: Mapping[str, Tensor], tolerance: float
) -> tuple[str | None, float, float | None]:
    """What the model makes of its output embedding's result: the name of a bias, or None; a scale; a cap, or None.

    Raises _Unfit where it is anything else. Whatever might be added is filled with numbers first (and stays so: `model`
    is a twin): it may still be zero, as ESM's bias is before training.
    """
    decoder, candidates = model.get_output_embeddings(), _of_vocabulary_size(model)
    if not isinstance(decoder, nn.Linear):
        raise _Unfit("its output embedding is no linear map")
    ramp = torch.linspace(-1, 1, decoder.out_features).to(decoder.weight).float()  # rounded as the weights are
    with torch.no_grad():
        for n, tensor in enumerate(candidates.values()):
            tensor.copy_(ramp.mul(n + 1).view(tensor.shape))
    with torch.enable_grad():
        logits = _logits_for(model, decoder, inputs, torch.zeros_like(ramp))
    added = logits[0].detach()
    names = [name for name, tensor in candidates.items() if torch.equal(tensor.detach().flatten().float(), added)]
    if bool((logits != added).any()) or (bool(added.any()) and len(names) != 1):
        raise _Unfit("what it adds is none of its parameters")
    bias = names[0] if added.any() else None
    _nothing_else_learns(model, logits, bias)

    def of(columns: Tensor) -> Tensor:
        return _logits_for(model, decoder, inputs, columns).detach() - added

    huge = of(2.0**22 * ramp)  # beyond any soft cap
    cap = float(huge.max()) if huge.max() < 2.0**12 else None
    line = huge / 2.0**22 if cap is None else cap * torch.atanh(of(ramp) / cap)
    scale = float((line.double() @ ramp.double()).mean() / ramp.double().square().sum())
    scale = 1.0 if abs(scale - 1) < 1e-6 else scale
    expected = 8 * scale * ramp if cap is None else cap * torch.tanh(8 * scale * ramp / cap)
    if not _near(of(8 * ramp), expected, tolerance):
        raise _Unfit("what it does to the logits is neither a scale nor a soft cap")
    if decoder.bias is not None and (bias is not None or scale != 1.0 or cap is not None):
        raise _Unfit("its output embedding has a bias of its own before that")
    return bias, scale, cap


def _logits_for(model: Any, decoder: nn.Linear, inputs: Mapping[str, Tensor], columns: Tensor) -> Tensor:
    """fp32 logits [rows, V] that the model makes of this row [V] in place of the output embedding's result."""
    calls: list[Tensor] = []

    def replace(_module: nn.Module, _arguments: Any, output: Tensor) -> Tensor:
        calls.append(output)
        return columns.to(output.dtype).expand_as(output)

    hook = decoder.register_forward_hook(replace)
    try:
        logits = _logits(model(**inputs, **uncached(model))).flatten(0, 1).float()
    except Exception as problem:
        raise _Unfit(str(problem)) from None
    finally:
        hook.remove()
    if len(calls) != 1 or logits.shape != calls[0].flatten(0, -2).shape:
        raise _Unfit(f"its output embedding ran {len(calls)} times, or gives other columns than the model")
    return logits


def _nothing_else_learns(model: Any, logits: Tensor, bias: str | None) -> None:
    """Raises _Unfit where a parameter other than `bias` stands after the output embedding (a learned scale)."""
    others = [p for name, p in model.named_parameters() if p.requires_grad and name != bias]
    gradients = torch.autograd.grad(logits.sum(), others, allow_unused=True) if logits.requires_grad and others else ()
    if any(gradient is not None for gradient in gradients):
        raise _Unfit("a parameter after the output embedding is no bias")


def _of_vocabulary_size(model: Any) -> dict[str, Tensor]:
    """What might be added after the output embedding: all of the vocabulary's size that the embedding does not hold."""
    decoder = model.get_output_embeddings()
    if not isinstance(decoder, nn.Linear):
        return {}
    inside = {id(tensor) for tensor in _named_tensors(decoder).values()}
    return {
        name: tensor
        for name, tensor in _named_tensors(model).items()
        if tensor.numel() == decoder.out_features and tensor.is_floating_point() and id(tensor) not in inside
    }


def _named_tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _near(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    return bool((found - expected).abs().max() <= tolerance * expected.abs().max())
