"""Rewards and their parts."""

from __future__ import annotations

import pytest
import torch

from attention_rl_trainer.rollout.reward import calculate_reward, trajectory_reward, value_logprob


def test_reward_by_hand() -> None:
    policy = value_logprob(torch.tensor([[-1.0, -3.0]]), torch.ones(1, 2, dtype=torch.int64))
    counterfactual = value_logprob(torch.tensor([[-2.0, -5.0]]), torch.ones(1, 2, dtype=torch.int64))
    assert policy.item() == -2.0
    assert calculate_reward(policy, counterfactual).item() == 1.5
    assert trajectory_reward(torch.tensor([[1.5, -0.5, 0.5]])).item() == 0.5


def test_the_mean_is_over_tokens_and_steps_alone() -> None:
    token_logprobs = torch.randn(3, 4, 5)
    expected = [[sum(step) / 5 for step in row] for row in token_logprobs.tolist()]
    got = value_logprob(token_logprobs, torch.ones(3, 4, 5, dtype=torch.int64))
    torch.testing.assert_close(got, torch.tensor(expected))
    assert trajectory_reward(got).tolist() == pytest.approx([sum(row) / 4 for row in expected], abs=1e-6)
