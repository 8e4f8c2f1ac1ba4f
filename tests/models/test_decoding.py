"""Decoding with the same shapes at every token against decoding as it comes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from test_readers import two_steps
from tiny import adapted, make_policy, tiny_llama
from tiny_families import build
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from attention_rl_trainer.models import decoding
from attention_rl_trainer.models.decoding import PlainDecoder, ReplayedDecoder, replays_exactly
from attention_rl_trainer.models.kv_cache import PreallocatedCache, keeps_every_token
from attention_rl_trainer.models.policy import PolicyModel
from attention_rl_trainer.models.readers import open_readers


@pytest.mark.parametrize("joint", [True, False])
@pytest.mark.parametrize("heads", ["layer", ["1.1", "0.2"]])
def test_replaying_equals_decoding_as_it_comes(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    joint: bool,
    heads: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The two steps end at 31 tokens: the context grows out of 16 places, and into the last that there are.
    monkeypatch.setattr(decoding, "PLACES", 16)
    policy = make_policy(model, tokenizer, attention_heads=heads)
    prompt = torch.randint(1, 380, (3, 9))
    with policy.inference():
        replayed = two_steps(open_readers(policy, prompt, 35, joint=joint, replay=True))
        plain = two_steps(open_readers(policy, prompt, 35, joint=joint, replay=False))
    for name, tensor in plain.items():
        torch.testing.assert_close(replayed[name], tensor, atol=1e-5, rtol=0, msg=name)
    assert any("vectors" in name for name in plain)


def test_every_forward_of_a_query_has_the_same_shapes(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = make_policy(llama, tokenizer)
    seen: list[tuple[int, ...]] = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def watched(query: torch.Tensor, key: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        seen.append(tuple(key.shape))
        return attend(query, key, *arguments, **options)

    with policy.inference():
        cache = policy.new_cache(2, 300)
        hidden = policy.forward(torch.randint(1, 380, (2, 125)), cache)[:, -1]
        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
        decoder = ReplayedDecoder(policy)
        decoder.decode(cache, hidden, torch.rand(2, 5, dtype=torch.float64), read_last=True)
        assert {shape[2] for shape in seen} == {256}
        assert cache.get_seq_length() == 130
        decoder.decode(cache, hidden, torch.rand(2, 128, dtype=torch.float64), read_last=False)
    assert {shape[2] for shape in seen} == {256, 300}
    assert cache.get_seq_length() == 257


def test_no_number_is_asked_back_from_the_device(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    policy = make_policy(model, tokenizer)
    noise = torch.rand(3, 4, dtype=torch.float64)
    assert policy.can_read_jointly  # found out with tokens of its own
    # Fake tensors have no numbers: asking for one raises.
    with policy.inference(), FakeTensorMode(allow_non_fake_inputs=True):
        readers = open_readers(policy, torch.randint(1, 380, (3, 9)), 40, joint=True, replay=True)
        assert readers.write_queries(noise, noise).vectors.shape == (3, 4, 8)


class Recorded:
    """Stands in for a captured graph: does the step that it was made of."""

    def __init__(self, step: Callable[[], None], other: Any) -> None:
        self.step, self.other = step, other
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1
        self.step()


def test_a_step_is_captured_once_for_each_number_of_places(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoding, "PLACES", 16)
    policy = make_policy(llama, tokenizer)
    made: list[Recorded] = []

    def capture(step: Callable[[], None], other: Any) -> Recorded:
        made.append(Recorded(step, other))
        return made[-1]

    prompt, noise = torch.randint(1, 380, (2, 5)), torch.rand(2, 6, dtype=torch.float64)
    with policy.inference():
        caches = [policy.new_cache(2, 64) for _ in range(2)]
        hidden = [policy.forward(prompt, cache)[:, -1] for cache in caches]
        decoders = PlainDecoder(policy), ReplayedDecoder(policy, capture)
        # They end at 11, 17 and 23 tokens.
        for _ in range(3):
            expected, found = (
                decoder.decode(cache, states, noise, read_last=True)
                for decoder, cache, states in zip(decoders, caches, hidden, strict=True)
            )
            assert torch.equal(expected.token_ids, found.token_ids)
        # The first token at so many places is decoded without.
        assert [graph.replays for graph in made] == [5, 11]
        assert made[0].other is None
        assert made[1].other is made[0]
        # Another batch has another cache, whose addresses the graphs do not know.
        decoders[1].decode(policy.new_cache(2, 64), hidden[1], noise, read_last=True)
    assert len(made) == 3


def test_one_token_needs_no_graph(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    policy = make_policy(llama, tokenizer)

    def capture(step: Callable[[], None], other: Any) -> Recorded:
        raise AssertionError("nothing is to be captured")

    with policy.inference():
        for read_last in (True, False):
            cache = policy.new_cache(2, 64)
            hidden = policy.forward(torch.randint(1, 380, (2, 5)), cache)[:, -1]
            noise = torch.rand(2, 1, dtype=torch.float64)
            found = ReplayedDecoder(policy, capture).decode(cache, hidden, noise, read_last=read_last)
            expected = policy.draw_tokens(hidden, noise[:, 0])
            assert torch.equal(found.token_ids[:, 0], expected.token_ids)
            assert cache.get_seq_length() == 5 + read_last


def ids_of(policy: PolicyModel) -> torch.Tensor:
    return policy.allowed_ids[torch.arange(35)].view(5, 7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_place_too_far_is_found_out(
    tokenizer: PreTrainedTokenizerFast, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = make_policy(tiny_llama().to(dtype), tokenizer)
    begin = decoding._State.begin

    def shifted(self: Any, last_hidden: torch.Tensor, noise: torch.Tensor, length: int) -> None:
        begin(self, last_hidden, noise, length + 1)

    with policy.inference():
        assert replays_exactly(policy, partial(PreallocatedCache.of, policy.causal_lm), ids_of(policy))
        monkeypatch.setattr(decoding._State, "begin", shifted)
        assert not replays_exactly(policy, partial(PreallocatedCache.of, policy.causal_lm), ids_of(policy))


@pytest.mark.parametrize(("name", "is_exact"), [("qwen3", True), ("gemma", True), ("phi3", True), ("doge", False)])
def test_a_family_is_replayed_where_that_is_exact(
    name: str, is_exact: bool, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = build(name)
    assert keeps_every_token(model)
    policy = PolicyModel(adapted(model), torch.arange(3, 380))
    with policy.inference():
        assert replays_exactly(policy, partial(PreallocatedCache.of, policy.causal_lm), ids_of(policy)) == is_exact


def test_on_a_cpu_nothing_is_replayed(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    assert not make_policy(llama, tokenizer).can_replay


def test_a_model_that_fails_at_it_is_decoded_without(
    llama: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(*arguments: Any) -> bool:
        raise RuntimeError("operation not permitted when stream is capturing")

    policy = make_policy(llama, tokenizer)
    monkeypatch.setattr("attention_rl_trainer.models.policy.replays_exactly", fail)
    monkeypatch.setattr(PolicyModel, "device", property(lambda self: FakeDevice()))
    assert not policy.can_replay
    assert "a step of LlamaForCausalLM cannot be captured" in caplog.text
    assert "not permitted when stream is capturing" in caplog.text


class FakeDevice:
    """Says that it is a CUDA device."""

    type = "cuda"
