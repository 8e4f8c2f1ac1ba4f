"""A sum over chunks of hidden states, each differentiated at once, so that nothing of a chunk's size outlives it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable


@dataclass(frozen=True, eq=False)
class Chunk:
    """A chunk of m tokens: its share of the sum, numbers to look at, and where its gradient enters the graph.

    Attributes:
        loss: a scalar; like ``parts`` ``[k]`` and ``per_token`` ``[j, m]`` without graph.
        outputs: what was computed from the chunk's hidden states with a graph.
        output_gradients: the gradient of the loss with respect to ``outputs``; ``None`` where they are the loss.
    """

    loss: Tensor
    parts: Tensor
    per_token: Tensor
    outputs: Tensor
    output_gradients: Tensor | None = None


ChunkTerms = Callable[[Tensor, slice], Chunk]


class _ChunkedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, hidden: Tensor, terms: ChunkTerms, chunk_size: int) -> tuple[Tensor, Tensor, Tensor]:
        needs_gradient: bool = ctx.needs_input_grad[0]  # type: ignore[attr-defined]  # torch sets it, untyped
        gradient = torch.empty_like(hidden) if needs_gradient else None
        losses, parts, per_token = [], [], []
        for start in range(0, hidden.shape[0], chunk_size):
            rows = slice(start, start + chunk_size)
            states = hidden[rows].detach().requires_grad_(needs_gradient)
            chunk = terms(states, rows)
            losses.append(chunk.loss)
            parts.append(chunk.parts)
            per_token.append(chunk.per_token)
            if gradient is not None:
                (gradient[rows],) = torch.autograd.grad(chunk.outputs, states, chunk.output_gradients)
            # Before the next chunk takes memory of the same size.
            del chunk
        ctx.save_for_backward(*([] if gradient is None else [gradient]))
        total, tokens = torch.stack(parts).sum(dim=0), torch.cat(per_token, dim=1)
        ctx.mark_non_differentiable(total, tokens)
        return torch.stack(losses).sum(), total, tokens

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, loss_gradient: Tensor, *_: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors  # type: ignore[attr-defined]  # torch sets it, untyped
        return gradient * loss_gradient.to(gradient.dtype), None, None


def chunked_sum(hidden: Tensor, terms: ChunkTerms, chunk_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sum a differentiable function of hidden states, holding what it computes for one chunk at a time.

    Each chunk is differentiated at once, which costs no second forward, as recomputation in the backward would.

    Args:
        hidden: ``[n, C]``, n > 0; nothing else gets a gradient.
        terms: given a chunk's states, ``[chunk_size, C]`` or fewer at the end, and their rows.

    Returns:
        The sum, a scalar that can be differentiated once; and without graph the sums of the parts, ``[k]``, and the
        numbers of each token, ``[j, n]``.
    """
    loss, parts, per_token = _ChunkedSum.apply(hidden, terms, chunk_size)  # type: ignore[no-untyped-call]  # upstream
    return loss, parts, per_token
