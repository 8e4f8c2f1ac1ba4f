"""From articles and entries to batches of memories: what is usable, the order of a run, and who reads ahead."""

from __future__ import annotations

import itertools
import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import IterableDataset as TorchIterableDataset

from attention_rl_trainer.memories.given import expect_articles
from attention_rl_trainer.memories.pairs import (
    EmbedKeys,
    MemoryBatch,
    MemoryRow,
    PairOptions,
    add_embeddings,
    collate_memories,
    draw_entries,
    draw_pairs,
    join_entry,
)
from attention_rl_trainer.memories.stream import Article, Articles, ArticleStream, Entries, PositionedArticle
from attention_rl_trainer.memories.tables import EntriesTable
from attention_rl_trainer.memories.tokenization import PlainTextEncoder
from attention_rl_trainer.options import Count, CountOrZero, option
from attention_rl_trainer.types import ArticleReference, KeyValuePairs, StreamPosition

logger = logging.getLogger(__name__)


@dataclass
class ReadingOptions(PairOptions):
    """Which articles, or rows of a table, are read, and in which order."""

    dataset_text_column: str = option("text", "Column of the data set that holds the articles.")
    dataset_key_column: str | None = option(
        None,
        "Of a table: column of the keys, such as questions. Each group of rows is a memory.",
        aliases=["--key_column"],
    )
    dataset_value_column: str | None = option(
        None, "Of a table: column of the values, such as answers.", aliases=["--value_column"]
    )
    dataset_group_column: str | None = option(
        None, "Of a table: column that says which rows make a memory, such as a topic.", aliases=["--group_column"]
    )
    shuffle: bool = option(True, "Shuffle the articles, anew in every epoch.")
    shuffle_buffer_size: Count = option(1000, "Articles held in memory to shuffle a streamed data set.")
    overfit_articles: CountOrZero = option(
        0,
        "Train on this number of articles only, the first usable ones, each with the same memory in every epoch: what "
        "cannot even be learned by heart is broken. 0 for all articles.",
    )


# ---- Rows from articles ----


def iter_article_pairs(
    articles: Iterable[PositionedArticle],
    encoder: PlainTextEncoder,
    options: PairOptions,
    seed: int,
    skipped: Counter[str],
    first_whole_epoch: int = 0,
    *,
    same_memory: bool = False,
) -> Iterator[MemoryRow]:
    """Turn articles into the pairs of one trajectory each; too short ones are counted and passed over.

    Args:
        seed: seed of the subset draws.
        skipped: counts of the articles passed over, by reason; ``"too_short"`` is added here.
        first_whole_epoch: the first epoch that is iterated from its beginning; an earlier one, entered in its middle,
            may well have no usable article left.
        same_memory: whether an article gives the same pairs in every epoch.

    Raises:
        ValueError: a whole epoch passed without one article long enough.
    """
    epoch, num_used, longest, most = first_whole_epoch, 0, 0, 0
    cut: set[str] = set()
    for item in articles:
        if item.position.epoch > epoch:
            _expect_usable_articles(num_used, longest, most, options, skipped)
            epoch, num_used = item.position.epoch, 0
        generator = np.random.default_rng([seed, 0 if same_memory else item.position.epoch, item.row])
        if isinstance(item.article, Entries):
            if len(item.article.keys) <= options.memory_size:
                most = max(most, len(item.article.keys))
                skipped["too_few_entries"] += 1
                continue
            example, chunks, numbers = _draw_entries(item.article, encoder, options, generator, cut)
        else:
            token_ids = encoder.encode_lazily(item.article.text)
            num_tokens = len(token_ids[: options.min_article_tokens])
            if num_tokens < options.min_article_tokens:
                longest = max(longest, num_tokens)
                skipped["too_short"] += 1
                continue
            example, chunks, numbers = draw_pairs(token_ids, options, generator)
        num_used += 1
        reference = ArticleReference(
            item.article.title, item.article.source, item.position.epoch, item.row, item.next_position
        )
        yield MemoryRow(example, chunks, numbers, reference, dict(skipped))
    _expect_usable_articles(num_used, longest, most, options, skipped)


