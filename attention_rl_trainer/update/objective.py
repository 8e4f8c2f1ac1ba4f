"""A micro-batch of kept trajectories into its loss (design §9).

Joins the policy's states and log-probabilities, the previous adapter's, and the pure terms of `losses`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attention_rl_trainer.errors import NonFiniteError, expect_finite
from attention_rl_trainer.models.modes import update_mode
from attention_rl_trainer.models.policy import PolicyModel
from attention_rl_trainer.rollout.environment import DifferentiableEnvironment, MemoryEnvironment
from attention_rl_trainer.rollout.layout import positions
from attention_rl_trainer.types import expect_tensor, is_token
from attention_rl_trainer.update.kept import KeptTrajectories
from attention_rl_trainer.update.losses import (
    LossOptions,
    QueryTokens,
    TokenTerms,
    query_terms,
    reward_gradient_term,
    selector_term,
)
from attention_rl_trainer.update.previous_adapter import AdapterSnapshot


@dataclass(frozen=True, eq=False)
class LossTerms:
    """The loss of a micro-batch and parts of it, each weighted by 1 / B_all; scalars."""

    loss: Tensor
    """What to differentiate."""
    policy: Tensor
    kl: Tensor | None
    """To the previous adapter or the base model, before β, nats; ``None`` where it is not computed, as at β = 0."""


def compute_loss_terms(
    policy: PolicyModel,
    model: nn.Module,
    environment: MemoryEnvironment,
    snapshot: AdapterSnapshot,
    kept: KeptTrajectories,
    options: LossOptions,
) -> LossTerms:
    """Compute the loss of a micro-batch in one forward over whole trajectories.

    Each step's context is a prefix of the trajectory, so one forward gives every query token's log-probability. Where
    activation checkpointing runs layers again in the backward, the caller must keep dropout disabled until after it.

    Args:
        policy: the adapted model.
        model: the same model as the trainer wrapped it.
        environment: gives the log-probability of the draws where ``selector_coef`` > 0.
        snapshot: the previous adapter.

    Raises:
        NonFiniteError: a logit, vector, log-probability, the KL or the loss is not finite; names which, the step of the
            trajectory and the articles.
        TypeError: ``selector_coef`` > 0, but the environment has no ``log_prob``.
        ValueError: ``log_prob`` does not return one number per draw.
    """
    places = positions(kept.query_starts, kept.query_length, kept.token_ids.device)
    with update_mode(policy.model):
        previous_hidden = _reference_hidden(policy, snapshot, kept, places, options)
    with update_mode(policy.model, adapter_dropout=not options.disable_dropout):
        hidden, capture = policy.training_forward(
            model, kept.token_ids, capture_queries=options.selector_coef > 0, padded=kept.memory.is_padded
        )
    tokens = _query_tokens(policy, kept, places, hidden, previous_hidden, options)
    terms = query_terms(
        tokens,
        policy.query_logits,
        beta=options.beta,
        entropy_coef=options.entropy_coef,
        epsilon=options.epsilon,
        chunk_size=policy.logits_chunk_size,
    )
    loss, quantities = terms.loss, _named(terms.per_token, kept, options)
    if capture is not None:
        vectors = torch.unflatten(capture.heads()[:, places], 1, (-1, kept.query_length)).mean(dim=2)
        choice = _choice_logprobs(environment, vectors, kept)
        quantities |= {"query vector": vectors.detach(), "log-probability of a drawn pair": choice.detach()}
        loss = loss + options.selector_coef * selector_term(choice, kept.advantages, kept.weights)
    if options.reward_gradient_coef > 0:
        term, logprobs = reading_term(policy, kept, hidden)
        quantities["policy logit or log-probability of a value"] = logprobs
        loss = loss + options.reward_gradient_coef * term
    expect_finite(quantities, kept.articles)
    if not bool(loss.isfinite()):
        parts = f"(policy {terms.policy.item()}, KL {terms.kl.item()})"
        raise NonFiniteError("the loss", parts, kept.articles)
    return LossTerms(loss, terms.policy, terms.kl if options.beta > 0 else None)


def _named(terms: TokenTerms, kept: KeptTrajectories, options: LossOptions) -> dict[str, Tensor]:
    """Order the numbers of single query tokens by what is computed from what, ``[b, T, L]`` each."""
    reference = "previous adapter's logit" if options.kl_reference == "previous" else "base model logit"
    values = {
        "policy logit": terms.logit_sum,
        reference: terms.previous_logit_sum,
        "policy gradient term": terms.policy,
        "KL": terms.kl,
        "entropy of a query token": terms.entropy,
    }
    return {name: value.view(len(kept), len(kept.query_starts), -1) for name, value in values.items()}


def _reference_hidden(
    policy: PolicyModel, snapshot: AdapterSnapshot, kept: KeptTrajectories, places: Tensor, options: LossOptions
) -> Tensor | None:
    """States under the adapter that the KL refers to, at the positions that predict query tokens, ``[n, C]``."""
    if options.beta == 0:
        return None
    reference = snapshot.swapped_in() if options.kl_reference == "previous" else policy.reference()
    with torch.no_grad(), reference:
        return policy.forward(kept.token_ids, padded=kept.memory.is_padded)[:, places - 1].flatten(0, 1)


def _query_tokens(
    policy: PolicyModel,
    kept: KeptTrajectories,
    places: Tensor,
    hidden: Tensor,
    previous_hidden: Tensor | None,
    options: LossOptions,
) -> QueryTokens:
    length = kept.query_length
    return QueryTokens(
        hidden=hidden[:, places - 1].flatten(0, 1),
        previous_hidden=previous_hidden,
        index=policy.allowed_index(kept.token_ids[:, places].flatten()),
        advantages=kept.advantages.float().repeat_interleave(length, dim=1).flatten(),
        weights=kept.weights.float().repeat_interleave(len(places)),
        rollout_logprobs=kept.rollout_logprobs.flatten() if options.num_iterations > 1 else None,
    )


def _choice_logprobs(environment: MemoryEnvironment, query_vectors: Tensor, kept: KeptTrajectories) -> Tensor:
    """Log-probabilities of the draws, ``[b, T]``, given the query vectors, ``[b, T, H, D]``."""
    if not isinstance(environment, DifferentiableEnvironment):
        raise TypeError(
            "selector_coef > 0 needs an environment with log_prob(memory, query_vectors, index), which "
            f"{type(environment).__name__} lacks; write that method, or set selector_coef to 0"
        )
    logprobs = environment.log_prob(kept.memory, query_vectors, kept.selected_index)
    expect_tensor("what the environment's log_prob returns", logprobs, kept.selected_index.shape, floating=True)
    return logprobs


def reading_term(policy: PolicyModel, kept: KeptTrajectories, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Less the weighted mean log-probability of the values under the policy, and the values' tokens', ``[b, T, V]``.

    Args:
        hidden: the policy's states of whole trajectories, ``[b, S, C]``.
    """
    places, num_steps = positions(kept.value_starts, kept.value_length, kept.token_ids.device), len(kept.value_starts)
    values = torch.unflatten(kept.token_ids[:, places], 1, (num_steps, -1))
    # Each step's mean is over its own tokens.
    weights = kept.weights.float()[:, None] / num_steps / is_token(values).sum(dim=2)
    term, logprobs = reward_gradient_term(
        hidden[:, places - 1].flatten(0, 1),
        values.flatten(),
        weights.flatten().repeat_interleave(kept.value_length),
        policy.score_tokens,
        chunk_size=policy.logits_chunk_size,
    )
    return term, logprobs.view(values.shape)
