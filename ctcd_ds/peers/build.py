"""From a recipe's peer to a model: a Hugging Face config or checkpoint, its vocabulary padded inside the model."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ctcd_ds.cli import UserError, did_you_mean
from ctcd_ds.corpus.rows import ABSENT, Corpus, SpecialIds
from ctcd_ds.hub import settle_hub
from ctcd_ds.kinds import instead, missing
from ctcd_ds.peers.layers import chosen, depth_of, from_layers, with_layers
from ctcd_ds.peers.reading import uncached
from ctcd_ds.peers.vocabulary import KEPT, fit_tables, parts_with_vocabulary, set_vocabulary
from ctcd_ds.recipe.sections import PeerSection

TOLERANCE = 1e-4  # of the logits' own size, from a model to its export: only the shape of the last GEMM differs
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
VOCABULARY_MULTIPLE = 64  # GEMMs with an odd inner size run at a fraction of their rate

# Settings of a Hugging Face config that are not the model's to decide here: the value that changes nothing, and why.
_PRECISION = "weights have the precision of the DeepSpeed config (bf16, fp16)"
_NOT_THE_MODELS = {
    "dtype": ("float32", _PRECISION),
    "torch_dtype": ("float32", _PRECISION),
    "return_dict": (True, "outputs are read by their names"),
    "output_hidden_states": (False, "nobody reads them, and they take memory"),
    "output_attentions": (False, "nobody reads them, and they take memory"),
    "is_decoder": (False, "the task decides which tokens a position sees"),
    "add_cross_attention": (False, "there is no second row to attend to"),
    "gradient_checkpointing": (False, "training.activation_checkpointing says it, for all peers"),
}


def padded(vocab_size: int) -> int:
    """The vocabulary's size inside the model."""
    return -(-vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


def seed_of(*parts: object) -> int:
    """A 63-bit seed that depends on all parts: independent random streams, keyed by what they are for."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def peer_config(section: PeerSection, corpus: Corpus, auto: Any, peers: Mapping[str, PeerSection] | None = None) -> Any:
    """The peer's Hugging Face config, with the corpus's vocabulary (padded) and special ids.

    `auto`: the task's Auto class of transformers. Where its model writes a text without an encoder's help, BERT and its
    like must be told (`is_decoder`).
    `peers`: all of the run, of which one may begin as layers of another. Raises UserError with what transformers
    refuses.
    """
    from transformers import AutoConfig

    if section.init_from is not None:
        return with_layers(peer_config(_source(section, peers), corpus, auto, peers), section.init_from.layers)
    try:
        if section.pretrained is not None:
            config = AutoConfig.from_pretrained(section.pretrained, trust_remote_code=False)
        else:
            values = dict(section.model or {})
            config = AutoConfig.for_model(values.pop("model_type"), **values)
        parts = parts_with_vocabulary(config)
    except Exception as problem:  # transformers raises whatever its config classes raise
        raise UserError(one_line(problem)) from None
    special, own = corpus.special, config.get_text_config()
    rows = max(corpus.vocab_size, own.vocab_size if section.pretrained is not None else getattr(config, KEPT, 0))
    if rows > corpus.vocab_size:
        setattr(config, KEPT, rows)
    for part in parts:
        for role, number in _roles(special).items():
            setattr(part, f"{role}_token_id", None if number == ABSENT else number)
    set_vocabulary(config, padded(rows))
    kind = auto._model_mapping.get(type(config), None)
    if config.is_encoder_decoder:
        config.decoder_start_token_id = special.pad
    elif hasattr(config, "is_decoder") and kind is not None and kind.can_generate():
        config.is_decoder = True
    return config


def _source(section: PeerSection, peers: Mapping[str, PeerSection] | None) -> PeerSection:
    """What a peer takes its layers from: another one, or a checkpoint as if it were one."""
    assert section.init_from is not None
    if section.init_from.peer is None:
        return PeerSection(pretrained=section.init_from.pretrained)
    return (peers or {})[section.init_from.peer]


def _roles(special: SpecialIds) -> dict[str, int]:
    """The ids that a config names. A text begins with [CLS] or what begins it, else with the end of the one before."""
    begin = next(number for number in (special.cls, special.bos, special.end) if number != ABSENT)
    return {"pad": special.pad, "cls": special.cls, "sep": special.sep, "bos": begin, "eos": special.end}


def config_mistakes(
    section: PeerSection,
    corpus: Corpus,
    sequence_length: int,
    auto: Any,
    peers: Mapping[str, PeerSection] | None = None,
    tasks: Mapping[str, Any] | None = None,
) -> Iterator[str]:
    """What is wrong with how a peer begins, as 'key = value: why' lines relative to the peer.

    `auto`: the task's Auto class of transformers. `peers`: all of the run. `tasks`: every task's Auto class.
    """
    if section.checkpoint is not None and (place := _place_mistake(section.checkpoint)) is not None:
        yield f"{section.checkpoint_key} = {section.checkpoint!r}: {place}"
        return
    if section.model is not None and (said := list(_setting_mistakes(section.model))):
        yield from said
        return
    if section.init_from is not None and (said := list(_layers_mistakes(section, corpus, auto, peers))):
        yield from said
        return
    try:
        config = peer_config(section, corpus, auto, peers)
    except UserError as mistake:
        hub = f"{section.checkpoint_key} = {section.checkpoint!r}: no model of the hub, and here "
        yield f"{'model' if section.checkpoint is None else hub + missing(Path(section.checkpoint))}: {mistake}"
        return
    if type(config) not in auto._model_mapping:
        fits = [
            f"objective.task: {task}" for task, other in (tasks or {}).items() if type(config) in other._model_mapping
        ]
        instead = f"; it has one for {' and for '.join(fits)}" if fits else ""
        yield f"model_type {config.model_type!r} has no head for this task in transformers ({auto.__name__}){instead}"
        return
    width, heads = getattr(config, "hidden_size", None), getattr(config, "num_attention_heads", None)
    try:
        own = getattr(config, "head_dim", None) or getattr(config, "d_kv", None)  # a head's width that is stated
    except Exception:  # Gemma 4 states one for each layer
        own = True
    if isinstance(width, int) and isinstance(heads, int) and (heads < 1 or (width % heads and not own)):
        yield f"model.num_attention_heads = {heads}: does not divide hidden_size = {width}"
        return
    places = getattr(config, "max_position_embeddings", None)
    if isinstance(places, int) and 0 < places < sequence_length:
        yield (
            f"max_position_embeddings = {places}: less than corpus.sequence_length = {sequence_length}; "
            "raise it or shorten the rows"
        )
    yield from _building_mistakes(section.model or {}, config, auto)


def _place_mistake(checkpoint: str) -> str | None:
    """What stands where a checkpoint should be; None where it is one, or may be one of the hub."""
    place = Path(checkpoint)
    if (place / "config.json").is_file():
        return None
    if place.exists():
        return f"no config.json there: {instead(place, 'model')}"
    looks_local = checkpoint.startswith((".", "/")) or checkpoint.count("/") > 1
    if looks_local:
        return missing(place)
    settle_hub()
    return None


def _layers_mistakes(
    section: PeerSection, corpus: Corpus, auto: Any, peers: Mapping[str, PeerSection] | None
) -> Iterator[str]:
    """What is wrong with a peer's init_from; nothing where its source cannot be built, which has its own message."""
    assert section.init_from is not None
    layers, source = section.init_from.layers, _source(section, peers)
    try:
        whole = peer_config(source, corpus, auto, peers)
        weights = _without_memory(whole, auto)
    except Exception:  # said of the source, or of pretrained
        return
    try:
        config = with_layers(whole, layers)
        chosen(_without_memory(config, auto), weights, layers, depth_of(whole))
    except UserError as mistake:
        yield f"init_from.layers = {list(layers)}: {mistake}"
        return
    except Exception as problem:  # whatever an architecture says about its own config
        yield f"init_from.layers = {list(layers)}: transformers cannot build it: {one_line(problem)}"
        return
    for key, value in (section.model or {}).items():
        if (theirs := getattr(config, key, None)) != value:
            yield f"model.{key} = {value!r}: {theirs!r} where its layers come from; say the same, or remove model"


def _without_memory(config: Any, auto: Any) -> dict[str, Tensor]:
    """Names and shapes of a model's weights."""
    with torch.device("meta"):
        return auto.from_config(copy.deepcopy(config)).state_dict()


def _setting_mistakes(model: Mapping[str, Any]) -> Iterator[str]:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    kind = model["model_type"]
    if kind not in CONFIG_MAPPING_NAMES:
        near = did_you_mean(kind, CONFIG_MAPPING_NAMES)
        yield f"model.model_type = {kind!r}: {_or_else(near, 'transformers has no such architecture')}"
        return
    for key in sorted(set(model) & set(_NOT_THE_MODELS)):
        harmless, reason = _NOT_THE_MODELS[key]
        if model[key] not in (harmless, None):
            yield f"model.{key} = {model[key]!r}: {reason}; remove it"


def _building_mistakes(model: Mapping[str, Any], config: Any, auto: Any) -> Iterator[str]:
    """What the model's own code says as it is built without memory, and which of the settings nothing reads."""
    from transformers import AutoConfig
    from transformers.activations import ACT2FN

    read: set[str] = set()
    config = copy.deepcopy(config)
    try:
        with torch.device("meta"), _noting_reads(type(config), read):
            auto.from_config(config)
    except Exception as problem:  # whatever an architecture says about its own config
        if keys := [key for key, value in model.items() if problem.args == (value,)]:  # it looked for an activation
            yield f"model.{keys[0]} = {model[keys[0]]!r}: allowed: {', '.join(sorted(ACT2FN))}"
        else:
            yield f"model: transformers cannot build it: {one_line(problem)}"
        return
    if not model:
        return
    default = AutoConfig.for_model(model["model_type"])
    known = {*default.to_dict(), *default.attribute_map, *_NOT_THE_MODELS, "model_type", "attn_implementation"}
    for key in sorted(set(model) - known - read):
        near = _or_else(did_you_mean(key, known), "see its config class in transformers")
        yield f"model.{key} = {model[key]!r}: {model['model_type']} has no such setting; {near}"


@contextmanager
def _noting_reads(kind: Any, read: set[str]) -> Iterator[None]:
    """Notes which attributes of configs of this class are read: some settings have no default in their class."""
    plain = kind.__getattribute__

    def noting(config: Any, name: str) -> Any:
        read.add(name)
        return plain(config, name)

    own = kind.__dict__.get("__getattribute__")
    kind.__getattribute__ = noting
    try:
        yield
    finally:
        if own is None:
            del kind.__getattribute__
        else:
            kind.__getattribute__ = own


def _or_else(hint: str, otherwise: str) -> str:
    return hint if hint.startswith("did") else otherwise


def one_line(problem: Exception) -> str:
    """What an exception says, on one line of a few hundred letters: transformers can quote a whole module."""
    said = " ".join(str(problem).split()) or type(problem).__name__
    return said if len(said) <= 300 else f"{said[:300]} …"


def build_peers(
    sections: Mapping[str, PeerSection],
    corpus: Corpus,
    seed: int,
    auto: Any,
    dtype: torch.dtype = torch.float32,
    new_tokens: Mapping[str, Sequence[int]] | None = None,
) -> dict[str, Any]:
    """All peers of a run, in order; each once, although another may begin as some of its layers. See `build_peer`."""
    built: dict[str, Any] = {}

    def build(name: str) -> Any:
        if name not in built:
            section = sections[name]
            source = build(section.init_from.peer) if section.init_from and section.init_from.peer else None
            new = (new_tokens or {}).get(name, ())
            built[name] = build_peer(name, section, corpus, seed, auto, dtype, new, source)
        return built[name]

    return {name: build(name) for name in sections}


def build_peer(
    name: str,
    section: PeerSection,
    corpus: Corpus,
    seed: int,
    auto: Any,
    dtype: torch.dtype = torch.float32,
    new_tokens: Sequence[int] = (),
    source: Any = None,
) -> Any:
    """The peer on the CPU, of the task's Auto class, vocabulary padded, weights tied as its config says.

    It is fp32, for whoever trains it keeps fp32 weights; a frozen one is read from its checkpoint as `dtype`, once.
    Initialisation is keyed by (seed, name): it does not depend on which other peers are in the run. What does not learn
    although its model does (RoFormer's positions) is a buffer, so that every checkpoint holds it.

    `new_tokens`: ids that its checkpoint does not know (`vocabulary.new_tokens`). `source`: the peer, built, of which
    it begins as some layers.
    """
    torch.manual_seed(seed_of(seed, "initialisation", name))
    if section.init_from is not None:
        whole = source
        if section.checkpoint is not None:
            whole = _read(PeerSection(pretrained=section.checkpoint), corpus, auto, torch.float32, new_tokens)
        model = from_layers(whole, section.init_from.layers, auto)
    elif section.pretrained is not None:
        model = _read(section, corpus, auto, dtype if section.frozen else torch.float32, new_tokens)
    else:
        model = auto.from_config(peer_config(section, corpus, auto), dtype=torch.float32)
    if section.frozen:
        model.requires_grad_(False)
    else:
        hold_fixed(model)
    return model


def _read(section: PeerSection, corpus: Corpus, auto: Any, dtype: torch.dtype, new_tokens: Sequence[int]) -> Any:
    """A checkpoint's model, its tables of the vocabulary as large as `peer_config` says."""
    from transformers import AutoConfig

    config = peer_config(section, corpus, auto)
    inside, own = config.get_text_config().vocab_size, AutoConfig.from_pretrained(section.pretrained).get_text_config()
    set_vocabulary(config, own.vocab_size)
    model = auto.from_pretrained(section.pretrained, config=config, dtype=dtype, trust_remote_code=False)
    fit_tables(model, inside, corpus.vocab_size, auto, new_tokens)
    return model


def missing_weights(checkpoint: str, auto: Any) -> list[str]:
    """The weights of a model that a checkpoint does not hold: they would begin as random numbers. Reads no values.

    Raises UserError with what transformers says where it holds none that can be read.
    """
    try:
        _, loading = auto.from_pretrained(
            checkpoint, trust_remote_code=False, output_loading_info=True, device_map="meta"
        )
    except Exception as problem:  # transformers and safetensors have many, with no common base
        raise UserError(one_line(problem)) from None
    return sorted(loading["missing_keys"])


def hold_fixed(model: torch.nn.Module) -> None:
    """Makes buffers of parameters that do not learn, under their names: DeepSpeed saves buffers, and not those."""
    for part in model.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            if not parameter.requires_grad:
                delattr(part, name)
                part.register_buffer(name, parameter.detach())


def load_fitted(model: Any, state: Mapping[str, Tensor]) -> None:
    """Loads a state whose vocabulary is smaller or larger than the model's: what is beyond either is left or cut.

    Every parameter and buffer of the model must be in `state`; shapes may differ along the vocabulary, whichever
    dimension it is.
    """
    own = model.state_dict()
    missing = sorted(set(own) - set(state))
    assert not missing, f"the state lacks {missing}"
    with torch.no_grad():
        for key, tensor in own.items():
            common = tuple(slice(min(sizes)) for sizes in zip(tensor.shape, state[key].shape, strict=True))
            tensor[common].copy_(state[key][common])


def with_state(config: Any, state: Mapping[str, Tensor], auto: Any, vocab_size: int | None = None) -> Any:
    """A model of this config with these weights, fp32; with `vocab_size` its vocabulary is cut to that."""
    config = copy.deepcopy(config)
    if vocab_size is not None:
        set_vocabulary(config, vocab_size)
    model = auto.from_config(config, dtype=torch.float32)
    load_fitted(model, state)
    return model


def save_and_reload(model: Any, place: Path, auto: Any) -> Any:
    """Writes a model directory and returns what transformers loads from it.

    Funnel's loading zeroes the row of the padding token, to which training gave numbers (it is a column of the logits
    too). Its config then names no padding token; the tokenizer still does.
    """
    model.save_pretrained(place)
    reloaded = auto.from_pretrained(place)
    state = reloaded.state_dict()
    if any(not torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items() if name in state):
        model.config.pad_token_id = None
        model.config.save_pretrained(place)
        reloaded = auto.from_pretrained(place)
    return reloaded


def difference(exported: Any, inside: Any, inputs: Mapping[str, Tensor]) -> tuple[float, float]:
    """How far the logits of an exported model are from those of the padded model inside, and how large they are."""
    logits = []
    for model in (exported, inside):
        torch.manual_seed(0)  # Reformer hashes by random numbers
        with torch.no_grad():
            logits.append(model.eval()(**inputs, **uncached(model)).logits)
    found, expected = logits[0], logits[1][..., : logits[0].shape[-1]]
    return float((found - expected).abs().max()), float(expected.abs().max())


_OF_FROZEN: WeakKeyDictionary[torch.nn.Module, str] = WeakKeyDictionary()


def frozen_sha256(peer: torch.nn.Module) -> str:
    """`weights_sha256` of a peer whose weights never change in a run: computed once."""
    if peer not in _OF_FROZEN:
        _OF_FROZEN[peer] = weights_sha256(peer)
    return _OF_FROZEN[peer]


def weights_sha256(model: torch.nn.Module) -> str:
    """sha256 over all parameters and buffers by name, dtype and bytes: the identity of a set of weights."""
    digest = hashlib.sha256()
    for key, tensor in sorted(model.state_dict().items()):
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without transformers' warnings and bars."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
