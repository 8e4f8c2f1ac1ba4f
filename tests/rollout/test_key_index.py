"""One large memory against the selector, key by key and draw by draw."""

from __future__ import annotations

import pytest
import torch

from attention_rl_trainer.rollout.key_index import KeyIndex
from attention_rl_trainer.rollout.selector import (
    HeadAggregation,
    compute_similarity,
    sample_key_value,
    selection_log_probabilities,
)

AGGREGATIONS: tuple[HeadAggregation, ...] = ("probabilities", "scores")


def plain_probabilities(
    queries: torch.Tensor, keys: torch.Tensor, available: torch.Tensor, temperature: float, how: HeadAggregation
) -> torch.Tensor:
    similarity = compute_similarity(queries, keys.expand(len(queries), *keys.shape))
    return selection_log_probabilities(similarity, available, temperature, how).exp()


@pytest.mark.parametrize("how", AGGREGATIONS)
@pytest.mark.parametrize("block_size", [1, 7, 16, 50, 64])
@pytest.mark.parametrize(("heads", "groups"), [(6, 2), (3, 3), (4, 1)])
def test_probabilities_are_the_selectors(how: HeadAggregation, block_size: int, heads: int, groups: int) -> None:
    keys, queries = torch.randn(50, groups, 8), torch.randn(3, heads, 8)
    got = KeyIndex(keys, block_size).score(queries, 0.2, how).probabilities()
    expected = plain_probabilities(queries, keys, torch.ones(3, 50, dtype=torch.bool), 0.2, how)
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("how", AGGREGATIONS)
@pytest.mark.parametrize("block_size", [4, 7, 64])
def test_draws_are_those_of_selecting_and_masking_one_by_one(how: HeadAggregation, block_size: int) -> None:
    keys, queries = torch.randn(20, 2, 8), torch.randn(3, 4, 8)
    noise = torch.rand(3, 20, dtype=torch.float64)
    got = KeyIndex(keys, block_size).score(queries, 0.3, how).draw(noise)
    available = torch.ones(3, 20, dtype=torch.bool)
    for step in range(20):
        probabilities = plain_probabilities(queries, keys, available, 0.3, how)
        index = sample_key_value(probabilities, noise[:, step])
        assert torch.equal(got[:, step], index), step
        available = available.scatter(1, index[:, None], False)


def test_what_is_left_has_all_the_mass_however_unlikely_it_was() -> None:
    # One key is e^200 times as likely as the next, and that one e^200 times as likely as the third.
    keys = torch.tensor([[[0.0]], [[200.0]], [[400.0]], [[-200.0]]])
    drawn = KeyIndex(keys, block_size=2).score(torch.ones(1, 1, 1)).draw(torch.full((1, 4), 0.5, dtype=torch.float64))
    assert drawn.tolist() == [[2, 1, 0, 3]]


def test_draws_follow_the_probabilities() -> None:
    keys, query = torch.randn(12, 2, 4), torch.randn(1, 4, 4)
    distribution = KeyIndex(keys, block_size=5).score(query)
    grid = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    counts = torch.bincount(torch.cat([distribution.draw(u.view(1, 1)) for u in grid]).flatten(), minlength=12)
    torch.testing.assert_close(counts / 4000, distribution.probabilities()[0], atol=1e-3, rtol=0)


def test_drawing_leaves_the_distribution_as_it_was() -> None:
    distribution = KeyIndex(torch.randn(9, 1, 4), block_size=4).score(torch.randn(2, 2, 4))
    before, noise = distribution.probabilities(), torch.rand(2, 5, dtype=torch.float64)
    first = distribution.draw(noise)
    assert torch.equal(distribution.probabilities(), before)
    assert torch.equal(distribution.draw(noise), first)


def test_unfitting_shapes_are_refused() -> None:
    index = KeyIndex(torch.randn(5, 2, 4))
    with pytest.raises(ValueError, match=r"\[M, G, D\] with M > 0, got \[0, 2, 4\]"):
        KeyIndex(torch.randn(0, 2, 4))
    with pytest.raises(ValueError, match="H a multiple of 2 groups"):
        index.score(torch.randn(1, 3, 4))
    with pytest.raises(ValueError, match="cannot draw 6 different keys from 5"):
        index.score(torch.randn(1, 2, 4)).draw(torch.rand(1, 6))
