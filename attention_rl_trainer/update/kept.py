"""Trajectories that are trained on, and what the loss needs of each (design §9)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attention_rl_trainer.errors import expect_finite
from attention_rl_trainer.types import ArticleReference, KeyValuePairs, Trajectory
from attention_rl_trainer.update.filter import Verdict
from attention_rl_trainer.update.losses import LossOptions, step_advantages


@dataclass(frozen=True, eq=False)
class KeptTrajectories:
    """Trajectories to train on, b of them.

    Attributes:
        token_ids: ``[b, S]`` int64.
        query_starts: position of each step's first query token, T integers; ``value_starts``, of its first value token.
        query_length: L; ``value_length``, V.
        rollout_logprobs: log-probabilities of the query tokens at the time of the rollout, ``[b, T, L]``.
        selected_index: columns of the memory that were drawn, ``[b, T]`` int64; ``advantages``, ``[b, T]``.
        weights: weight of each trajectory in the loss, 1 / B_all, ``[b]``.
        articles: what was read, b articles or none; for errors.
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
        if len(rows) > 0:
            expect_finite({"advantage": advantages}, read)
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
        )
