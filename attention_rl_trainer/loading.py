"""Articles into batches of their pairs: the order in which a run reads them, and the process that reads ahead.

Joins `articles` (the stream), `pairs` (rows and batches) and the options. Knows nothing about models.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

from datasets import Dataset, IterableDataset
from torch.utils.data import DataLoader

from attention_rl_trainer.articles import Article, ArticleStream, ArticleTable, StreamPosition
from attention_rl_trainer.config import AttentionGuidedRLConfig
from attention_rl_trainer.pairs import ArticleBatch, ArticlePairsDataset, collate_article_pairs, first_usable_articles
from attention_rl_trainer.tokenization import PlainTextEncoder

Articles: TypeAlias = ArticleTable | Sequence[Mapping[str, object]] | Sequence[Article]


def training_stream(
    articles: Articles, encoder: PlainTextEncoder, args: AttentionGuidedRLConfig, position: StreamPosition
) -> ArticleStream:
    """Read articles endlessly, shuffled as the options say; with ``overfit_articles`` the first usable ones alone.

    Args:
        articles: a (streamed) data set, or a list of rows or of articles.
        encoder: tells which articles are long enough.
        args: the run's options.
        position: where to begin.

    Raises:
        ValueError: there are not as many usable articles as ``overfit_articles``.
    """
    if args.overfit_articles > 0:
        # In the order of the source, once.
        once = evaluation_stream(articles, args, num_epochs=1)
        articles = first_usable_articles(once, encoder, args.pair_shape, args.overfit_articles)
    return _stream(articles, args, position, shuffle=args.shuffle, num_epochs=None)


def evaluation_stream(articles: Articles, args: AttentionGuidedRLConfig, *, num_epochs: int) -> ArticleStream:
    """Read articles in their order, from the first one on.

    Args:
        articles: a (streamed) data set, or a list of rows or of articles.
        args: the run's options.
        num_epochs: how often.
    """
    return _stream(articles, args, StreamPosition(), shuffle=False, num_epochs=num_epochs)


def _stream(
    articles: Articles,
    args: AttentionGuidedRLConfig,
    position: StreamPosition,
    *,
    shuffle: bool,
    num_epochs: int | None,
) -> ArticleStream:
    return ArticleStream(
        articles,
        source=_source_name(articles),
        seed=args.seed,
        text_column=args.dataset_text_column,
        shuffle=shuffle,
        shuffle_buffer_size=args.shuffle_buffer_size,
        position=position,
        process_index=args.process_index,
        num_processes=args.world_size,
        num_epochs=num_epochs,
    )


def article_loader(
    stream: ArticleStream, encoder: PlainTextEncoder, args: AttentionGuidedRLConfig, batch_size: int
) -> DataLoader[Any]:
    """Cut the articles of a stream into pairs, and hand them out in batches.

    Args:
        stream: the articles.
        encoder: text to token ids.
        args: the run's options.
        batch_size: articles in a batch.

    Returns:
        A loader of ``{"articles": ArticleBatch}``.
    """
    rows = ArticlePairsDataset(stream, encoder, args.pair_shape, args.seed, same_memory=args.overfit_articles > 0)
    return DataLoader(
        rows,
        batch_size=batch_size,
        collate_fn=article_collator(args),
        num_workers=args.dataloader_num_workers,
        worker_init_fn=_leave_process_group if args.dataloader_num_workers else None,
        pin_memory=False,
    )


def article_collator(args: AttentionGuidedRLConfig) -> Callable[[Sequence[Any]], dict[str, ArticleBatch]]:
    """Give what joins rows of an `ArticlePairsDataset` to a batch, named as the Trainer names a model's inputs.

    Args:
        args: the run's options.
    """
    return partial(_collate, tokens_per_key=args.tokens_per_key)


def _collate(rows: Sequence[Any], tokens_per_key: int) -> dict[str, ArticleBatch]:
    return {"articles": collate_article_pairs(rows, tokens_per_key)}


def _leave_process_group(worker: int) -> None:
    """A signal to the trainer's whole group must not take the articles away before the step has ended."""
    if os.name == "posix":
        os.setpgid(0, 0)


def _source_name(articles: Articles) -> str:
    if isinstance(articles, Dataset | IterableDataset) and articles.info.dataset_name:
        return str(articles.info.dataset_name)
    return type(articles).__name__
