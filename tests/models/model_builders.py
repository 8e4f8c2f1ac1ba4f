"""Builders of tiny base models, and of what holds them: a `.gguf` file, a Hub cache."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from gguf import GGUFWriter
from tiny import VOCABULARY_SIZE
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

CPU = torch.device("cpu")

TEXTS = [
    "The capital of France is",
    " Query: what orbits the Earth?\nResponse:\tthe Moon — naïve café, 北京, 🙂",
    "for i in range(10):\n    print(i)  # 3.14159e-10",
    "",
]


def tiny_llama_config(**changes: int) -> LlamaConfig:
    sizes = {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    return LlamaConfig(**{**sizes, **changes})


def sliding_model() -> PreTrainedModel:
    """A Mistral whose layers forget what left their window of 16 tokens."""
    options = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64}
    config = MistralConfig(**options, num_hidden_layers=2, vocab_size=VOCABULARY_SIZE, sliding_window=16, head_dim=8)
    return MistralForCausalLM(config).eval()


def write_gguf(path: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Write a Llama as llama.cpp keeps it: its own names, and the rows of q and k in its rotary order."""
    config = model.config
    writer = GGUFWriter(str(path), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    bpe = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(bpe["vocab"], key=bpe["vocab"].__getitem__))
    writer.add_token_types([3] + [1] * (len(bpe["vocab"]) - 1))
    writer.add_token_merges([" ".join(merge) for merge in bpe["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "model.layers.": "blk.",
    }
    for name, weight in model.state_dict().items():
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        for projection, count in heads.items():
            if projection in name:
                rows, columns = weight.shape
                weight = weight.view(count, 2, rows // count // 2, columns).transpose(1, 2).reshape(rows, columns)
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        writer.add_tensor(name, weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def put_in_hub_cache(hub_cache: Path, repo_id: str, files: dict[str, bytes]) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = hub_cache / f"models--{repo_id.replace('/', '--')}"
    for path, content in {
        "refs/main": commit.encode(),
        **{f"snapshots/{commit}/{k}": v for k, v in files.items()},
    }.items():
        (repository / path).parent.mkdir(parents=True, exist_ok=True)
        (repository / path).write_bytes(content)
