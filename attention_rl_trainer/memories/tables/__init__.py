"""From rows to memories whose keys and values are texts of their own: grouped tables, and the fact book.

A memory is a row, `Entries`; what holds them is a sequence, so that `ArticleStream` reads it, resumes in it and shares
it out as it does with articles. Nothing here knows of tokens or of models.
"""

from attention_rl_trainer.memories.tables.entries_table import EntriesTable, take_split
from attention_rl_trainer.memories.tables.factbook import FACTBOOK, load_factbook
from attention_rl_trainer.memories.tables.grouping import group_rows
from attention_rl_trainer.memories.tables.opening import is_csv, load_grouped

__all__ = [
    "FACTBOOK",
    "EntriesTable",
    "group_rows",
    "is_csv",
    "load_factbook",
    "load_grouped",
    "take_split",
]
