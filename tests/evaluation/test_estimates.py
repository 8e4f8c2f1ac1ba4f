"""Means and ratios with intervals that are bootstrapped over articles."""

from __future__ import annotations

import numpy as np
import pytest

from attention_rl_trainer.evaluation.estimates import Estimate, clustered_mean, clustered_ratio


def test_mean_and_counts() -> None:
    estimate = clustered_mean([1.0, 2.0, 6.0], ["a", "a", "b"])
    assert (estimate.mean, estimate.num_values, estimate.num_clusters) == (3.0, 3, 2)
    # The two articles give 1.5 and 6; a resample of one of them alone gives the ends.
    assert (estimate.low, estimate.high) == (1.5, 6.0)


def test_interval_of_independent_articles_is_that_of_the_normal_distribution() -> None:
    values = np.random.default_rng(0).normal(2.0, 3.0, 400)
    estimate = clustered_mean(values.tolist(), list(range(400)))
    half = 1.96 * values.std() / 20
    assert estimate.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert estimate.high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_repeating_every_trajectory_of_an_article_tells_nothing_new() -> None:
    values = np.random.default_rng(1).normal(size=60).tolist()
    once = clustered_mean(values, list(range(60)))
    # Taken for independent, ten times as many values would narrow the interval to a third.
    tenfold = clustered_mean(values * 10, list(range(60)) * 10)
    assert (tenfold.low, tenfold.high) == pytest.approx((once.low, once.high))


def test_ratio_is_of_the_sums() -> None:
    estimate = clustered_ratio([1.0, 3.0, 0.0], [2.0, 2.0, 4.0], ["a", "b", "c"])
    assert estimate.mean == 0.5
    # The mean of the three ratios would be 2/3.
    assert estimate.low is not None
    assert estimate.high is not None
    assert 0.0 <= estimate.low < 0.5 < estimate.high <= 1.5


def test_the_same_numbers_give_the_same_interval() -> None:
    values, articles = [0.1, 0.5, 0.2, 0.9], ["a", "b", "c", "d"]
    assert clustered_mean(values, articles) == clustered_mean(values, articles)
    assert clustered_mean(values, articles, seed=1).mean == clustered_mean(values, articles).mean


def test_one_article_says_nothing_about_others() -> None:
    estimate = clustered_mean([1.0, 2.0], ["a", "a"])
    assert estimate == Estimate(1.5, None, None, 2, 1)
    assert str(estimate) == "+1.500"
    assert str(Estimate(0.1234, -0.05, 0.3, 9, 3)) == "+0.123 [-0.050, +0.300]"


@pytest.mark.parametrize(("values", "articles"), [([], []), ([1.0], ["a", "b"])])
def test_what_does_not_fit_is_refused(values: list[float], articles: list[str]) -> None:
    with pytest.raises(ValueError, match="as many numerators, denominators and clusters"):
        clustered_mean(values, articles)


def test_a_gap_of_nothing_has_no_share() -> None:
    with pytest.raises(ValueError, match="sum to 0"):
        clustered_ratio([1.0, 2.0], [1.0, -1.0], ["a", "b"])


def test_articles_that_alone_have_no_ratio_leave_no_interval() -> None:
    """A resample may take nothing but the article without a gap."""
    estimate = clustered_ratio([0.0, 1.0, 3.0], [0.0, 2.0, 2.0], ["a", "b", "c"])
    assert estimate == Estimate(1.0, None, None, 3, 3)
