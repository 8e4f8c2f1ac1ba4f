"""From a source to batches of key-value memories (design §3).

`articles`, `games` and `tables` open a source and clean what it holds, `sources` finds which of them a name means,
`stream` puts the rows in a resumable order, `tokenization` turns text into ids, `pairs` makes keys and values of ids,
and `loading` joins them into batches.
"""

from attention_rl_trainer.memories.articles.sources import load_articles
from attention_rl_trainer.memories.loading import MemoryLoader, iter_key_value_pairs
from attention_rl_trainer.memories.pairs import MemoryBatch
from attention_rl_trainer.memories.sources import load_memories
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
    "load_memories",
]
