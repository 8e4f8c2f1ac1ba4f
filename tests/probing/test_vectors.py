"""Vectors of half keys and keys against plain forwards without a cache, one sequence at a time."""

from __future__ import annotations

import random
from contextlib import nullcontext

import pytest
import torch
from tiny import adapted, random_batch
from tiny_families import build
from torch import Tensor
from transformers import PreTrainedModel

from attention_rl_trainer.memories.pairs import MemoryBatch
from attention_rl_trainer.models.attention import AttentionLayer
from attention_rl_trainer.models.heads import readable_layers
from attention_rl_trainer.models.policy import PolicyModel, PolicyOptions
from attention_rl_trainer.probing.vectors import LayerVectors, half_length, iter_vectors, join_vectors
from attention_rl_trainer.rollout.layout import Layout, Separators

SEPARATORS = Separators(query=(5, 6), response=(7,))
LAYOUT = Layout(SEPARATORS, 2, tokens_per_query=4, tokens_per_key=6, tokens_per_value=5)


def policy_of(model: PreTrainedModel) -> PolicyModel:
    """A policy whose adapter changes everything that is read with it."""
    layers = readable_layers(model)
    return PolicyModel(adapted(model, scale=0.5), torch.arange(5, 380), PolicyOptions(attention_layer=max(layers)))


def read(policy: PolicyModel, batch: MemoryBatch, layout: Layout = LAYOUT) -> dict[int, LayerVectors]:
    return join_vectors(list(iter_vectors(policy, layout, batch, readable_layers(policy.causal_lm))))


def prompt_by_hand(batch: MemoryBatch, row: int) -> list[int]:
    example = [*batch.example_keys[row].tolist(), 7, *batch.example_values[row].tolist()]
    return [5, 6, *example, 5, 6]


