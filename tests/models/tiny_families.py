"""A tiny random causal language model of every type that transformers knows, built in process from its config.

Sizes go by the names of config attributes (``SIZES``), so that most types of other versions of transformers are met as
well; what a type needs beyond that is in ``EXCEPTIONS``. ``VARIANTS`` switch on what a type's defaults leave off.
"""

from __future__ import annotations

import inspect
import math
import re
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

MODEL_TYPES: tuple[str, ...] = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
VOCABULARY = 512
HIDDEN, HEADS, GROUPS, HEAD_DIM = 64, 4, 2, 32

SIZES: dict[str, Any] = {
    # Widths
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "emb_dim", "embedding_size", "word_embed_proj_dim"), HIDDEN),
    **dict.fromkeys(("lru_width", "hidden_size_global", "pronunciation_embed_dim", "ple_embed_dim"), HIDDEN),
    **dict.fromkeys(("input_embedding_size", "output_embedding_size", "text_hidden_size", "adapter_out_dim"), HIDDEN),
    **dict.fromkeys(("adapter_in_dim", "adapter_input_size", "out_hidden_size", "shape_embed_dim"), HIDDEN),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "d_inner", "dff", "dim_ff", "ffn_hidden_size"), 96),
    **dict.fromkeys(("decoder_ffn_dim", "encoder_ffn_dim", "feed_forward_size", "intermediate_size_mlp"), 96),
    **dict.fromkeys(("dense_intermediate_size", "shared_intermediate_size", "expert_ffn_hidden_size"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 48),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "shared_experts_intermediate_size"), 48),
    **{"router_hidden_size": 16, "hidden_size_per_layer_input": 8, "block_multiple_of": 16},
    **dict.fromkeys(("laurel_rank", "adapter_rank", "hc_lowrank", "o_lora_rank", "gated_norm_rank"), 8),
    # Layers
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks", "depth"), 2),
    **dict.fromkeys(("decoder_layers", "encoder_layers", "num_decoder_layers", "num_encoder_layers"), 2),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers"), 1),
    # Heads
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"), HEADS),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads", "swa_num_attention_heads"), HEADS),
    **dict.fromkeys(("num_decoder_attention_heads", "num_encoder_attention_heads"), HEADS),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads", "kv_n_heads"), GROUPS),
    **dict.fromkeys(("head_dim", "kv_channels", "d_head", "dim_head", "attention_head_size", "swa_head_dim"), HEAD_DIM),
    "rotary_dim": 8,
    # Latent and indexed attention
    **{"kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 12},
    **{"index_head_dim": 16, "index_n_heads": 4, "index_topk": 8, "index_block_size": 4, "index_topk_blocks": 2},
    # Experts
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 8),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts"), 2),
    **{"n_group": 2, "num_expert_group": 2, "topk_group": 1, "moe_top_k": 2, "zero_expert_num": 2},
    # Recurrent layers
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size"), 8),
    **dict.fromkeys(("mamba_dt_rank", "time_step_rank"), 4),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "n_mamba_heads"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim"), 16),
    **dict.fromkeys(("mamba_n_groups", "mamba_ngroups", "n_groups"), 2),
    **dict.fromkeys(("mamba_chunk_size", "chunk_size", "block_size"), 8),
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 12},
    **{"mamba_d_ssm": 128, "linear_num_heads": 4, "linear_head_dim": 16},
    # Lengths
    **dict.fromkeys(("max_position_embeddings", "n_positions", "context_length", "model_max_length"), 256),
    **dict.fromkeys(("max_seq_len", "max_target_positions", "max_source_positions"), 256),
    **dict.fromkeys(("sliding_window", "sliding_window_size", "window_size", "attention_window_size"), 8),
    **dict.fromkeys(("attention_chunk_size", "keep_window_size", "local_attention", "local_attention_window_len"), 8),
    **dict.fromkeys(("rel_extent", "image_size", "num_mel_bins", "downsample_hidden_size"), 32),
    # Scales
    **{"logit_scale": 0.5, "logits_mup_width_multiplier": 2.0, "dim_model_base": 32, "query_pre_attn_scalar": 24},
}
"""A value by the name of a config attribute, where the type's default is a positive number."""

_VOCABULARIES = (
    *("vocab_size", "decoder_vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size"),
    *("pronunciation_vocab_size", "shape_vocab_size", "encoder_hash_byte_group_vocab"),
)


def _layers(*kinds: str) -> dict[str, Any]:
    return {"layer_types": list(kinds), "num_hidden_layers": len(kinds)}


