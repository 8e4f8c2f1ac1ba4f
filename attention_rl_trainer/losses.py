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

from attention_rl_trainer.finiteness import logit_sums

Advantage = Literal["reward", "centered", "whitened"]
Credit = Literal["trajectory", "return_to_go", "step"]
KLReference = Literal["previous", "base"]
Logits = Callable[[Tensor], Tensor]
TokenScores = Callable[[Tensor, Tensor], Tensor]


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
class Chunk:
    """What is summed over a chunk, and where its gradient enters the graph.

    Attributes:
        loss: the chunk's share of the sum, a scalar without graph.
        parts: parts of it to look at, ``[k]``, without graph.
        outputs: what was computed from the chunk's hidden states with a graph.
        output_gradients: the gradient of the loss with respect to it; ``None`` for 1, where it is the loss.
        per_token: numbers of each token to look at, ``[j, m]``, without graph.
    """

    loss: Tensor
    parts: Tensor
    per_token: Tensor
    outputs: Tensor
    output_gradients: Tensor | None = None


ChunkTerms = Callable[[Tensor, slice], Chunk]


class _ChunkedSum(torch.autograd.Function):
    """A sum over chunks of hidden states; see `chunked_sum`."""

    @staticmethod
    def forward(ctx: FunctionCtx, hidden: Tensor, terms: ChunkTerms, chunk_size: int) -> tuple[Tensor, Tensor, Tensor]:
        needs_gradient: bool = ctx.needs_input_grad[0]  # type: ignore[attr-defined]  # torch sets it, untyped
        gradient = torch.empty_like(hidden) if needs_gradient else None
        losses, parts, per_token = [], [], []
        for start in range(0, hidden.shape[0], chunk_size):
            rows = slice(start, start + chunk_size)
            states = hidden[rows].detach().requires_grad_(needs_gradient)
            chunk = terms(states, rows)
            losses.append(chunk.loss)
            parts.append(chunk.parts)
            per_token.append(chunk.per_token)
            if gradient is not None:
                (gradient[rows],) = torch.autograd.grad(chunk.outputs, states, chunk.output_gradients)
            # Before the next chunk takes memory of the same size.
            del chunk
        ctx.save_for_backward(*([] if gradient is None else [gradient]))
        total, tokens = torch.stack(parts).sum(dim=0), torch.cat(per_token, dim=1)
        ctx.mark_non_differentiable(total, tokens)
        return torch.stack(losses).sum(), total, tokens

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, loss_gradient: Tensor, *_: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors  # type: ignore[attr-defined]  # torch sets it, untyped
        return gradient * loss_gradient.to(gradient.dtype), None, None


