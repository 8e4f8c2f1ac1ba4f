"""Query vectors and key vectors into a distribution over pairs, and a draw from it (design §5).

    score[h, k] = q[h] · key[k, group(h)] / (√D · temperature)            group(h) = ⌊h · G / H⌋

``"probabilities"`` takes the softmax over the keys for each head and averages the heads' distributions (the seed
document's text); ``"scores"`` averages the scores first and takes one softmax (its sample code).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from attention_rl_trainer.models.sampling import sample_by_inverse

HeadAggregation = Literal["probabilities", "scores"]


def compute_similarity(query_vectors: Tensor, key_vectors: Tensor) -> Tensor:
    """Compare query heads ``[B, H, D]`` with the key groups that they attend to, of ``[B, M, G, D]``.

    Returns:
        Dot products divided by √D, ``[B, H, M]``.

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
    grouped = torch.unflatten(query_vectors, 1, (num_groups, num_heads // num_groups))
    scores = torch.einsum("bgrd,bmgd->bgrm", grouped, key_vectors)
    return scores.flatten(1, 2) / math.sqrt(head_dim)


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


def sample_key_value(probabilities: Tensor, noise: Tensor) -> Tensor:
    """Draw columns ``[B]`` of probabilities ``[B, M]``, never one of probability 0, by noise ``[B]`` in [0, 1).

    Rows need not be normalized exactly.
    """
    return sample_by_inverse(probabilities, noise)
