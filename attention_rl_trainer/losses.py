"""Kept trajectories into a loss: REINFORCE on query tokens, KL to the previous adapter, and the extensions (design §9).

    policy_τ = - Σ_t A_t Σ_i log π(query_{t,i} | s_{t,i})
    kl_τ     =   Σ_t Σ_i KL(π_previous(·|s_{t,i}) || π(·|s_{t,i}))
    loss     = Σ_τ w_τ (policy_τ + β kl_τ - entropy_coef · H_τ
                        - selector_coef Σ_t A_t log p(selected_t) - reward_gradient_coef · (1/T) Σ_t log p_θ(value_t))

with w_τ = 1 / B_all, B_all the trajectories of the rollout batch over all processes. Vocabulary logits exist only at
the query (and, for the last term, value) positions, in chunks. A chunk's gradient with respect to its hidden states is
computed together with the chunk, so that nothing of the vocabulary's size outlives it and nothing is computed twice.

Pure functions. Knows nothing about filters, optimizers or where the previous adapter is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional as F

Advantage = Literal["reward", "centered", "whitened"]
Credit = Literal["trajectory", "return_to_go", "step"]
KLReference = Literal["previous", "base"]
LogSoftmax = Callable[[Tensor], Tensor]
TokenScores = Callable[[Tensor, Tensor], Tensor]
ChunkTerms = Callable[[Tensor, slice], tuple[Tensor, Tensor]]


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


class _ChunkedSum(torch.autograd.Function):
    """A sum over chunks of hidden states; see `chunked_sum`."""

    @staticmethod
    def forward(ctx: FunctionCtx, hidden: Tensor, terms: ChunkTerms, chunk_size: int) -> tuple[Tensor, Tensor]:
        needs_gradient = ctx.needs_input_grad[0]  # type: ignore[attr-defined]  # torch sets it, untyped
        gradient = torch.empty_like(hidden) if needs_gradient else None
        losses, parts = [], []
        for start in range(0, hidden.shape[0], chunk_size):
            rows = slice(start, start + chunk_size)
            states = hidden[rows].detach().requires_grad_(needs_gradient)
            with torch.set_grad_enabled(needs_gradient):
                loss, part = terms(states, rows)
            if gradient is not None:
                (gradient[rows],) = torch.autograd.grad(loss, states)
            losses.append(loss.detach())
            parts.append(part.detach())
            # Before the next chunk takes memory of the same size.
            del loss, part
        ctx.save_for_backward(*([] if gradient is None else [gradient]))
        total = torch.stack(parts).sum(dim=0)
        ctx.mark_non_differentiable(total)
        return torch.stack(losses).sum(), total

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, loss_gradient: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors  # type: ignore[attr-defined]  # torch sets it, untyped
        return gradient * loss_gradient.to(gradient.dtype), None, None


def chunked_sum(hidden: Tensor, terms: ChunkTerms, chunk_size: int) -> tuple[Tensor, Tensor]:
    """Sum a differentiable function of hidden states, holding what it computes for one chunk at a time.

    Each chunk is differentiated at once, which costs no second forward, as recomputation in the backward would.

    Args:
        hidden: ``[n, C]``; the only thing that gets a gradient.
        terms: the states of a chunk and its rows, to the chunk's share of the sum, and parts of it to look at.
        chunk_size: rows of a chunk.

    Returns:
        The sum, a scalar that can be differentiated once, and the sums of the parts, which cannot.
    """
    loss, parts = _ChunkedSum.apply(hidden, terms, chunk_size)  # type: ignore[no-untyped-call]  # not annotated upstream
    return loss, parts


@dataclass(frozen=True, eq=False)
class QueryTerms:
    """Weighted sums over query tokens; each is a scalar tensor.

    Attributes:
        loss: policy + β · kl - entropy_coef · entropy, with gradient.
        policy: Σ w · policy gradient terms, detached like the following.
        kl: Σ w · KL to the previous adapter, nats.
        entropy: Σ w · entropy, nats.
    """

    loss: Tensor
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


def _chunk_terms(
    tokens: QueryTokens, log_softmax: LogSoftmax, beta: float, entropy_coef: float, epsilon: float
) -> tuple[Tensor, Tensor]:
    """Compute a chunk's loss, and its policy, KL and entropy parts, ``[3]``."""
    log_probabilities = log_softmax(tokens.hidden)
    logprobs = log_probabilities.gather(1, tokens.index[:, None]).squeeze(1)
    policy = policy_gradient_terms(logprobs, tokens.advantages, tokens.rollout_logprobs, epsilon)
    zero = torch.zeros_like(policy)
    kl, entropy = zero, zero
    if tokens.previous_hidden is not None:
        with torch.no_grad():
            previous = log_softmax(tokens.previous_hidden)
        kl = kl_divergence(previous, log_probabilities)
    if entropy_coef != 0:
        entropy = -(log_probabilities.exp() * log_probabilities).sum(dim=-1)
    parts = torch.stack([policy, kl, entropy]) @ tokens.weights
    return parts[0] + beta * parts[1] - entropy_coef * parts[2], parts


def query_terms(
    tokens: QueryTokens,
    log_softmax: LogSoftmax,
    *,
    beta: float,
    entropy_coef: float = 0.0,
    epsilon: float = 0.2,
    chunk_size: int = 256,
) -> QueryTerms:
    """Sum the loss terms of query tokens, holding the logits of one chunk at a time.

    Args:
        tokens: the tokens and what belongs to each.
        log_softmax: hidden states ``[n, C]`` to log-probabilities over the allowed ids ``[n, A]``.
        beta: weight of the KL.
        entropy_coef: weight of the entropy; at 0 it is not computed.
        epsilon: clip of the importance ratio.
        chunk_size: tokens in a chunk.
    """

    def terms(states: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        chunk = replace(tokens.chunk(rows), hidden=states)
        return _chunk_terms(chunk, log_softmax, beta, entropy_coef, epsilon)

    loss, parts = chunked_sum(tokens.hidden, terms, chunk_size)
    return QueryTerms(loss, *parts)


def selector_term(log_probabilities: Tensor, advantages: Tensor, weights: Tensor) -> Tensor:
    """REINFORCE on the draws of pairs: - Σ_τ w_τ Σ_t A_t log p(selected_t).

    Args:
        log_probabilities: of the drawn pairs, with gradient, ``[b, T]``.
        advantages: ``[b, T]``.
        weights: ``[b]``.
    """
    return -((advantages * log_probabilities).sum(dim=1) * weights).sum()


def reward_gradient_term(
    hidden: Tensor, token_ids: Tensor, weights: Tensor, score_tokens: TokenScores, *, chunk_size: int = 256
) -> Tensor:
    """The reward's direct dependence on the reader: - Σ_τ w_τ (1/T) Σ_t mean_V log p_θ(value_t).

    Args:
        hidden: states that predict the value tokens, with gradient, ``[n, C]``, n = b · T · V.
        token_ids: the value tokens, ``[n]`` int64.
        weights: weight w / (T · V) of each token, ``[n]``.
        score_tokens: hidden states ``[m, C]`` and token ids ``[m]`` to log-probabilities ``[m]``.
        chunk_size: tokens in a chunk.
    """

    def terms(states: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        loss = -(score_tokens(states, token_ids[rows]) * weights[rows]).sum()
        return loss, loss[None]

    return chunked_sum(hidden, terms, chunk_size)[0]
