"""Rolled-out trajectories into the micro-batches of an update, and a micro-batch into its loss (design §9).

Joins `policy` (states and log-probabilities), `losses` (pure terms) and the previous adapter. Knows nothing about
optimizers, filters or the Trainer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attention_rl_trainer.adapters import AdapterSnapshot
from attention_rl_trainer.finiteness import NonFiniteError, expect_finite
from attention_rl_trainer.losses import (
    KLReference,
    QueryTokens,
    TokenTerms,
    query_terms,
    reward_gradient_term,
    selector_term,
)
from attention_rl_trainer.memory import DifferentiableEnvironment, MemoryEnvironment
from attention_rl_trainer.pairs import ArticleReference
from attention_rl_trainer.policy import PolicyModel, dropout_disabled
from attention_rl_trainer.types import KeyValuePairs, Trajectory


@dataclass(frozen=True, eq=False)
class KeptTrajectories:
    """Trajectories to train on.

    Attributes:
        token_ids: ``[b, S]`` int64.
        query_starts: position of each step's first query token, T integers.
        value_starts: position of each step's first value token, T integers.
        query_length: L.
        value_length: V.
        rollout_logprobs: log-probabilities of the query tokens at the time of the rollout, ``[b, T, L]``.
        selected_index: columns drawn, ``[b, T]`` int64.
        memory: what they were drawn from.
        advantages: ``[b, T]``.
        weights: weight of each trajectory in the loss, 1 / B_all, ``[b]``.
        articles: what was read, b articles, for errors; may be empty.
    """

    token_ids: Tensor
    query_starts: tuple[int, ...]
    value_starts: tuple[int, ...]
    query_length: int
    value_length: int
    rollout_logprobs: Tensor
    selected_index: Tensor
    memory: KeyValuePairs
    advantages: Tensor
    weights: Tensor
    articles: tuple[ArticleReference, ...] = ()

    def __len__(self) -> int:
        """Return the number of trajectories, b."""
        return self.token_ids.shape[0]

    @classmethod
    def select(
        cls,
        trajectory: Trajectory,
        rows: Tensor,
        advantages: Tensor,
        weights: Tensor,
        articles: Sequence[ArticleReference] = (),
    ) -> KeptTrajectories:
        """Take the kept rows of a rollout batch.

        Args:
            trajectory: the rollout batch.
            rows: the kept rows, ``[b]`` int64.
            advantages: of the kept rows, ``[b, T]``.
            weights: of the kept rows, ``[b]``.
            articles: of the kept rows, b articles, for errors; may be empty.
        """
        first = trajectory.steps[0]
        return cls(
            token_ids=trajectory.token_ids[rows],
            query_starts=tuple(trajectory.query_starts),
            value_starts=tuple(trajectory.value_starts),
            query_length=first.query_tokens.shape[1],
            value_length=first.selected_pair.value_tokens.shape[1],
            rollout_logprobs=trajectory.stack("query_logprobs")[rows],
            selected_index=trajectory.stack("selected_index")[rows],
            memory=trajectory.memory.select_rows(rows),
            advantages=advantages,
            weights=weights,
            articles=tuple(articles),
        )

    def split(self, size: int) -> Iterator[KeptTrajectories]:
        """Cut into micro-batches.

        Args:
            size: trajectories in a micro-batch.
        """
        for start in range(0, len(self), size):
            yield self.select_rows(torch.arange(start, min(start + size, len(self)), device=self.token_ids.device))

    def select_rows(self, rows: Tensor) -> KeptTrajectories:
        """Keep some of the trajectories.

        Args:
            rows: ``[b]`` int64.
        """
        return KeptTrajectories(
            token_ids=self.token_ids[rows],
            query_starts=self.query_starts,
            value_starts=self.value_starts,
            query_length=self.query_length,
            value_length=self.value_length,
            rollout_logprobs=self.rollout_logprobs[rows],
            selected_index=self.selected_index[rows],
            memory=self.memory.select_rows(rows),
            advantages=self.advantages[rows],
            weights=self.weights[rows],
            articles=tuple(self.articles[row] for row in rows.tolist()) if self.articles else (),
        )


@dataclass(frozen=True)
class LossSettings:
    """Weights of the loss's terms, by the names of `AttentionGuidedRLConfig`."""

    beta: float = 0.1
    kl_reference: KLReference = "previous"
    selector_coef: float = 0.0
    reward_gradient_coef: float = 0.0
    entropy_coef: float = 0.0
    epsilon: float = 0.2
    use_importance_ratios: bool = False
    disable_dropout: bool = True


@dataclass(frozen=True, eq=False)
class LossTerms:
    """The loss of a micro-batch and its parts, each weighted by 1 / B_all; scalars.

    Attributes:
        loss: what to differentiate.
        policy: the policy gradient part.
        kl: the KL to the previous adapter, before β, nats.
    """

    loss: Tensor
    policy: Tensor
    kl: Tensor


def _positions(starts: tuple[int, ...], length: int, device: torch.device) -> Tensor:
    """List the positions of T runs of tokens, ``[T · length]``."""
    return (torch.tensor(starts, device=device)[:, None] + torch.arange(length, device=device)).flatten()


