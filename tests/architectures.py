"""Every architecture of transformers in small: the settings that a recipe's `model` would have."""

from __future__ import annotations

import re
from typing import Any

LENGTH = 32  # of rows that all of them take

# What a config calls its sizes → how large they are here. Only integers of the default config are replaced.
_SIZES = (
    (r"num_hidden_layers|n_layers?|num_layers|(en|de)coder_layers|num_(en|de)coder_layers|num_blocks", 2),
    (r"hidden_size|d_model|dim|emb_dim|embedding_size|n_embd|d_embed|dim_model|lru_width|word_embed_proj_dim", 32),
    (r"(num|n|(en|de)coder)_(attention_)?heads?|num_(en|de)coder_attention_heads|n_head|n_kv_heads", 4),
    (r"num_key_value(_attention)?_heads|num_kv_heads|linear_num_(key_|value_)?heads", 4),
    (
        r"intermediate_size|hidden_dim|(en|de)coder_ffn_dim|d_inner|d_ff|ffn_dim|ffn_hidden_size|n_inner|dim_ff|ff_dim",
        64,
    ),
    (
        r"(moe|shared|shared_expert|expert|moe_shared_expert)_intermediate_size|intermediate_size_mlp|feed_forward_size",
        64,
    ),
    (r"moe_ffn_hidden_size|expert_ffn_hidden_size", 64),
    (r"head_dim|d_head|attention_head_(dim|size)|d_kv|global_head_dim|linear_(key|value)_head_dim|kv_lora_rank", 8),
    (r"qk_(nope|rope)_head_dim|v_head_dim|linear_head_dim", 8),
    (r"q_lora_rank", 16),
    (r"num_experts|n_routed_experts|num_local_experts|moe_num_experts|n_experts|num_routed_experts", 4),
    (r"num_experts_per_tok(en)?|moe_topk|moe_k|top_k|moe_top_k|num_selected_experts", 2),
    (r"sliding_window|window_size|attention_window_size", 16),
    (r"mamba_(n|num)_heads", 8),
    (r"mamba_d_head|mamba_head_dim", 8),
    (r"mamba_d_state|state_size|ssm_state_size", 8),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|max_sequence_length|seq_length", 72),  # some begin after
    (r"max_(source|target)_positions|max_(en|de)coder_position_embeddings", 72),  # the padding id
    (r"max_2d_position_embeddings", 16),
)

