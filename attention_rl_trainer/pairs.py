"""Token ids of an article into fixed-length key-value pairs, and a trajectory's random subset of them (design §3).

Everything is index arithmetic on ids: no padding, no second tokenization, no decoding. The draw of a subset is seeded
by (seed, epoch, article index), so it does not depend on which process or batch the article falls into.

Knows nothing about models: the key vectors are added by a function that is passed in.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import IterableDataset

from attention_rl_trainer.articles import Article, ArticleStream, PositionedArticle, StreamPosition
from attention_rl_trainer.tokenization import PlainTextEncoder
from attention_rl_trainer.types import KeyValuePairs

Window = Literal["start", "random"]
EmbedKeys = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class PairShape:
    """The lengths and counts that cut an article into pairs.

    Attributes:
        num_kv_pairs: N, pairs of an article that take part, the example counted.
        subset_fraction: share of the N pairs that make a trajectory's memory.
        tokens_per_key: K.
        tokens_per_value: V.
        window: ``"start"``, the article's first N pairs, or ``"random"``, a random run of as many after pair 0.
    """

    num_kv_pairs: int = 32
    subset_fraction: float = 0.25
    tokens_per_key: int = 20
    tokens_per_value: int = 20
    window: Window = "start"

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
        chunk_length: tokens in a chunk.

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
        num_samples: how many to draw.
        candidates: numbers of the chunks that may be drawn.
        generator: source of randomness.

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
    """Split chunks into their keys and values.

    Args:
        chunks: ``[..., K + V]`` int64.
        tokens_per_key: K.

    Returns:
        Keys ``[..., K]`` and values ``[..., V]``.

    Raises:
        ValueError: a chunk is not longer than a key.
    """
    if not 0 < tokens_per_key < chunks.shape[-1]:
        raise ValueError(f"tokens_per_key must lie in 1..{chunks.shape[-1] - 1} for these chunks, got {tokens_per_key}")
    return chunks[..., :tokens_per_key], chunks[..., tokens_per_key:]


@dataclass(frozen=True)
class ArticleReference:
    """Where a trajectory's pairs come from.

    Attributes:
        title: the article's title.
        source: the data set or file.
        epoch: the pass over the source, from 0.
        article_index: the article's identity in the source.
        next_position: the position in the source right after the article.
    """

    title: str
    source: str
    epoch: int
    article_index: int
    next_position: StreamPosition


@dataclass(frozen=True, eq=False)
class ArticlePairs:
    """The pairs of one article that one trajectory uses.

    Attributes:
        example: tokens of pair 0, the in-context example, ``[K + V]`` int64.
        chunks: tokens of the memory's pairs, ``[M, K + V]`` int64.
        pair_numbers: their numbers in the article, ``[M]`` int64.
        article: where they come from.
        skipped: articles passed over so far, by reason.
    """

    example: Tensor
    chunks: Tensor
    pair_numbers: Tensor
    article: ArticleReference
    skipped: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class ArticleBatch:
    """B articles cut into pairs, ready to be rolled out.

    Attributes:
        example_keys: keys of the in-context examples, ``[B, K]`` int64.
        example_values: their values, ``[B, V]`` int64.
        key_tokens: keys of the memories, ``[B, M, K]`` int64.
        value_tokens: values of the memories, ``[B, M, V]`` int64.
        pair_numbers: numbers of the pairs in their articles, ``[B, M]`` int64.
        articles: where each row comes from.
        skipped: articles passed over so far, by reason.
    """

    example_keys: Tensor
    example_values: Tensor
    key_tokens: Tensor
    value_tokens: Tensor
    pair_numbers: Tensor
    articles: Sequence[ArticleReference]
    skipped: Mapping[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        """Return the number of rows, B."""
        return len(self.articles)

    @property
    def position_after(self) -> StreamPosition:
        """The position in the source right after the last row."""
        return self.articles[-1].next_position

    def select_rows(self, rows: Sequence[int]) -> ArticleBatch:
        """Keep some rows, in the given order.

        Args:
            rows: numbers of the rows to keep.
        """
        index = torch.as_tensor(list(rows), dtype=torch.int64)
        return ArticleBatch(
            example_keys=self.example_keys[index],
            example_values=self.example_values[index],
            key_tokens=self.key_tokens[index],
            value_tokens=self.value_tokens[index],
            pair_numbers=self.pair_numbers[index],
            articles=[self.articles[row] for row in rows],
            skipped=self.skipped,
        )


def draw_pairs(
    token_ids: Sequence[int], shape: PairShape, generator: np.random.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Cut an article and draw a trajectory's memory.

    Args:
        token_ids: the article's ids, at least `PairShape.min_article_tokens` of them.
        shape: lengths and counts.
        generator: source of randomness for the draw.

    Returns:
        The example ``[K + V]``, the memory's chunks ``[M, K + V]`` and their numbers in the article ``[M]``.
    """
    num_candidates = shape.num_kv_pairs - 1
    used = len(token_ids) if shape.window == "random" else shape.min_article_tokens
    chunks = chunk_tokens(torch.tensor(token_ids[:used], dtype=torch.int64), shape.tokens_per_pair)
    first = 1
    if shape.window == "random":
        first = int(generator.integers(1, chunks.shape[0] - num_candidates + 1))
    candidates = np.arange(first, first + num_candidates)
    memory, numbers = sample_chunks(chunks, shape.memory_size, candidates, generator)
    return chunks[0], memory, numbers


