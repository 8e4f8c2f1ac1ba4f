"""Reward statistics against numpy, the warm-up, and the threshold by the history before the batch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from attention_rl_trainer.update.filter import RewardStatistics, keep_mask


@pytest.mark.parametrize("offset", [0.0, 1000.0, -1e6])
@pytest.mark.parametrize("num_parts", [1, 2, 97, 100_000])
def test_statistics_equal_numpy_for_any_split(offset: float, num_parts: int) -> None:
    values = offset + 0.1 * np.random.default_rng(0).standard_normal(100_000)
    statistics = RewardStatistics()
    for part in np.array_split(values, num_parts):
        statistics.update(torch.from_numpy(part))
    assert statistics.count == 100_000
    exact_mean = math.fsum(values) / len(values)
    exact_std = math.sqrt(math.fsum((values - exact_mean) ** 2) / len(values))
    tolerance = 1e-12 * max(abs(offset) + 1, exact_std)
    assert abs(statistics.mean - exact_mean) <= tolerance
    assert abs(statistics.std - exact_std) <= tolerance
    assert abs(statistics.std - values.std()) <= tolerance


def test_statistics_by_hand() -> None:
    statistics = RewardStatistics()
    assert (statistics.count, statistics.mean, statistics.std) == (0, 0.0, 0.0)
    statistics.update(torch.tensor([2.0, 4.0, 4.0, 4.0, 5.0, 5.0, 7.0, 9.0]))
    assert (statistics.mean, statistics.std) == (5.0, 2.0)  # ddof 0
    assert statistics.threshold(1.0) == 7.0
    statistics.update(torch.tensor([]))
    assert statistics.count == 8


def test_merging_equals_updating() -> None:
    first, second, both = RewardStatistics(), RewardStatistics(), RewardStatistics()
    a, b = torch.randn(7, dtype=torch.float64), torch.randn(12, dtype=torch.float64) + 3
    first.update(a)
    second.update(b)
    both.update(torch.cat([a, b]))
    first.merge(second)
    assert first.count == both.count
    assert first.mean == pytest.approx(both.mean, abs=1e-14)
    assert first.std == pytest.approx(both.std, abs=1e-14)


def test_state_round_trips_to_the_last_bit() -> None:
    statistics = RewardStatistics()
    statistics.update(torch.randn(31))
    assert RewardStatistics.from_state_dict(statistics.state_dict()) == statistics


def test_a_non_finite_reward_leaves_the_statistics_alone() -> None:
    statistics = RewardStatistics()
    statistics.update(torch.tensor([1.0, 2.0]))
    before = statistics.state_dict()
    with pytest.raises(ValueError, match="nan"):
        statistics.update(torch.tensor([1.0, math.nan]))
    assert statistics.state_dict() == before


def history(count: int, mean: float = 0.0, std: float = 1.0) -> RewardStatistics:
    return RewardStatistics(count, mean, std**2 * count)


@pytest.mark.parametrize(("seen", "kept"), [(0, False), (14, False), (15, True), (16, True)])
def test_warm_up_is_exactly_fifteen(seen: int, kept: bool) -> None:
    mask = keep_mask(torch.tensor([100.0]), history(seen), filter_threshold=1.0, warmup_episodes=15)
    assert mask.tolist() == [kept]


def test_threshold_by_hand() -> None:
    rewards = torch.tensor([0.9, 1.0, 1.1, 5.0, -5.0])
    mask = keep_mask(rewards, history(20), filter_threshold=1.0, warmup_episodes=15)
    assert mask.tolist() == [False, False, True, True, False]  # exactly at the threshold is not above it
    assert keep_mask(rewards, history(20), filter_threshold=None, warmup_episodes=15).all()
    assert keep_mask(rewards, history(20), filter_threshold=-math.inf, warmup_episodes=15).all()
    assert keep_mask(rewards, history(20, std=0.0), filter_threshold=-math.inf, warmup_episodes=15).all()


def test_a_batch_is_not_judged_by_itself() -> None:
    # A batch that is good throughout is kept throughout; judged by itself, it would not be.
    rewards = torch.linspace(10, 11, 64)
    past = history(15)
    assert keep_mask(rewards, past, filter_threshold=1.0, warmup_episodes=15).all()
    past.update(rewards)
    assert keep_mask(rewards, past, filter_threshold=1.0, warmup_episodes=15).sum() < 64
