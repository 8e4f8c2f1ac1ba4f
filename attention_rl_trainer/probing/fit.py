"""Vectors of half keys and keys into heads, means and temperature (design §5).

    s_k = mean over h in S of sim(q_h - μ^q_h, k_g(h) - μ^k_g(h))          p = softmax(s / τ) over the pairs of a memory

S holds the heads that, each alone, rank the right pair first most often; the means are those of the vectors at hand; τ
makes the right pairs as likely as can be. Heads are chosen on the first half of the memories, and τ on the second, on
which heads that were chosen for their luck do no better than others.

Source: QRHead (Zhang et al., 2025) chooses heads by the attention that queries pay to the right passage.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from scipy.optimize import brentq, minimize_scalar
from torch import Tensor

from attention_rl_trainer.models.heads import HeadNumber
from attention_rl_trainer.models.sampling import entropy
from attention_rl_trainer.probing.vectors import LayerVectors
from attention_rl_trainer.rollout.selector import (
    HeadAggregation,
    HeadSimilarity,
    Selector,
    selection_information,
    selection_log_probabilities,
)

# Temperatures that are considered.
_LOWEST, _HIGHEST = 1e-3, 1e3
# Queries that are compared at once.
_MEMORIES_AT_ONCE = 16


@dataclass(frozen=True, eq=False)
class HeadScores:
    """How often each head, alone, ranks the right pair first."""

    accuracy: dict[int, Tensor]
    """By layer, ``[H]``."""
    chance: float
    """What drawing blindly gives, 1 / M."""

    def best(self, count: int) -> tuple[HeadNumber, ...]:
        """The best heads, the better first; of equals the one of the lower layer and number.

        Raises:
            ValueError: there are fewer.
        """
        ranked = sorted(
            (-round(float(value), 6), layer, head)
            for layer, values in self.accuracy.items()
            for head, value in enumerate(values)
        )
        if count > len(ranked):
            raise ValueError(f"probe_heads is {count}, but the model has {len(ranked)} heads that could select")
        return tuple(HeadNumber(layer, head) for _, layer, head in ranked[:count])


@dataclass(frozen=True)
class SelectionQuality:
    """How well a selector finds pairs by halves of their keys."""

    p_right: float
    """Mean probability of the right pair."""
    information: float
    """`selection_information` over the half keys of a memory, nats."""
    entropy: float
    """Mean entropy of a choice, nats."""


def means_of(vectors: LayerVectors) -> tuple[Tensor, Tensor]:
    """Average queries and keys over memories and pairs: ``[H, D]`` and ``[G, D]``."""
    return vectors.queries.flatten(0, 1).mean(dim=0), vectors.keys.flatten(0, 1).mean(dim=0)


def similarities(vectors: LayerVectors, selector: Selector) -> Tensor:
    """Compare each half key with all keys of its memory, ``[n, M, H, M]``."""
    parts = []
    for start in range(0, len(vectors.keys), _MEMORIES_AT_ONCE):
        part = vectors.rows(slice(start, start + _MEMORIES_AT_ONCE))
        num_pairs = part.keys.shape[1]
        compared = selector.similarity(part.queries.flatten(0, 1), part.keys.repeat_interleave(num_pairs, dim=0))
        parts.append(torch.unflatten(compared, 0, (-1, num_pairs)))
    return torch.cat(parts)


def score_heads(layers: Mapping[int, LayerVectors], *, center: bool, head_similarity: HeadSimilarity) -> HeadScores:
    """Measure every head of some layers alone."""
    accuracy = {}
    for number, vectors in layers.items():
        means = means_of(vectors) if center else (None, None)
        found = similarities(vectors, Selector(1.0, "scores", head_similarity, *means)).argmax(dim=-1)
        right = torch.arange(found.shape[1], device=found.device)[None, :, None]
        accuracy[number] = (found == right).float().mean(dim=(0, 1)).cpu()
    num_pairs = next(iter(layers.values())).keys.shape[1]
    return HeadScores(accuracy, 1 / num_pairs)


def take_heads(layers: Mapping[int, LayerVectors], heads: Sequence[HeadNumber]) -> LayerVectors:
    """Take chosen heads, in their order, each with the keys of its group."""
    queries, keys = [], []
    for number in heads:
        vectors = layers[number.layer]
        per_group = vectors.queries.shape[2] // vectors.keys.shape[2]
        queries.append(vectors.queries[:, :, number.head])
        keys.append(vectors.keys[:, :, number.head // per_group])
    return LayerVectors(torch.stack(queries, dim=2), torch.stack(keys, dim=2))


def choices(vectors: LayerVectors, selector: Selector) -> Tensor:
    """Log-probabilities of a memory's pairs after half of each key, ``[n, M, M]``; all pairs are available."""
    return _choices(similarities(vectors, selector), selector.temperature, selector.head_aggregation)


def _choices(similarity: Tensor, temperature: float, head_aggregation: HeadAggregation) -> Tensor:
    """`choices` of what was compared, ``[n, M, H, M]``."""
    num_memories, num_pairs = similarity.shape[:2]
    available = torch.ones(num_memories * num_pairs, num_pairs, dtype=torch.bool, device=similarity.device)
    chosen = selection_log_probabilities(similarity.flatten(0, 1), available, temperature, head_aggregation)
    return torch.unflatten(chosen, 0, (num_memories, num_pairs))


def fit_temperature(vectors: LayerVectors, selector: Selector) -> float:
    """Find the temperature at which the right pairs are likeliest.

    Where the right pair always has the highest score, colder is always likelier, and a selector that is certain hears
    no nuance. So no more is asked than that all n right pairs together miss one nat: the highest such temperature.
    """
    similarity = similarities(vectors, selector)

    def loss(log_temperature: float) -> float:
        chosen = _choices(similarity, math.exp(log_temperature), selector.head_aggregation)
        return -chosen.diagonal(dim1=1, dim2=2).mean().item()

    # The loss has one minimum for one softmax, and mostly for a mean of several: a grid first.
    grid = [math.log(_LOWEST) + step * math.log(_HIGHEST / _LOWEST) / 24 for step in range(25)]
    best = min(range(len(grid)), key=lambda place: loss(grid[place]))
    bounds = grid[max(0, best - 1)], grid[min(len(grid) - 1, best + 1)]
    found = minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-3})
    enough = 1 / (vectors.queries.shape[0] * vectors.queries.shape[1])
    if found.fun >= enough:
        return math.exp(found.x)
    too_warm = next(place for place in grid[best + 1 :] if loss(place) > enough)
    return math.exp(brentq(lambda place: loss(place) - enough, found.x, too_warm, xtol=1e-3))


def selection_quality(vectors: LayerVectors, selector: Selector) -> SelectionQuality:
    """Measure a selector on memories."""
    probabilities = choices(vectors, selector).exp()
    return SelectionQuality(
        p_right=probabilities.diagonal(dim1=1, dim2=2).mean().item(),
        information=selection_information(probabilities).mean().item(),
        entropy=entropy(probabilities).mean().item(),
    )
