"""Kept trajectories into a loss: REINFORCE on query tokens, KL to the previous adapter, and the extensions (design §9).

    policy_τ = - Σ_t A_t Σ_i log π(query_{t,i} | s_{t,i})
    kl_τ     =   Σ_t Σ_i KL(π_previous(·|s_{t,i}) || π(·|s_{t,i}))
    loss     = Σ_τ w_τ (policy_τ + β kl_τ - entropy_coef · H_τ
                        + selector_coef · choice_τ - reward_gradient_coef · (1/T) Σ_t log p_θ(value_t))

    choice_τ = - Σ_t A_t log p_t(selected_t)                       "sampled"
               - Σ_t Σ_k p_t(k) a_t(k)                             "expected"
                 Σ_t KL(softmax(a_t / distillation_temperature) || p_t)     "distilled"

with w_τ = 1 / B_all, B_all the trajectories of all rollout batches of the update, and a_t(k) what value k would tell
about the others that are unread (`rollout.information`). Vocabulary logits exist only at the query (and, for the last
term, value) positions, in chunks. A chunk's gradient with respect to its hidden states is computed together with the
chunk, so that nothing of the vocabulary's size outlives it and nothing is computed twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from attention_rl_trainer.errors import logit_sums
from attention_rl_trainer.options import Coefficient, Count, Options, Positive, option
from attention_rl_trainer.update.chunks import Chunk, chunked_sum

Advantage = Literal["reward", "centered", "whitened"]
Credit = Literal["trajectory", "return_to_go", "step"]
KLReference = Literal["previous", "base"]
SelectorGradient = Literal["sampled", "expected", "distilled"]
# Blocks of a chunk's rows in which the KL is differentiated.
_KL_BLOCKS = 8
Logits = Callable[[Tensor], Tensor]
TokenScores = Callable[[Tensor, Tensor], Tensor]


@dataclass
class LossOptions(Options):
    """What weighs a query token, and the terms beside it."""

    advantage: Advantage = option(
        "centered",
        "What weighs a query: its 'reward', the reward less the historical mean ('centered'), or that divided by the "
        "historical SD ('whitened').",
    )
    credit: Credit = option(
        "trajectory",
        "Which rewards weigh a step's query: the 'trajectory' mean, this and later steps ('return_to_go'), or its own "
        "('step').",
    )
    beta: Coefficient = option(0.1, "Weight of the KL penalty.")
    kl_reference: KLReference = option(
        "previous", "KL to the adapter before the last update ('previous') or to the base model ('base')."
    )
    selector_coef: Coefficient = option(0.0, "Weight of the selector's own term, which trains the draws of pairs.")
    selector_gradient: SelectorGradient = option(
        "sampled",
        "How the selector is trained: REINFORCE on the draws ('sampled'), or by what each unread pair's value would "
        "tell about the others: raise its mean ('expected'), or imitate its softmax ('distilled').",
    )
    distillation_temperature: Positive = option(
        0.02,
        "Divides what values tell, nats per token, before the softmax that 'distilled' imitates.",
    )
    reward_gradient_coef: Coefficient = option(
        0.0, "Weight of the gradient through log p_θ(value): the model also learns to read."
    )
    entropy_coef: Coefficient = option(0.0, "Weight of an entropy bonus on query tokens.")
    num_iterations: Count = option(1, "Optimizer steps on each rollout batch; above 1 with clipped importance ratios.")
    epsilon: Positive = option(0.2, "Clip of the importance ratio when num_iterations > 1.")
    disable_dropout: bool = option(True, "Switch dropout off in the update too; it is always off in the rollout.")

    @property
    def needs_choice_values(self) -> bool:
        """Whether the loss needs what each choice would tell."""
        return self.selector_coef > 0 and self.selector_gradient != "sampled"

    def check_options(self) -> None:
        """Check the ranges, and that the selector's gradient is used."""
        super().check_options()
        if self.selector_gradient != "sampled" and self.selector_coef == 0:
            raise ValueError(
                f"selector_gradient is {self.selector_gradient!r}, but selector_coef is 0, so the selector has no term "
                "in the loss; set selector_coef above 0"
            )