EXCEPTIONS: dict[str, dict[str, Any]] = {
    "bamba": {"num_hidden_layers": 3, "attn_layer_indices": [1]},
    "cohere2_moe": {"num_shared_experts": 1},
    "cohere_compass_text": {
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [3, 3, 2]},
        },
    },
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 4.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "deepseek_v4": {"compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8}},
    "diffllama": {"attention_dropout": 0.0},
    "dots1": {"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "dory": {
        **{"n_input_layers": 1, "n_recurrent_layers": 2, "n_output_layers": 1},
        **_layers(*["sliding_attention", "full_attention"] * 2),
    },
    "dots3_note_text": {
        **{"swa_num_attention_heads": 6, "swa_num_key_value_heads": 6, "swa_q_lora_rank": 20, "swa_kv_lora_rank": 12},
        **{"swa_head_dim": 24, "swa_qk_nope_head_dim": 16, "swa_v_head_dim": 12},
    },
    "gemma3n_text": {
        **{"num_kv_shared_layers": 2, "activation_sparsity_pattern": [0.9, 0.0, 0.0, 0.0], "intermediate_size": 96},
        **_layers(*["sliding_attention", "full_attention"] * 2),
    },
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}},
    "gemma4_text": {"global_head_dim": 48},
    "gemma4_unified_text": {"global_head_dim": 48},
    "got_ocr2": {"vision_config": {"mlp_dim": 96, "output_channels": 16}},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": _layers("linear_attention", "full_attention", "linear_attention"),
    "granitemoeshared": {"shared_intermediate_size": 48},
    "helium": {"head_dim": HIDDEN // HEADS},
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 4, "attn_layer_offset": 2},
    "laguna": {"num_attention_heads_per_layer": [8, 4]},
    "lfm2": _layers("conv", "full_attention", "conv"),
    "lfm2_moe": _layers("conv", "full_attention", "conv"),
    "longcat_flash": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": GROUPS},
    "qwen4_exp_text": {
        **{"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 32, "indexer_budget": 8},
        "indexer_compress_ratio": 2,
    },
    "recurrent_gemma": {"num_hidden_layers": 4},
    "reformer": {
        **{"is_decoder": True, "axial_pos_shape": [16, 16], "axial_pos_embds_dim": [16, 48], "hash_seed": 0},
        **{"local_attn_chunk_length": 8, "lsh_attn_chunk_length": 8, "num_buckets": 4},
    },
    "xlnet": {"d_head": HIDDEN // HEADS},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        **{"layers_block_type": [*["linear_attention", "hybrid"] * 2, "linear_attention"], "num_hidden_layers": 5},
    },
    "zaya": {"num_experts_per_tok": 1},
}
"""What a type needs beyond ``SIZES``."""

READS_ANOTHER_MODEL = "it reads the keys of another model: inputs_embeds and shared_kv_states cannot be None"
_NO_DECODER_CONFIG = "its class reads the decoder's config, and AutoModelForCausalLM gives it the whole one"
UNBUILDABLE: dict[str, str] = {
    "gemma3n": "its vision tower needs the package timm; gemma3n_text is its language model",
    "gemma4_assistant": READS_ANOTHER_MODEL,
    "gemma4_unified_assistant": READS_ANOTHER_MODEL,
    "musicgen": _NO_DECODER_CONFIG,
    "musicgen_melody": _NO_DECODER_CONFIG,
}
"""Types that cannot be built or cannot run on token ids alone, with the reason."""

