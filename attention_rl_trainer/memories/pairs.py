"""Token ids into key-value pairs, and a trajectory's random subset of them (design §3).

Articles are cut into pairs of fixed lengths by index arithmetic on ids: no padding, no second tokenization, no
decoding. Entries, whose keys and values are texts of their own, are cut where they are too long and padded where they
are shorter than the longest of the batch. The draw of a subset is seeded by (seed, epoch, article index), so it does
not depend on which process or batch the article is in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attention_rl_trainer.options import Count, Options, Share, option
from attention_rl_trainer.types import PADDING, ArticleReference, KeyValuePairs, StreamPosition, is_token

Window = Literal["start", "random"]
EmbedKeys = Callable[[Tensor], Tensor]
"""Token ids of keys ``[n, K]`` to their attention vectors ``[n, G, D]``."""


@dataclass
class PairOptions(Options):
    """The lengths and counts that cut an article into pairs."""

    num_kv_pairs: int = option(32, "N: pairs of an article that take part, the in-context example counted.")
    subset_fraction: Share = option(0.25, "Share of the N pairs that make a trajectory's memory of M pairs; in (0, 1].")
    tokens_per_key: Count = option(20, "K: tokens of a key.")
    tokens_per_value: Count = option(20, "V: tokens of a value.")
    window: Window = option(
        "start", "Which pairs of an article take part: its first N ('start') or a random run of as many ('random')."
    )

    def check_options(self) -> None:
        """Check the ranges, and that there is a pair to read."""
        super().check_options()
        if self.num_kv_pairs < 2:
            raise ValueError(f"num_kv_pairs must be at least 2 (the example and one to read), got {self.num_kv_pairs}")

    @property
    def tokens_per_pair(self) -> int:
        """Tokens of a key and its value, K + V."""
        return self.tokens_per_key + self.tokens_per_value

    @property
    def min_article_tokens(self) -> int:
        """Tokens that an article must have, (K + V) · N."""
        return self.tokens_per_pair * self.num_kv_pairs

    @property
    def memory_size(self) -> int:
        """M, the pairs in a trajectory's memory: max(1, min(N - 1, ⌊fraction · N + ½⌋))."""
        rounded = math.floor(self.subset_fraction * self.num_kv_pairs + 0.5)
        return max(1, min(self.num_kv_pairs - 1, rounded))


def chunk_tokens(token_ids: Tensor, chunk_length: int) -> Tensor:
    """Cut a sequence into consecutive chunks of equal length; the incomplete rest is left out.

    Args:
        token_ids: ``[n]`` int64.
        chunk_length: in tokens.

    Returns:
        ``[n // chunk_length, chunk_length]``, a view of ``token_ids``.
    """
    num_chunks = token_ids.shape[0] // chunk_length
    return token_ids[: num_chunks * chunk_length].view(num_chunks, chunk_length)


