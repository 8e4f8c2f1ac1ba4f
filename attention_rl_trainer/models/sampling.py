"""Uniform numbers for each episode, and draws from them by the inverse distribution function (design §4).

Every random choice of an episode comes from a stream of its own, seeded by (seed, episode, purpose). A trajectory
therefore does not depend on its place in a batch, on how batches are cut, or on the number of processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor


class Purpose(IntEnum):
    """What a stream of uniform numbers is for."""

    POLICY = 1
    COUNTERFACTUAL = 2
    SELECTION = 3
    EVALUATION = 4
    WARM_START = 5
    OTHER_QUERIES = 6


def episode_noise(seed: int, episodes: Sequence[int], purpose: Purpose, shape: Sequence[int]) -> Tensor:
    """Draw uniform numbers in [0, 1), ``[B, *shape]`` float64 on the CPU, from one stream of each of B episodes."""
    streams = [np.random.default_rng([seed, episode, int(purpose)]).random(tuple(shape)) for episode in episodes]
    return torch.from_numpy(np.stack(streams))


def sample_by_inverse(probabilities: Tensor, noise: Tensor) -> Tensor:
    """Draw one outcome per row by the inverse distribution function, ``[B]`` int64; never one of probability 0.

    Args:
        probabilities: ``[B, A]``, non-negative; rows need not be normalized exactly.
        noise: uniform numbers in [0, 1), ``[B]``.
    """
    cumulative = probabilities.double().cumsum(dim=-1)
    total = cumulative[:, -1:]
    # Rounding may lift the product to the total itself, past the last outcome that has any mass.
    target = torch.minimum(noise.to(cumulative)[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    index = torch.searchsorted(cumulative, target, right=True).squeeze(-1)
    # Only NaN gets past the end; the caller's check on finite numbers must come before an index error.
    return index.clamp(max=probabilities.shape[-1] - 1)


def entropy(probabilities: Tensor) -> Tensor:
    """Entropy of distributions ``[..., A]`` in nats: 0 for a certain outcome, log A for uniform ones."""
    return -torch.xlogy(probabilities, probabilities).sum(dim=-1)
