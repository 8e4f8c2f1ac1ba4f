"""Groups of queries: what further queries of a context are, earn, and leave as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import make_policy, make_sampler, random_batch, tiny_llama
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from attention_rl_trainer.models.causal_lm import deterministic_inference
from attention_rl_trainer.models.decoding import DecodedQuery, ReplayedDecoder
from attention_rl_trainer.models.readers import open_readers
from attention_rl_trainer.rollout.groups import leave_one_out
from attention_rl_trainer.rollout.sampler import TrajectorySampler
from attention_rl_trainer.types import Trajectory

ROWS, LENGTH, VALUE = 3, 4, 5


def rolled_out(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, **options: Any) -> Trajectory:
    return make_sampler(model, tokenizer, **options).sample(random_batch(ROWS), range(ROWS))


def plain_scores(sampler: TrajectorySampler, text: Tensor) -> Tensor:
    """Log-probability of each token of a text ``[B, S]`` after those before it, over the whole vocabulary."""
    with deterministic_inference(sampler.policy.model):
        scores = sampler.policy.model(input_ids=text).logits.float().log_softmax(dim=-1)
    return scores[:, :-1].gather(2, text[:, 1:, None]).squeeze(2)


@pytest.mark.parametrize("joint", [False, True])
def test_other_queries_are_the_policys_and_earn_what_a_plain_forward_says(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, joint: bool
) -> None:
    sampler = make_sampler(model, tokenizer, joint=joint, num_queries=3, policy_options={"query_temperature": 0.8})
    trajectory = sampler.sample(random_batch(ROWS), range(ROWS))

    response = torch.tensor(sampler.layout.separators.response).expand(ROWS, -1)
    for step in trajectory.steps:
        assert step.other_queries is not None
        assert step.other_query_logprobs is not None
        assert step.other_rewards is not None
        for number in range(2):
            query = step.other_queries[:, number]
            with deterministic_inference(sampler.policy.model):
                states = sampler.policy.forward(torch.cat([step.context_tokens, query], dim=1))[:, -LENGTH - 1 : -1]
            logprobs = sampler.policy.query_token_logprobs(states, query)
            torch.testing.assert_close(step.other_query_logprobs[:, number], logprobs, atol=1e-5, rtol=0)
            text = torch.cat([step.context_tokens, query, response, step.selected_pair.value_tokens], dim=1)
            earned = plain_scores(sampler, text)[:, -VALUE:].mean(dim=1) - step.counterfactual_value_logprob
            torch.testing.assert_close(step.other_rewards[:, number], earned, atol=1e-5, rtol=0)
    queries = torch.cat([trajectory.stack("query_tokens")[:, :, None], trajectory.stack("other_queries")], dim=2)
    assert len(queries.flatten(0, 2).unique(dim=0)) > ROWS * 3


@pytest.mark.parametrize("joint", [False, True])
def test_the_query_that_goes_on_is_what_it_was_without_others(tokenizer: PreTrainedTokenizerFast, joint: bool) -> None:
    alone = rolled_out(tiny_llama(), tokenizer, joint=joint)
    in_group = rolled_out(tiny_llama(), tokenizer, joint=joint, num_queries=4)

    assert torch.equal(in_group.token_ids, alone.token_ids)
    assert alone.steps[0].other_queries is None
    for name in ("reward", "query_logprobs", "selection_probabilities"):
        torch.testing.assert_close(in_group.stack(name), alone.stack(name), atol=1e-5, rtol=0)
    assert in_group.forward_tokens > alone.forward_tokens


def test_the_rest_of_the_reward_is_the_same_for_all(tokenizer: PreTrainedTokenizerFast) -> None:
    plain = rolled_out(tiny_llama(), tokenizer, num_queries=2)
    paid = rolled_out(tiny_llama(), tokenizer, num_queries=2, order_coef=0.5, information_coef=2.0)

    added = paid.stack("reward") - plain.stack("reward")
    assert added.abs().min() > 1e-6
    torch.testing.assert_close(paid.stack("other_rewards") - plain.stack("other_rewards"), added[:, :, None])


def test_a_reward_of_ones_own_judges_one_query(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match=r"^num_queries is 2, but a reward_fn judges the query that drew the pair"):
        make_sampler(tiny_llama(), tokenizer, num_queries=2, reward_fn=lambda step: step.reward)


def test_each_is_compared_with_the_mean_of_the_others() -> None:
    found = leave_one_out(torch.tensor([[1.0, 2.0, 6.0], [0.0, 0.0, 0.0]]))

    assert found.tolist() == [[-3.0, -1.5, 4.5], [0.0, 0.0, 0.0]]


@pytest.mark.parametrize("joint", [False, True])
def test_queries_that_are_forgotten_leave_the_context_as_it_was(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, joint: bool
) -> None:
    policy = make_policy(model, tokenizer)
    prompt = torch.randint(1, 380, (2, 9), generator=torch.Generator().manual_seed(0))
    noise = torch.rand(5, 2, LENGTH, dtype=torch.float64)
    with policy.inference():
        readers = [open_readers(policy, prompt, 60, joint=joint, num_queries=count) for count in (4, 1)]
        for _ in range(2):
            found = readers[0].write_queries(noise[0], noise[1], noise[2:].transpose(0, 1))
            expected = readers[1].write_queries(noise[0], noise[1])
            blocks = [prompt[:, :3]] * 2
            states = [reader.read_response(block, 3) for reader, block in zip(readers, blocks, strict=True)]
            for of_group, alone in zip(*states, strict=True):
                torch.testing.assert_close(of_group[:, :3], alone[:, :3], atol=1e-5, rtol=0)
            text = torch.cat([expected.query.token_ids, prompt[:, :3]], dim=1)
            followed = [reader.follow(text) for reader in readers]
            torch.testing.assert_close(*followed, atol=1e-5, rtol=0)
            assert len(found.others) == 3
            assert not torch.equal(found.others[0].token_ids, found.others[1].token_ids)
            assert torch.equal(found.query.token_ids, expected.query.token_ids)
            assert torch.equal(found.counterfactual.token_ids, expected.counterfactual.token_ids)
            torch.testing.assert_close(found.vectors, expected.vectors, atol=1e-5, rtol=0)
    assert readers[0].forward_tokens > readers[1].forward_tokens


def test_what_is_replayed_has_the_hooks_that_it_was_captured_with(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph that was captured without the query's hooks would give no vectors where it is replayed."""
    hooked: list[int] = []
    decode = ReplayedDecoder.decode

    def note(decoder: ReplayedDecoder, *arguments: Any, **options: Any) -> DecodedQuery:
        hooked.append(len(options["captures"]))
        return decode(decoder, *arguments, **options)

    monkeypatch.setattr(ReplayedDecoder, "decode", note)
    policy = make_policy(tiny_llama(), tokenizer)
    noise = torch.rand(4, 2, LENGTH, dtype=torch.float64)
    with policy.inference():
        readers = open_readers(policy, torch.randint(1, 380, (2, 9)), 60, joint=False, replay=True)
        readers.write_queries(noise[0], noise[1], noise[2:].transpose(0, 1))
    # Two others and the query itself of the policy, and one of the reference, whose cache is its own.
    assert hooked == [1, 1, 1, 0]