def iter_article_pairs(
    articles: Iterable[PositionedArticle],
    encoder: PlainTextEncoder,
    shape: PairShape,
    seed: int,
    skipped: Counter[str],
    first_whole_epoch: int = 0,
    *,
    same_memory: bool = False,
) -> Iterator[ArticlePairs]:
    """Turn articles into the pairs of one trajectory each; too short ones are counted and passed over.

    Args:
        articles: articles with their positions in the source.
        encoder: text to ids.
        shape: lengths and counts.
        seed: seed of the subset draws.
        skipped: counts of the articles passed over, by reason; ``"too_short"`` is added here.
        first_whole_epoch: the first epoch that is iterated from its beginning; an earlier one, entered in its middle,
            may well have no usable article left.
        same_memory: whether an article gives the same pairs in every epoch.

    Yields:
        The pairs of one article at a time.

    Raises:
        ValueError: a whole epoch passed without one article long enough.
    """
    epoch, num_used, longest = first_whole_epoch, 0, 0
    for item in articles:
        if item.position.epoch > epoch:
            _expect_usable_articles(num_used, longest, shape, skipped)
            epoch, num_used = item.position.epoch, 0
        token_ids = encoder.encode(item.article.text)
        longest = max(longest, len(token_ids))
        if len(token_ids) < shape.min_article_tokens:
            skipped["too_short"] += 1
            continue
        num_used += 1
        generator = np.random.default_rng([seed, 0 if same_memory else item.position.epoch, item.row])
        example, chunks, numbers = draw_pairs(token_ids, shape, generator)
        reference = ArticleReference(
            item.article.title, item.article.source, item.position.epoch, item.row, item.next_position
        )
        yield ArticlePairs(example, chunks, numbers, reference, dict(skipped))
    _expect_usable_articles(num_used, longest, shape, skipped)


def _expect_usable_articles(num_used: int, longest: int, shape: PairShape, skipped: Mapping[str, int]) -> None:
    if num_used == 0:
        counts = ", ".join(f"{count} {reason}" for reason, count in sorted(skipped.items()))
        raise ValueError(
            f"no article is long enough: {skipped.get('too_short', 0)} were too short (skipped: {counts}); an article "
            f"needs ({shape.tokens_per_key} + {shape.tokens_per_value}) · {shape.num_kv_pairs} = "
            f"{shape.min_article_tokens} tokens, the longest has {longest}. Use longer articles, or lower "
            "num_kv_pairs, tokens_per_key or tokens_per_value"
        )


