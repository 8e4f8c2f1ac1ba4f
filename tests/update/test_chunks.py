"""A sum over chunks: value and gradient of the whole, whatever the chunks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attention_rl_trainer.update.chunks import Chunk, chunked_sum

WEIGHTS = torch.arange(1.0, 8.0)


def cubes(states: Tensor, rows: slice) -> Chunk:
    """Σ_i w_i Σ_c x_{i,c}³, by autograd from the sum."""
    with torch.enable_grad():
        loss = (states.pow(3).sum(dim=1) * WEIGHTS[rows]).sum()
    tokens = states.detach()
    parts = torch.stack([loss.detach(), tokens.sum(), tokens.new_tensor(float(len(tokens)))])
    return Chunk(loss.detach(), parts, torch.stack([tokens[:, 0], tokens[:, 1]]), loss)


def cubes_by_hand(states: Tensor, rows: slice) -> Chunk:
    """The same, with a gradient that is written out, of the states times 2."""
    chunk = cubes(states.detach(), rows)
    with torch.enable_grad():
        doubled = 2 * states
    gradient = 1.5 * states.detach().square() * WEIGHTS[rows, None]
    return Chunk(chunk.loss, chunk.parts, chunk.per_token, doubled, gradient)


@pytest.mark.parametrize("terms", [cubes, cubes_by_hand])
@pytest.mark.parametrize("chunk_size", [1, 2, 3, 7, 100])
def test_equals_the_sum_over_the_whole(terms: type, chunk_size: int) -> None:
    hidden = torch.randn(7, 2, requires_grad=True)
    loss, parts, per_token = chunked_sum(hidden, terms, chunk_size)
    expected = (hidden.pow(3).sum(dim=1) * WEIGHTS).sum()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(parts, torch.stack([expected.detach(), hidden.detach().sum(), torch.tensor(7.0)]))
    assert torch.equal(per_token, hidden.detach().T)
    (got,) = torch.autograd.grad(-2 * loss, hidden)
    torch.testing.assert_close(got, torch.autograd.grad(-2 * expected, hidden)[0])
    assert not parts.requires_grad
    assert not per_token.requires_grad


def test_goes_through_the_chunks_once_and_in_order() -> None:
    seen: list[tuple[int, int, int]] = []

    def terms(states: Tensor, rows: slice) -> Chunk:
        seen.append((rows.start, rows.stop, len(states)))
        return cubes(states, rows)

    loss, *_ = chunked_sum(torch.randn(7, 2, requires_grad=True), terms, 3)
    loss.backward()
    assert seen == [(0, 3, 3), (3, 6, 3), (6, 9, 1)]


def test_without_a_gradient_to_compute_none_is_asked_for() -> None:
    def terms(states: Tensor, rows: slice) -> Chunk:
        assert not states.requires_grad
        loss = states.sum()
        return Chunk(loss, loss[None], states.T, loss)

    hidden = torch.randn(7, 2)
    loss, *_ = chunked_sum(hidden, terms, 3)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, hidden.sum())


def test_cannot_be_differentiated_twice() -> None:
    hidden = torch.randn(7, 2, requires_grad=True)
    loss, *_ = chunked_sum(hidden, cubes, 3)
    scale = torch.ones((), requires_grad=True)
    (gradient,) = torch.autograd.grad(loss, hidden, scale, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
