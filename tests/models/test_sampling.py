"""Episode streams and draws by the inverse distribution function."""

from __future__ import annotations

import math

import torch

from attention_rl_trainer.models.sampling import Purpose, entropy, episode_noise, sample_by_inverse


def test_an_episode_has_its_stream_wherever_it_stands() -> None:
    together = episode_noise(3, [10, 11, 12], Purpose.POLICY, (2, 4))
    alone = episode_noise(3, [11], Purpose.POLICY, (2, 4))
    assert together.shape == (3, 2, 4)
    assert torch.equal(together[1:2], alone)
    assert bool(((together >= 0) & (together < 1)).all())


def test_streams_differ_by_seed_episode_and_purpose() -> None:
    streams = [
        episode_noise(seed, [episode], purpose, (8,)) for seed in (1, 2) for episode in (0, 1) for purpose in Purpose
    ]
    assert len({tuple(stream.flatten().tolist()) for stream in streams}) == 2 * 2 * len(Purpose) == 24


def test_never_draws_an_outcome_of_probability_zero() -> None:
    almost_one = math.nextafter(1.0, 0.0)
    probabilities = torch.tensor([[0.0, 0.3, 0.7, 0.0], [1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 1e-30, 0.0]])
    for noise in (0.0, 0.5, almost_one):
        drawn = sample_by_inverse(probabilities, torch.full((3,), noise, dtype=torch.float64))
        assert bool((probabilities.gather(1, drawn[:, None]) > 0).all())


def test_rows_use_their_own_noise() -> None:
    probabilities = torch.full((4, 4), 0.25)
    drawn = sample_by_inverse(probabilities, torch.tensor([0.1, 0.3, 0.6, 0.9], dtype=torch.float64))
    assert drawn.tolist() == [0, 1, 2, 3]


def test_entropy_by_hand() -> None:
    got = entropy(torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]))
    torch.testing.assert_close(got, torch.tensor([math.log(2), 0.0]))
