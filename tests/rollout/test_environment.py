"""The environment: availability, draws without replacement, and the log-probability of an order."""

from __future__ import annotations

import itertools

import pytest
import torch
from tiny import make_environment
from torch import Tensor

from attention_rl_trainer.rollout.environment import (
    DifferentiableEnvironment,
    KVMemoryEnvironment,
    MemoryEnvironment,
    Selection,
)
from attention_rl_trainer.types import KeyValuePairs


def make_pairs(rows: int = 3, num_pairs: int = 4, groups: int = 2, head_dim: int = 4) -> KeyValuePairs:
    return KeyValuePairs(
        key_tokens=torch.arange(rows * num_pairs * 3).view(rows, num_pairs, 3),
        value_tokens=torch.arange(rows * num_pairs * 2).view(rows, num_pairs, 2),
        key_vectors=torch.randn(rows, num_pairs, groups, head_dim),
        pair_numbers=torch.arange(1, num_pairs + 1).expand(rows, -1).clone(),
    )


def test_every_pair_is_read_exactly_once() -> None:
    environment, pairs = KVMemoryEnvironment(), make_pairs()
    environment.reset(pairs)
    drawn = []
    for _ in range(4):
        selection = environment.step(torch.randn(3, 4, 4), torch.rand(3))
        assert torch.equal(selection.pairs.value_tokens, pairs.value_tokens[torch.arange(3), selection.index])
        assert torch.equal(
            selection.pairs.key_embedding, pairs.key_vectors[torch.arange(3), selection.index].flatten(1)
        )
        drawn.append(selection.index)
    assert [sorted(row) for row in torch.stack(drawn, dim=1).tolist()] == [[0, 1, 2, 3]] * 3
    with pytest.raises(ValueError, match="used up"):
        environment.step(torch.randn(3, 4, 4), torch.rand(3))


def test_a_drawn_pair_has_probability_zero_afterwards() -> None:
    environment = KVMemoryEnvironment()
    environment.reset(make_pairs())
    first = environment.step(torch.randn(3, 4, 4), torch.rand(3))
    second = environment.step(torch.randn(3, 4, 4), torch.rand(3))
    assert second.probabilities.gather(1, first.index[:, None]).tolist() == [[0.0]] * 3
    torch.testing.assert_close(second.probabilities.sum(dim=1), torch.ones(3))


def test_log_prob_equals_the_probabilities_of_the_steps() -> None:
    environment, pairs = make_environment(temperature=0.5), make_pairs()
    queries = torch.randn(3, 4, 4, 4)
    environment.reset(pairs)
    selections = [environment.step(queries[:, t], torch.rand(3)) for t in range(4)]
    index = torch.stack([selection.index for selection in selections], dim=1)
    taken = [s.probabilities.gather(1, s.index[:, None]).squeeze(1) for s in selections]
    torch.testing.assert_close(environment.log_prob(pairs, queries, index), torch.stack(taken, dim=1).log())


@pytest.mark.parametrize("num_read", [0, 1, 3])
def test_log_prob_leaves_the_present_episodes_as_they_are(num_read: int) -> None:
    pairs, others = make_pairs(), make_pairs(rows=2, num_pairs=5)
    queries, noise = torch.randn(3, 4, 4, 4), torch.rand(3, 4)
    interrupted, plain = make_environment(temperature=0.5), make_environment(temperature=0.5)
    taken = []
    for environment in (interrupted, plain):
        environment.reset(pairs)
        drawn = []
        for step in range(4):
            if environment is interrupted and step == num_read:
                before = environment.available_mask.clone()
                for memory, index in ((pairs, torch.tensor([[3, 0]] * 3)), (others, torch.tensor([[4, 1]] * 2))):
                    first = environment.log_prob(memory, queries[: len(index), :2], index)
                    assert torch.equal(environment.log_prob(memory, queries[: len(index), :2], index), first)
                assert torch.equal(environment.available_mask, before)
                assert environment.pairs is pairs
            drawn.append(environment.step(queries[:, step], noise[:, step]))
        taken.append(drawn)
    for first, second in zip(*taken, strict=True):
        assert torch.equal(first.index, second.index)
        assert torch.equal(first.probabilities, second.probabilities)


def test_log_prob_needs_no_episode_and_does_not_depend_on_one() -> None:
    environment, pairs = KVMemoryEnvironment(), make_pairs()
    queries, index = torch.randn(3, 2, 4, 4), torch.tensor([[1, 3], [0, 2], [2, 1]])
    fresh = environment.log_prob(pairs, queries, index)
    environment.reset(make_pairs())
    environment.step(queries[:, 0], torch.rand(3))
    assert torch.equal(environment.log_prob(pairs, queries, index), fresh)


def test_log_prob_of_all_orders_sums_to_one() -> None:
    environment, pairs = make_environment(head_aggregation="scores"), make_pairs(rows=1, num_pairs=3)
    queries = torch.randn(1, 3, 4, 4)
    orders = [torch.tensor([order]) for order in itertools.permutations(range(3))]
    total = sum(environment.log_prob(pairs, queries, order).sum().exp() for order in orders)
    assert float(total) == pytest.approx(1.0, abs=1e-6)


def test_log_prob_has_a_gradient_to_the_queries() -> None:
    queries = torch.randn(3, 4, 4, 4, requires_grad=True)
    KVMemoryEnvironment().log_prob(make_pairs(), queries, torch.tensor([[0, 1, 2, 3]] * 3)).sum().backward()
    assert queries.grad is not None
    assert bool(queries.grad.isfinite().all())
    assert queries.grad[:, :3].abs().min() > 0
    assert queries.grad[:, 3].abs().max() == 0  # the last pair is drawn for certain


def test_protocols() -> None:
    class Bare:
        def reset(self, pairs: KeyValuePairs) -> None: ...

        def step(self, query_vectors: Tensor, noise: Tensor) -> Selection: ...

    assert isinstance(KVMemoryEnvironment(), DifferentiableEnvironment)
    assert isinstance(Bare(), MemoryEnvironment)
    assert not isinstance(Bare(), DifferentiableEnvironment)


def test_use_before_reset_and_bad_temperature_are_refused() -> None:
    with pytest.raises(RuntimeError, match="reset"):
        KVMemoryEnvironment().step(torch.randn(1, 2, 2), torch.rand(1))
    with pytest.raises(ValueError, match="selection_temperature must be above 0 and finite, got 0"):
        make_environment(temperature=0)
