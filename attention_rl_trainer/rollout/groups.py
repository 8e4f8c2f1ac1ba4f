"""Further queries that the policy writes in a context, each judged by the value that was drawn there."""

from __future__ import annotations

import torch
from torch import Tensor

from attention_rl_trainer.models.policy import PolicyModel
from attention_rl_trainer.rollout.branch_values import BranchValues, row_chunks
from attention_rl_trainer.rollout.layout import Layout
from attention_rl_trainer.types import KeyValuePairs


def other_tokens(layout: Layout, num_queries: int) -> int:
    """Tokens per trajectory that `other_values` reads."""
    per_query = layout.tokens_per_query + layout.scored_tokens
    return layout.trajectory_tokens + layout.num_steps * (num_queries - 1) * per_query


def other_values(
    policy: PolicyModel, layout: Layout, memory: KeyValuePairs, token_ids: Tensor, index: Tensor, queries: Tensor
) -> Tensor:
    """Let the policy score the values that were drawn after other queries in the same contexts.

    Args:
        layout: of this batch (`Layout.for_batch`).
        token_ids: whole trajectories, ``[B, S]`` int64.
        index: the column drawn at each step, ``[B, T]`` int64.
        queries: ``[B, T, Q - 1, L]`` int64.

    Returns:
        Nats per token, ``[B, T, Q - 1]``.

    Raises:
        UnsupportedArchitectureError: the model does not read trees.
    """
    parts = []
    for rows in row_chunks(len(index), other_tokens(layout, queries.shape[2] + 1), index.device):
        reading = BranchValues(policy, layout, memory.select_rows(rows), token_ids[rows])
        for step, of_step in enumerate(queries[rows].unbind(dim=1)):
            for query in of_step.unbind(dim=1):
                reading.ask(layout.context_tokens(step) - 1, index[rows, step], query)
        parts.append(reading.read().view(len(rows), *queries.shape[1:3]))
    return torch.cat(parts)


def leave_one_out(rewards: Tensor) -> Tensor:
    """Each reward of a group, ``[..., Q]``, less the mean of the others.

    Source: RLOO (Kool et al., 2019; Ahmadian et al., 2024).
    """
    count = rewards.shape[-1]
    return (rewards - rewards.mean(dim=-1, keepdim=True)) * count / (count - 1)
