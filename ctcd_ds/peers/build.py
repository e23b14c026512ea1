"""From a recipe's peer to a model: a Hugging Face config or checkpoint, its vocabulary padded inside the model."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ctcd_ds.cli import UserError, did_you_mean
from ctcd_ds.corpus.rows import Corpus
from ctcd_ds.recipe import PeerSection

VOCABULARY_MULTIPLE = 64  # GEMMs with an odd inner size run at a fraction of their rate

# Their positions begin after the padding id, which takes as many places away.
_OFFSET_POSITIONS = ("roberta", "xlm-roberta", "camembert", "roberta-prelayernorm", "mpnet", "data2vec-text", "ibert")


def padded(vocab_size: int) -> int:
    """The vocabulary's size inside the model."""
    return -(-vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


def seed_of(*parts: object) -> int:
    """A 63-bit seed that depends on all parts: independent random streams, keyed by what they are for."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def peer_config(section: PeerSection, corpus: Corpus) -> Any:
    """The peer's Hugging Face config, with the corpus's vocabulary (padded) and special ids.

    Raises UserError with what transformers refuses.
    """
    from transformers import AutoConfig

    try:
        if section.pretrained is not None:
            config = AutoConfig.from_pretrained(section.pretrained, trust_remote_code=False)
        else:
            values = dict(section.model or {})
            config = AutoConfig.for_model(values.pop("model_type"), **values)
    except Exception as problem:  # transformers raises whatever its config classes raise
        raise UserError(" ".join(str(problem).split())) from None
    special = corpus.special
    config.pad_token_id, config.cls_token_id, config.sep_token_id = special.pad, special.cls, special.sep
    config.bos_token_id, config.eos_token_id = special.cls, special.sep
    config.vocab_size = padded(corpus.vocab_size)
    return config


def config_mistakes(section: PeerSection, corpus: Corpus, sequence_length: int) -> Iterator[str]:
    """What is wrong with a peer's `model` or `pretrained`, as 'key = value: why' lines relative to the peer."""
    from transformers import MODEL_FOR_MASKED_LM_MAPPING, AutoConfig, AutoModelForMaskedLM

    if section.pretrained is not None and not (Path(section.pretrained) / "config.json").is_file():
        looks_local = section.pretrained.startswith((".", "/")) or section.pretrained.count("/") > 1
        if Path(section.pretrained).exists():
            yield f"pretrained = {section.pretrained!r}: no config.json there (`ctcd export` makes models of a run)"
            return
        if looks_local:
            yield f"pretrained = {section.pretrained!r}: no such directory"
            return
    model = section.model or {}
    if section.model is not None:
        try:
            known = set(AutoConfig.for_model(model["model_type"]).to_dict())
        except ValueError:
            from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

            near = did_you_mean(model["model_type"], CONFIG_MAPPING_NAMES)
            hint = near if near.startswith("did") else "transformers has no such architecture"
            yield f"model.model_type = {model['model_type']!r}: {hint}"
            return
        known |= set(AutoConfig.for_model(model["model_type"]).attribute_map)
        for key in sorted(set(model) - known - {"model_type"}):
            yield f"model.{key} = {model[key]!r}: {model['model_type']} has no such setting; {_near(key, known)}"
    try:
        config = peer_config(section, corpus)
    except UserError as mistake:
        hub = f"pretrained = {section.pretrained!r}: no such directory, and no model of the hub"
        yield f"{'model' if section.model is not None else hub}: {mistake}"
        return
    if type(config) not in MODEL_FOR_MASKED_LM_MAPPING:
        yield f"model_type {config.model_type!r} has no masked-LM head in transformers"
        return
    width, heads = getattr(config, "hidden_size", None), getattr(config, "num_attention_heads", None)
    if isinstance(width, int) and isinstance(heads, int) and (heads < 1 or width % heads):
        yield f"model.num_attention_heads = {heads}: does not divide hidden_size = {width}"
        return
    places = getattr(config, "max_position_embeddings", None)
    if isinstance(places, int):
        offset = config.pad_token_id + 1 if config.model_type in _OFFSET_POSITIONS else 0
        if sequence_length + offset > places:
            extra = f" + {offset} (its positions begin after the padding id)" if offset else ""
            yield (
                f"max_position_embeddings = {places}: less than corpus.sequence_length = {sequence_length}{extra}; "
                "raise it or shorten the rows"
            )
    try:
        with torch.device("meta"):
            AutoModelForMaskedLM.from_config(config)
    except Exception as problem:  # whatever an architecture says about its own config
        yield f"model: transformers cannot build it: {' '.join(str(problem).split())}"


def _near(key: str, known: set[str]) -> str:
    hint = did_you_mean(key, known)
    return hint if hint.startswith("did") else "see its config class in transformers"


def build_peer(name: str, section: PeerSection, corpus: Corpus, seed: int) -> Any:
    """The peer as a Hugging Face masked LM in fp32 on the CPU, vocabulary padded, weights tied as its config says.

    Initialisation is keyed by (seed, name): it does not depend on which other peers are in the run.
    """
    from transformers import AutoModelForMaskedLM

    config = peer_config(section, corpus)
    config.dtype = torch.float32
    torch.manual_seed(seed_of(seed, "initialisation", name))
    model = AutoModelForMaskedLM.from_config(config)
    if section.pretrained is not None:
        checkpoint = AutoModelForMaskedLM.from_pretrained(
            section.pretrained, dtype=torch.float32, trust_remote_code=False
        )
        load_fitted(model, checkpoint.state_dict())
    if section.frozen:
        model.requires_grad_(False)
    return model


def load_fitted(model: Any, state: Mapping[str, Tensor]) -> None:
    """Loads a state whose vocabulary is smaller or larger than the model's: rows beyond either are left or cut.

    Every parameter of the model must be in `state`, and differ in its first dimension only.
    """
    own = model.state_dict()
    missing = sorted(set(own) - set(state))
    assert not missing, f"the state lacks {missing}"
    with torch.no_grad():
        for key, tensor in own.items():
            rows = min(len(tensor), len(state[key])) if tensor.ndim else None
            tensor[:rows].copy_(state[key][:rows]) if rows is not None else tensor.copy_(state[key])


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
