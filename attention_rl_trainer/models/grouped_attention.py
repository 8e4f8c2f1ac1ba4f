"""Grouped-query attention that reads keys and values once for each group instead of once for each query head.

With few new tokens after a long context, attention is the reading of the cache. On a CPU, torch's attention kernel
takes as many key heads as query heads: transformers repeats the keys for it, or torch does. The H / G query heads that
share a group differ in their queries alone, so they can stand one after the other as further queries of one head::

    [B, G · r, S, D]  ->  [B, G, r · S, D]        r = H / G

The kernel and its arithmetic stay the same, and so do the results. On a GPU the kernels know about groups.

In bfloat16 even so the kernel takes four times as long as reading the keys. Two batched matrix products,

    scores = q · kᵀ,    [B · G, r · S, D] x [B · G, D, C]        attended = softmax(scores) · v

take half of its time, for scores that are rounded to bfloat16, as transformers' "eager" attention rounds them too. The
products copy whatever is not a contiguous buffer, so they run over the whole buffer of which keys and values are the
first places (`kv_cache` keeps it short), and a bias takes out the places after them.

Registers with transformers as the attention implementation "sdpa_grouped".
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "sdpa_grouped"
# In float32 the products take as long as the kernel.
DTYPES_OF_PRODUCTS = (torch.bfloat16,)
# Scores of so many rows are computed at once that they stay in a processor's cache between the passes over them.
SCORES_BYTES = 4 * 2**20


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
        query: ``[B, H, S, D]``.
        key: ``[B, G, C, D]``.
        value: ``[B, G, C, D]``.
        attention_mask: ``[B or 1, 1, S, C]``, or ``None``: one query sees everything, several see a square triangle.
        scaling: factor of the scores, by default 1 / √D.

    Returns:
        ``[B, S, H, D]``, and no weights.
    """
    batch_size, num_heads, num_queries, _ = query.shape
    num_groups = key.shape[1]
    is_triangle = attention_mask is None and num_queries > 1
    has_own_bias = attention_mask is not None and attention_mask.shape[1] != 1
    if is_triangle or has_own_bias or kwargs.get("position_bias") is not None:
        return _as_transformers(module, query, key, value, attention_mask, dropout, scaling, kwargs), None
    shared = num_heads // num_groups
    grouped = query.reshape(batch_size, num_groups, shared * num_queries, -1)
    mask = None if attention_mask is None else attention_mask.repeat(1, 1, shared, 1)
    buffers = None
    if query.dtype in DTYPES_OF_PRODUCTS and dropout == 0 and (mask is None or mask.shape[0] == 1):
        buffers = _whole_buffers(key, value)
    if buffers is not None:
        scaling = 1 / math.sqrt(query.shape[-1]) if scaling is None else scaling
        bias = _bias(mask, key.shape[2], buffers[0].shape[2], query.dtype)
        attended = attend_by_products(grouped, *buffers, bias, scaling)
    elif shared == 1:
        return _as_transformers(module, query, key, value, attention_mask, dropout, scaling, kwargs), None
    else:
        attended = nn.functional.scaled_dot_product_attention(
            grouped, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling
        )
    return attended.reshape(batch_size, num_heads, num_queries, -1).transpose(1, 2).contiguous(), None


def _as_transformers(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    options: dict[str, Any],
) -> Tensor:
    output, _ = sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
    )
    return output


def _whole_buffers(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor] | None:
    """Find the contiguous buffers of which keys and values are the first places, ``[B, G, places, D]``."""
    keys, values = _whole_buffer(key), _whole_buffer(value)
    if keys is None or values is None or keys.shape != values.shape:
        return None
    return keys, values


def _whole_buffer(states: Tensor) -> Tensor | None:
    batch_size, num_groups, length, head_dim = states.shape
    batch_stride, group_stride, place_stride, stride = states.stride()
    num_places, rest = divmod(group_stride, head_dim)
    is_slice = (batch_stride, place_stride, stride, rest) == (num_groups * group_stride, head_dim, 1, 0)
    end = states.storage_offset() + batch_size * batch_stride
    if not is_slice or num_places < length or end * states.element_size() > states.untyped_storage().nbytes():
        return None
    return states.as_strided((batch_size, num_groups, num_places, head_dim), states.stride())


def _bias(mask: Tensor | None, length: int, num_places: int, dtype: torch.dtype) -> Tensor | None:
    """Turn a mask into what is added to the scores, the lowest number for the places after; ``[1 or r · S, places]``.

    It is finite, because padding at the beginning of a row sees nothing: what it attends to is never used, but must be
    a number, since it is multiplied by 0.
    """
    if mask is None and length == num_places:
        return None
    bias = torch.full((1 if mask is None else mask.shape[2], num_places), torch.finfo(dtype).min, dtype=dtype)
    if mask is None:
        bias[:, :length] = 0
    elif mask.dtype == torch.bool:
        bias[:, :length].masked_fill_(mask[0, 0], 0)
    else:
        bias[:, :length] = mask[0, 0]
    return bias


def rows_at_once(row_bytes: int) -> int:
    """Rows of a batch whose scores, of ``row_bytes`` each, are computed at once."""
    return max(1, SCORES_BYTES // row_bytes)


def attend_by_products(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scaling: float) -> Tensor:
    """Attend by two batched matrix products, a few rows at a time.

    Args:
        query: ``[B, G, n, D]``, the shape of what is returned.
        key: ``[B, G, C, D]``, contiguous; finite also where the bias takes it out.
        value: like ``key``.
        bias: what is added to the scaled scores, ``[1 or n, C]``.
    """
    batch_size, num_groups, num_queries, _ = query.shape
    rows = rows_at_once(num_groups * num_queries * key.shape[2] * query.element_size())
    attended = torch.empty_like(query, memory_format=torch.contiguous_format)
    added, weight = (query.new_zeros(1), 0) if bias is None else (bias, 1)
    for first in range(0, batch_size, rows):
        queries, keys, values, output = (
            states[first : first + rows].flatten(0, 1) for states in (query, key, value, attended)
        )
        scores = torch.baddbmm(added, queries, keys.transpose(1, 2), beta=weight, alpha=scaling)
        torch.bmm(torch.softmax(scores, dim=-1), values, out=output)
    return attended


def grouped_mask(batch_size: int, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    """Make transformers' mask, of one row where no row is padded: every layer converts what it is given."""
    rows = 1 if attention_mask is None else batch_size
    mask: Tensor | None = sdpa_mask(batch_size=rows, attention_mask=attention_mask, **kwargs)
    return mask


AttentionInterface.register(NAME, grouped_attention_forward)
AttentionMaskInterface.register(NAME, grouped_mask)


@contextmanager
def grouped_attention(model: PreTrainedModel) -> Iterator[None]:
    """Let a model on the CPU attend by groups while the context lasts; other models stay as they are.

    Only "sdpa", the implementation that is equal to this one, is replaced.
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
