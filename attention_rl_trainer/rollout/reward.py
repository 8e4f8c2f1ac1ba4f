"""Log-probabilities of the values into rewards and their parts (design §7).

    reward      = log p_θ(value | policy's query)    - log p_base(value | counterfactual query)
    query_gain  = log p_base(value | policy's query) - log p_base(value | counterfactual query)
    model_gain  = log p_θ(value | policy's query)    - log p_base(value | policy's query)
    order_gain  = log p_base(value | context, counterfactual query) - log p_base(value | pair 0 alone, the same query)

all in nats per value token. The first is the sum of the next two; the last is not paid for unless ``order_coef`` > 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from attention_rl_trainer.options import Coefficient, Options, option
from attention_rl_trainer.types import TrajectoryStep


@dataclass
class RewardOptions(Options):
    """What a step is paid for beside the reading itself."""

    order_coef: Coefficient = option(0.0, "Weight of the order gain in the reward.")


class RewardFunction(Protocol):
    """A user's own reward, given to the trainer as ``reward_fn``."""

    def __call__(self, step: TrajectoryStep, /) -> Tensor:
        """Judge a step of B trajectories.

        Args:
            step: all that the rollout knows of it; its ``reward`` is the default one.

        Returns:
            Nats per token or whatever else, ``[B]``, finite.
        """


def calculate_reward(policy_value_logprob: Tensor, counterfactual_value_logprob: Tensor) -> Tensor:
    """Compute a step's reward: the value's log-probability, normalized by the base model's own query.

    Args:
        policy_value_logprob: mean log p_θ(value | context, policy's query), nats per token, any shape.
        counterfactual_value_logprob: mean log p_base(value | context, counterfactual query), the same shape.

    Returns:
        Nats per token, the same shape.
    """
    return policy_value_logprob - counterfactual_value_logprob


def value_logprob(token_logprobs: Tensor) -> Tensor:
    """Average the log-probabilities of a value's tokens.

    Args:
        token_logprobs: log-probability of each value token given what comes before it, nats, ``[..., V]``.

    Returns:
        Nats per token, ``[...]``.
    """
    return token_logprobs.mean(dim=-1)


def trajectory_reward(step_rewards: Tensor) -> Tensor:
    """Average the rewards of a trajectory's steps.

    Args:
        step_rewards: ``[B, T]``.

    Returns:
        ``[B]``.
    """
    return step_rewards.mean(dim=-1)