def compute_loss_terms(
    policy: PolicyModel,
    model: nn.Module,
    environment: MemoryEnvironment,
    snapshot: AdapterSnapshot,
    kept: KeptTrajectories,
    settings: LossSettings,
) -> LossTerms:
    """Compute the loss of a micro-batch in one forward over whole trajectories.

    Each step's context is a prefix of the trajectory, so one forward gives every query token's log-probability. Where
    activation checkpointing runs layers again in the backward, the caller must keep dropout disabled until after it.

    Args:
        policy: the adapted model.
        model: the same model as the trainer wrapped it.
        environment: gives the log-probability of the draws where ``selector_coef`` > 0.
        snapshot: the previous adapter.
        kept: the micro-batch.
        settings: weights of the terms.

    Returns:
        The loss and its parts.

    Raises:
        NonFiniteError: a logit, vector, log-probability, the KL or the loss is not finite; names which, the step of the
            trajectory and the articles.
    """
    positions = _positions(kept.query_starts, kept.query_length, kept.token_ids.device)
    with dropout_disabled(policy.model):
        previous_hidden = _reference_hidden(policy, snapshot, kept, positions, settings)
    with dropout_disabled(policy.model) if settings.disable_dropout else nullcontext():
        hidden, capture = policy.training_forward(model, kept.token_ids, capture_queries=settings.selector_coef > 0)
    tokens = _query_tokens(policy, kept, positions, hidden, previous_hidden, settings)
    terms = query_terms(
        tokens,
        policy.query_logits,
        beta=settings.beta,
        entropy_coef=settings.entropy_coef,
        epsilon=settings.epsilon,
        chunk_size=policy.logits_chunk_size,
    )
    loss, quantities = terms.loss, _named(terms.per_token, kept, settings)
    if capture is not None:
        if not isinstance(environment, DifferentiableEnvironment):
            raise TypeError("selector_coef > 0 needs an environment with log_prob(query_vectors, index)")
        vectors = torch.unflatten(capture.heads()[:, positions], 1, (-1, kept.query_length)).mean(dim=2)
        environment.reset(kept.memory)
        choice = environment.log_prob(vectors, kept.selected_index)
        quantities |= {"query vector": vectors.detach(), "log-probability of a drawn pair": choice.detach()}
        loss = loss + settings.selector_coef * selector_term(choice, kept.advantages, kept.weights)
    if settings.reward_gradient_coef > 0:
        term, logprobs = _reading_term(policy, kept, hidden)
        quantities["policy logit or log-probability of a value"] = logprobs
        loss = loss + settings.reward_gradient_coef * term
    expect_finite(quantities, kept.articles)
    if not bool(loss.isfinite()):
        parts = f"(policy {terms.policy.item()}, KL {terms.kl.item()})"
        raise NonFiniteError("the loss", parts, kept.articles)
    return LossTerms(loss, terms.policy, terms.kl)


def _named(terms: TokenTerms, kept: KeptTrajectories, settings: LossSettings) -> dict[str, Tensor]:
    """Order the numbers of single query tokens by what is computed from what, ``[b, T, L]`` each."""
    reference = "previous adapter's logit" if settings.kl_reference == "previous" else "base model logit"
    values = {
        "policy logit": terms.logit_sum,
        reference: terms.previous_logit_sum,
        "policy gradient term": terms.policy,
        "KL": terms.kl,
        "entropy of a query token": terms.entropy,
    }
    return {name: value.view(len(kept), len(kept.query_starts), -1) for name, value in values.items()}


def _reference_hidden(
    policy: PolicyModel, snapshot: AdapterSnapshot, kept: KeptTrajectories, positions: Tensor, settings: LossSettings
) -> Tensor | None:
    """States under the adapter that the KL refers to, at the positions that predict query tokens, ``[n, C]``."""
    if settings.beta == 0:
        return None
    reference = snapshot.swapped_in() if settings.kl_reference == "previous" else policy.reference()
    with torch.no_grad(), reference:
        return policy.forward(kept.token_ids)[:, positions - 1].flatten(0, 1)


def _query_tokens(
    policy: PolicyModel,
    kept: KeptTrajectories,
    positions: Tensor,
    hidden: Tensor,
    previous_hidden: Tensor | None,
    settings: LossSettings,
) -> QueryTokens:
    length = kept.query_length
    return QueryTokens(
        hidden=hidden[:, positions - 1].flatten(0, 1),
        previous_hidden=previous_hidden,
        index=policy.allowed_index(kept.token_ids[:, positions].flatten()),
        advantages=kept.advantages.float().repeat_interleave(length, dim=1).flatten(),
        weights=kept.weights.float().repeat_interleave(len(positions)),
        rollout_logprobs=kept.rollout_logprobs.flatten() if settings.use_importance_ratios else None,
    )


def _reading_term(policy: PolicyModel, kept: KeptTrajectories, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Less the weighted mean log-probability of the values under the policy, and the values' tokens', ``[b, T, V]``."""
    positions = _positions(kept.value_starts, kept.value_length, kept.token_ids.device)
    term, logprobs = reward_gradient_term(
        hidden[:, positions - 1].flatten(0, 1),
        kept.token_ids[:, positions].flatten(),
        kept.weights.float().repeat_interleave(len(positions)) / len(positions),
        policy.score_tokens,
        chunk_size=policy.logits_chunk_size,
    )
    return term, logprobs.view(len(kept), len(kept.value_starts), -1)
