"""From a recipe's peer to a model: a Hugging Face config or checkpoint, its vocabulary padded inside the model."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ctcd_ds.cli import UserError, did_you_mean
from ctcd_ds.corpus.rows import ABSENT, Corpus, SpecialIds
from ctcd_ds.kinds import instead
from ctcd_ds.peers.reading import uncached
from ctcd_ds.recipe import PeerSection

TOLERANCE = 1e-4  # of the logits' own size, from a model to its export: only the shape of the last GEMM differs
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
    "gradient_checkpointing": (False, "activations are always kept"),
}


def padded(vocab_size: int) -> int:
    """The vocabulary's size inside the model."""
    return -(-vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


def seed_of(*parts: object) -> int:
    """A 63-bit seed that depends on all parts: independent random streams, keyed by what they are for."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def peer_config(section: PeerSection, corpus: Corpus, auto: Any) -> Any:
    """The peer's Hugging Face config, with the corpus's vocabulary (padded) and special ids.

    `auto`: the task's Auto class of transformers; BERT and its like are causal only where their config says so.
    Raises UserError with what transformers refuses.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    try:
        if section.pretrained is not None:
            config = AutoConfig.from_pretrained(section.pretrained, trust_remote_code=False)
        else:
            values = dict(section.model or {})
            config = AutoConfig.for_model(values.pop("model_type"), **values)
        parts = _parts(config)
    except Exception as problem:  # transformers raises whatever its config classes raise
        raise UserError(one_line(problem)) from None
    special = corpus.special
    for part in parts:
        for role, number in _roles(special).items():
            setattr(part, f"{role}_token_id", None if number == ABSENT else number)
    set_vocabulary(config, padded(corpus.vocab_size))
    if auto is AutoModelForCausalLM and hasattr(config, "is_decoder"):
        config.is_decoder = True
    if auto is AutoModelForSeq2SeqLM:
        config.decoder_start_token_id = special.pad
    return config


def set_vocabulary(config: Any, size: int) -> None:
    """Makes the vocabulary that large wherever a config says its size: in its text part, encoder and decoder, and by
    other names (Marian's decoder_vocab_size, FSMT's src_vocab_size, Gemma's vocab_size_per_layer_input).
    """
    parts, old = _parts(config), config.get_text_config().vocab_size
    for part in parts:
        for name in [name for name, value in vars(part).items() if "vocab_size" in name and value == old]:
            setattr(part, name, size)
        part.vocab_size = size


def _parts(config: Any) -> list[Any]:
    """The config, its text part, and all configs inside that have the text's vocabulary."""
    own = config.get_text_config()
    parts = {id(part): part for part in (config, own)}
    waiting = [config]
    while waiting:
        inside = [part for part in vars(waiting.pop()).values() if hasattr(part, "to_dict")]
        parts |= {id(part): part for part in inside if getattr(part, "vocab_size", None) == own.vocab_size}
        waiting += inside
    return list(parts.values())


def _roles(special: SpecialIds) -> dict[str, int]:
    """The ids that a config names. A text begins with [CLS] or what begins it, else with the end of the one before."""
    begin = next(number for number in (special.cls, special.bos, special.end) if number != ABSENT)
    return {"pad": special.pad, "cls": special.cls, "sep": special.sep, "bos": begin, "eos": special.end}


def config_mistakes(section: PeerSection, corpus: Corpus, sequence_length: int, auto: Any) -> Iterator[str]:
    """What is wrong with a peer's `model` or `pretrained`, as 'key = value: why' lines relative to the peer.

    `auto`: the task's Auto class of transformers.
    """
    if section.pretrained is not None and not (Path(section.pretrained) / "config.json").is_file():
        looks_local = section.pretrained.startswith((".", "/")) or section.pretrained.count("/") > 1
        if Path(section.pretrained).exists():
            found = instead(Path(section.pretrained), "model")
            yield f"pretrained = {section.pretrained!r}: no config.json there: {found}"
            return
        if looks_local:
            yield f"pretrained = {section.pretrained!r}: no such directory"
            return
    if section.model is not None and (said := list(_setting_mistakes(section.model))):
        yield from said
        return
    try:
        config = peer_config(section, corpus, auto)
    except UserError as mistake:
        hub = f"pretrained = {section.pretrained!r}: no such directory, and no model of the hub"
        yield f"{'model' if section.model is not None else hub}: {mistake}"
        return
    if type(config) not in auto._model_mapping:
        yield f"model_type {config.model_type!r} has no head for this task in transformers ({auto.__name__})"
        return
    width, heads = getattr(config, "hidden_size", None), getattr(config, "num_attention_heads", None)
    if isinstance(width, int) and isinstance(heads, int) and (heads < 1 or width % heads):
        yield f"model.num_attention_heads = {heads}: does not divide hidden_size = {width}"
        return
    places = getattr(config, "max_position_embeddings", None)
    if isinstance(places, int) and 0 < places < sequence_length:
        yield (
            f"max_position_embeddings = {places}: less than corpus.sequence_length = {sequence_length}; "
            "raise it or shorten the rows"
        )
    yield from _building_mistakes(section.model or {}, config, auto)


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


def build_peer(name: str, section: PeerSection, corpus: Corpus, seed: int, auto: Any) -> Any:
    """The peer in fp32 on the CPU, of the task's Auto class, vocabulary padded, weights tied as its config says.

    Initialisation is keyed by (seed, name): it does not depend on which other peers are in the run. What does not learn
    although its model does (RoFormer's positions) is a buffer, so that every checkpoint holds it.
    """
    config = peer_config(section, corpus, auto)
    torch.manual_seed(seed_of(seed, "initialisation", name))
    model = auto.from_config(config, dtype=torch.float32)
    if section.pretrained is not None:
        checkpoint = auto.from_pretrained(section.pretrained, dtype=torch.float32, trust_remote_code=False)
        load_fitted(model, checkpoint.state_dict())
    if section.frozen:
        model.requires_grad_(False)
    else:
        hold_fixed(model)
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
