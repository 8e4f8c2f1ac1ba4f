"""Trajectories that are trained on, and what the loss needs of each (design §9)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attention_rl_trainer.errors import expect_finite
from attention_rl_trainer.models.branches import TokenTree
from attention_rl_trainer.models.policy import PolicyModel
from attention_rl_trainer.rollout.groups import leave_one_out
from attention_rl_trainer.rollout.information import choice_values
from attention_rl_trainer.rollout.layout import Layout, positions
from attention_rl_trainer.types import ArticleReference, KeyValuePairs, Trajectory
from attention_rl_trainer.update.filter import Verdict
from attention_rl_trainer.update.losses import LossOptions, step_advantages


@dataclass(frozen=True, eq=False)
class OtherQueries:
    """Queries that were written in the contexts of kept trajectories, and are not in them."""

    token_ids: Tensor
    """``[b, T, Q - 1, L]`` int64."""
    rollout_logprobs: Tensor
    """Log-probabilities of the tokens at the time of the rollout, ``[b, T, Q - 1, L]``."""
    advantages: Tensor
    """Each query's reward less the mean of the other Q - 1, the one that went on first, ``[b, T, Q]``."""

    def select_rows(self, rows: Tensor) -> OtherQueries:
        """Take those of some trajectories."""
        return OtherQueries(self.token_ids[rows], self.rollout_logprobs[rows], self.advantages[rows])


@dataclass(frozen=True, eq=False)
class WrittenQueries:
    """Every query token of kept trajectories: at each of T steps of each of Q queries, the one that went on first.

    Attributes:
        predicted_from: places of the states that predict them, ``[T · Q · L]``.
        token_ids: ``[b, T · Q · L]`` int64; ``advantages`` and ``rollout_logprobs`` likewise.
        tree: the trajectories with the other queries as branches; ``None`` where there are no others.
    """

    predicted_from: Tensor
    token_ids: Tensor
    advantages: Tensor
    rollout_logprobs: Tensor
    group_size: int = 1
    tree: TokenTree | None = None


