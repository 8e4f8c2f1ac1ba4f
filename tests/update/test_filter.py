"""Reward statistics against numpy, the warm-up, the threshold by the history before the batch, and other filters."""

from __future__ import annotations

import json
import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from attention_rl_trainer.errors import NonFiniteError
from attention_rl_trainer.update.filter import FilterOptions, RewardFilter, RewardStatistics, TrajectoryFilter


@pytest.mark.parametrize("offset", [0.0, 1000.0, -1e6])
@pytest.mark.parametrize("num_parts", [1, 2, 97, pytest.param(100_000, marks=pytest.mark.slow)])
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


def filter_after(count: int, mean: float = 0.0, std: float = 1.0, **options: Any) -> RewardFilter:
    """A filter with a history."""
    reward_filter = RewardFilter(FilterOptions(**options))
    reward_filter.load_state_dict({"count": count, "mean": mean, "sum_of_squares": std**2 * count})
    return reward_filter


@pytest.mark.parametrize(("seen", "kept"), [(0, False), (14, False), (15, True), (16, True)])
def test_warm_up_is_exactly_fifteen(seen: int, kept: bool) -> None:
    verdict = filter_after(seen).judge(torch.tensor([100.0]))
    assert verdict.keep.tolist() == [kept]
    assert verdict.is_warmup != kept
    assert verdict.threshold == (1.0 if kept else None)


def test_threshold_by_hand() -> None:
    rewards = torch.tensor([0.9, 1.0, 1.1, 5.0, -5.0])
    verdict = filter_after(20).judge(rewards)
    assert verdict.keep.tolist() == [False, False, True, True, False]  # exactly at the threshold is not above it
    assert verdict.threshold == 1.0
    for reward_filter in (
        filter_after(20, filter_threshold=None),
        filter_after(20, filter_threshold=-math.inf),
        filter_after(20, std=0.0, filter_threshold=-math.inf),
    ):
        verdict = reward_filter.judge(rewards)
        assert verdict.keep.all()
        assert verdict.threshold is None, "nothing was judged by a number"
        assert not verdict.is_warmup
    assert not filter_after(20, filter_threshold=math.inf).judge(rewards).keep.any()


def test_a_batch_is_not_judged_by_itself() -> None:
    # A batch that is good throughout is kept throughout; judged by itself, it would not be.
    rewards = torch.linspace(10, 11, 64)
    reward_filter = filter_after(15)
    assert reward_filter.judge(rewards).keep.all()
    assert reward_filter.judge(rewards).keep.sum() < 64


def test_a_verdict_has_the_history_before_and_after() -> None:
    reward_filter = RewardFilter(FilterOptions(warmup_episodes=2))
    first = reward_filter.judge(torch.tensor([1.0, 3.0]))
    second = reward_filter.judge(torch.tensor([5.0]))
    assert first.history == RewardStatistics()
    assert first.history_after == second.history == RewardStatistics(2, 2.0, 2.0)
    assert second.history_after == reward_filter.statistics == RewardStatistics(3, 3.0, 8.0)
    assert (first.is_warmup, second.is_warmup) == (True, False)
    assert second.threshold == 3.0
    assert second.keep.tolist() == [True]


def test_an_error_leaves_the_history_alone() -> None:
    reward_filter = filter_after(20)
    before = reward_filter.state_dict()
    with pytest.raises(ValueError, match="rewards must be finite, got nan"):
        reward_filter.judge(torch.tensor([1.0, math.nan]))
    assert reward_filter.state_dict() == before
    huge = filter_after(20, std=1e150, filter_threshold=1e300)
    before = huge.state_dict()
    with pytest.raises(NonFiniteError, match="the threshold of the reward history is not finite after 20 rewards"):
        huge.judge(torch.tensor([1.0]))
    assert huge.state_dict() == before


def test_the_state_of_a_filter_round_trips_to_the_last_bit() -> None:
    reward_filter, again = RewardFilter(), RewardFilter()
    reward_filter.judge(torch.randn(31))
    again.load_state_dict(json.loads(json.dumps(reward_filter.state_dict())))
    rewards = torch.randn(9)
    verdict, expected = again.judge(rewards), reward_filter.judge(rewards)
    assert torch.equal(verdict.keep, expected.keep)
    assert verdict.threshold == expected.threshold
    assert again.statistics == reward_filter.statistics
    assert isinstance(reward_filter, TrajectoryFilter)


class Best(RewardFilter):
    """Keeps the best of each batch."""

    def __init__(self, count: int, options: FilterOptions | None = None) -> None:
        super().__init__(options)
        self.count = count
        self.thresholds: list[float | None] = []

    def keep(self, rewards: Tensor, threshold: float | None) -> Tensor:
        self.thresholds.append(threshold)
        return rewards >= rewards.topk(self.count).values[-1]


class TestASubclass:
    def test_keeps_others_with_the_same_history(self) -> None:
        best, usual = Best(2, FilterOptions(warmup_episodes=4)), RewardFilter(FilterOptions(warmup_episodes=4))
        first, second = torch.tensor([0.0, 2.0, 0.0, 2.0]), torch.tensor([-3.0, 0.5, 0.0, -1.0])
        assert best.judge(first).keep.tolist() == [False] * 4, "the warm-up stays"
        assert best.thresholds == []
        usual.judge(first)
        verdict, expected = best.judge(second), usual.judge(second)
        assert verdict.keep.tolist() == [False, True, True, False]
        assert expected.keep.tolist() == [False] * 4
        assert best.thresholds == [2.0]
        assert (verdict.threshold, verdict.history, verdict.history_after, verdict.is_warmup) == (
            expected.threshold,
            expected.history,
            expected.history_after,
            expected.is_warmup,
        )

    def test_has_a_state_that_round_trips(self) -> None:
        best, again = Best(1), Best(1)
        best.judge(torch.randn(20))
        again.load_state_dict(best.state_dict())
        rewards = torch.randn(5)
        assert torch.equal(best.judge(rewards).keep, again.judge(rewards).keep)
        assert best.thresholds == again.thresholds

    @pytest.mark.parametrize(
        ("mask", "got"),
        [
            (torch.tensor([3, 1]), "torch.int64 of shape [2]"),
            (torch.ones(4), "torch.float32 of shape [4]"),
            (torch.ones(4, 1, dtype=torch.bool), "torch.bool of shape [4, 1]"),
        ],
        ids=["rows", "weights", "column"],
    )
    def test_must_return_a_bool_for_each(self, mask: Tensor, got: str) -> None:
        class Wrong(RewardFilter):
            def keep(self, rewards: Tensor, threshold: float | None) -> Tensor:
                return mask

        wrong = Wrong(FilterOptions(warmup_episodes=1))
        wrong.judge(torch.zeros(1))
        before = wrong.state_dict()
        with pytest.raises(ValueError, match=re.escape(f"whether to keep it, [B] bool; got {got}")):
            wrong.judge(torch.zeros(4))
        assert wrong.state_dict() == before