def step_advantages(
    step_rewards: Tensor, history_mean: float, history_std: float, *, advantage: Advantage, credit: Credit
) -> Tensor:
    """Turn step rewards ``[b, T]``, nats per token, into the weights of the steps' log-probabilities, ``[b, T]``.

    The history is that of trajectory rewards before the batch; SD 0 leaves ``"whitened"`` unscaled. The credit is the
    mean over all steps (``"trajectory"``), the sum over this and later steps divided by T, or the step's own, myopic.
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
    """Terms to minimize, of ``[n]`` log π(token) with gradient: - A log π, plain REINFORCE.

    With the log-probabilities at the time of the rollout, - min(r A, clip(r, 1 ± epsilon) A), r the ratio of the
    probabilities (PPO, Schulman et al. 2017).
    """
    if rollout_logprobs is None:
        return -advantages * logprobs
    ratio = torch.exp(logprobs - rollout_logprobs)
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - epsilon, 1 + epsilon) * advantages)


def kl_divergence(previous_log_probabilities: Tensor, log_probabilities: Tensor) -> Tensor:
    """KL(previous || current) in nats, ``[...]``, of log-probabilities ``[..., A]``."""
    pointwise = F.kl_div(log_probabilities, previous_log_probabilities, reduction="none", log_target=True)
    return pointwise.sum(dim=-1)


@dataclass(frozen=True, eq=False)
class TokenTerms:
    """Numbers of single query tokens, ``[n]`` each, without graph; KL and entropy in nats."""

    logit_sum: Tensor
    """Finite only where every logit is."""
    previous_logit_sum: Tensor
    """The same under the previous adapter; 0 without one."""
    policy: Tensor
    kl: Tensor
    entropy: Tensor


@dataclass(frozen=True, eq=False)
class QueryTerms:
    """Weighted sums over query tokens, scalars: the loss, with gradient, and its parts before β and entropy_coef."""

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
        index: the tokens' places on the axis of allowed ids, ``[n]`` int64; the others ``[n]`` too.
        rollout_logprobs: ``None`` for plain REINFORCE.
    """

    hidden: Tensor
    previous_hidden: Tensor | None
    index: Tensor
    advantages: Tensor
    weights: Tensor
    rollout_logprobs: Tensor | None = None

    def chunk(self, rows: slice) -> QueryTokens:
        """Take some of the tokens."""
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

    With c = d policy / d log π(token), p the present probabilities, q = - d KL / d log π as autograd finds it through
    `kl_divergence` (the previous probabilities, whose sum is 1) and H the entropy:

        d loss / d logits = w · [c · onehot + (β - c) · p - β · q + entropy_coef · p · (log p + H)]

    Computed in place: autograd through the softmax would hold three times as many tensors of the vocabulary's size, and
    spend most of the time on allocating them.
    """
    with torch.enable_grad():
        logits = logits_of(tokens.hidden)
    place = tokens.index[:, None]
    present = torch.log_softmax(logits.detach(), dim=-1)
    policy, slope = _policy_terms_and_slope(present.gather(1, place).squeeze(1), tokens, epsilon)
    kl, entropy, previous_sums = torch.zeros_like(policy), torch.zeros_like(policy), torch.zeros_like(policy)
    kl_slope = None
    if tokens.previous_hidden is not None:
        with torch.no_grad():
            previous_logits = logits_of(tokens.previous_hidden)
            previous_sums = logit_sums(previous_logits)
            kl_slope = torch.log_softmax(previous_logits, dim=-1)
            del previous_logits
        kl = _kl_and_slope_in_place(kl_slope, present)
    slope_of_all = (beta - slope)[:, None]
    if entropy_coef == 0:
        gradient = present.exp_().mul_(slope_of_all)
    else:
        probabilities = present.exp()
        entropy = -torch.linalg.vecdot(probabilities, present)
        gradient = probabilities.mul_(present.add_(entropy[:, None]).mul_(entropy_coef).add_(slope_of_all))
    if kl_slope is not None:
        gradient.add_(kl_slope, alpha=beta)
    gradient.scatter_add_(1, place, slope[:, None]).mul_(tokens.weights[:, None])
    parts = torch.stack([policy, kl, entropy]) @ tokens.weights
    per_token = torch.stack([logit_sums(logits), previous_sums, policy, kl, entropy])
    return Chunk(parts[0] + beta * parts[1] - entropy_coef * parts[2], parts, per_token, logits, gradient)


def _kl_and_slope_in_place(previous: Tensor, present: Tensor) -> Tensor:
    """Compute `kl_divergence` of log-probabilities ``[n, A]``; its slope along the present ones replaces ``previous``.

    In blocks of rows, because `F.kl_div` and its derivative need four more tensors of their size.
    """
    kl = []
    size = math.ceil(len(present) / _KL_BLOCKS)
    for start in range(0, len(present), size):
        block = slice(start, start + size)
        with torch.enable_grad():
            variable = present[block].detach().requires_grad_()
            divergence = kl_divergence(previous[block], variable)
            (slope,) = torch.autograd.grad(divergence.sum(), variable)
        kl.append(divergence.detach())
        previous[block] = slope
    return torch.cat(kl)


def _policy_terms_and_slope(logprobs: Tensor, tokens: QueryTokens, epsilon: float) -> tuple[Tensor, Tensor]:
    """Compute `policy_gradient_terms` and their derivative with respect to the log-probabilities, ``[n]`` each."""
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
    """Sum the loss terms of query tokens, holding the logits of one chunk of tokens at a time.

    ``logits_of`` turns hidden states ``[m, C]`` into logits of the allowed ids, ``[m, A]`` in float32. At
    ``entropy_coef`` 0 no entropy is computed.
    """
    # Without a previous adapter there is no KL, whatever its weight.
    weight = beta if tokens.previous_hidden is not None else 0.0

    def terms(states: Tensor, rows: slice) -> Chunk:
        return _chunk_terms(replace(tokens.chunk(rows), hidden=states), logits_of, weight, entropy_coef, epsilon)

    loss, parts, per_token = chunked_sum(tokens.hidden, terms, chunk_size)
    policy, kl, entropy = parts
    return QueryTerms(loss, policy, kl, entropy, TokenTerms(*per_token))


def selector_term(log_probabilities: Tensor, advantages: Tensor, weights: Tensor) -> Tensor:
    """REINFORCE on the draws of pairs, - Σ_τ w_τ Σ_t A_t log p(selected_t), of ``[b, T]``, ``[b, T]`` and ``[b]``."""
    return -((advantages * log_probabilities).sum(dim=1) * weights).sum()


def expected_choice_term(log_probabilities: Tensor, values: Tensor, weights: Tensor) -> Tensor:
    """Less the expected worth of the choices, - Σ_τ w_τ Σ_t Σ_k p_t(k) a_t(k).

    Args:
        log_probabilities: ``[b, T, M]``, -inf where a pair was read; ``values``, a_t(k), likewise but 0 there.
        weights: ``[b]``.
    """
    expected = (log_probabilities.exp() * values).sum(dim=(1, 2))
    return -(expected * weights).sum()


def distilled_choice_term(log_probabilities: Tensor, values: Tensor, temperature: float, weights: Tensor) -> Tensor:
    """KL of the choices to a softmax of what they are worth, Σ_τ w_τ Σ_t KL(softmax(a_t / temperature) || p_t).

    Source: the target of Atlas's perplexity distillation (Izacard et al., 2023). Arguments of `expected_choice_term`.
    """
    is_unread = log_probabilities > -torch.inf
    target = torch.log_softmax((values / temperature).masked_fill(~is_unread, -torch.inf), dim=-1)
    # A finite stand-in: both are -inf where a pair was read.
    chosen, target = (part.masked_fill(~is_unread, 0) for part in (log_probabilities, target))
    pointwise = F.kl_div(chosen, target, reduction="none", log_target=True)
    return (pointwise.masked_fill(~is_unread, 0).sum(dim=(1, 2)) * weights).sum()


def reward_gradient_term(
    hidden: Tensor, token_ids: Tensor, weights: Tensor, score_tokens: TokenScores, *, chunk_size: int = 256
) -> tuple[Tensor, Tensor]:
    """The reward's direct dependence on the reader, - Σ_τ w_τ (1/T) Σ_t mean_V log p_θ(value_t), with gradient.

    ``hidden`` ``[n, C]`` predicts the n = b · T · V value tokens, whose weights are w / (T · V), V without padding.
    ``score_tokens`` turns states and token ids into log-probabilities; those of all tokens, ``[n]``, are returned too,
    without gradient.
    """

    def terms(states: Tensor, rows: slice) -> Chunk:
        with torch.enable_grad():
            logprobs = score_tokens(states, token_ids[rows])
            loss = -(logprobs * weights[rows]).sum()
        return Chunk(loss.detach(), loss.detach()[None], logprobs.detach()[None], loss)

    loss, _, logprobs = chunked_sum(hidden, terms, chunk_size)
    return loss, logprobs.squeeze(0)