def slow(policy: PolicyModel, batch: MemoryBatch, number: int, *, adapter: bool = False) -> tuple[Tensor, Tensor]:
    """The definition: the layer's queries ``[n, M, H, D]`` and keys ``[n, M, G, D]``."""
    model, layer = policy.model.eval(), AttentionLayer(policy.causal_lm, number)
    rows, num_pairs, length = batch.key_tokens.shape
    queries, keys = [], []
    for row in range(rows):
        for pair in range(num_pairs):
            key = batch.key_tokens[row, pair].tolist()
            half = key[: -(-length // 2)]
            with torch.no_grad(), nullcontext() if adapter else model.disable_adapter():
                with layer.capture_queries() as capture:
                    model(input_ids=torch.tensor([prompt_by_hand(batch, row) + half]), use_cache=False)
                queries.append(capture.heads()[0, -len(half) :].mean(dim=0))
                with layer.capture_keys() as capture:
                    model(input_ids=torch.tensor([key]), use_cache=False)
                keys.append(capture.heads()[0].mean(dim=0))
    return tuple(torch.stack(side).unflatten(0, (rows, num_pairs)) for side in (queries, keys))


@pytest.mark.parametrize(
    "family",
    [
        *("llama", "gpt2", "gpt_neox", "phi3", "qwen3", "gemma", "llama+multi_query", "gpt_bigcode"),
        # A window of 8 tokens, which the prompt does not fit into; a convolution before and after the attention.
        *("mistral", "qwen2+sliding", "lfm2"),
        # Attention beside a recurrence in the same layer, and one layer of each.
        *("falcon_h1", "granitemoehybrid"),
    ],
)
def test_equal_forwards_without_a_cache(family: str) -> None:
    policy, batch = policy_of(build(family)), random_batch(2, num_pairs=3)
    policy.model.train()
    found = read(policy, batch)
    assert policy.model.training
    assert found.keys() == readable_layers(policy.causal_lm).keys()
    for number, vectors in found.items():
        queries, keys = slow(policy, batch, number)
        torch.testing.assert_close(vectors.queries, queries, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(vectors.keys, keys, atol=2e-5, rtol=1e-4)
    last = max(found)
    for expected, with_adapter in zip(slow(policy, batch, last), slow(policy, batch, last, adapter=True), strict=True):
        assert (expected - with_adapter).norm() > 0.05 * expected.norm()


@pytest.mark.parametrize(("length", "half"), [(1, 1), (2, 1), (5, 3), (6, 3), (20, 10)])
def test_half_a_key(length: int, half: int) -> None:
    assert half_length(length) == half


@pytest.mark.parametrize("length", [1, 2, 5])
def test_keys_of_other_lengths(length: int) -> None:
    policy, batch = policy_of(build("llama")), random_batch(2, num_pairs=3, key_length=length)
    vectors = read(policy, batch)[1]
    queries, keys = slow(policy, batch, 1)
    torch.testing.assert_close(vectors.queries, queries, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(vectors.keys, keys, atol=2e-5, rtol=1e-4)


def test_more_pairs_than_are_read_at_once() -> None:
    policy, batch = policy_of(build("llama")), random_batch(1, num_pairs=70)
    vectors = read(policy, batch)[1]
    queries, keys = slow(policy, batch, 1)
    torch.testing.assert_close(vectors.queries, queries, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(vectors.keys, keys, atol=2e-5, rtol=1e-4)


def test_memories_do_not_depend_on_each_other() -> None:
    policy, batch = policy_of(build("llama")), random_batch(3, num_pairs=3)
    together = read(policy, batch)[0]
    turned = read(policy, batch.select_rows([2, 0]))[0]
    assert torch.equal(turned.queries, together.queries[[2, 0]])
    assert torch.equal(turned.keys, together.keys[[2, 0]])
    assert torch.equal(together.rows(slice(1, None)).queries, together.queries[1:])
    assert torch.equal(together.rows(slice(1, None)).keys, together.keys[1:])


def test_half_keys_stand_behind_the_keys_that_are_shown() -> None:
    policy, batch = policy_of(build("llama")), random_batch(1, num_pairs=2)
    shown = Layout(Separators((5, 6), (7,), ((8,), (9, 10), (11,))), 2, 4, 6, 5)
    queries = read(policy, batch, shown)[1].queries
    keys = batch.key_tokens[0].tolist()
    listed = [8, *keys[0], 9, 10, *keys[1], 11, *prompt_by_hand(batch, 0)]
    layer = AttentionLayer(policy.causal_lm, 1)
    for pair in range(2):
        ids = torch.tensor([listed + keys[pair][:3]])
        with policy.inference(), policy.reference(), layer.capture_queries() as capture:
            policy.forward(ids)
        torch.testing.assert_close(queries[0, pair], capture.heads()[0, -3:].mean(dim=0), atol=2e-5, rtol=1e-4)
    assert not torch.allclose(queries, read(policy, batch)[1].queries, atol=1e-3)


def test_nothing_is_left_behind() -> None:
    policy, batch = policy_of(build("llama")), random_batch(2, num_pairs=3)
    policy.embed_keys(batch.key_tokens[0])
    remembered, embedded = len(policy.key_cache), policy.embedded_tokens
    weights = {name: tensor.clone() for name, tensor in policy.model.state_dict().items()}
    states = torch.get_rng_state(), random.getstate()
    policy.model.train()
    steps = iter_vectors(policy, LAYOUT, batch, readable_layers(policy.causal_lm))
    next(steps)
    # Between two memories the policy is as it was, so that a bar may be closed and a fit interrupted.
    assert policy.model.training
    assert torch.is_grad_enabled()
    next(steps)
    steps.close()
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert all(torch.equal(tensor, weights[name]) for name, tensor in policy.model.state_dict().items())
    assert all(parameter.grad is None for parameter in policy.model.parameters())
    assert (len(policy.key_cache), policy.embedded_tokens) == (remembered, embedded)
    ids = batch.example_keys
    with policy.inference():
        adapter_on = policy.forward(ids)
        with policy.reference():
            assert not torch.allclose(policy.forward(ids), adapter_on, atol=1e-3)
    hooks = [len(module._forward_hooks) for module in policy.model.modules()]
    assert sum(hooks) == 0
