"""From a source to batches of key-value memories (design §3).

`articles` opens a source and cleans what it holds, `stream` puts the articles in a resumable order, `tokenization` turns
text into ids, `pairs` cuts ids into keys and values, and `loading` joins them into batches.
"""

from attention_rl_trainer.memories.articles.sources import load_articles
from attention_rl_trainer.memories.loading import iter_key_value_pairs
from attention_rl_trainer.memories.pairs import MemoryBatch

__all__ = ["MemoryBatch", "iter_key_value_pairs", "load_articles"]
