"""One large memory, scored at the speed at which its keys can be read (design §5).

`selector` compares each trajectory with a handful of keys of its own. Here any number of queries share 10⁴ to 10⁷ keys.
The keys are stored in blocks, group by group, so that a block is one small matrix product; what it gives stays in the
cache while it is turned into exponentials, and only block sums are normalized. A draw picks a block, then a key of it:
the same inverse distribution function, in the same order of keys, as over all of them.

    p(k) = mean over h of exp(score[h, k]) / Σ_k' exp(score[h, k'])        (or one softmax of the heads' mean score)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attention_rl_trainer.models.sampling import sample_by_inverse
from attention_rl_trainer.rollout.selector import HeadAggregation

# Scores that are held at once while they are turned into exponentials: 4 MiB of float32, about a core's share of cache.
_CHUNK_ELEMENTS = 2**20


class KeyIndex:
    """The keys of one memory, ``[M, G, D]`` float32, copied into blocks of ``block_size`` keys.

    Raises:
        ValueError: there is no key.
    """

    def __init__(self, key_vectors: Tensor, block_size: int = 1024) -> None:
        if key_vectors.dim() != 3 or key_vectors.shape[0] == 0:
            raise ValueError(f"key_vectors must have shape [M, G, D] with M > 0, got {list(key_vectors.shape)}")
        self.num_keys, self.num_groups, self.head_dim = key_vectors.shape
        block_size = min(block_size, self.num_keys)
        num_blocks = -(-self.num_keys // block_size)
        # Keys that fill the last block up are masked wherever scores are used.
        filled = key_vectors.new_zeros(num_blocks * block_size, self.num_groups, self.head_dim)
        filled[: self.num_keys] = key_vectors
        self.blocks = torch.unflatten(filled, 0, (num_blocks, block_size)).transpose(1, 2).contiguous()
        self._num_missing = num_blocks * block_size - self.num_keys

    def score(
        self, query_vectors: Tensor, temperature: float = 1.0, head_aggregation: HeadAggregation = "probabilities"
    ) -> KeyDistribution:
        """Compare queries ``[Q, H, D]`` with every key.

        Raises:
            ValueError: the heads cannot share the groups, or the dimension differs from the keys'.
        """
        num_heads, head_dim = query_vectors.shape[1:]
        if num_heads % self.num_groups or head_dim != self.head_dim:
            raise ValueError(
                f"query_vectors must have shape [Q, H, {self.head_dim}] with H a multiple of {self.num_groups} groups, "
                f"got {list(query_vectors.shape)}"
            )
        scaled = query_vectors / (math.sqrt(self.head_dim) * temperature)
        return KeyDistribution(self, torch.unflatten(scaled, 1, (self.num_groups, -1)), head_aggregation)

    def block_scores(self, scaled_queries: Tensor, blocks: slice) -> Tensor:
        """Score n blocks with queries ``[Q, G, r, D]``: ``[n, Q, G · r, block]``, -inf where the last is filled up."""
        num_queries, _, shared, _ = scaled_queries.shape
        keys = self.blocks[blocks]
        rows = scaled_queries.transpose(0, 1).flatten(1, 2)
        product = torch.bmm(rows.repeat(len(keys), 1, 1), keys.flatten(0, 1).transpose(1, 2))
        scores = product.view(len(keys), self.num_groups, num_queries, shared, -1)
        if self._num_missing and range(self.blocks.shape[0])[blocks][-1] == self.blocks.shape[0] - 1:
            scores[-1, ..., -self._num_missing :] = -torch.inf
        return scores.transpose(1, 2).flatten(2, 3)


class KeyDistribution:
    """Distributions over the keys of an index, one for each query ``[Q, G, r, D]`` divided by √D · temperature."""

    def __init__(self, index: KeyIndex, scaled_queries: Tensor, head_aggregation: HeadAggregation) -> None:
        self._index = index
        self._queries = scaled_queries
        self._aggregation = head_aggregation
        num_queries, num_groups, shared, _ = scaled_queries.shape
        block_size = index.blocks.shape[2]
        step = max(1, _CHUNK_ELEMENTS // (num_queries * num_groups * shared * block_size))
        self._chunks: list[Tensor] = []
        maxima, sums = [], []
        for start in range(0, index.blocks.shape[0], step):
            scores = self._scores(slice(start, start + step), scaled_queries)
            exponentials, maximum, total = _relative_exponentials(scores)
            self._chunks.append(exponentials)
            maxima.append(maximum)
            sums.append(total)
        # Of each block, query and head: the largest score, and the sum of exponentials relative to it.
        self._maxima, self._sums = torch.cat(maxima), torch.cat(sums)

    def _scores(self, blocks: slice, queries: Tensor) -> Tensor:
        """Score some blocks, ``[n, Q, heads, block]``; the heads' mean is one head."""
        scores = self._index.block_scores(queries, blocks)
        return scores.mean(dim=2, keepdim=True) if self._aggregation == "scores" else scores

    def _log_masses(self) -> Tensor:
        """Log of the exponentials' sums of each block, ``[blocks, Q, heads]``."""
        return self._maxima + self._sums.log()

    def probabilities(self) -> Tensor:
        """Return the probability of every key, ``[Q, M]``."""
        weights = _head_weights(self._maxima, self._log_masses())
        sizes = [len(chunk) for chunk in self._chunks]
        parts = [
            torch.matmul(weight[:, :, None], chunk).squeeze(2)
            for weight, chunk in zip(torch.split(weights, sizes), self._chunks, strict=True)
        ]
        return torch.cat(parts).transpose(0, 1).flatten(1)[:, : self._index.num_keys]

    def draw(self, noise: Tensor) -> Tensor:
        """Draw n keys with noise ``[Q, n]`` in [0, 1): their numbers in the order of the draws, ``[Q, n]`` int64.

        Without replacement: after each draw the heads' distributions are normalized over the keys that are left.

        Raises:
            ValueError: there are fewer than n keys.
        """
        if noise.shape[1] > self._index.num_keys:
            raise ValueError(f"cannot draw {noise.shape[1]} different keys from {self._index.num_keys}")
        rows = [self._draw_row(query, noise[query]) for query in range(noise.shape[0])]
        return torch.stack(rows)

    def _draw_row(self, query: int, noise: Tensor) -> Tensor:
        maxima, sums = self._maxima[:, query].clone(), self._sums[:, query].clone()
        block_size = self._index.blocks.shape[2]
        drawn: list[Tensor] = []
        # Blocks that something was taken from; the others are read where they were computed.
        touched: dict[int, Tensor] = {}
        for uniform in noise.double():
            log_masses = maxima + sums.log()
            weights = _head_weights(maxima, log_masses)
            block_mass = (weights * sums).sum(dim=1).double()
            target = uniform * block_mass.sum()
            block = int(sample_by_inverse(block_mass[None], uniform[None]))
            exponentials = touched.get(block, self._block(query, block))
            within = weights[block] @ exponentials
            # What is left of the uniform number once the block is chosen is uniform again.
            rest = (target - block_mass[:block].sum()) / block_mass[block]
            key = sample_by_inverse(within[None], rest.clamp(0, 1)[None])[0]
            drawn.append(block * block_size + key)
            taken = torch.stack([item for item in drawn if int(item) // block_size == block]) - block * block_size
            touched[block], maxima[block], sums[block] = self._block_without(query, block, taken)
        return torch.stack(drawn)

    def _block(self, query: int, block: int) -> Tensor:
        """Exponentials of one block, ``[heads, block]``."""
        step = len(self._chunks[0])
        return self._chunks[block // step][block % step, query]

    def _block_without(self, query: int, block: int, taken: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Score a block again without what was taken: relative to its new maximum, small masses do not vanish."""
        scores = self._scores(slice(block, block + 1), self._queries[query : query + 1])
        scores[..., taken] = -torch.inf
        exponentials, maximum, total = _relative_exponentials(scores)
        return exponentials[0, 0], maximum[0, 0], total[0, 0]


def _relative_exponentials(scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Turn scores ``[..., block]`` into exponentials relative to their maximum, in place; also maxima and sums."""
    # A block of which everything was taken has no maximum; 0 keeps -inf - -inf out.
    maximum = scores.amax(dim=-1).clamp(min=torch.finfo(scores.dtype).min)
    exponentials = scores.sub_(maximum[..., None]).exp_()
    return exponentials, maximum, exponentials.sum(dim=-1)


def _head_weights(maxima: Tensor, log_masses: Tensor) -> Tensor:
    """Factor that turns a block's exponentials into probabilities of the heads' mixture, ``[blocks, ..., heads]``."""
    return torch.exp(maxima - torch.logsumexp(log_masses, dim=0)) / maxima.shape[-1]
