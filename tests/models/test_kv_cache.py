"""The preallocated cache against transformers' own, and its views of shared memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from model_builders import sliding_model
from tiny import tiny_gpt2, tiny_llama
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel

from attention_rl_trainer.models.kv_cache import (
    PreallocatedCache,
    cache_argument,
    keeps_every_token,
    memory_bytes,
    new_cache,
)
from attention_rl_trainer.models.projections import UnsupportedArchitectureError


def read(model: PreTrainedModel, ids: Tensor, cache: Cache) -> Tensor:
    held = {cache_argument(model.base_model, model): cache}
    with torch.no_grad():
        hidden: Tensor = model.base_model(input_ids=ids, use_cache=True, **held).last_hidden_state
    return hidden


def test_equals_the_dynamic_cache(model: PreTrainedModel) -> None:
    ids = torch.randint(1, 380, (3, 12))
    ours, theirs = PreallocatedCache(2, 3, 12), DynamicCache(config=model.config)
    for start, end in [(0, 5), (5, 6), (6, 7), (7, 12)]:
        torch.testing.assert_close(
            read(model, ids[:, start:end], ours), read(model, ids[:, start:end], theirs), atol=1e-6, rtol=0
        )
    assert ours.length == ours.get_seq_length() == 12


def test_a_length_set_back_forgets(llama: PreTrainedModel) -> None:
    ids, other = torch.randint(1, 380, (2, 9)), torch.randint(1, 380, (2, 4))
    cache = PreallocatedCache(2, 2, 9)
    read(llama, ids[:, :5], cache)
    read(llama, other, cache)
    cache.length = 5
    again = read(llama, ids[:, 5:], cache)
    torch.testing.assert_close(again, llama.base_model(input_ids=ids, use_cache=False).last_hidden_state[:, 5:])
    cache.crop(-4)
    assert cache.length == 5
    torch.testing.assert_close(read(llama, ids[:, 5:], cache), again, rtol=0, atol=0)


def test_a_view_writes_its_rows_alone(llama: PreTrainedModel) -> None:
    ids = torch.randint(1, 380, (4, 8))
    cache = PreallocatedCache(2, 4, 8)
    read(llama, ids[:, :5], cache)
    below = cache.view(slice(2, 4))
    assert below.length == 5
    read(llama, ids[2:, 5:7], below)
    assert (below.length, cache.length) == (7, 5)
    below.length = 5
    # The rows above continue as if nothing had happened; those below wrote something else and are read again.
    hidden = read(llama, ids[:, 5:], cache)
    expected = llama.base_model(input_ids=ids, use_cache=False).last_hidden_state[:, 5:]
    torch.testing.assert_close(hidden, expected, atol=1e-5, rtol=0)
    taken = cache.view(slice(0, 2))
    assert taken.length == 8


def test_two_views_fill_one_cache(llama: PreTrainedModel) -> None:
    ids = torch.randint(1, 380, (4, 6))
    cache = PreallocatedCache(2, 4, 6)
    for rows in (slice(0, 2), slice(2, 4)):
        read(llama, ids[rows, :5], cache.view(rows))
    cache.length = 5
    expected = llama.base_model(input_ids=ids, use_cache=False).last_hidden_state[:, 5:]
    torch.testing.assert_close(read(llama, ids[:, 5:], cache), expected, atol=1e-5, rtol=0)


def test_more_tokens_than_it_was_made_for_are_refused(llama: PreTrainedModel) -> None:
    cache = PreallocatedCache(2, 1, 4)
    with pytest.raises(ValueError, match="made for 4 tokens, got 5"):
        read(llama, torch.randint(1, 380, (1, 5)), cache)


def test_memory_is_allocated_once() -> None:
    model = tiny_llama()
    cache = PreallocatedCache(2, 3, 10)
    assert memory_bytes(cache) == 0
    read(model, torch.randint(1, 380, (3, 2)), cache)
    # 2 layers, keys and values, 3 rows, 2 groups, 10 tokens, 8 dimensions, float32
    assert memory_bytes(cache) == 2 * 2 * 3 * 2 * 10 * 8 * 4
    before = [buffer.data_ptr() for buffer in cache.buffers]
    assert len(set(before)) == 4
    read(model, torch.randint(1, 380, (3, 8)), cache)
    assert [buffer.data_ptr() for buffer in cache.buffers] == before


def test_memory_grows_by_pieces_and_never_beyond_the_capacity(llama: PreTrainedModel) -> None:
    ids = torch.randint(1, 380, (3, 10))
    cache = PreallocatedCache(2, 3, 10, piece=4)
    below = cache.view(slice(1, 3))
    expected = llama.base_model(input_ids=ids, use_cache=False).last_hidden_state
    for start, end, places in [(0, 3, 4), (3, 4, 4), (4, 9, 10), (9, 10, 10)]:
        hidden = read(llama, ids[:, start:end], cache)
        torch.testing.assert_close(hidden, expected[:, start:end], atol=1e-5, rtol=0)
        assert memory_bytes(cache) == 2 * 2 * 3 * 2 * places * 8 * 4
    # A view that was made before the memory was reads what has been written since.
    below.length = 9
    torch.testing.assert_close(read(llama, ids[1:, 9:], below), expected[1:, 9:], atol=1e-5, rtol=0)


def test_empty_places_are_finite(llama: PreTrainedModel) -> None:
    cache = PreallocatedCache(2, 2, 64, piece=32)
    read(llama, torch.randint(1, 380, (2, 40)), cache)
    assert len(cache.buffers) == 4
    assert all(bool((buffer[:, :, 40:] == 0).all()) for buffer in cache.buffers)


def test_layers_that_forget_are_distinguished() -> None:
    assert keeps_every_token(tiny_llama())
    assert keeps_every_token(tiny_gpt2())
    assert not keeps_every_token(sliding_model())


def test_a_new_cache_is_preallocated_where_every_token_is_kept(model: PreTrainedModel) -> None:
    ids = torch.randint(1, 380, (3, 200))
    cache = new_cache(model, 3, 300)
    assert isinstance(cache, PreallocatedCache)
    # On a CPU in pieces of 128 tokens, and no further than the capacity.
    for end, places in [(5, 128), (128, 128), (200, 256)]:
        read(model, ids[:, cache.length : end], cache)
        assert {buffer.shape[2] for buffer in cache.buffers} == {places}
    with pytest.raises(ValueError, match="made for 300 tokens, got 400"):
        read(model, torch.randint(1, 380, (3, 200)), cache)
    sliding = sliding_model()
    theirs = new_cache(sliding, 3, 40)
    assert type(theirs) is DynamicCache
    torch.testing.assert_close(
        read(sliding, ids[:, :40], theirs), sliding.base_model(input_ids=ids[:, :40]).last_hidden_state
    )


class Forwards(nn.Module):
    """Hands on whatever it is given, as some backbones do."""

    def forward(self, **arguments: Any) -> None: ...


class Renamed(nn.Module):
    def forward(self, input_ids: Tensor, cache: Cache | None = None, **arguments: Any) -> None: ...


class Named(nn.Module):
    def forward(self, input_ids: Tensor, past_key_values: Cache | None = None) -> None: ...


class Recurrent(nn.Module):
    def forward(self, input_ids: Tensor, cache_params: Cache | None = None) -> None: ...


def test_the_cache_goes_by_the_name_that_the_forward_has() -> None:
    assert cache_argument(Renamed(), Renamed()) == "cache"
    assert cache_argument(Named(), Named()) == "past_key_values"
    assert cache_argument(Recurrent(), Recurrent()) == "cache_params"
    # Code that came with a model keeps its own name, whatever the installed transformers calls it.
    assert cache_argument(Named(), Renamed()) == "past_key_values"
    assert cache_argument(Forwards(), Renamed()) == "cache"
    with pytest.raises(UnsupportedArchitectureError, match=r"Forwards reads without a key-value cache.*none of cache"):
        cache_argument(Forwards(), Forwards())


def test_a_forward_that_was_wrapped_keeps_the_name(llama: PreTrainedModel) -> None:
    name = cache_argument(llama.base_model, llama)
    assert cache_argument(Forwards(), add_hook_to_module(llama, ModelHook())) == name
