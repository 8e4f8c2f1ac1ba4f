"""Means of trajectories' numbers, with intervals that respect which article each came from (design §11).

Trajectories of one article are not independent of each other, so intervals are bootstrapped over articles: each
resample draws articles with replacement and takes all of their trajectories.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

_RESAMPLES = 9999


@dataclass(frozen=True)
class Estimate:
    """A mean or ratio of means with its 95% interval.

    The interval is ``None`` for one article, which says nothing about others, and where some articles alone have no
    ratio, because their denominators sum to 0.
    """

    mean: float
    low: float | None
    high: float | None
    num_values: int
    """Trajectories."""
    num_clusters: int
    """Articles."""

    def __str__(self) -> str:
        """Format as ``+0.123 [+0.100, +0.146]``."""
        if self.low is None or self.high is None:
            return f"{self.mean:+.3f}"
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


def _ratio(numerator: NDArray[np.float64], denominator: NDArray[np.float64], axis: int = -1) -> Any:
    return numerator.sum(axis=axis) / denominator.sum(axis=axis)


def clustered_ratio(
    numerators: Sequence[float], denominators: Sequence[float], clusters: Sequence[Hashable], *, seed: int = 0
) -> Estimate:
    """Estimate Σ numerators / Σ denominators, with a percentile bootstrap over clusters, the trajectories' articles.

    Raises:
        ValueError: there is no value, the lengths differ, or the denominators sum to 0.
    """
    if not 0 < len(numerators) == len(denominators) == len(clusters):
        raise ValueError(
            f"expected as many numerators, denominators and clusters, at least one; got {len(numerators)}, "
            f"{len(denominators)} and {len(clusters)}"
        )
    places = {name: place for place, name in enumerate(dict.fromkeys(clusters))}
    sums = np.zeros((2, len(places)))
    for numerator, denominator, cluster in zip(numerators, denominators, clusters, strict=True):
        sums[:, places[cluster]] += numerator, denominator
    if sums[1].sum() == 0:
        raise ValueError("the denominators sum to 0, so there is no ratio")
    mean = float(_ratio(sums[0], sums[1]))
    if len(places) == 1:
        return Estimate(mean, None, None, len(numerators), 1)
    with np.errstate(divide="ignore", invalid="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        interval = stats.bootstrap(
            (sums[0], sums[1]),
            _ratio,
            paired=True,
            vectorized=True,
            n_resamples=_RESAMPLES,
            method="percentile",
            rng=np.random.default_rng(seed),
        ).confidence_interval
    low, high = float(interval.low), float(interval.high)
    if not (math.isfinite(low) and math.isfinite(high)):
        return Estimate(mean, None, None, len(numerators), len(places))
    return Estimate(mean, low, high, len(numerators), len(places))


def clustered_mean(values: Sequence[float], clusters: Sequence[Hashable], *, seed: int = 0) -> Estimate:
    """Estimate the mean over trajectories; see `clustered_ratio`."""
    return clustered_ratio(values, [1.0] * len(values), clusters, seed=seed)
