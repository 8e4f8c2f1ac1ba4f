"""Kept trajectories into a loss: REINFORCE on query tokens, KL to the previous adapter, and the extensions (design §9).

    policy_τ = - Σ_t A_t Σ_i log π(query_{t,i} | s_{t,i})
    kl_τ     =   Σ_t Σ_i KL(π_previous(·|s_{t,i}) || π(·|s_{t,i}))
    loss     = Σ_τ w_τ (policy_τ + β kl_τ - entropy_coef · H_τ
                        - selector_coef Σ_t A_t log p(selected_t) - reward_gradient_coef · (1/T) Σ_t log p_θ(value_t))

with w_τ = 1 / B_all, B_all the trajectories of the rollout batch over all processes. Vocabulary logits exist only at
the query (and, for the last term, value) positions, in chunks that the backward computes again.

Pure functions. Knows nothing about filters, optimizers or where the previous adapter is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

Advantage = Literal["reward", "centered", "whitened"]
Credit = Literal["trajectory", "return_to_go", "step"]
KLReference = Literal["previous", "base"]
LogSoftmax = Callable[[Tensor], Tensor]


def step_advantages(
    step_rewards: Tensor, history_mean: float, history_std: float, *, advantage: Advantage, credit: Credit
) -> Tensor:
    """Turn the rewards of trajectories into the weights of their steps' log-probabilities.

    Args:
        step_rewards: ``[b, T]``, nats per token.
        history_mean: mean of the history before the batch.
        history_std: its standard deviation; 0 leaves ``"whitened"`` unscaled.
        advantage: ``"reward"`` r, ``"centered"`` r - mean, or ``"whitened"`` (r - mean) / SD.
        credit: ``"trajectory"``, every step the mean over all steps; ``"return_to_go"``, the sum over this and later
            steps divided by T; ``"step"``, its own (myopic).

    Returns:
        ``[b, T]``.
    """
    rewards = step_rewards
    if advantage != "reward":
        rewards = rewards - history_mean
    if advantage == "whitened" and history_std > 0:
        rewards = rewards / history_std
    if credit == "trajectory":
        return rewards.mean(dim=1, keepdim=True).expand_as(rewards)
    if credit == "return_to_go":
        return rewards.flip(1).cumsum(1).flip(1) / rewards.shape[1]
    return rewards


def policy_gradient_terms(
    logprobs: Tensor, advantages: Tensor, rollout_logprobs: Tensor | None = None, epsilon: float = 0.2
) -> Tensor:
    """REINFORCE, or its clipped importance-weighted form when a rollout is used more than once.

    Args:
        logprobs: log π(token), with gradient, ``[n]``.
        advantages: weight of each token, ``[n]``.
        rollout_logprobs: log-probabilities at the time of the rollout, ``[n]``; ``None`` for plain REINFORCE.
        epsilon: the ratio is clipped to 1 ± epsilon.

    Returns:
        Terms to minimize, ``[n]``.
    """
    if rollout_logprobs is None:
        return -advantages * logprobs
    ratio = torch.exp(logprobs - rollout_logprobs)
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - epsilon, 1 + epsilon) * advantages)


def kl_divergence(previous_log_probabilities: Tensor, log_probabilities: Tensor) -> Tensor:
    """KL(previous || current) over the last axis, summed, in nats.

    Args:
        previous_log_probabilities: ``[..., A]``.
        log_probabilities: ``[..., A]``.

    Returns:
        ``[...]``.
    """
    pointwise = F.kl_div(log_probabilities, previous_log_probabilities, reduction="none", log_target=True)
    return pointwise.sum(dim=-1)


@dataclass(frozen=True, eq=False)
class QueryTerms:
    """Weighted sums over query tokens; each is a scalar tensor.

    Attributes:
        policy: Σ w · policy gradient terms.
        kl: Σ w · KL to the previous adapter, nats.
        entropy: Σ w · entropy, nats.
    """

    policy: Tensor
    kl: Tensor
    entropy: Tensor


@dataclass(frozen=True, eq=False)
class QueryTokens:
    """The query tokens of kept trajectories, flattened.

    Attributes:
        hidden: states that predict them, with gradient, ``[n, C]``.
        previous_hidden: the same states under the previous adapter, ``[n, C]``; ``None`` leaves the KL out.
        index: the tokens' places on the axis of allowed ids, ``[n]`` int64.
        advantages: ``[n]``.
        weights: weight w of each token's trajectory, ``[n]``.
        rollout_logprobs: ``[n]``, or ``None`` for plain REINFORCE.
    """

    hidden: Tensor
    previous_hidden: Tensor | None
    index: Tensor
    advantages: Tensor
    weights: Tensor
    rollout_logprobs: Tensor | None = None

    def chunk(self, rows: slice) -> QueryTokens:
        """Take some of the tokens.

        Args:
            rows: which.
        """
        return QueryTokens(
            self.hidden[rows],
            None if self.previous_hidden is None else self.previous_hidden[rows],
            self.index[rows],
            self.advantages[rows],
            self.weights[rows],
            None if self.rollout_logprobs is None else self.rollout_logprobs[rows],
        )


def _chunk_terms(tokens: QueryTokens, log_softmax: LogSoftmax, epsilon: float, with_entropy: bool) -> Tensor:
    """Compute the three sums over a chunk, ``[3]``."""
    log_probabilities = log_softmax(tokens.hidden)
    logprobs = log_probabilities.gather(1, tokens.index[:, None]).squeeze(1)
    policy = policy_gradient_terms(logprobs, tokens.advantages, tokens.rollout_logprobs, epsilon)
    zero = torch.zeros_like(policy)
    kl, entropy = zero, zero
    if tokens.previous_hidden is not None:
        with torch.no_grad():
            previous = log_softmax(tokens.previous_hidden)
        kl = kl_divergence(previous, log_probabilities)
    if with_entropy:
        entropy = -(log_probabilities.exp() * log_probabilities).sum(dim=-1)
    return torch.stack([policy, kl, entropy]) @ tokens.weights


def query_terms(
    tokens: QueryTokens,
    log_softmax: LogSoftmax,
    *,
    epsilon: float = 0.2,
    with_entropy: bool = False,
    chunk_size: int = 256,
) -> QueryTerms:
    """Sum the loss terms of query tokens, holding the logits of one chunk at a time.

    Args:
        tokens: the tokens and what belongs to each.
        log_softmax: hidden states ``[n, C]`` to log-probabilities over the allowed ids ``[n, A]``.
        epsilon: clip of the importance ratio.
        with_entropy: whether the entropy is wanted.
        chunk_size: tokens in a chunk.
    """
    sums = tokens.hidden.new_zeros(3, dtype=torch.float32)
    for start in range(0, len(tokens.index), chunk_size):
        chunk = tokens.chunk(slice(start, start + chunk_size))
        sums = sums + checkpoint(
            _chunk_terms, chunk, log_softmax, epsilon, with_entropy, use_reentrant=False, preserve_rng_state=False
        )
    policy, kl, entropy = sums
    return QueryTerms(policy, kl, entropy)


def selector_term(log_probabilities: Tensor, advantages: Tensor, weights: Tensor) -> Tensor:
    """REINFORCE on the draws of pairs: - Σ_τ w_τ Σ_t A_t log p(selected_t).

    Args:
        log_probabilities: of the drawn pairs, with gradient, ``[b, T]``.
        advantages: ``[b, T]``.
        weights: ``[b]``.
    """
    return -((advantages * log_probabilities).sum(dim=1) * weights).sum()


def reward_gradient_term(value_logprobs: Tensor, weights: Tensor) -> Tensor:
    """The reward's direct dependence on the reader: - Σ_τ w_τ (1/T) Σ_t mean_V log p_θ(value_t).

    Args:
        value_logprobs: of each value token, with gradient, ``[b, T, V]``.
        weights: ``[b]``.
    """
    return -(value_logprobs.mean(dim=(1, 2)) * weights).sum()
