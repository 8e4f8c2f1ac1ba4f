"""Grouped-query attention that reads keys and values once for each group instead of once for each query head.

With few new tokens behind a long context, attention is the reading of the cache. On a CPU, torch's attention kernel
takes as many key heads as query heads: transformers repeats the keys for it, or torch does. The H / G query heads that
share a group differ in their queries alone, so they can stand behind one another as further queries of one head::

    [B, G · r, S, D]  ->  [B, G, r · S, D]        r = H / G

The kernel and its arithmetic stay the same, and so do the results. On a GPU the kernels know about groups.

Registers with transformers as the attention implementation "sdpa_grouped". Knows nothing about caches.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "sdpa_grouped"


def grouped_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend with the query heads of a group as further queries of one head; transformers' interface.

    Args:
        module: the attention module.
        query: ``[B, H, S, D]``.
        key: ``[B, G, C, D]``.
        value: ``[B, G, C, D]``.
        attention_mask: ``[B or 1, 1, S, C]``, or ``None``: one query sees everything, several see a square triangle.
        dropout: probability of dropping an attention weight.
        scaling: factor of the scores, by default 1 / √D.
        kwargs: what transformers' own function takes besides.

    Returns:
        ``[B, S, H, D]``, and no weights.
    """
    batch_size, num_heads, num_queries, _ = query.shape
    num_groups = key.shape[1]
    is_triangle = attention_mask is None and num_queries > 1
    has_own_bias = attention_mask is not None and attention_mask.shape[1] != 1
    if num_heads == num_groups or is_triangle or has_own_bias or kwargs.get("position_bias") is not None:
        output, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return output, None
    shared = num_heads // num_groups
    attended = nn.functional.scaled_dot_product_attention(
        query.reshape(batch_size, num_groups, shared * num_queries, -1),
        key,
        value,
        attn_mask=None if attention_mask is None else attention_mask.repeat(1, 1, shared, 1),
        dropout_p=dropout,
        scale=scaling,
    )
    return attended.reshape(batch_size, num_heads, num_queries, -1).transpose(1, 2).contiguous(), None


def grouped_mask(batch_size: int, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    """Make transformers' mask, of one row where no row is padded: every layer converts what it is given.

    Args:
        batch_size: rows of the batch.
        attention_mask: which tokens are padding; ``None`` for none.
        kwargs: what transformers' own function takes besides.
    """
    rows = 1 if attention_mask is None else batch_size
    mask: Tensor | None = sdpa_mask(batch_size=rows, attention_mask=attention_mask, **kwargs)
    return mask


AttentionInterface.register(NAME, grouped_attention_forward)
AttentionMaskInterface.register(NAME, grouped_mask)


@contextmanager
def grouped_attention(model: PreTrainedModel) -> Iterator[None]:
    """Let a model on the CPU attend by groups while the context lasts; other models stay as they are.

    Args:
        model: a causal language model; only "sdpa", the implementation that is equal to this one, is replaced.
    """
    config = model.config.get_text_config()
    previous = config._attn_implementation
    if previous != "sdpa" or model.device != torch.device("cpu"):
        yield
        return
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = previous