def sample_chunks(
    chunks: Tensor, num_samples: int, candidates: NDArray[np.int64], generator: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Draw chunks without replacement, in random order.

    Args:
        chunks: ``[n, chunk_length]`` int64.
        candidates: numbers of the chunks that may be drawn.

    Returns:
        The chunks ``[num_samples, chunk_length]`` and their numbers ``[num_samples]`` int64.

    Raises:
        ValueError: there are fewer candidates than samples.
    """
    if num_samples > len(candidates):
        raise ValueError(f"cannot draw {num_samples} chunks from {len(candidates)} candidates; lower subset_fraction")
    numbers = torch.from_numpy(generator.choice(candidates, size=num_samples, replace=False))
    return chunks[numbers], numbers


def split_key_values(chunks: Tensor, tokens_per_key: int) -> tuple[Tensor, Tensor]:
    """Split chunks ``[..., K + V]`` into keys ``[..., K]`` and values ``[..., V]``.

    Raises:
        ValueError: a chunk is not longer than a key.
    """
    if not 0 < tokens_per_key < chunks.shape[-1]:
        raise ValueError(f"tokens_per_key must be in 1..{chunks.shape[-1] - 1} for these chunks, got {tokens_per_key}")
    return chunks[..., :tokens_per_key], chunks[..., tokens_per_key:]


@dataclass(frozen=True, eq=False)
class MemoryRow:
    """The pairs of one article that one trajectory uses."""

    example: Tensor
    """Tokens of the in-context example, ``[K + V]`` int64; of an article pair 0."""
    chunks: Tensor
    """Tokens of the memory's pairs, ``[M, K + V]`` int64; K and V are those of the options."""
    pair_numbers: Tensor
    """Their numbers in the article, ``[M]`` int64."""
    article: ArticleReference
    skipped: Mapping[str, int] = field(default_factory=dict)
    """Articles passed over so far, by reason."""


@dataclass(frozen=True, eq=False)
class MemoryBatch:
    """B articles cut into pairs, ready to be rolled out."""

    example_keys: Tensor
    """Keys of the in-context examples, ``[B, K]`` int64."""
    example_values: Tensor
    """Their values, ``[B, V]`` int64."""
    key_tokens: Tensor
    """Keys of the memories, ``[B, M, K]`` int64."""
    value_tokens: Tensor
    """Values of the memories, ``[B, M, V]`` int64."""
    pair_numbers: Tensor
    """Numbers of the pairs in their articles, ``[B, M]`` int64."""
    articles: Sequence[ArticleReference]
    """Where each row comes from."""
    skipped: Mapping[str, int] = field(default_factory=dict)
    """Articles passed over so far, by reason."""
    is_padded: bool = False
    """Whether keys or values, those of the examples included, may be shorter than K or V."""

    def __len__(self) -> int:
        """Return the number of rows, B."""
        return len(self.articles)

    @property
    def position_after(self) -> StreamPosition:
        """The position in the source right after the last row."""
        return self.articles[-1].next_position

    def head(self, num_rows: int) -> MemoryBatch:
        """Keep at most so many rows, the first ones."""
        return self if num_rows >= len(self) else self.select_rows(range(max(0, num_rows)))

    def select_rows(self, rows: Sequence[int]) -> MemoryBatch:
        """Keep the rows of these numbers, in the given order."""
        if rows == range(len(self)):
            return self
        index = torch.as_tensor(list(rows), dtype=torch.int64)
        return MemoryBatch(
            example_keys=self.example_keys[index],
            example_values=self.example_values[index],
            key_tokens=self.key_tokens[index],
            value_tokens=self.value_tokens[index],
            pair_numbers=self.pair_numbers[index],
            articles=[self.articles[row] for row in rows],
            skipped=self.skipped,
            is_padded=self.is_padded,
        )

    def trimmed(self) -> MemoryBatch:
        """Leave out the places that are padding in all rows."""
        example_keys, key_tokens, keys_padded = _trimmed(self.example_keys, self.key_tokens)
        example_values, value_tokens, values_padded = _trimmed(self.example_values, self.value_tokens)
        return replace(
            self,
            example_keys=example_keys,
            example_values=example_values,
            key_tokens=key_tokens,
            value_tokens=value_tokens,
            is_padded=keys_padded or values_padded,
        )


class TokenIds(Protocol):
    """The ids of an article, such as a list of them."""

    def __len__(self) -> int:
        """Return their number."""

    def __getitem__(self, part: slice, /) -> Sequence[int]:
        """Return those of a run."""


def draw_pairs(
    token_ids: TokenIds, options: PairOptions, generator: np.random.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Cut an article and draw a trajectory's memory.

    Args:
        token_ids: the article's ids, at least `PairOptions.min_article_tokens` of them.

    Returns:
        The example ``[K + V]``, the memory's chunks ``[M, K + V]`` and their numbers in the article ``[M]``.
    """
    length, num_candidates, first = options.tokens_per_pair, options.num_kv_pairs - 1, 1
    if options.window == "random":
        # The one case in which the length of the whole article counts.
        first = int(generator.integers(1, len(token_ids) // length - num_candidates + 1))
    (example,) = chunk_tokens(_tensor(token_ids[:length]), length)
    run = chunk_tokens(_tensor(token_ids[first * length : (first + num_candidates) * length]), length)
    memory, numbers = sample_chunks(run, options.memory_size, np.arange(num_candidates), generator)
    return example, memory, numbers + first


def _tensor(token_ids: Sequence[int]) -> Tensor:
    return torch.tensor(token_ids, dtype=torch.int64)


def draw_entries(num_entries: int, options: PairOptions, generator: np.random.Generator) -> tuple[int, list[int]]:
    """Draw a trajectory's memory from entries that have no order: N of them take part, or all if there are fewer.

    The example is a random one too, so that no single one can be learned by heart.

    Args:
        num_entries: at least M + 1.

    Returns:
        The number of the example, and those of the M pairs of the memory.
    """
    taking_part = np.arange(num_entries)
    if num_entries > options.num_kv_pairs:
        taking_part = taking_part[: options.num_kv_pairs]
        if options.window == "random":
            taking_part = generator.choice(num_entries, size=options.num_kv_pairs, replace=False)
    example, *memory = generator.permutation(taking_part)[: options.memory_size + 1].tolist()
    return example, memory


def join_entry(key: Sequence[int], value: Sequence[int], options: PairOptions) -> Tensor:
    """Cut a key and a value to K and V tokens, and pad them, ``[K + V]``."""
    chunk = torch.full((options.tokens_per_pair,), PADDING, dtype=torch.int64)
    key, value = key[: options.tokens_per_key], value[: options.tokens_per_value]
    chunk[options.tokens_per_key - len(key) : options.tokens_per_key + len(value)] = _tensor([*key, *value])
    return chunk


def collate_memories(rows: Sequence[MemoryRow], tokens_per_key: int) -> MemoryBatch:
    """Stack the pairs of B articles into a batch, trimmed; chunks are split after ``tokens_per_key`` tokens."""
    example_keys, example_values = split_key_values(torch.stack([row.example for row in rows]), tokens_per_key)
    key_tokens, value_tokens = split_key_values(torch.stack([row.chunks for row in rows]), tokens_per_key)
    return MemoryBatch(
        example_keys=example_keys,
        example_values=example_values,
        key_tokens=key_tokens,
        value_tokens=value_tokens,
        pair_numbers=torch.stack([row.pair_numbers for row in rows]),
        articles=[row.article for row in rows],
        skipped=rows[-1].skipped,
    ).trimmed()


def _trimmed(example: Tensor, pairs: Tensor) -> tuple[Tensor, Tensor, bool]:
    """Leave out places that are padding in examples ``[B, n]`` and pairs ``[B, M, n]``; says whether any is left."""
    are_tokens = is_token(torch.cat([example[:, None], pairs], dim=1)).flatten(0, 1)
    used = are_tokens.any(dim=0)
    if not bool(used.all()):
        example, pairs = example[:, used], pairs[..., used]
    return example, pairs, not bool(are_tokens[:, used].all())


def add_embeddings(batch: MemoryBatch, embed_keys: EmbedKeys) -> KeyValuePairs:
    """Add the keys' attention vectors to a batch of memories; the memories are on the device of the vectors."""
    batch_size, num_pairs, _ = batch.key_tokens.shape
    vectors = torch.unflatten(embed_keys(batch.key_tokens.flatten(0, 1)), 0, (batch_size, num_pairs))
    return KeyValuePairs(
        key_tokens=batch.key_tokens.to(vectors.device),
        value_tokens=batch.value_tokens.to(vectors.device),
        key_vectors=vectors,
        pair_numbers=batch.pair_numbers.to(vectors.device),
        is_padded=batch.is_padded,
    )
