"""From log-probabilities of values to rewards and their parts (design §7).

    reward      = log p_θ(value | policy's query)    - log p_base(value | counterfactual query)
    query_gain  = log p_base(value | policy's query) - log p_base(value | counterfactual query)
    model_gain  = log p_θ(value | policy's query)    - log p_base(value | policy's query)
    order_gain  = log p_base(value | context, counterfactual query) - log p_base(value | pair 0 alone, the same query)

all in nats per value token. The first is the sum of the next two; the last is not paid for unless ``order_coef`` > 0,
nor is what a step tells about the values still unread unless ``information_coef`` > 0 (`information`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor

from attention_rl_trainer.options import Coefficient, Options, option
from attention_rl_trainer.types import TrajectoryStep, expect_tensor, is_token


@dataclass
class RewardOptions(Options):
    """What a step is paid for beside the reading itself."""

    order_coef: Coefficient = option(
        0.0, "Weight in a step's reward of the order gain: what the pairs before brought to its value."
    )
    information_coef: Coefficient = option(
        0.0, "Weight in a step's reward of the information gain: what it tells about the values still unread."
    )


class RewardFunction(Protocol):
    """A user's own reward, given to the trainer as ``reward_fn``."""

    def __call__(self, step: TrajectoryStep, /) -> Tensor:
        """Judge a step, whose ``reward`` is the default one, of B trajectories: ``[B]``, floating, finite."""


def judge_step(reward_fn: RewardFunction, step: TrajectoryStep) -> TrajectoryStep:
    """Replace a step's default reward by a user's own.

    Raises:
        ValueError: ``reward_fn`` does not return a floating tensor ``[B]``.
    """
    reward = reward_fn(step)
    if not isinstance(reward, Tensor):
        raise ValueError(f"reward_fn must return a tensor of shape {list(step.reward.shape)}, got {reward!r}")
    expect_tensor("what reward_fn returns", reward, step.reward.shape, floating=True)
    return replace(step, reward=reward.to(step.reward))


def calculate_reward(policy_value_logprob: Tensor, counterfactual_value_logprob: Tensor) -> Tensor:
    """Normalize a value's log-probability by that after the base model's own query; nats per token, any shape."""
    return policy_value_logprob - counterfactual_value_logprob


def value_logprob(token_logprobs: Tensor, value_tokens: Tensor) -> Tensor:
    """Average the log-probabilities of a value's tokens ``[..., V]``, nats, 0 for padding, into nats per token."""
    return token_logprobs.sum(dim=-1) / is_token(value_tokens).sum(dim=-1)


def trajectory_reward(step_rewards: Tensor) -> Tensor:
    """Average the rewards of a trajectory's steps, ``[B, T]``, into ``[B]``."""
    return step_rewards.mean(dim=-1)
