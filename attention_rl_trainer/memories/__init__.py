"""From a source to batches of key-value memories (design §3).

`articles` opens a source and cleans what it holds, `stream` puts the articles in a resumable order, `tokenization`
turns text into ids, `pairs` cuts ids into keys and values, and `loading` joins them into batches.
"""

from attention_rl_trainer.memories.articles.sources import load_articles
from attention_rl_trainer.memories.loading import MemoryLoader, iter_key_value_pairs
from attention_rl_trainer.memories.pairs import MemoryBatch
from attention_rl_trainer.memories.stream import Articles, ArticleStream
from attention_rl_trainer.memories.tokenization import PlainTextEncoder

__all__ = [
    "ArticleStream",
    "Articles",
    "MemoryBatch",
    "MemoryLoader",
    "PlainTextEncoder",
    "iter_key_value_pairs",
    "load_articles",
]