@dataclass(frozen=True, eq=False)
class KeptTrajectories:
    """Trajectories to train on, b of them.

    Attributes:
        token_ids: ``[b, S]`` int64.
        query_starts: position of each step's first query token, T integers; ``value_starts``, of its first value token.
        query_length: L; ``value_length``, V.
        rollout_logprobs: log-probabilities of the query tokens at the time of the rollout, ``[b, T, L]``.
        selected_index: columns of the memory that were drawn, ``[b, T]`` int64.
        advantages: of the draws, and of the queries too where there are no others, ``[b, T]``.
        weights: weight of each trajectory in the loss, 1 / B_all, ``[b]``.
        articles: what was read, b articles or none; for errors.
        others: the other queries of each context, where ``num_queries`` > 1.
        choice_values: what each choice would tell, ``[b, T, M]`` (`rollout.information`); ``None`` where no loss asks.
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
    others: OtherQueries | None = None
    choice_values: Tensor | None = None

    def __len__(self) -> int:
        return self.token_ids.shape[0]

    @classmethod
    def of(
        cls,
        trajectories: Trajectory,
        verdict: Verdict,
        options: LossOptions,
        num_trajectories: int,
        articles: Sequence[ArticleReference] = (),
    ) -> KeptTrajectories:
        """Take the kept rows of a rollout batch, with their advantages over the history before it.

        Args:
            num_trajectories: B_all, those of the whole update.
            articles: B articles, or none; for errors.

        Raises:
            NonFiniteError: an advantage is not finite.
        """
        rows = verdict.keep.nonzero().squeeze(1)
        read = tuple(articles[row] for row in rows.tolist()) if articles else ()
        advantages = step_advantages(
            trajectories.stack("reward")[rows],
            verdict.history.mean,
            verdict.history.std,
            advantage=options.advantage,
            credit=options.credit,
        )
        others = None
        if trajectories.steps[0].other_rewards is not None:
            own, rewards = (trajectories.stack(name)[rows] for name in ("reward", "other_rewards"))
            by_query = leave_one_out(torch.cat([own[:, :, None], rewards], dim=2))
            if options.advantage == "whitened" and verdict.history.std > 0:
                by_query = by_query / verdict.history.std
            tokens, logprobs = (trajectories.stack(f"other_{name}")[rows] for name in ("queries", "query_logprobs"))
            others = OtherQueries(tokens, logprobs, by_query)
        if len(rows) > 0:
            expect_finite({"advantage": advantages if others is None else others.advantages.sum(dim=2)}, read)
        first = trajectories.steps[0]
        return cls(
            token_ids=trajectories.token_ids[rows],
            query_starts=tuple(trajectories.query_starts),
            value_starts=tuple(trajectories.value_starts),
            query_length=first.query_tokens.shape[1],
            value_length=first.selected_pair.value_tokens.shape[1],
            rollout_logprobs=trajectories.stack("query_logprobs")[rows],
            selected_index=trajectories.stack("selected_index")[rows],
            memory=trajectories.memory.select_rows(rows),
            advantages=advantages,
            weights=torch.full((len(rows),), 1 / num_trajectories, device=rows.device),
            articles=read,
            others=others,
        )

    def split(self, size: int) -> Iterator[KeptTrajectories]:
        """Cut into micro-batches of ``size`` trajectories; the last may have fewer."""
        for start in range(0, len(self), size):
            yield self.select_rows(torch.arange(start, min(start + size, len(self)), device=self.token_ids.device))

    def select_rows(self, rows: Tensor) -> KeptTrajectories:
        """Take the trajectories of some rows, int64."""
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
            others=None if self.others is None else self.others.select_rows(rows),
            choice_values=None if self.choice_values is None else self.choice_values[rows],
        )


def written_queries(kept: KeptTrajectories) -> WrittenQueries:
    """Collect the tokens that are reinforced."""
    length, device = kept.query_length, kept.token_ids.device
    places = positions(kept.query_starts, length, device)
    advantages = kept.advantages[:, :, None]
    own = WrittenQueries(
        predicted_from=places - 1,
        token_ids=kept.token_ids[:, places],
        advantages=advantages.repeat_interleave(length, dim=2).flatten(1),
        rollout_logprobs=kept.rollout_logprobs.flatten(1),
    )
    if kept.others is None:
        return own
    tree, predicted = TokenTree(kept.token_ids), list[int]()
    for step, start in enumerate(kept.query_starts):
        predicted += range(start - 1, start - 1 + length)
        for query in kept.others.token_ids[:, step].unbind(dim=1):
            first = tree.grow(start - 1, query)
            predicted += [start - 1, *range(first, first + length - 1)]

    def by_step(of_own: Tensor, of_others: Tensor) -> Tensor:
        """Join ``[b, T, L]`` and ``[b, T, Q - 1, L]``."""
        return torch.cat([of_own[:, :, None], of_others], dim=2).flatten(1)

    steps = (len(kept), len(kept.query_starts), length)
    return WrittenQueries(
        predicted_from=torch.tensor(predicted, device=device),
        token_ids=by_step(own.token_ids.view(steps), kept.others.token_ids),
        advantages=kept.others.advantages.repeat_interleave(length, dim=2).flatten(1),
        rollout_logprobs=by_step(kept.rollout_logprobs, kept.others.rollout_logprobs),
        group_size=1 + kept.others.token_ids.shape[2],
        tree=tree,
    )


def with_choice_values(kept: KeptTrajectories, policy: PolicyModel, layout: Layout) -> KeptTrajectories:
    """Let the base model score what each choice would tell (`rollout.information`), once for all optimizer steps.

    Args:
        layout: of this batch (`Layout.for_batch`).
    """
    values = choice_values(policy, layout, kept.memory, kept.token_ids, kept.selected_index)
    expect_finite({"log-probability of an unread value": values}, kept.articles)
    return replace(kept, choice_values=values)
