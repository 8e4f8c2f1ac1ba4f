"""Key vectors by content: no key is embedded twice while it is remembered (design §5).

Adapters are off when a key is embedded and the base model is frozen, so a key's vector never changes. Articles come
back in every epoch, and their pairs with them.

Knows nothing about models: what embeds the keys is passed in.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor, nn

from attention_rl_trainer.models.attention import AttentionLayer

EmbedKeys = Callable[[Tensor], Tensor]
# What Python needs for an entry beside the numbers: the key's bytes object, the tensor and its place in the table.
_ENTRY_OVERHEAD = 600


class KeyVectorCache:
    """Vectors of the keys that were used last.

    Args:
        max_bytes: memory that it may take; 0 remembers nothing.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._vectors: OrderedDict[bytes, Tensor] = OrderedDict()

    def __len__(self) -> int:
        """Return the number of keys remembered."""
        return len(self._vectors)

    def embed(self, token_ids: Tensor, embed_keys: EmbedKeys) -> Tensor:
        """Look up the vectors of keys, and compute those that are not remembered.

        Args:
            token_ids: ``[n, K]`` int64 on the CPU.
            embed_keys: token ids ``[m, K]`` of different keys to vectors ``[m, G, D]``.

        Returns:
            ``[n, G, D]``. Where one that was computed is not finite, nothing is remembered.
        """
        contents = [row.tobytes() for row in token_ids.numpy()]
        unseen = {content: row for row, content in enumerate(contents) if content not in self._vectors}
        found = {content: self._vectors[content] for content in contents if content not in unseen}
        if unseen:
            computed = embed_keys(token_ids[list(unseen.values())])
            # Rows of one tensor would keep all of it alive.
            found |= {content: row.clone() for content, row in zip(unseen, computed, strict=True)}
            if not bool(computed.isfinite().all()):
                # The run stops at them; one that goes on with mended weights must not meet them again.
                return torch.stack([found[content] for content in contents])
        for content in contents:
            self._remember(content, found[content])
        return torch.stack([found[content] for content in contents])

    def _remember(self, content: bytes, vector: Tensor) -> None:
        size = len(content) + vector.numel() * vector.element_size() + _ENTRY_OVERHEAD
        if content not in self._vectors:
            self._vectors[content] = vector
            self.num_bytes += size
        self._vectors.move_to_end(content)
        while self.num_bytes > self.max_bytes:
            self._vectors.popitem(last=False)
            self.num_bytes -= size


def extract_embeddings(backbone: nn.Module, layer: AttentionLayer, token_ids: Tensor, batch_size: int = 32) -> Tensor:
    """Compute the key vectors of token sequences: the layer's keys on the sequence alone, averaged over its tokens.

    Every forward has ``batch_size`` rows, the last one filled up: matrix kernels are chosen by shape, and a vector
    should not depend on how many others are computed.

    Args:
        backbone: the decoder without its output head; the caller disables adapters and gradients.
        layer: the attention layer to read, of the same model.
        token_ids: ``[n, K]`` int64.
        batch_size: sequences in one forward.

    Returns:
        ``[n, G, D]`` in float32.
    """
    missing = -len(token_ids) % batch_size
    filled = torch.cat([token_ids, token_ids[-1:].expand(missing, -1)])
    vectors = [layer.run_to_keys(backbone, chunk).mean(dim=1) for chunk in torch.split(filled, batch_size)]
    return torch.cat(vectors)[: len(token_ids)]
