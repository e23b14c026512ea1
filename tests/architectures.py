"""Every architecture of transformers in small: the settings that a recipe's `model` would have."""

from __future__ import annotations

import re
from typing import Any

LENGTH = 32  # of rows that all of them take

# What a config calls its sizes → how large they are here. Only integers of the default config are replaced.
_SIZES = (
    (r"num_hidden_layers|n_layers?|num_layers|(en|de)coder_layers|num_(en|de)coder_layers|num_blocks", 2),
    (r"hidden_size|d_model|dim|emb_dim|embedding_size|n_embd", 32),
    (r"(num|n|(en|de)coder)_(attention_)?heads?|num_key_value_heads|n_head", 4),
    (r"intermediate_size|hidden_dim|(en|de)coder_ffn_dim|d_inner|d_ff", 64),
    (r"head_dim|d_head|attention_head_size|d_kv", 8),
    (r"max_position_embeddings", 72),  # XLM-R-XL and its like begin after the padding id
    (r"max_2d_position_embeddings", 16),
)

# What the sizes above do not say, or say wrongly.
_OWN: dict[str, dict[str, Any]] = {
    "bart": {"max_position_embeddings": 64},
    "esm": {"mask_token_id": 4},
    "funnel": {"block_sizes": [1, 1], "num_decoder_layers": 1},
    "longformer": {"attention_window": 8},
    "luke": {"entity_vocab_size": 10, "entity_emb_size": 16},
    "mobilebert": {"embedding_size": 16, "intra_bottleneck_size": 16, "num_feedforward_networks": 1},
    "neomme": {"head_dim": 16},
    "perceiver": {
        "num_latents": 8, "d_latents": 32, "d_model": 32, "num_blocks": 1, "num_self_attends_per_block": 2,
        "num_self_attention_heads": 4, "num_cross_attention_heads": 4, "qk_channels": 32, "v_channels": 32,
    },
    "reformer": {
        "axial_pos_embds_dim": [16, 16], "axial_pos_shape": [4, 8], "attn_layers": ["local", "lsh"], "num_buckets": 4,
        "attention_head_size": 8, "local_attn_chunk_length": 8, "lsh_attn_chunk_length": 8, "feed_forward_size": 64,
        "hash_seed": 1,
    },
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
}  # fmt: skip


def tiny(model_type: str) -> dict[str, Any]:
    """The `model` section of a small peer of this type."""
    from transformers import AutoConfig

    return {"model_type": model_type, **_small(AutoConfig.for_model(model_type)), **_OWN.get(model_type, {})}


def _small(config: Any) -> dict[str, Any]:
    nested = {key: value for key, value in vars(config).items() if hasattr(value, "to_dict")}
    found: dict[str, Any] = {key: {"model_type": value.model_type, **_small(value)} for key, value in nested.items()}
    own_names = {own: general for general, own in config.attribute_map.items()}
    for key, value in config.to_dict().items():
        for pattern, size in _SIZES:
            if type(value) is int and any(re.fullmatch(pattern, name) for name in (key, own_names.get(key, ""))):
                found[key] = size
                break
    return found
