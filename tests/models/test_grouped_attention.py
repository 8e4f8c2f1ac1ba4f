"""Attention by key groups is the attention that transformers computes."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_gpt2, tiny_llama
from torch import nn
from transformers import DynamicCache, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from attention_rl_trainer.models import grouped_attention as module_under_test
from attention_rl_trainer.models.grouped_attention import (
    NAME,
    attend_by_products,
    grouped_attention,
    grouped_attention_forward,
)
from attention_rl_trainer.models.kv_cache import cache_argument


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


def triangle(num_queries: int, context: int) -> torch.Tensor:
    return torch.ones(num_queries, context, dtype=torch.bool).tril(context - num_queries)


@pytest.mark.parametrize("rows_at_once", [1, 2, 5])
@pytest.mark.parametrize("scaling", [0.3, 1.0])
def test_products_equal_the_formula(rows_at_once: int, scaling: float, monkeypatch: pytest.MonkeyPatch) -> None:
    query, (key, value) = torch.randn(5, 2, 4, 8), torch.randn(2, 5, 2, 7, 8)
    bias = torch.zeros(4, 7).masked_fill(~triangle(4, 7), -torch.inf)
    monkeypatch.setattr(module_under_test, "SCORES_BYTES", rows_at_once * 2 * 4 * 7 * 4)
    for added in (bias, bias[3:], None):
        scores = scaling * query @ key.transpose(2, 3)
        expected = (scores if added is None else scores + added).softmax(-1) @ value
        torch.testing.assert_close(attend_by_products(query, key, value, added, scaling), expected, atol=1e-6, rtol=0)


def in_buffer(states: torch.Tensor, num_places: int) -> torch.Tensor:
    """The same states as the first places of a buffer; those after them hold something else."""
    buffer = states.new_full((*states.shape[:2], num_places, states.shape[3]), 50.0)
    buffer[:, :, : states.shape[2]] = states
    return buffer[:, :, : states.shape[2]]


@pytest.mark.parametrize("num_places", [9, 12])
@pytest.mark.parametrize(("heads", "groups"), [(6, 2), (4, 4), (4, 1)])
@pytest.mark.parametrize("num_queries", [1, 4])
@pytest.mark.parametrize("additive", [False, True])
def test_products_run_in_bfloat16_over_a_buffer_and_equal_transformers_attention(
    additive: bool, num_queries: int, heads: int, groups: int, num_places: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    query = torch.randn(3, heads, num_queries, 8, dtype=torch.bfloat16)
    states = torch.randn(2, 3, groups, 9, 8, dtype=torch.bfloat16)
    key, value = in_buffer(states[0], num_places), in_buffer(states[1], num_places)
    mask = triangle(num_queries, 9)[None, None] if num_queries > 1 else None
    seen = None if mask is None else mask.expand(3, -1, -1, -1)
    expected, _ = sdpa_attention_forward(Attention(heads // groups), query.float(), *states.float(), seen)
    if additive and mask is not None:
        mask = torch.zeros(1, 1, num_queries, 9, dtype=torch.bfloat16).masked_fill(~mask, -torch.inf)
    calls = []
    monkeypatch.setattr(
        module_under_test,
        "attend_by_products",
        lambda *arguments: calls.append(arguments[1].shape) or attend_by_products(*arguments),
    )
    got, _ = grouped_attention_forward(Attention(heads // groups), query, key, value, mask)
    assert calls == [(3, groups, num_places, 8)]
    torch.testing.assert_close(got.float(), expected, atol=2e-2, rtol=0)


def test_a_place_that_sees_nothing_gets_a_number() -> None:
    query, states = torch.randn(1, 4, 3, 8, dtype=torch.bfloat16), torch.randn(2, 1, 2, 9, 8, dtype=torch.bfloat16)
    mask = triangle(3, 9)[None, None].clone()
    mask[..., 0, :] = False
    got, _ = grouped_attention_forward(Attention(2), query, in_buffer(states[0], 16), in_buffer(states[1], 16), mask)
    expected, _ = sdpa_attention_forward(Attention(2), query.float(), *states.float(), mask)

    assert got[:, 0].isfinite().all()
    torch.testing.assert_close(got[:, 1:].float(), expected[:, 1:], atol=2e-2, rtol=0)


def test_what_is_not_a_slice_of_a_buffer_or_has_its_end_outside_is_left_to_the_kernel(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(module_under_test, "attend_by_products")
    query = torch.randn(3, 4, 1, 8, dtype=torch.bfloat16)
    states = torch.randn(2, 3, 2, 12, 8, dtype=torch.bfloat16)
    by_token = states.transpose(2, 3).contiguous().transpose(2, 3)
    for key, value in [by_token, (states[0][:, :, 3:], states[1][:, :, 3:]), (states[0], by_token[1])]:
        expected, _ = sdpa_attention_forward(Attention(2), query, key, value, None)
        got, _ = grouped_attention_forward(Attention(2), query, key, value, None)
        torch.testing.assert_close(got, expected, atol=1e-2, rtol=0)


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
        held = {cache_argument(model.base_model, model): DynamicCache(config=model.config)}
        pieces = [ids[:, :4], ids[:, 4:5], ids[:, 5:]]
        with torch.no_grad():
            states = [model.base_model(input_ids=piece, **held).last_hidden_state for piece in pieces]
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
