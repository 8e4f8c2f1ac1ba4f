"""Query vectors and key vectors into a distribution over pairs, and a draw from it (design §5).

    score[h, k] = q[h] · key[k, group(h)] / √D                   ("dot")            group(h) = ⌊h · G / H⌋
    score[h, k] = q[h] · key[k, group(h)] / (|q[h]| · |key[k, group(h)]|)           ("cosine")

each divided by the temperature, of vectors less their means where these were fitted (`Calibration`).
``"probabilities"`` takes the softmax over the keys for each head and averages the heads' distributions (the seed
document's text); ``"scores"`` averages the scores first and takes one softmax (its sample code).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from attention_rl_trainer.models.sampling import entropy, sample_by_inverse
from attention_rl_trainer.types import expect_tensor

HeadAggregation = Literal["probabilities", "scores"]
HeadSimilarity = Literal["dot", "cosine"]


def compute_similarity(query_vectors: Tensor, key_vectors: Tensor, head_similarity: HeadSimilarity = "dot") -> Tensor:
    """Compare query heads ``[B, H, D]`` with the key groups that they attend to, of ``[B, M, G, D]``.

    Returns:
        Dot products divided by √D, or cosines, ``[B, H, M]``.

    Raises:
        ValueError: the shapes do not fit each other.
    """
    batch_size, num_heads, head_dim = query_vectors.shape
    if key_vectors.dim() != 4 or key_vectors.shape[0] != batch_size or key_vectors.shape[3] != head_dim:
        raise ValueError(
            f"key_vectors must have shape [{batch_size}, M, G, {head_dim}] beside query_vectors "
            f"{list(query_vectors.shape)}, got {list(key_vectors.shape)}"
        )
    num_groups = key_vectors.shape[2]
    if num_heads % num_groups != 0:
        raise ValueError(f"{num_heads} query heads cannot share {num_groups} key groups evenly")
    if head_similarity == "cosine":
        query_vectors = torch.nn.functional.normalize(query_vectors, dim=-1)
        key_vectors = torch.nn.functional.normalize(key_vectors, dim=-1)
    grouped = torch.unflatten(query_vectors, 1, (num_groups, num_heads // num_groups))
    scores = torch.einsum("bgrd,bmgd->bgrm", grouped, key_vectors).flatten(1, 2)
    return scores if head_similarity == "cosine" else scores / math.sqrt(head_dim)


def selection_log_probabilities(
    similarity: Tensor,
    available_mask: Tensor,
    temperature: float = 1.0,
    head_aggregation: HeadAggregation = "probabilities",
) -> Tensor:
    """Turn similarities ``[B, H, M]`` into log-probabilities over the pairs that are available, ``[B, M]`` bool.

    Returns:
        ``[B, M]``, -inf where a pair is not available. Their gradient is finite wherever they are.

    Raises:
        ValueError: a row has no pair available.
    """
    if not bool(available_mask.any(dim=-1).all()):
        raise ValueError("every row needs at least one available pair; the memory is used up")
    scores = similarity / temperature
    unavailable = ~available_mask
    if head_aggregation == "scores":
        return torch.log_softmax(scores.mean(dim=1).masked_fill(unavailable, -torch.inf), dim=-1)
    per_head = torch.log_softmax(scores.masked_fill(unavailable[:, None], -torch.inf), dim=-1)
    # A finite stand-in keeps logsumexp's gradient from turning -inf - -inf into NaN.
    finite = per_head.masked_fill(unavailable[:, None], 0.0)
    mean = torch.logsumexp(finite, dim=1) - math.log(similarity.shape[1])
    return mean.masked_fill(unavailable, -torch.inf)


def unread_masks(index: Tensor, num_pairs: int) -> Tensor:
    """Tell which pairs are unread before each step and after the last, ``[B, T + 1, M]`` bool.

    Args:
        index: the column drawn at each step, ``[B, T]`` int64.
    """
    drawn = torch.nn.functional.one_hot(index, num_pairs).cumsum(dim=1) > 0
    return torch.cat([torch.ones_like(drawn[:, :1]), ~drawn], dim=1)


@dataclass(frozen=True, eq=False)
class Selector:
    """How vectors are compared, with everything that was chosen or fitted."""

    temperature: float = 1.0
    head_aggregation: HeadAggregation = "probabilities"
    head_similarity: HeadSimilarity = "dot"
    query_means: Tensor | None = None
    """Subtracted from the query vectors, ``[H, D]``."""
    key_means: Tensor | None = None
    """Subtracted from the key vectors, ``[G, D]``."""

    def similarity(self, query_vectors: Tensor, key_vectors: Tensor) -> Tensor:
        """Compare queries ``[B, H, D]`` with keys ``[B, M, G, D]``, less their means: ``[B, H, M]``."""
        if self.query_means is not None and self.key_means is not None:
            expect_tensor("query_means", self.query_means, query_vectors.shape[1:], floating=True)
            expect_tensor("key_means", self.key_means, key_vectors.shape[2:], floating=True)
            query_vectors = query_vectors - self.query_means.to(query_vectors.device)
            key_vectors = key_vectors - self.key_means.to(key_vectors.device)
        return compute_similarity(query_vectors, key_vectors, self.head_similarity)

    def log_probabilities(self, query_vectors: Tensor, key_vectors: Tensor, available_mask: Tensor) -> Tensor:
        """See `selection_log_probabilities`; ``[B, M]``."""
        similarity = self.similarity(query_vectors, key_vectors)
        return selection_log_probabilities(similarity, available_mask, self.temperature, self.head_aggregation)


def selection_information(probabilities: Tensor) -> Tensor:
    """How much of a choice depends on the query: the entropy of the mean choice less the mean entropy, nats.

    The mutual information of query and choice, where each of n queries is as likely as another.

    Args:
        probabilities: of the pairs of one memory after each of n queries, ``[..., n, M]``.

    Returns:
        ``[...]``: 0 where every query draws alike, at most log n and log M.
    """
    return entropy(probabilities.mean(dim=-2)) - entropy(probabilities).mean(dim=-1)


def sample_key_value(probabilities: Tensor, noise: Tensor) -> Tensor:
    """Draw columns ``[B]`` of probabilities ``[B, M]``, never one of probability 0, by noise ``[B]`` in [0, 1).

    Rows need not be normalized exactly.
    """
    return sample_by_inverse(probabilities, noise)
