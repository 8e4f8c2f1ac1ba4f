"""Query and key vectors off real attention layers, split and fused, compared with what the attention receives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import adapted, tiny_gpt2, tiny_llama
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from attention_rl_trainer.models.attention import AttentionLayer, find_attention_projections
from attention_rl_trainer.models.kv_cache import cache_argument
from attention_rl_trainer.models.projections import AttentionHeads, UnsupportedArchitectureError

SIZES: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {"head_dim": 16},  # not hidden_size / heads
    "gemma": {"head_dim": 16},
    "olmo": {},
    "olmo2": {},
    "phi3": {},
    "gpt_neox": {"num_key_value_heads": None},
    "gpt2": {},
    # A gate beside the queries.
    "qwen3_next": EXPERTS | {"head_dim": 16, "layer_types": ["linear_attention", "full_attention"]},
    "qwen3_5_text": {"head_dim": 16, "layer_types": ["linear_attention", "full_attention"]},
    "qwen3_5_moe_text": EXPERTS | {"head_dim": 16, "layer_types": ["linear_attention", "full_attention"]},
    # Norms and clipping between projection and comparison, under several names.
    "stablelm": {"qk_layernorm": True},
    "phi": {"qk_layernorm": True},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "hunyuan_v1_dense": {"head_dim": 8},
    "nanochat": {},
    "exaone4": {},
    "gemma3_text": {"head_dim": 16},
    "cohere": {"use_qk_norm": True},
    "llama4_text": {"head_dim": 16, "intermediate_size_mlp": 48, "num_local_experts": 2},
    "clipped olmo": {"clip_qkv": 0.05},
    "clipped olmoe": EXPERTS | {"clip_qkv": 0.9},
    # A factor that all share.
    "opt": {"word_embed_proj_dim": 32, "ffn_dim": 48, "num_key_value_heads": None},
    "yarn llama": {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0}},
}


def build(name: str) -> PreTrainedModel:
    if name == "gpt2":
        return tiny_gpt2()
    options = {key: value for key, value in (SIZES | ARCHITECTURES[name]).items() if value is not None}
    torch.manual_seed(0)
    config = AutoConfig.for_model(name.split()[-1], **options)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    with torch.no_grad():
        for parameter in model.parameters():  # so that no norm or bias does nothing
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_vectors_are_what_the_attention_receives_at_position_zero(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rotary embedding turns nothing at position 0, so there the hooked vectors are the attention's own inputs."""
    model = build(name)
    received: list[tuple[Tensor, Tensor]] = []

    def recording(module: Any, query: Tensor, key: Tensor, *args: Any, **options: Any) -> Any:
        received.append((query, key))
        return sdpa_attention_forward(module, query, key, *args, **options)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", recording)
    layer = AttentionLayer(model, layer=-1)
    ids = torch.randint(3, 90, (3, 5))
    with torch.no_grad(), layer.capture_queries() as queries, layer.capture_keys() as keys:
        model(input_ids=ids, use_cache=False)
    query, key = received[-1]  # [B, heads, S, D]
    for captured, compared in ((queries.heads()[:, 0], query[:, :, 0]), (keys.heads()[:, 0], key[:, :, 0])):
        factor = (compared.norm() / captured.norm()).item()
        if name not in ("opt", "yarn llama"):
            assert factor == pytest.approx(1, abs=1e-5)
        torch.testing.assert_close(factor * captured, compared, atol=1e-5, rtol=1e-4)
    assert layer.heads == AttentionHeads(query.shape[1], key.shape[1], query.shape[3])
    assert queries.heads().shape == (3, 5, query.shape[1], query.shape[3])
    # The keys of a memory are read without the rest of the forward.
    with torch.no_grad():
        torch.testing.assert_close(layer.run_to_keys(model.base_model, ids), keys.heads(), atol=1e-5, rtol=1e-4)


def test_fused_gpt2_equals_its_weight_by_hand() -> None:
    model = tiny_gpt2()
    layer, ids = AttentionLayer(model), torch.randint(0, 90, (2, 4))
    with torch.no_grad(), layer.capture_keys() as keys:
        states = model(input_ids=ids, output_hidden_states=True).hidden_states[-2]
    block = model.transformer.h[-1]
    fused = block.ln_1(states) @ block.attn.c_attn.weight + block.attn.c_attn.bias
    torch.testing.assert_close(keys.heads(), fused[..., 32:64].unflatten(-1, (4, 8)), atol=1e-5, rtol=1e-4)


