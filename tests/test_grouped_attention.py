"""Attention by key groups is the attention that transformers computes."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_gpt2, tiny_llama
from torch import nn
from transformers import DynamicCache, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from attention_rl_trainer.grouped_attention import NAME, grouped_attention, grouped_attention_forward


class Attention(nn.Module):
    """What transformers' function asks of the module."""

    def __init__(self, num_key_value_groups: int) -> None:
        super().__init__()
        self.num_key_value_groups = num_key_value_groups
        self.is_causal = True


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scaling", [None, 0.3])
@pytest.mark.parametrize(("heads", "groups"), [(6, 2), (4, 4), (4, 1)])
@pytest.mark.parametrize(("num_queries", "context"), [(1, 9), (4, 9), (5, 5)])
def test_equals_transformers_attention(
    num_queries: int, context: int, heads: int, groups: int, scaling: float | None, dtype: torch.dtype
) -> None:
    query = torch.randn(3, heads, num_queries, 8, dtype=dtype)
    key, value = torch.randn(2, 3, groups, context, 8, dtype=dtype)
    mask = None
    if 1 < num_queries < context:
        mask = torch.ones(num_queries, context, dtype=torch.bool).tril(context - num_queries).expand(3, 1, -1, -1)
    module = Attention(heads // groups)
    expected, _ = sdpa_attention_forward(module, query, key, value, mask, scaling=scaling)
    got, weights = grouped_attention_forward(module, query, key, value, mask, scaling=scaling)
    assert weights is None
    assert got.is_contiguous()
    torch.testing.assert_close(got, expected, atol=1e-6 if dtype == torch.float32 else 1e-2, rtol=0)


def test_a_mask_for_each_head_is_left_to_transformers() -> None:
    query, key, value = torch.randn(2, 4, 2, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    bias = torch.randn(2, 4, 2, 5)
    expected, _ = sdpa_attention_forward(Attention(2), query, key, value, bias)
    got, _ = grouped_attention_forward(Attention(2), query, key, value, bias)
    torch.testing.assert_close(got, expected, atol=0, rtol=0)


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_a_model_computes_the_same_and_gets_its_own_attention_back(build: type[PreTrainedModel]) -> None:
    model = build()
    ids = torch.randint(1, 380, (3, 9))

    def read() -> torch.Tensor:
        cache = DynamicCache(config=model.config)
        pieces = [ids[:, :4], ids[:, 4:5], ids[:, 5:]]
        with torch.no_grad():
            states = [model.base_model(input_ids=piece, past_key_values=cache).last_hidden_state for piece in pieces]
        return torch.cat(states, dim=1)

    expected = read()
    with grouped_attention(model):
        assert model.config._attn_implementation == NAME
        torch.testing.assert_close(read(), expected, atol=1e-6, rtol=0)
    assert model.config._attn_implementation == "sdpa"
    with pytest.raises(KeyboardInterrupt), grouped_attention(model):
        raise KeyboardInterrupt
    assert model.config._attn_implementation == "sdpa"


def test_another_implementation_stays(llama: PreTrainedModel) -> None:
    llama.set_attn_implementation("eager")
    with grouped_attention(llama):
        assert llama.config._attn_implementation == "eager"
    assert llama.config._attn_implementation == "eager"