_LAYERDROP = ("bart", "mbart", "pegasus", "marian", "whisper", "trocr")
_BIDIRECTIONAL = (
    *("bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert"),
    *("rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl", "xmod"),
)
_SLIDING_LAST = {"use_sliding_window": True, "sliding_window": 8} | _layers("full_attention", "sliding_attention")
_LONGROPE = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
_ALL_VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    # Attention
    "cohere+qk_norm": ("cohere", {"use_qk_norm": True}),
    "dbrx+clip": ("dbrx", {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 0.5}}),
    "falcon+alibi": ("falcon", {"alibi": True, "parallel_attn": False, "bias": True}),
    "falcon+groups": ("falcon", {"new_decoder_architecture": True}),
    "gemma2+softcap": ("gemma2", {"attn_logit_softcapping": 1.0, "final_logit_softcapping": 2.0}),
    "gemma3_text+softcap": ("gemma3_text", {"attn_logit_softcapping": 1.0, "final_logit_softcapping": 2.0}),
    "gemma4_text+shared_kv": (
        "gemma4_text",
        {"num_kv_shared_layers": 2} | _layers(*["sliding_attention", "full_attention"] * 2),
    ),
    "gemma4_text+shared_keys_and_values": (
        "gemma4_text",
        {"attention_k_eq_v": True, "num_global_key_value_heads": 1},
    ),
    "glm4_moe+qk_norm": ("glm4_moe", {"use_qk_norm": True}),
    "gpt2+reordered": ("gpt2", {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True}),
    "gpt_bigcode+multi_head": ("gpt_bigcode", {"multi_query": False}),
    "gpt_neox+serial": ("gpt_neox", {"use_parallel_residual": False}),
    "granite+multipliers": (
        "granite",
        {"attention_multiplier": 0.3, "embedding_multiplier": 3.0, "logits_scaling": 0.5, "residual_multiplier": 0.7},
    ),
    "llama+biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama+multi_query": ("llama", {"num_key_value_heads": 1}),
    "llama4_text+no_qk_norm": ("llama4_text", {"use_qk_norm": False}),
    "deepseek_v2+full_queries": ("deepseek_v2", {"q_lora_rank": None}),
    "deepseek_v3+full_queries": ("deepseek_v3", {"q_lora_rank": None}),
    "mpt+clip": ("mpt", {"attn_config": {"clip_qkv": 0.5, "softmax_scale": 0.4}}),
    "olmo+clip": ("olmo", {"clip_qkv": 0.5}),
    "olmoe+clip": ("olmoe", {"clip_qkv": 0.5}),
    "opt+projections": ("opt", {"word_embed_proj_dim": 32, "do_layer_norm_before": False}),
    "phi+qk_norm": ("phi", {"qk_layernorm": True}),
    "qwen2+sliding": ("qwen2", _SLIDING_LAST),
    "qwen3+sliding": ("qwen3", _SLIDING_LAST),
    "qwen4_exp_text+ngrams": ("qwen4_exp_text", {"ple_layer_ids": [1], "ngram_vocab_size_base": 50, "eos_token_id": 1}),
    "stablelm+parallel": ("stablelm", {"use_parallel_residual": True, "use_qkv_bias": True}),
    "stablelm+qk_norm": ("stablelm", {"qk_layernorm": True}),
    "zamba2+adapters": (
        "zamba2",
        {"use_shared_attention_adapter": True, "use_mem_rope": True, "num_key_value_heads": HEADS},
    ),
    # Positions
    "llama+dynamic_rope": (
        "llama",
        {
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
            "max_position_embeddings": 24,
        },
    ),
    "llama+yarn": (
        "llama",
        {
            "rope_parameters": {
                **{"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0},
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "phi3+longrope": ("phi3", {"rope_parameters": _LONGROPE, "original_max_position_embeddings": 24}),
    # Experts
    "doge+experts": ("doge", {"is_moe": True, "num_experts": 16}),
    "gemma4_text+experts": (
        "gemma4_text",
        {"enable_moe_block": True, "num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 48},
    ),
    "dbrx+jitter": ("dbrx", {"ffn_config": {"moe_jitter_eps": 0.2}}),
    "minimax+jitter": ("minimax", {"router_jitter_noise": 0.2}),
    "minimax_m2+jitter": ("minimax_m2", {"router_jitter_noise": 0.2}),
    "mixtral+jitter": ("mixtral", {"router_jitter_noise": 0.2}),
    "phimoe+jitter": ("phimoe", {"router_jitter_noise": 0.2, "input_jitter_noise": 0.2}),
    "granitemoe_swa+shared_expert": ("granitemoe_swa", {"shared_intermediate_size": 48}),
    # Hybrids that end in an attention layer
    "bamba+attention_last": ("bamba", {"attn_layer_indices": [0, 2]}),
    "gemma3_text+full_last": ("gemma3_text", _layers("sliding_attention", "full_attention")),
    "granitemoehybrid+attention_last": ("granitemoehybrid", _layers("linear_attention", "full_attention")),
    "jamba+attention_last": ("jamba", {"attn_layer_offset": 3}),
    "lfm2+attention_last": ("lfm2", _layers("conv", "full_attention")),
    "lfm2_moe+attention_last": ("lfm2_moe", _layers("conv", "full_attention")),
    "minimax+attention_last": ("minimax", _layers("linear_attention", "full_attention")),
    "nemotron_h+attention_last": ("nemotron_h", {"layers_block_type": ["linear_attention", "moe", "full_attention"]}),
    "recurrent_gemma+attention_last": ("recurrent_gemma", {"num_hidden_layers": 3}),
    # Layers left out at random
    "biogpt+layerdrop": ("biogpt", {"layerdrop": 0.5}),
    "opt+layerdrop": ("opt", {"layerdrop": 0.5}),
    "xglm+layerdrop": ("xglm", {"layerdrop": 0.5}),
    **{f"{model_type}+layerdrop": (model_type, {"decoder_layerdrop": 0.5}) for model_type in _LAYERDROP},
    # Types that look ahead unless told not to
    **{f"{model_type}+decoder": (model_type, {"is_decoder": True}) for model_type in _BIDIRECTIONAL},
    "xlm+decoder": ("xlm", {"causal": True}),
}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    name: variant for name, variant in _ALL_VARIANTS.items() if variant[0] in MODEL_TYPES
}
"""Models by a name of their own: a type, and the options that differ from its tiny config."""


def _one_layer_of_each_kind(values: Mapping[str, Any]) -> dict[str, Any]:
    """Shorten what a config lists by layer: each kind once, the last layer's at the end, and never one layer alone."""
    count = next((name for name in ("num_hidden_layers", "num_layers", "n_layer") if name in values), None)
    # Where no value occurs twice, the list holds the numbers of some layers.
    by_layer = {
        name: value
        for name, value in values.items()
        if count and isinstance(value, list) and len(value) == values[count] != len(set(map(str, value)))
    }
    if not by_layer:
        return {}
    kinds = list(zip(*by_layer.values(), strict=True))
    chosen = [kind for number, kind in enumerate(kinds) if kind not in kinds[:number] and kind != kinds[-1]]
    chosen += [kinds[-1]] * max(1, 2 - len(chosen))
    return {count: len(chosen)} | dict(zip(by_layer, map(list, zip(*chosen, strict=True)), strict=True))


def _sized(name: str, value: object) -> object:
    """Choose a tiny value by an attribute's name and default; ``None`` where the default stays."""
    if name == "head_dim":
        return HEAD_DIM
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if value == 0:
        return 0.1 if isinstance(value, float) and re.search("dropout|pdrop", name) else None
    return SIZES.get(name)


def _options(default: PreTrainedConfig, vocabulary: int, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Say by which options a tiny config differs from its type's default one."""
    stored, aliases = default.to_dict(), default.attribute_map
    names = {name: aliases.get(name, name) for name in inspect.signature(type(default)).parameters}
    values = {name: stored[alias] for name, alias in names.items() if alias in stored}
    options = {name: _sized(name, value) for name, value in values.items()}
    if "qk_nope_head_dim" in values:  # Latent attention: the head dimension follows, and heads share no keys.
        options |= {"head_dim": None, "num_key_value_heads": HEADS}
    options |= {name: vocabulary for name, value in values.items() if name in _VOCABULARIES and value}
    ids = [name for name, value in values.items() if re.search("_token_(id|index)$", name) and value is not None]
    high = [name for name in ids if np.max(values[name]) >= vocabulary]
    options |= {name: vocabulary - 1 - number for number, name in enumerate(high)}
    options = {name: value for name, value in options.items() if name in values and value is not None}
    options |= _one_layer_of_each_kind(values) | EXCEPTIONS.get(default.model_type, {}) | overrides
    for name in type(default).sub_configs:
        part = getattr(default, name)
        if isinstance(part, PreTrainedConfig):
            options[name] = type(part)(**_options(part, vocabulary, options.get(name, {})))
    return options


def config_of(name: str, vocabulary: int = VOCABULARY, **overrides: Any) -> PreTrainedConfig:
    """Make a small config of a type or variant; skips the test where the installed transformers has no such type."""
    model_type, changes = VARIANTS.get(name, (name, {}))
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no model type {model_type!r}")
    config_class = CONFIG_MAPPING[model_type]
    return config_class(**_options(config_class(), vocabulary, changes | overrides))


def _randomize(model: nn.Module, seed: int) -> None:
    """Draw weights such that attention is not uniform, logits vary by about 1, and every norm and bias counts."""
    generator = torch.Generator().manual_seed(seed)

    def noise(tensor: torch.Tensor, std: float) -> torch.Tensor:
        return torch.randn(tensor.shape, generator=generator) * std

    owners = {id(p): module for module in model.modules() for p in module.parameters(recurse=False)}
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            name, owner = path.rpartition(".")[2], owners[id(parameter)]
            if parameter.ndim < 2 or not re.search("weight|proj|embed", name):
                parameter.add_(noise(parameter, 1.0 if name == "temp" else 0.1))
            elif parameter.requires_grad:  # Tables of sines stay.
                if isinstance(owner, nn.modules.conv._ConvNd):
                    inputs = math.prod(parameter.shape[1:])
                else:
                    inputs = parameter.shape[0 if isinstance(owner, Conv1D) else -1]
                parameter.copy_(noise(parameter, inputs**-0.5))
        for path, buffer in model.named_buffers():
            if path.endswith("bias") and buffer.ndim == 1:
                buffer.add_(noise(buffer, 0.1))


def build(name: str, vocabulary: int = VOCABULARY, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """Build a tiny model of a type or variant, in float32 and evaluation mode: the same for the same seed.

    Dropout probabilities that are 0 by default are 0.1.
    """
    config = config_of(name, vocabulary, **overrides)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # The import of GPTBigCode, in the oldest transformers with the newest torch.
        warnings.filterwarnings("ignore", "`torch.jit.script", DeprecationWarning)
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    _randomize(model, seed)
    return model.eval()
