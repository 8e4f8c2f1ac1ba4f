"""From the name of a source to a resumable stream of articles: section 3 of the design.

`sources` opens a source, `dumps` and `markup` read MediaWiki dumps, `stream` puts the articles in order. Nothing here
knows about tokens or models.
"""

from attention_rl_trainer.articles.sources import ArticleTable, load_articles
from attention_rl_trainer.articles.stream import (
    READING_ERRORS,
    Article,
    ArticleStream,
    PositionedArticle,
    StreamPosition,
    iter_wikipedia_articles,
)

__all__ = [
    "READING_ERRORS",
    "Article",
    "ArticleStream",
    "ArticleTable",
    "PositionedArticle",
    "StreamPosition",
    "iter_wikipedia_articles",
    "load_articles",
]