# What the sizes above do not say, or say wrongly.
_DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_OWN: dict[str, dict[str, Any]] = {
    "axk1": {"n_group": 2, "topk_group": 1},
    "bart": {"max_position_embeddings": 64},
    "blt": {
        "encoder_hash_byte_group_vocab": 500, "patch_in_forward": False, "encoder_config": {"hidden_size_global": 32},
        "decoder_config": {"hidden_size_global": 32},
    },
    "cohere_compass_text": {
        "layer_types": ["full_attention", "sliding_attention"],
        "rope_parameters": {"full_attention": _DEFAULT_ROPE, "sliding_attention": _DEFAULT_ROPE},
    },
    "codegen": {"rotary_dim": 8},
    "ctrl": {"dff": 64},
    "dbrx": {
        "attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {
        "n_routed_experts": 4, "n_shared_experts": 1, "moe_intermediate_size": 64, "num_experts_per_tok": 2,
        "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    },
    "dots3_note": {
        "vision_config": {"num_hidden_layers": 42, "adapter_in_dim": 32, "adapter_out_dim": 32},
        "audio_config": {"adapter_input_size": 32, "adapter_out_dim": 32},
    },
    "esm": {"mask_token_id": 4},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_groups": 1, "mamba_chunk_size": 8},
    "funnel": {"block_sizes": [1, 1], "num_decoder_layers": 1},
    "gemma3n_text": {
        "num_hidden_layers": 5, "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 8, "laurel_rank": 8,
        "activation_sparsity_pattern": [0.0] * 5, "layer_types": ["sliding_attention"] * 4 + ["full_attention"],
    },
    "gemma4": {"text_config": {"hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0}},
    "gemma4_text": {"hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gptj": {"rotary_dim": 8},
    "hunyuan_v1_dense": {"rope_parameters": _DEFAULT_ROPE, "head_dim": 8},
    "hunyuan_v1_moe": {"rope_parameters": _DEFAULT_ROPE, "head_dim": 8},
    "led": {"attention_window": [8, 8]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "longcat_flash": {"num_layers": 1, "n_routed_experts": 4, "zero_expert_num": 2, "head_dim": 8, "qk_head_dim": 16},
    "longformer": {"attention_window": 8},
    "luke": {"entity_vocab_size": 10, "entity_emb_size": 16},
    "mamba2": {"num_heads": 8, "n_groups": 1, "chunk_size": 8},
    "mimo_v2_flash": {"num_key_value_heads": 2},
    "ministral": {"rope_parameters": _DEFAULT_ROPE, "head_dim": 8},
    "mobilebert": {"embedding_size": 16, "intra_bottleneck_size": 16, "num_feedforward_networks": 1},
    "nemo_speechlm": {"audio_config": {"diarization_config": {"head_config": {"audio_hidden_size": 32}}}},
    "nemotron": {"num_key_value_heads": 2, "head_dim": 8},
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
    "rembert": {"input_embedding_size": 16, "output_embedding_size": 48},
    "roc_bert": {"shape_embed_dim": 8, "shape_vocab_size": 40, "pronunciation_embed_dim": 8},
    "vibevoice_asr": {
        "acoustic_tokenizer_encoder_config": {"num_filters": 1, "depths": [1] * 7},
        "semantic_tokenizer_encoder_config": {"num_filters": 1, "depths": [1] * 7},
    },
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 5, "layers_block_type": ["mamba", "mamba", "hybrid", "mamba", "hybrid"],
        "attention_hidden_size": 64, "attention_head_dim": 16, "n_mamba_heads": 2, "mamba_dt_rank": 8,
    },
    "zamba2": {
        "num_hidden_layers": 3, "layers_block_type": ["mamba", "hybrid", "mamba"],
        "layer_types": ["mamba", "hybrid", "mamba"], "mamba_ngroups": 1, "mamba_headdim": 8, "n_mamba_heads": 8,
        "chunk_size": 8, "attention_hidden_size": 64, "attention_head_dim": 16, "num_mem_blocks": 1, "mamba_d_state": 8,
        "adapter_rank": 8,
    },
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip


# (task, type) → why it can be no peer: what is said of it holds these words.
REFUSED = {
    ("clm", "cpmant"): "its positions see what comes after them",
    ("clm", "emu3"): "could not be exported: Unrecognized configuration class",  # images come first, text is a part
    ("clm", "gemma3n"): "requires the timm library",
    ("clm", "gemma4_assistant"): "hidden_size_per_layer_input must be 0",  # both read another model's cache
    ("clm", "gemma4_unified_assistant"): "The set of layer types producing a cache is different",
    ("clm", "mllama"): "could not be exported: Unrecognized configuration class",
    ("clm", "musicgen"): "Multiple valid text configs",  # writes music
    ("clm", "musicgen_melody"): "Multiple valid text configs",
    ("clm", "xlm"): "its positions see what comes after them",
    ("clm", "xlnet"): "its positions see what comes after them",
    ("span", "voxtral_realtime"): "exactly one of input_features or encoder_inputs_embeds",  # listens
    **{
        ("clm", kind): "prepare the corpus with this type's own tokenizer"
        for kind in ("qwen2", "qwen3_5", "qwen3_5_moe", "qwen3_5_moe_text", "qwen4_exp")
    },
    **{
        ("span", kind): "it has no encoder and decoder"  # they listen, and go on with a text
        for kind in (
            "audioflamingo3", "glmasr", "granite_speech", "granite_speech_plus", "moss_transcribe_diarize",
            "musicflamingo", "nemo_speechlm", "qwen2_audio", "qwen3_asr", "vibevoice_asr", "voxtral",
        )
    },
}  # fmt: skip


def tiny(model_type: str) -> dict[str, Any]:
    """The `model` section of a small peer of this type."""
    from transformers import AutoConfig

    try:
        small = _small(AutoConfig.for_model(model_type))
    except Exception:  # its own defaults do not fit together
        small = {}
    return _laid_over({"model_type": model_type, **small}, _OWN.get(model_type, {}))


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


def _laid_over(settings: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    inner = {key: _laid_over(settings[key], value) for key, value in own.items() if type(settings.get(key)) is dict}
    return {**settings, **own, **inner}