def chunked_sum(hidden: Tensor, terms: ChunkTerms, chunk_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sum a differentiable function of hidden states, holding what it computes for one chunk at a time.

    Each chunk is differentiated at once, which costs no second forward, as recomputation in the backward would.

    Args:
        hidden: ``[n, C]``; the only thing that gets a gradient.
        terms: the states of a chunk and its rows, to the chunk's share of the sum.
        chunk_size: rows of a chunk.

    Returns:
        The sum, a scalar that can be differentiated once, and, which cannot, the sums of the parts and the numbers of
        each token, ``[j, n]``.
    """
    loss, parts, per_token = _ChunkedSum.apply(hidden, terms, chunk_size)  # type: ignore[no-untyped-call]  # upstream
    return loss, parts, per_token


@dataclass(frozen=True, eq=False)
class TokenTerms:
    """Numbers of single query tokens, ``[n]`` each, without graph.

    Attributes:
        logit_sum: sum of the logits, finite only where all are.
        previous_logit_sum: the same under the previous adapter; 0 without one.
        policy: policy gradient term.
        kl: KL to the previous adapter, nats.
        entropy: nats.
    """

    logit_sum: Tensor
    previous_logit_sum: Tensor
    policy: Tensor
    kl: Tensor
    entropy: Tensor


@dataclass(frozen=True, eq=False)
class QueryTerms:
    """Weighted sums over query tokens; each is a scalar tensor.

    Attributes:
        loss: policy + β · kl - entropy_coef · entropy, with gradient.
        policy: Σ w · policy gradient terms, detached like the following.
        kl: Σ w · KL to the previous adapter, nats.
        entropy: Σ w · entropy, nats.
        per_token: what to look at where a sum is not finite.
    """

    loss: Tensor
    policy: Tensor
    kl: Tensor
    entropy: Tensor
    per_token: TokenTerms


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


def _chunk_terms(tokens: QueryTokens, logits_of: Logits, beta: float, entropy_coef: float, epsilon: float) -> Chunk:
    """Compute a chunk's loss, its policy, KL and entropy parts, and the gradient with respect to its logits.

    With c = d policy / d log π(token), p and q the present and the previous probabilities and H the entropy:

        d loss / d logits = w · [c · onehot + (β - c) · p - β · q + entropy_coef · p · (log p + H)]

    Written out and computed in place: autograd would hold three times as many tensors of the vocabulary's size, and
    most of the time would go into allocating them.
    """
    with torch.enable_grad():
        logits = logits_of(tokens.hidden)
    place = tokens.index[:, None]
    present = torch.log_softmax(logits.detach(), dim=-1)
    policy, slope = _policy_terms_and_slope(present.gather(1, place).squeeze(1), tokens, epsilon)
    kl, entropy, previous_sums = torch.zeros_like(policy), torch.zeros_like(policy), torch.zeros_like(policy)
    previous_probabilities = None
    if tokens.previous_hidden is not None:
        with torch.no_grad():
            previous_logits = logits_of(tokens.previous_hidden)
            previous_sums = logit_sums(previous_logits)
            previous = torch.log_softmax(previous_logits, dim=-1)
            del previous_logits
        previous_probabilities = previous.exp()
        kl = torch.linalg.vecdot(previous_probabilities, previous.sub_(present))
        del previous
    slope_of_all = (beta - slope)[:, None]
    if entropy_coef == 0:
        gradient = present.exp_().mul_(slope_of_all)
    else:
        probabilities = present.exp()
        entropy = -torch.linalg.vecdot(probabilities, present)
        gradient = probabilities.mul_(present.add_(entropy[:, None]).mul_(entropy_coef).add_(slope_of_all))
    if previous_probabilities is not None:
        gradient.add_(previous_probabilities, alpha=-beta)
    gradient.scatter_add_(1, place, slope[:, None]).mul_(tokens.weights[:, None])
    parts = torch.stack([policy, kl, entropy]) @ tokens.weights
    per_token = torch.stack([logit_sums(logits), previous_sums, policy, kl, entropy])
    return Chunk(parts[0] + beta * parts[1] - entropy_coef * parts[2], parts, per_token, logits, gradient)


def _policy_terms_and_slope(logprobs: Tensor, tokens: QueryTokens, epsilon: float) -> tuple[Tensor, Tensor]:
    """Compute the policy gradient terms and their derivative with respect to the log-probabilities, ``[n]`` each."""
    with torch.enable_grad():
        variable = logprobs.requires_grad_()
        terms = policy_gradient_terms(variable, tokens.advantages, tokens.rollout_logprobs, epsilon)
        (slope,) = torch.autograd.grad(terms.sum(), variable)
    return terms.detach(), slope


def query_terms(
    tokens: QueryTokens,
    logits_of: Logits,
    *,
    beta: float,
    entropy_coef: float = 0.0,
    epsilon: float = 0.2,
    chunk_size: int = 256,
) -> QueryTerms:
    """Sum the loss terms of query tokens, holding the logits of one chunk at a time.

    Args:
        tokens: the tokens and what belongs to each.
        logits_of: hidden states ``[n, C]`` to logits of the allowed ids ``[n, A]`` in float32.
        beta: weight of the KL.
        entropy_coef: weight of the entropy; at 0 it is not computed.
        epsilon: clip of the importance ratio.
        chunk_size: tokens in a chunk.
    """
    # Without a previous adapter there is no KL, whatever its weight.
    weight = beta if tokens.previous_hidden is not None else 0.0

    def terms(states: Tensor, rows: slice) -> Chunk:
        return _chunk_terms(replace(tokens.chunk(rows), hidden=states), logits_of, weight, entropy_coef, epsilon)

    loss, parts, per_token = chunked_sum(tokens.hidden, terms, chunk_size)
    policy, kl, entropy = parts
    return QueryTerms(loss, policy, kl, entropy, TokenTerms(*per_token))


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
) -> tuple[Tensor, Tensor]:
    """The reward's direct dependence on the reader: - Σ_τ w_τ (1/T) Σ_t mean_V log p_θ(value_t).

    Args:
        hidden: states that predict the value tokens, with gradient, ``[n, C]``, n = b · T · V.
        token_ids: the value tokens, ``[n]`` int64.
        weights: weight w / (T · V) of each token, ``[n]``.
        score_tokens: hidden states ``[m, C]`` and token ids ``[m]`` to log-probabilities ``[m]``.
        chunk_size: tokens in a chunk.

    Returns:
        The term, a scalar with gradient, and the log-probabilities, ``[n]``, without.
    """

    def terms(states: Tensor, rows: slice) -> Chunk:
        with torch.enable_grad():
            logprobs = score_tokens(states, token_ids[rows])
            loss = -(logprobs * weights[rows]).sum()
        return Chunk(loss.detach(), loss.detach()[None], logprobs.detach()[None], loss)

    loss, _, logprobs = chunked_sum(hidden, terms, chunk_size)
    return loss, logprobs.squeeze(0)
