"""What queries are worth: each against a whole forward of the base model, and who is compared with whom."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from tiny import make_sampler, random_batch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from attention_rl_trainer.evaluation.queries import (
    CONTROL,
    EMPTY,
    OTHER_KEY,
    OWN_KEY,
    POLICY,
    ControlQueries,
    draw_other_columns,
    names_its_pair,
    rouge_l,
    score_queries,
)
from attention_rl_trainer.models.causal_lm import deterministic_inference
from attention_rl_trainer.models.sampling import Purpose, episode_noise, sample_by_inverse
from attention_rl_trainer.rollout.sampler import TrajectorySampler
from attention_rl_trainer.types import ArticleReference, StreamPosition, Trajectory


def base_log_probabilities(sampler: TrajectorySampler, ids: Tensor) -> Tensor:
    with deterministic_inference(sampler.policy.model), sampler.policy.model.disable_adapter():
        log_probabilities: Tensor = sampler.policy.model(ids[None]).logits.log_softmax(-1)[0]
    return log_probabilities


def value_score(sampler: TrajectorySampler, context: Tensor, query: Tensor, value: Tensor) -> float:
    ids = torch.cat([context, query, torch.tensor(sampler.layout.separators.response), value])
    log_probabilities = base_log_probabilities(sampler, ids)
    places = range(len(ids) - len(value), len(ids))
    return sum(log_probabilities[place - 1, ids[place]].item() for place in places) / len(value)


def sample_query(sampler: TrajectorySampler, context: Tensor, noise: Tensor) -> Tensor:
    """A query of the base model, token by token, from whole forwards."""
    allowed = sampler.policy.allowed_ids
    ids = context
    for number in noise:
        probabilities = base_log_probabilities(sampler, ids)[-1, allowed].exp()
        ids = torch.cat([ids, allowed[sample_by_inverse(probabilities[None], number[None])]])
    return ids[len(context) :]


@pytest.mark.parametrize("key_length", [3, 6])
def test_gains_are_those_of_whole_forwards(
    key_length: int, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    sampler = make_sampler(model, tokenizer, num_steps=3)
    batch = random_batch(3, key_length=key_length)
    episodes = range(4, 7)
    trajectory = sampler.sample(batch, episodes)
    control = torch.randint(1, 380, (3, 3, 4))
    gains = score_queries(sampler, batch, trajectory, control, num_counterfactuals=3)
    other = draw_other_columns(trajectory, sampler.seed)
    noise = episode_noise(sampler.seed, episodes, Purpose.COUNTERFACTUAL, (3, 3, 4))
    for row in range(3):
        expected: dict[str, float] = dict.fromkeys((POLICY, EMPTY, OWN_KEY, OTHER_KEY, CONTROL), 0.0)
        spread = 0.0
        for number, step in enumerate(trajectory.steps):
            context, value = step.context_tokens[row], step.selected_pair.value_tokens[row]
            keys = batch.key_tokens[row]
            queries = {
                POLICY: step.query_tokens[row],
                EMPTY: torch.tensor([], dtype=torch.int64),
                OWN_KEY: keys[step.selected_index[row]],
                OTHER_KEY: keys[other[row, number]],
                CONTROL: control[row, number],
            }
            drawn = [
                value_score(sampler, context, sample_query(sampler, context, noise[row, k, number]), value)
                for k in range(3)
            ]
            assert drawn[0] == pytest.approx(step.counterfactual_value_logprob[row].item(), abs=1e-5)
            for name, query in queries.items():
                expected[name] += (value_score(sampler, context, query, value) - sum(drawn) / 3) / 3
            spread += torch.tensor(drawn).std(correction=0).item() / 3
        assert {name: gain[row].item() for name, gain in gains.gains.items()} == pytest.approx(expected, abs=1e-5)
        assert gains.counterfactual_std[row].item() == pytest.approx(spread, abs=1e-5)


def test_another_key_is_never_the_one_that_was_drawn(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    sampler = make_sampler(llama, tokenizer, num_steps=4)
    trajectory = sampler.sample(random_batch(40, num_pairs=4), range(40))
    other = draw_other_columns(trajectory, sampler.seed)
    chosen = trajectory.stack("selected_index")
    assert not bool((other == chosen).any())
    assert ((other - chosen) % 4).unique().tolist() == [1, 2, 3]


def test_a_memory_of_one_pair_has_no_other_key(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    sampler = make_sampler(llama, tokenizer, num_steps=1)
    batch = random_batch(2, num_pairs=1)
    control = torch.ones(2, 1, 4, dtype=torch.int64)
    gains = score_queries(sampler, batch, sampler.sample(batch, range(2)), control, num_counterfactuals=1)
    assert set(gains.gains) == {POLICY, EMPTY, OWN_KEY, CONTROL}
    assert gains.counterfactual_std.tolist() == [0.0, 0.0]


def test_no_counterfactual_is_refused(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    sampler = make_sampler(llama, tokenizer)
    batch = random_batch(2)
    trajectory = sampler.sample(batch, range(2))
    with pytest.raises(ValueError, match="num_counterfactuals must be at least 1, got 0"):
        score_queries(sampler, batch, trajectory, trajectory.stack("query_tokens"), num_counterfactuals=0)


def slow_rouge_l(first: Sequence[int], second: Sequence[int]) -> float:
    """By the definition: the last tokens are both in the subsequence, or one of them is not."""

    @functools.cache
    def longest(m: int, n: int) -> int:
        if m == 0 or n == 0:
            return 0
        if first[m - 1] == second[n - 1]:
            return longest(m - 1, n - 1) + 1
        return max(longest(m - 1, n), longest(m, n - 1))

    common = longest(len(first), len(second))
    if common == 0:
        return 0.0
    precision, recall = common / len(first), common / len(second)
    return 2 * precision * recall / (precision + recall)


class TestRougeL:
    def test_by_hand(self) -> None:
        query = torch.tensor([1, 2, 3, 4])
        keys = torch.tensor([[1, 2, 3, 4, 5], [4, 3, 2, 1, 9], [1, 7, 3, 7, 4], [6, 7, 8, 9, 6], [3, 4, 1, 2, 3]])
        # The same from the front; backwards; with gaps; nothing shared; the middle (1 2 3) beats the front (3 4).
        assert rouge_l(query, keys).tolist() == pytest.approx([8 / 9, 2 / 9, 6 / 9, 0, 6 / 9])
        assert rouge_l(query, query).item() == 1

    @pytest.mark.parametrize("lengths", [(7, 9), (9, 7), (1, 5), (5, 1)], ids=str)
    @pytest.mark.parametrize("num_tokens", [2, 5])
    def test_against_a_slow_loop(self, lengths: tuple[int, int], num_tokens: int) -> None:
        """Of few different tokens, so that they often agree."""
        queries = torch.randint(num_tokens, (6, 3, lengths[0]))
        keys = torch.randint(num_tokens, (6, 4, lengths[1]))
        found = rouge_l(queries[:, :, None], keys[:, None])
        assert found.shape == (6, 3, 4)
        for row, of_row in enumerate(found.tolist()):
            for number, of_query in enumerate(of_row):
                slow = [slow_rouge_l(queries[row, number].tolist(), key.tolist()) for key in keys[row]]
                assert of_query == pytest.approx(slow, abs=1e-6)

    def test_it_is_symmetric(self) -> None:
        first, second = torch.randint(4, (20, 8)), torch.randint(4, (20, 6))
        assert torch.equal(rouge_l(first, second), rouge_l(second, first))


def of_one_row(keys: Sequence[Sequence[int]], index: Sequence[int], sampler: TrajectorySampler) -> Trajectory:
    """A trajectory whose memory and choices are replaced."""
    batch = random_batch(1, num_pairs=len(keys), key_length=len(keys[0]))
    trajectory = sampler.sample(batch, [0])
    steps = [
        replace(step, selected_index=torch.tensor([column]))
        for step, column in zip(trajectory.steps, index, strict=True)
    ]
    return replace(trajectory, steps=steps, memory=replace(trajectory.memory, key_tokens=torch.tensor([keys])))


class TestNamesItsPair:
    def test_by_hand(self, llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
        keys = [[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 9, 9], [7, 7, 7, 7, 7, 7], [7, 7, 7, 7, 7, 7]]
        trajectory = of_one_row(keys, [0, 0, 1, 2], make_sampler(llama, tokenizer, num_steps=4))
        queries = torch.tensor(
            [
                [5, 6, 0, 0],  # the end of the first key alone
                [1, 2, 3, 4],  # the first two keys alike: a tie
                [5, 6, 0, 0],  # another key's
                [7, 7, 7, 7],  # a key that the memory holds twice
            ]
        )
        assert names_its_pair(trajectory, queries[None]).tolist() == [[True, False, False, False]]
        # What shares no token with any key names none.
        assert not names_its_pair(trajectory, torch.full((1, 4, 4), 300)).any()

    def test_against_a_slow_loop(self, llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
        batch = random_batch(12)
        batch = replace(batch, key_tokens=batch.key_tokens % 6)
        trajectory = make_sampler(llama, tokenizer).sample(batch, range(12))
        queries = trajectory.stack("query_tokens") % 6
        expected = []
        for row in range(12):
            for step, query in enumerate(queries[row].tolist()):
                chosen = int(trajectory.steps[step].selected_index[row])
                found = [slow_rouge_l(query, key.tolist()) for key in batch.key_tokens[row]]
                expected.append(all(found[chosen] > other for n, other in enumerate(found) if n != chosen))
        assert names_its_pair(trajectory, queries).flatten().tolist() == expected
        assert set(expected) == {True, False}

    def test_a_pair_alone_is_refused(self, llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
        trajectory = make_sampler(llama, tokenizer, num_steps=1).sample(random_batch(2, num_pairs=1), range(2))
        with pytest.raises(ValueError, match="these memories have a single one"):
            names_its_pair(trajectory, trajectory.stack("query_tokens"))


class TestControlQueries:
    @staticmethod
    def articles(*numbers: int) -> list[ArticleReference]:
        return [ArticleReference(f"title {n}", "made up", 0, n, StreamPosition(0, n + 1)) for n in numbers]

    @staticmethod
    def queries(*numbers: int) -> Tensor:
        return torch.tensor(numbers)[:, None, None].expand(-1, 2, 3).clone()

    def take(self, control: ControlQueries, articles: Sequence[int], names: Sequence[int]) -> list[int]:
        taken: list[int] = control.take(self.articles(*articles), self.queries(*names))[:, 0, 0].tolist()
        return taken

    def test_the_next_row_of_another_article(self) -> None:
        assert self.take(ControlQueries(), [1, 1, 2, 3], [10, 11, 12, 13]) == [12, 12, 13, 10]

    def test_a_batch_of_one_article_takes_the_last_of_the_batch_before(self) -> None:
        control = ControlQueries()
        self.take(control, [1, 2], [10, 11])
        assert self.take(control, [3], [12]) == [11]
        assert self.take(control, [4, 4], [13, 14]) == [12, 12]

    def test_a_first_batch_of_one_article_is_refused(self) -> None:
        with pytest.raises(ValueError, match="all trajectories so far are on 'title 5'"):
            self.take(ControlQueries(), [5, 5], [1, 2])
