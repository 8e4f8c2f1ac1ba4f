"""Values that a model reads after places of trajectories, in one forward: branches of a tree (`models.branches`)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attention_rl_trainer.models.branches import TokenTree
from attention_rl_trainer.models.policy import PolicyModel
from attention_rl_trainer.rollout.layout import Layout, repeated
from attention_rl_trainer.rollout.reward import value_logprob
from attention_rl_trainer.types import KeyValuePairs

# Tokens of all rows of a forward, above which what is read is cut into several.
_MAX_TOKENS = 16384


def rows_read_together(tokens_per_row: int) -> int:
    """Rows of a batch that are read in one forward."""
    return max(1, _MAX_TOKENS // tokens_per_row)


def row_chunks(num_rows: int, tokens_per_row: int, device: torch.device) -> Sequence[Tensor]:
    """Cut the numbers of rows into those that are read together."""
    return torch.split(torch.arange(num_rows, device=device), rows_read_together(tokens_per_row))


class BranchValues:
    """Values to be read after places of contexts ``[B, P]``."""

    def __init__(self, policy: PolicyModel, layout: Layout, memory: KeyValuePairs, context: Tensor) -> None:
        self._policy = policy
        self._layout = layout
        self._memory = memory
        self._tree = TokenTree(context)
        self._starts: list[int] = []
        self._values: list[Tensor] = []

    def ask(self, after: int, columns: Tensor, query: Tensor | None = None) -> int:
        """Let a response with the values of columns ``[B]``, after a query ``[B, L]`` or none, follow a place.

        Returns the place of its last token.
        """
        pair, layout = self._memory.gather(columns), self._layout
        if query is not None:
            after = self._tree.grow(after, query) + query.shape[1] - 1
        start = self._tree.grow(after, layout.response(pair, is_last=True))
        self._starts.append(start + layout.value_offset)
        self._values.append(pair.value_tokens)
        return self._tree.num_tokens - 1

    def separate(self, after: int) -> int:
        """Let a query separator follow a place; returns the place of its last token."""
        separator = self._layout.separators.query
        self._tree.grow(after, repeated(separator, len(self._memory.pair_numbers), self._memory.pair_numbers.device))
        return self._tree.num_tokens - 1

    def read(self) -> Tensor:
        """Let policy or reference, whichever is active, score what was asked, in this order: ``[B, n]`` nats per token.

        Raises:
            UnsupportedArchitectureError: the model does not read trees.
        """
        with self._policy.inference():
            hidden = self._policy.forward_tree(self._tree)
            values = torch.stack(self._values, dim=1)
            starts = torch.tensor(self._starts, device=hidden.device)
            places = (starts[:, None] - 1 + torch.arange(values.shape[2], device=hidden.device)).flatten()
            logprobs = self._policy.token_logprobs(hidden[:, places], values.flatten(1))
        return value_logprob(logprobs.view(values.shape), values)
