"""Key vectors: a key's attention keys averaged over its tokens, computed once and remembered by content (design §5).

Adapters are off when a key is embedded and the base model is frozen, so a key's vector never changes. Articles come
back in every epoch, and their pairs with them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor, nn

from attention_rl_trainer.models.heads import AttentionReader
from attention_rl_trainer.types import PADDING, is_token

EmbedKeys: TypeAlias = Callable[[Tensor], Tensor]

# What Python needs for an entry beside the numbers: the key's bytes object, the tensor and its place in the table.
_ENTRY_OVERHEAD = 600


def extract_embeddings(backbone: nn.Module, reader: AttentionReader, token_ids: Tensor, batch_size: int = 32) -> Tensor:
    """Compute the key vectors of token sequences: the reader's keys on each ``[K]`` alone, averaged over its tokens.

    Every forward has ``batch_size`` rows, the last one filled up: matrix kernels are chosen by shape, and a vector
    should not depend on how many others are computed. The caller disables adapters and gradients.

    Args:
        backbone: the reader's decoder, without the output head.
        token_ids: ``[n, K]`` int64.

    Returns:
        ``[n, G, D]`` in float32.
    """
    missing = -len(token_ids) % batch_size
    filled = torch.cat([token_ids, token_ids[-1:].expand(missing, -1)])
    vectors = [reader.run_to_keys(backbone, chunk).mean(dim=1) for chunk in torch.split(filled, batch_size)]
    return torch.cat(vectors)[: len(token_ids)]


def of_one_length(token_ids: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Sort keys ``[n, K]``, padded on the left, by their length.

    Returns:
        For each length k the rows ``[m]`` of those that have it, and they without padding, ``[m, k]``.
    """
    lengths = is_token(token_ids).sum(dim=1)
    parts = []
    for length in sorted(set(lengths.tolist())):
        rows = (lengths == length).nonzero().squeeze(1)
        parts.append((rows, token_ids[rows, token_ids.shape[1] - length :]))
    return parts


def embed_by_length(token_ids: Tensor, embed_keys: EmbedKeys) -> Tensor:
    """Embed keys of different lengths, those of one length together.

    Args:
        token_ids: ``[n, K]`` int64, padded on the left.
        embed_keys: token ids ``[m, k]`` without padding to vectors ``[m, ...]``.

    Returns:
        ``[n, ...]``.
    """
    parts = of_one_length(token_ids)
    vectors = [embed_keys(keys) for _, keys in parts]
    if len(vectors) == 1:
        return vectors[0]
    joined = torch.cat(vectors)
    return joined[torch.cat([rows for rows, _ in parts]).argsort().to(joined.device)]


class KeyVectorCache:
    """Vectors of the keys that were used last, within ``max_bytes``; 0 remembers nothing.

    Attributes:
        vectors: ``[G, D]`` by the bytes of a key's ids; the key that was used last is at the end.
        num_bytes: memory that they take.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self.vectors: OrderedDict[bytes, Tensor] = OrderedDict()

    def __len__(self) -> int:
        return len(self.vectors)

    def embed(self, token_ids: Tensor, embed_keys: EmbedKeys) -> Tensor:
        """Look up the vectors of keys, and compute those that are not remembered.

        Args:
            token_ids: ``[n, K]`` int64 on the CPU.
            embed_keys: token ids ``[m, K]`` of different keys to vectors ``[m, G, D]``.

        Returns:
            ``[n, G, D]``. Where one that was computed is not finite, nothing is remembered.
        """
        contents = [row[row != PADDING].tobytes() for row in token_ids.numpy()]
        unseen = {content: row for row, content in enumerate(contents) if content not in self.vectors}
        found = {content: self.vectors[content] for content in contents if content not in unseen}
        if unseen:
            computed = embed_keys(token_ids[list(unseen.values())])
            # Rows of one tensor would keep all of it alive.
            found |= {content: row.clone() for content, row in zip(unseen, computed, strict=True)}
            if not bool(computed.isfinite().all()):
                # The run stops at them; one that resumes with repaired weights must not meet them again.
                return torch.stack([found[content] for content in contents])
        for content in contents:
            self._remember(content, found[content])
        return torch.stack([found[content] for content in contents])

    def _remember(self, content: bytes, vector: Tensor) -> None:
        size = len(content) + vector.numel() * vector.element_size() + _ENTRY_OVERHEAD
        if content not in self.vectors:
            self.vectors[content] = vector
            self.num_bytes += size
        self.vectors.move_to_end(content)
        while self.num_bytes > self.max_bytes:
            self.vectors.popitem(last=False)
            self.num_bytes -= size