def test_lora_counts_and_is_off_for_the_base(llama: PreTrainedModel) -> None:
    model, ids = adapted(llama), torch.randint(1, 90, (2, 4))
    layer = AttentionLayer(model.get_base_model())
    with torch.no_grad():
        with layer.capture_queries() as with_adapter:
            model(input_ids=ids)
        with model.disable_adapter(), layer.capture_queries() as without:
            model(input_ids=ids)
        with AttentionLayer(tiny_llama()).capture_queries() as never_adapted:
            tiny = tiny_llama()
            AttentionLayer(tiny)
            tiny(input_ids=ids)
    assert (with_adapter.mean() - without.mean()).abs().max() > 1e-3
    assert never_adapted.outputs == []  # a capture belongs to one model
    with torch.no_grad(), AttentionLayer(tiny).capture_queries() as base:
        tiny(input_ids=ids)
    torch.testing.assert_close(without.mean(), base.mean())


def test_capture_joins_decoding_steps_and_removes_its_hook(model: PreTrainedModel) -> None:
    layer, ids = AttentionLayer(model), torch.randint(1, 90, (2, 6))
    with torch.no_grad():
        with layer.capture_queries() as whole:
            model(input_ids=ids)
        with layer.capture_queries() as steps:
            held = {cache_argument(model, model): DynamicCache(config=model.config)}
            model(input_ids=ids[:, :3], **held)
            for position in range(3, 6):
                model(input_ids=ids[:, position : position + 1], **held)
        model(input_ids=ids)
    torch.testing.assert_close(whole.heads(), steps.heads(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(whole.mean(), whole.heads().mean(dim=1))
    assert (len(whole.outputs), len(steps.outputs)) == (1, 4)


def test_hook_is_removed_after_an_error(llama: PreTrainedModel) -> None:
    layer = AttentionLayer(llama)
    with pytest.raises(KeyboardInterrupt), layer.capture_keys() as capture:
        raise KeyboardInterrupt
    llama(input_ids=torch.randint(1, 90, (1, 4)))
    assert capture.outputs == []


def test_layers_are_counted_from_both_ends(llama: PreTrainedModel) -> None:
    assert AttentionLayer(llama, 0).layer == 0
    assert AttentionLayer(llama, -1).layer == 1
    with pytest.raises(ValueError, match=r"attention_layer must be in -2\.\.1 for a model of 2 layers, got 2"):
        AttentionLayer(llama, 2)


def test_unknown_architectures_are_refused_by_name() -> None:
    torch.manual_seed(0)
    bloom = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("bloom", vocab_size=50, hidden_size=16, n_layer=1, n_head=2)
    )
    with pytest.raises(UnsupportedArchitectureError, match=r"BloomForCausalLM.*'bloom'.*supported are.*q_proj"):
        AttentionLayer(bloom)
    mamba = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("mamba", vocab_size=50, hidden_size=16, num_hidden_layers=1, state_size=4)
    )
    with pytest.raises(
        UnsupportedArchitectureError, match=r"layer -1 of MambaForCausalLM.*'mamba'.*nor has another layer; supp"
    ):
        AttentionLayer(mamba)


def test_weights_that_are_not_finite_are_refused_as_such(llama: PreTrainedModel) -> None:
    with torch.no_grad():
        llama.model.layers[0].mlp.up_proj.weight[3, 2] = float("nan")
    with pytest.raises(UnsupportedArchitectureError, match=r"LlamaForCausalLM.*not finite.*weights hold NaN"):
        AttentionLayer(llama)


def test_uneven_heads_are_refused() -> None:
    with pytest.raises(UnsupportedArchitectureError, match="5 query heads cannot share 2"):
        AttentionHeads(5, 2, 8)


def test_all_attention_projections_get_an_adapter() -> None:
    assert find_attention_projections(tiny_llama()) == [f"self_attn.{x}_proj" for x in "koqv"]
    assert find_attention_projections(tiny_gpt2()) == ["attn.c_attn", "attn.c_proj"]
    model = get_peft_model(tiny_gpt2(), LoraConfig(target_modules=["attn.c_attn", "attn.c_proj"], fan_in_fan_out=True))
    targeted = {name.split(".lora_A")[0] for name, _ in model.named_parameters() if ".lora_A" in name}
    assert len(targeted) == 4
    assert not any(".mlp." in name for name in targeted)
