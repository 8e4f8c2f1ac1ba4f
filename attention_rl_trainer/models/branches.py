"""A tree of tokens that is read in one forward: a trunk, and branches that grow from its places or from one another.

    trunk      0 1 2 3 4 5          Each token sees those on its way back to the trunk's first, and no other branch; its
    after 2    └─ 6 7               position is the number of them. So a branch's states are those of a text that ends
    after 7       └─ 8 9            in it, and what many such texts have in common is read once.
    after 4        └─ 10 11

The rows of a batch have one form and tokens of their own. Source: the tree attention of speculative decoding
(SpecInfer, Miao et al., 2024).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from attention_rl_trainer.models.rounding import are_equal_states


class TokenTree:
    """A tree that grows.

    Args:
        trunk: ``[B, S]`` int64, with or without padding.
    """

    def __init__(self, trunk: Tensor) -> None:
        self._pieces: list[Tensor] = []
        self._ends: list[tuple[int, int]] = []
        """Of each piece: the place after which it grows, and how many tokens it has."""
        self.num_tokens = 0
        self._add(-1, trunk)

    def grow(self, after: int, tokens: Tensor) -> int:
        """Let a branch ``[B, m]`` grow after a place of the tree, counted from 0; returns its first token's place.

        Raises:
            ValueError: the tree has no such place.
        """
        if not 0 <= after < self.num_tokens:
            raise ValueError(f"a branch must grow after a place of the tree, 0 to {self.num_tokens - 1}; got {after}")
        return self._add(after, tokens)

    def _add(self, after: int, tokens: Tensor) -> int:
        self._pieces.append(tokens)
        self._ends.append((after, tokens.shape[1]))
        start = self.num_tokens
        self.num_tokens += tokens.shape[1]
        return start

    @property
    def token_ids(self) -> Tensor:
        """All tokens by their places, ``[B, n]`` int64."""
        return torch.cat(self._pieces, dim=1)

    def sees(self) -> Tensor:
        """Tell which places, of the columns, each place sees: ``[n, n]`` bool, on the CPU."""
        sees = torch.zeros(self.num_tokens, self.num_tokens, dtype=torch.bool)
        start = 0
        for after, count in self._ends:
            stop = start + count
            if after >= 0:
                sees[start:stop] = sees[after]
            sees[start:stop, start:stop] = torch.ones(count, count, dtype=torch.bool).tril()
            start = stop
        return sees


def reads_branches_exactly(
    read_tree: Callable[[TokenTree], Tensor], read: Callable[[Tensor], Tensor], token_ids: Tensor
) -> bool:
    """Prove on a few tokens ``[B, S]``, S of 6 or more, that a tree's branches read like texts that end in them.

    Args:
        read_tree: a tree to hidden states ``[B, n, C]``.
        read: tokens to hidden states ``[B, S, C]``.
    """
    tree = TokenTree(token_ids[:, :4])
    side, other = token_ids[:, 4:6], token_ids.flip(1)[:, :3]
    first = tree.grow(1, side)
    tree.grow(first + 1, other)
    third = tree.grow(3, token_ids[:, 4:])
    states = read_tree(tree)
    aside = read(torch.cat([token_ids[:, :2], side, other], dim=1))
    along = read(token_ids)
    return all(
        are_equal_states(found, expected)
        for found, expected in (
            (states[:, :4], along[:, :4]),
            (states[:, third:], along[:, 4:]),
            (states[:, first:third], aside[:, 2:]),
        )
    )
