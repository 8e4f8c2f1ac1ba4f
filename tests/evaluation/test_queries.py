"""What queries are worth: each against a whole forward of the base model, and who is compared with whom."""

from __future__ import annotations

from collections.abc import Sequence

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
    score_queries,
)
from attention_rl_trainer.models.causal_lm import deterministic_inference
from attention_rl_trainer.models.sampling import Purpose, episode_noise, sample_by_inverse
from attention_rl_trainer.rollout.sampler import TrajectorySampler
from attention_rl_trainer.types import ArticleReference, StreamPosition


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