def first_usable_articles(
    articles: Iterable[PositionedArticle], encoder: PlainTextEncoder, shape: PairShape, count: int
) -> list[Article]:
    """Take the first articles that are long enough.

    Args:
        articles: articles in their order, not endless.
        encoder: text to ids.
        shape: lengths and counts.
        count: how many.

    Raises:
        ValueError: there are not so many.
    """
    usable: list[Article] = []
    for item in articles:
        if len(encoder.encode(item.article.text)) >= shape.min_article_tokens:
            usable.append(item.article)
        if len(usable) == count:
            return usable
    raise ValueError(
        f"overfit_articles is {count}, but only {len(usable)} articles have the {shape.min_article_tokens} tokens that "
        "num_kv_pairs, tokens_per_key and tokens_per_value ask for"
    )


def collate_article_pairs(rows: Sequence[ArticlePairs], tokens_per_key: int) -> ArticleBatch:
    """Stack the pairs of several articles into a batch.

    Args:
        rows: B articles' pairs.
        tokens_per_key: K, where a chunk is split.
    """
    example_keys, example_values = split_key_values(torch.stack([row.example for row in rows]), tokens_per_key)
    key_tokens, value_tokens = split_key_values(torch.stack([row.chunks for row in rows]), tokens_per_key)
    return ArticleBatch(
        example_keys=example_keys,
        example_values=example_values,
        key_tokens=key_tokens,
        value_tokens=value_tokens,
        pair_numbers=torch.stack([row.pair_numbers for row in rows]),
        articles=[row.article for row in rows],
        skipped=rows[-1].skipped,
    )


def add_embeddings(batch: ArticleBatch, embed_keys: EmbedKeys) -> KeyValuePairs:
    """Add the keys' attention vectors to a batch of memories.

    Args:
        batch: the tokens.
        embed_keys: token ids ``[n, K]`` to vectors ``[n, G, D]``.

    Returns:
        The memories, on the device of the vectors.
    """
    batch_size, num_pairs, _ = batch.key_tokens.shape
    vectors = torch.unflatten(embed_keys(batch.key_tokens.flatten(0, 1)), 0, (batch_size, num_pairs))
    return KeyValuePairs(
        key_tokens=batch.key_tokens.to(vectors.device),
        value_tokens=batch.value_tokens.to(vectors.device),
        key_vectors=vectors,
        pair_numbers=batch.pair_numbers.to(vectors.device),
    )


def iter_key_value_pairs(
    articles: Iterable[PositionedArticle],
    encoder: PlainTextEncoder,
    shape: PairShape,
    batch_size: int,
    embed_keys: EmbedKeys,
    seed: int = 0,
) -> Iterator[KeyValuePairs]:
    """Iterate over batches of memories with their key vectors; a last incomplete batch is left out.

    Args:
        articles: articles with their positions, as `ArticleStream` yields them.
        encoder: text to ids.
        shape: lengths and counts.
        batch_size: B.
        embed_keys: token ids ``[n, K]`` to vectors ``[n, G, D]``.
        seed: seed of the subset draws.

    Yields:
        Memories of B trajectories.
    """
    rows: list[ArticlePairs] = []
    for row in iter_article_pairs(articles, encoder, shape, seed, Counter()):
        rows.append(row)
        if len(rows) == batch_size:
            yield add_embeddings(collate_article_pairs(rows, shape.tokens_per_key), embed_keys)
            rows = []


class ArticlePairsDataset(IterableDataset[ArticlePairs]):
    """An article stream as a `torch` data set of `ArticlePairs`, for a data loader.

    Args:
        stream: the articles, at the position to start from.
        encoder: text to ids.
        shape: lengths and counts.
        seed: seed of the subset draws.
        same_memory: whether an article gives the same pairs in every epoch.
    """

    def __init__(
        self,
        stream: ArticleStream,
        encoder: PlainTextEncoder,
        shape: PairShape,
        seed: int,
        *,
        same_memory: bool = False,
    ) -> None:
        self.stream = stream
        self.encoder = encoder
        self.shape = shape
        self.seed = seed
        self.same_memory = same_memory

    def __iter__(self) -> Iterator[ArticlePairs]:
        """Iterate from the stream's position."""
        start = self.stream.position
        first_whole_epoch = start.epoch if start.index == 0 else start.epoch + 1
        yield from iter_article_pairs(
            self.stream,
            self.encoder,
            self.shape,
            self.seed,
            self.stream.skipped,
            first_whole_epoch,
            same_memory=self.same_memory,
        )