def _draw_entries(
    entries: Entries, encoder: PlainTextEncoder, options: PairOptions, generator: np.random.Generator, cut: set[str]
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw a memory of entries: as `draw_pairs`. What is cut is said once for keys and once for values."""
    example, memory = draw_entries(len(entries.keys), options, generator)
    chunks = []
    for number in (example, *memory):
        key, value = encoder.encode(entries.keys[number]), encoder.encode(entries.values[number])
        fields = (("key", key, options.tokens_per_key), ("value", value, options.tokens_per_value))
        for name, token_ids, limit in fields:
            if not token_ids:
                raise ValueError(f"{name} {number} of {entries.title!r} in {entries.source!r} is empty; leave it out")
            if len(token_ids) > limit and name not in cut:
                cut.add(name)
                logger.warning(
                    "A %s of %r, and maybe others, is cut from %d to %d tokens; tokens_per_%s sets their number.",
                    name, entries.title, len(token_ids), limit, name,
                )  # fmt: skip
        chunks.append(join_entry(key, value, options))
    return chunks[0], torch.stack(chunks[1:]), torch.tensor(memory, dtype=torch.int64)


def _expect_usable_articles(
    num_used: int, longest: int, most: int, options: PairOptions, skipped: Mapping[str, int]
) -> None:
    counts = ", ".join(f"{count} {reason}" for reason, count in sorted(skipped.items()))
    if num_used == 0 and most > 0:
        raise ValueError(
            f"no memory has enough entries: {skipped['too_few_entries']} had too few (skipped: {counts}); it takes "
            f"{options.memory_size} and one for the example, the most found are {most}. Lower num_kv_pairs or "
            "subset_fraction, or give more rows of each group"
        )
    if num_used == 0:
        raise ValueError(
            f"no article is long enough: {skipped.get('too_short', 0)} were too short (skipped: {counts}); an article "
            f"needs ({options.tokens_per_key} + {options.tokens_per_value}) · {options.num_kv_pairs} = "
            f"{options.min_article_tokens} tokens, the longest has {longest}. Use longer articles, or lower "
            "num_kv_pairs, tokens_per_key or tokens_per_value"
        )


def first_usable_articles(
    articles: Iterable[PositionedArticle], encoder: PlainTextEncoder, options: PairOptions, count: int
) -> list[Article | Entries]:
    """Take the first ``count`` articles that are long enough.

    Args:
        articles: not endless.

    Raises:
        ValueError: there are fewer.
    """
    usable: list[Article | Entries] = []
    for item in articles:
        needed = options.min_article_tokens
        if isinstance(item.article, Entries):
            is_usable = len(item.article.keys) > options.memory_size
        else:
            is_usable = len(encoder.encode_lazily(item.article.text)[:needed]) == needed
        if is_usable:
            usable.append(item.article)
        if len(usable) == count:
            return usable
    raise ValueError(
        f"overfit_articles is {count}, but only {len(usable)} articles have the {options.min_article_tokens} tokens "
        "that num_kv_pairs, tokens_per_key and tokens_per_value ask for; lower it, or use more or longer articles"
    )


def iter_key_value_pairs(
    articles: Iterable[PositionedArticle],
    encoder: PlainTextEncoder,
    options: PairOptions,
    batch_size: int,
    embed_keys: EmbedKeys,
    seed: int = 0,
) -> Iterator[KeyValuePairs]:
    """Iterate over memories of B trajectories with their key vectors; a last incomplete batch is left out.

    Args:
        articles: articles with their positions, as `ArticleStream` yields them.
        batch_size: B.
        seed: seed of the subset draws.
    """
    rows: list[MemoryRow] = []
    for row in iter_article_pairs(articles, encoder, options, seed, Counter()):
        rows.append(row)
        if len(rows) == batch_size:
            yield add_embeddings(collate_memories(rows, options.tokens_per_key), embed_keys)
            rows = []


# ---- Batches for a run ----


class MemoryDataset(TorchIterableDataset[MemoryRow]):
    """An article stream as a `torch` data set of `MemoryRow`, from the stream's position; see `iter_article_pairs`."""

    def __init__(
        self,
        stream: ArticleStream,
        encoder: PlainTextEncoder,
        options: PairOptions,
        seed: int,
        *,
        same_memory: bool = False,
    ) -> None:
        self.stream = stream
        self.encoder = encoder
        self.options = options
        self.seed = seed
        self.same_memory = same_memory

    def __iter__(self) -> Iterator[MemoryRow]:
        """Iterate from the stream's position."""
        start = self.stream.position
        first_whole_epoch = start.epoch if start.index == 0 else start.epoch + 1
        yield from iter_article_pairs(
            self.stream,
            self.encoder,
            self.options,
            self.seed,
            self.stream.skipped,
            first_whole_epoch,
            same_memory=self.same_memory,
        )


def collate_inputs(rows: Sequence[MemoryRow], tokens_per_key: int) -> dict[str, MemoryBatch]:
    """Join rows to a batch, named as the Trainer names a model's inputs."""
    return {"memories": collate_memories(rows, tokens_per_key)}


class MemoryLoader:
    """Reads a run's articles: in an endless shuffled order for training, in their own order for evaluation.

    Args:
        seed: seed of the order and of the subset draws.
        num_workers: 1 for a process that reads ahead, else 0.
    """

    def __init__(
        self,
        options: ReadingOptions,
        encoder: PlainTextEncoder,
        seed: int,
        *,
        num_workers: int = 0,
    ) -> None:
        self._options = options
        self._encoder = encoder
        self._seed = seed
        self._num_workers = num_workers

    def training_stream(self, articles: Articles, position: StreamPosition) -> ArticleStream:
        """Read articles endlessly from a position, shuffled as the options say.

        With ``overfit_articles`` the first usable ones alone are read.

        Raises:
            ValueError: these are not articles, or there are fewer usable ones than ``overfit_articles``.
        """
        options = self._options
        expect_articles(articles, "train_dataset", options.dataset_text_column)
        if options.overfit_articles > 0:
            once = self._stream(articles, StreamPosition(), shuffle=False, num_epochs=1)
            articles = first_usable_articles(once, self._encoder, options, options.overfit_articles)
        return self._stream(articles, position, shuffle=options.shuffle, num_epochs=None)

    def evaluation_stream(self, articles: Articles, *, num_epochs: int) -> ArticleStream:
        """Read articles in their order, from the first one, ``num_epochs`` times.

        Raises:
            ValueError: these are not articles.
        """
        expect_articles(articles, "eval_dataset", self._options.dataset_text_column)
        return self._stream(articles, StreamPosition(), shuffle=False, num_epochs=num_epochs)

    def first_memories(self, articles: Articles, count: int) -> MemoryBatch:
        """Read the first memories of training, wherever a run stands.

        Raises:
            ValueError: none can be used.
        """
        rows = self.rows(self.training_stream(articles, StreamPosition()))
        return collate_memories(list(itertools.islice(rows, count)), self._options.tokens_per_key)

    def _stream(
        self, articles: Articles, position: StreamPosition, *, shuffle: bool, num_epochs: int | None
    ) -> ArticleStream:
        return ArticleStream(
            articles,
            source=_source_name(articles),
            seed=self._seed,
            text_column=self._options.dataset_text_column,
            shuffle=shuffle,
            shuffle_buffer_size=self._options.shuffle_buffer_size,
            position=position,
            num_epochs=num_epochs,
        )

    def rows(self, stream: ArticleStream) -> MemoryDataset:
        """Cut the articles of a stream into pairs."""
        # Those that are overfitted are the same in every epoch; an evaluation ends, and its epochs differ.
        same_memory = self._options.overfit_articles > 0 and stream.num_epochs is None
        return MemoryDataset(stream, self._encoder, self._options, self._seed, same_memory=same_memory)

    def batches(self, stream: ArticleStream, batch_size: int) -> DataLoader[Any]:
        """Cut the articles of a stream into pairs; returns a loader of ``{"memories": MemoryBatch}``."""
        return DataLoader(
            self.rows(stream),
            batch_size=batch_size,
            collate_fn=partial(collate_inputs, tokens_per_key=self._options.tokens_per_key),
            num_workers=self._num_workers,
            worker_init_fn=_leave_process_group if self._num_workers else None,
            pin_memory=False,
        )


def _source_name(articles: Articles) -> str:
    if isinstance(articles, Dataset | IterableDataset) and articles.info.dataset_name:
        return str(articles.info.dataset_name)
    if isinstance(articles, EntriesTable):
        return articles.name
    return type(articles).__name__


def _leave_process_group(worker: int) -> None:
    """A signal to the trainer's whole group must not take the articles away before the step has ended."""
    if os.name == "posix":
        os.setpgid(0, 0)
