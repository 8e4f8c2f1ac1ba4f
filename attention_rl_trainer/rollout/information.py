"""What a reading tells about the values that are still unread, by the base model (design §11).

With c_t what stands before step t, j and k pairs that are unread then, and no query written,

    W_t[j]   = log p_base(value_j | c_t), nats per token                                       `unread_values`
    ρ_t      = (1/M) Σ_{j unread after step t} (W_{t+1}[j] - W_t[j])                           `information_gains`
    A_t(k)   = (1/M) Σ_{j ≠ k unread} (log p_base(value_j | c_t, value_k) - W_t[j])            `choice_values`

ρ rewards by the difference of a potential (as TIPS and IGPO do for answers): the ease of what is drawn cancels, and
over a whole memory the steps' sum is the mean of what the pairs before it brought to each value: the order's worth.

Values are read as branches of a tree that grow from the trajectory where its steps begin (`models.branches`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from attention_rl_trainer.memories.pairs import MemoryBatch, add_embeddings
from attention_rl_trainer.models.policy import PolicyModel
from attention_rl_trainer.rollout.branch_values import BranchValues, row_chunks
from attention_rl_trainer.rollout.layout import Layout, repeated
from attention_rl_trainer.rollout.selector import unread_masks
from attention_rl_trainer.types import KeyValuePairs

# Tokens of a tree above which what is read is cut into several: each place is compared with all others.
MAX_TREE_TOKENS = 1024


def _unread_columns(index: Tensor, num_pairs: int) -> list[Tensor]:
    """List the columns that are unread before each step and after the last, ascending: T + 1 tensors ``[B, M - t]``."""
    masks = unread_masks(index, num_pairs)
    return [mask.nonzero()[:, 1].view(len(index), -1) for mask in masks.unbind(dim=1)]


def _unread_trees(layout: Layout, num_pairs: int) -> tuple[int, int]:
    """How many values `unread_values` scores of a trajectory, and how many of them a tree has."""
    count = sum(num_pairs - step for step in range(layout.num_steps + 1))
    return count, max(1, min(count, (MAX_TREE_TOKENS - layout.cached_tokens) // layout.scored_tokens))


def unread_tokens(layout: Layout, num_pairs: int) -> int:
    """Tokens per trajectory that `unread_values` reads."""
    count, at_once = _unread_trees(layout, num_pairs)
    return -(-count // at_once) * layout.cached_tokens + count * layout.scored_tokens


def unread_values(
    policy: PolicyModel, layout: Layout, memory: KeyValuePairs, token_ids: Tensor, index: Tensor
) -> Tensor:
    """Score the unread values before each step and after the last.

    Args:
        layout: of this batch (`Layout.for_batch`).
        token_ids: whole trajectories, ``[B, S]`` int64.
        index: the column drawn at each step, ``[B, T]`` int64.

    Returns:
        W, nats per token, ``[B, T + 1, M]`` float32; 0 where a value was read.

    Raises:
        UnsupportedArchitectureError: the model does not read trees.
    """
    num_pairs = memory.pair_numbers.shape[1]
    _, at_once = _unread_trees(layout, num_pairs)
    parts = []
    for rows in row_chunks(len(index), layout.cached_tokens + at_once * layout.scored_tokens, index.device):
        columns = _unread_columns(index[rows], num_pairs)
        separator = repeated(layout.separators.query, len(rows), token_ids.device)
        pairs, context = memory.select_rows(rows), torch.cat([token_ids[rows], separator], dim=1)
        asked = [
            (layout.context_tokens(step) - 1, column)
            for step, unread in enumerate(columns)
            for column in unread.unbind(dim=1)
        ]
        read = []
        for start in range(0, len(asked), at_once):
            reading = BranchValues(policy, layout, pairs, context)
            for end, column in asked[start : start + at_once]:
                reading.ask(end, column)
            with policy.reference():
                read.append(reading.read())
        found = torch.split(torch.cat(read, dim=1), [unread.shape[1] for unread in columns], dim=1)
        parts.append(torch.stack([_placed(*part, num_pairs) for part in zip(columns, found, strict=True)], dim=1))
    return torch.cat(parts)


def information_gains(values: Tensor, index: Tensor) -> Tensor:
    """What each step told about the values that were unread after it: nats per token, ``[B, T]``.

    Args:
        values: W of `unread_values`, ``[B, T + 1, M]``.
        index: the column drawn at each step, ``[B, T]`` int64.
    """
    unread = unread_masks(index, values.shape[2])[:, 1:]
    return torch.where(unread, values[:, 1:] - values[:, :-1], 0).mean(dim=2)


def choice_values(
    policy: PolicyModel, layout: Layout, memory: KeyValuePairs, token_ids: Tensor, index: Tensor
) -> Tensor:
    """Score every choice at every step by what its value would tell about the others; arguments of `unread_values`.

    Returns:
        A, nats per token, ``[B, T, M]`` float32; 0 where a pair was read.

    Raises:
        UnsupportedArchitectureError: the model does not read trees.
    """
    steps = []
    for step, unread in enumerate(_unread_columns(index, memory.pair_numbers.shape[1])[: index.shape[1]]):
        context = token_ids[:, : layout.context_tokens(step)]
        steps.append(_values_of_choices(policy, layout, memory, context, unread))
    return torch.stack(steps, dim=1)


def first_choice_values(policy: PolicyModel, layout: Layout, batch: MemoryBatch) -> Tensor:
    """Score every pair of memories by what its value, read first, would tell about the others.

    Args:
        layout: of the run.

    Returns:
        A at the first step, nats per token, ``[B, M]`` float32.

    Raises:
        UnsupportedArchitectureError: the model does not read trees.
    """
    memory, layout = add_embeddings(batch, policy.embed_keys), layout.for_batch(batch)
    every = torch.arange(memory.pair_numbers.shape[1], device=policy.device).expand(len(batch), -1)
    return _values_of_choices(policy, layout, memory, layout.prompt(batch, policy.device), every)


def _values_of_choices(
    policy: PolicyModel, layout: Layout, memory: KeyValuePairs, context: Tensor, unread: Tensor
) -> Tensor:
    """Score the choices of unread columns ``[B, n]`` in contexts ``[B, P]``: ``[B, M]``."""
    num_pairs, count = memory.pair_numbers.shape[1], unread.shape[1]
    per_choice, at_once = _per_choice(layout, context.shape[1], count)
    parts = []
    for rows in row_chunks(len(unread), context.shape[1] + at_once * per_choice, unread.device):
        pairs, columns = memory.select_rows(rows), unread[rows]
        alone, after = [], []
        for choices in torch.split(torch.arange(count), at_once):
            reading = BranchValues(policy, layout, pairs, context[rows])
            for choice in choices.tolist():
                _ask_after_choice(reading, context.shape[1] - 1, columns, choice)
            with policy.reference():
                read = reading.read().view(len(rows), len(choices), count)
            alone.append(read[:, :, 0])
            after.append(read[:, :, 1:])
        before = torch.cat(alone, dim=1)
        told = torch.cat(after, dim=1).sum(dim=2) - (before.sum(dim=1, keepdim=True) - before)
        parts.append(_placed(columns, told / num_pairs, num_pairs))
    return torch.cat(parts)


def _per_choice(layout: Layout, context_tokens: int, num_unread: int) -> tuple[int, int]:
    """Tokens of a choice's branches, and how many choices a tree has."""
    tokens = num_unread * layout.scored_tokens + len(layout.separators.query)
    return tokens, max(1, min(num_unread, (MAX_TREE_TOKENS - context_tokens) // tokens))


def choice_tokens(layout: Layout, step: int, num_unread: int) -> int:
    """Tokens per trajectory that `choice_values` reads for one step, counted from 0."""
    context = layout.context_tokens(step)
    tokens, at_once = _per_choice(layout, context, num_unread)
    return -(-num_unread // at_once) * context + num_unread * tokens


def _ask_after_choice(reading: BranchValues, end: int, columns: Tensor, choice: int) -> None:
    """Ask for a column's value, and after it for those of all others."""
    chosen = reading.ask(end, columns[:, choice])
    after = reading.separate(chosen)
    for other in range(columns.shape[1]):
        if other != choice:
            reading.ask(after, columns[:, other])


def _placed(columns: Tensor, numbers: Tensor, num_pairs: int) -> Tensor:
    """Put numbers of some columns ``[B, n]`` into ``[B, M]``, with 0 elsewhere."""
    return numbers.new_zeros(len(columns), num_pairs).scatter(1, columns, numbers)
