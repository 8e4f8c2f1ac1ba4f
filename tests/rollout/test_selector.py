"""The selector against a slow loop, against cases worked by hand, and its draws."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from attention_rl_trainer.rollout.selector import compute_similarity, sample_key_value, selection_log_probabilities


def loop_probabilities(
    query: Tensor, keys: Tensor, available: Tensor, temperature: float, aggregation: str
) -> list[list[float]]:
    """The definition, one number at a time."""
    rows = []
    num_heads, head_dim = query.shape[1:]
    num_keys, num_groups = keys.shape[1:3]
    for row in range(query.shape[0]):
        scores = [[0.0] * num_keys for _ in range(num_heads)]
        for head in range(num_heads):
            group = head // (num_heads // num_groups)
            for key in range(num_keys):
                dot = sum(query[row, head, i].item() * keys[row, key, group, i].item() for i in range(head_dim))
                scores[head][key] = dot / math.sqrt(head_dim) / temperature
        if aggregation == "scores":
            scores = [[sum(column) / num_heads for column in zip(*scores, strict=True)]]
        mean = [0.0] * num_keys
        for head_scores in scores:
            exponents = [math.exp(s) if available[row, k] else 0.0 for k, s in enumerate(head_scores)]
            for key in range(num_keys):
                mean[key] += exponents[key] / sum(exponents) / len(scores)
        rows.append(mean)
    return rows


@pytest.mark.parametrize("aggregation", ["probabilities", "scores"])
@pytest.mark.parametrize("temperature", [0.1, 1.0, 3.0])
@pytest.mark.parametrize(("heads", "groups"), [(6, 2), (4, 4), (3, 1)])
def test_equals_the_slow_loop(aggregation: str, temperature: float, heads: int, groups: int) -> None:
    query, keys = torch.randn(3, heads, 5), torch.randn(3, 4, groups, 5)
    available = torch.tensor([[True, True, True, True], [False, True, False, True], [False, False, True, False]])
    got = selection_log_probabilities(compute_similarity(query, keys), available, temperature, aggregation).exp()
    expected = torch.tensor(loop_probabilities(query, keys, available, temperature, aggregation))
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(got.sum(dim=1), torch.ones(3))
    assert bool((got[~available] == 0).all())


def test_two_heads_worked_by_hand() -> None:
    # D = 4, so scores are halved. Head 0 scores the keys (2, 0), head 1 (0, 2): opposite votes of the same strength.
    query = torch.tensor([[[2.0, 0, 0, 0], [0, 2.0, 0, 0]]])
    keys = torch.tensor([[[[2.0, 0, 0, 0]], [[0, 2.0, 0, 0]]]])
    similarity = compute_similarity(query, keys)
    assert similarity.tolist() == [[[2.0, 0.0], [0.0, 2.0]]]
    everything = torch.ones(1, 2, dtype=torch.bool)
    assert selection_log_probabilities(similarity, everything).exp().tolist() == [[0.5, 0.5]]
    # A third head that scores (2, 0) breaks the tie: averaged probabilities give 2/3 σ(2) + 1/3 σ(-2), averaged
    # scores σ(2/3).
    similarity = torch.cat([similarity, similarity[:, :1]], dim=1)
    sigmoid = 1 / (1 + math.exp(-2))
    by_probabilities = selection_log_probabilities(similarity, everything).exp()[0, 0].item()
    assert by_probabilities == pytest.approx(2 / 3 * sigmoid + 1 / 3 * (1 - sigmoid), abs=1e-6)
    by_scores = selection_log_probabilities(similarity, everything, 1.0, "scores").exp()[0, 0].item()
    assert by_scores == pytest.approx(1 / (1 + math.exp(-2 / 3)), abs=1e-6)


def test_grouped_heads_read_their_own_group() -> None:
    # Heads 0, 1 share group 0 and heads 2, 3 group 1; only group 1 of the second key is non-zero.
    query = torch.ones(1, 4, 1)
    keys = torch.tensor([[[[0.0], [0.0]], [[0.0], [3.0]]]])
    assert compute_similarity(query, keys).tolist() == [[[0, 0], [0, 0], [0, 3], [0, 3]]]


def test_temperature_divides() -> None:
    similarity = torch.tensor([[[1.0, 0.0]]])
    available = torch.ones(1, 2, dtype=torch.bool)
    cold = selection_log_probabilities(similarity, available, 0.5).exp()[0, 0].item()
    assert cold == pytest.approx(1 / (1 + math.exp(-2)), abs=1e-6)


@pytest.mark.parametrize("aggregation", ["probabilities", "scores"])
def test_gradient_is_finite_beside_masked_keys(aggregation: str) -> None:
    similarity = torch.randn(2, 3, 4, requires_grad=True)
    available = torch.tensor([[True, False, True, False], [True, True, True, True]])
    log_probabilities = selection_log_probabilities(similarity, available, 1.0, aggregation)
    log_probabilities.gather(1, torch.tensor([[0], [3]])).sum().backward()
    assert similarity.grad is not None
    assert bool(similarity.grad.isfinite().all())
    assert bool((similarity.grad[0, :, 1] == 0).all())
    assert similarity.grad.abs().sum() > 0


def test_a_used_up_memory_is_refused() -> None:
    with pytest.raises(ValueError, match="used up"):
        selection_log_probabilities(torch.randn(2, 1, 3), torch.tensor([[True] * 3, [False] * 3]))


def test_unfitting_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"got \[2, 5, 1, 3\]"):
        compute_similarity(torch.randn(2, 4, 8), torch.randn(2, 5, 1, 3))
    with pytest.raises(ValueError, match="cannot share 3 key groups"):
        compute_similarity(torch.randn(2, 4, 8), torch.randn(2, 5, 3, 8))


def test_draws_follow_the_probabilities() -> None:
    probabilities = torch.tensor([0.1, 0.0, 0.6, 0.3]).repeat(20000, 1)
    noise = torch.rand(20000, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    counts = torch.bincount(sample_key_value(probabilities, noise), minlength=4) / 20000
    assert counts[1] == 0
    torch.testing.assert_close(counts, probabilities[0], atol=0.011, rtol=0)  # 3.2 standard errors


def test_draw_worked_by_hand() -> None:
    probabilities = torch.tensor([[0.25, 0.25, 0.5]]).repeat(5, 1)
    noise = torch.tensor([0.0, 0.2499, 0.25, 0.5, 0.9999], dtype=torch.float64)
    assert sample_key_value(probabilities, noise).tolist() == [0, 0, 1, 2, 2]
