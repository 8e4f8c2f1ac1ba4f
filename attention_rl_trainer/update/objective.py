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
from attention_rl_trainer.rollout.environment import DifferentiableEnvironment, ExactEnvironment, MemoryEnvironment
from attention_rl_trainer.rollout.layout import positions
from attention_rl_trainer.types import expect_tensor, is_token
from attention_rl_trainer.update.kept import KeptTrajectories, WrittenQueries, written_queries
from attention_rl_trainer.update.losses import (
    LossOptions,
    QueryTokens,
    TokenTerms,
    distilled_choice_term,
    expected_choice_term,
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
    written = written_queries(kept)
    with update_mode(policy.model):
        previous_hidden = _reference_hidden(policy, snapshot, kept, written, options)
    with update_mode(policy.model, adapter_dropout=not options.disable_dropout):
        hidden, capture = policy.training_forward(
            model,
            kept.token_ids if written.tree is None else written.tree,
            capture_queries=options.selector_coef > 0,
            padded=kept.memory.is_padded,
        )
    tokens = _query_tokens(policy, kept, written, hidden, previous_hidden, options)
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
        term, choice = choice_term(environment, vectors, kept, options)
        quantities |= {"query vector": vectors.detach(), "log-probability of a drawn pair": choice}
        loss = loss + options.selector_coef * term
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
    """Order the numbers of single query tokens by what is computed from what, ``[b, T, Q · L]`` each."""
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
    policy: PolicyModel,
    snapshot: AdapterSnapshot,
    kept: KeptTrajectories,
    written: WrittenQueries,
    options: LossOptions,
) -> Tensor | None:
    """States under the adapter that the KL refers to, at the places that predict query tokens, ``[n, C]``."""
    if options.beta == 0:
        return None
    reference = snapshot.swapped_in() if options.kl_reference == "previous" else policy.reference()
    with torch.no_grad(), reference:
        if written.tree is None:
            hidden = policy.forward(kept.token_ids, padded=kept.memory.is_padded)
        else:
            hidden = policy.forward_tree(written.tree)
    return hidden[:, written.predicted_from].flatten(0, 1)


def _query_tokens(
    policy: PolicyModel,
    kept: KeptTrajectories,
    written: WrittenQueries,
    hidden: Tensor,
    previous_hidden: Tensor | None,
    options: LossOptions,
) -> QueryTokens:
    return QueryTokens(
        hidden=hidden[:, written.predicted_from].flatten(0, 1),
        previous_hidden=previous_hidden,
        index=policy.allowed_index(written.token_ids.flatten()),
        advantages=written.advantages.float().flatten(),
        # Of a group each query weighs its share.
        weights=(kept.weights.float() / written.group_size).repeat_interleave(len(written.predicted_from)),
        rollout_logprobs=written.rollout_logprobs.flatten() if options.num_iterations > 1 else None,
    )


def choice_term(
    environment: MemoryEnvironment, query_vectors: Tensor, kept: KeptTrajectories, options: LossOptions
) -> tuple[Tensor, Tensor]:
    """Compute the selector's term of the loss before its weight.

    Args:
        query_vectors: with gradient, ``[b, T, H, D]``.

    Returns:
        The term, and the log-probabilities of the draws, ``[b, T]``, detached.
    """
    index = kept.selected_index
    if options.selector_gradient == "sampled":
        if not isinstance(environment, DifferentiableEnvironment):
            raise _lacking(environment, "selector_coef > 0", "log_prob", "set selector_coef to 0")
        drawn = environment.log_prob(kept.memory, query_vectors, index)
        expect_tensor("what the environment's log_prob returns", drawn, index.shape, floating=True)
        return selector_term(drawn, kept.advantages, kept.weights), drawn.detach()
    if not isinstance(environment, ExactEnvironment):
        asked = f"selector_gradient {options.selector_gradient!r}"
        raise _lacking(environment, asked, "log_probabilities", "set selector_gradient to 'sampled'")
    choices = environment.log_probabilities(kept.memory, query_vectors, index)
    shape = (*index.shape, kept.memory.pair_numbers.shape[1])
    expect_tensor("what the environment's log_probabilities returns", choices, shape, floating=True)
    values = kept.choice_values
    assert values is not None, "needs_choice_values says that they must be there"
    if options.selector_gradient == "expected":
        term = expected_choice_term(choices, values, kept.weights)
    else:
        term = distilled_choice_term(choices, values, options.distillation_temperature, kept.weights)
    return term, choices.detach().gather(2, index[:, :, None]).squeeze(2)


def _lacking(environment: MemoryEnvironment, option: str, method: str, remedy: str) -> TypeError:
    name = type(environment).__name__
    return TypeError(
        f"{option} needs an environment with {method}(memory, query_vectors, index), which {name} lacks; write that "
        f"method, or {remedy}"
    )


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
