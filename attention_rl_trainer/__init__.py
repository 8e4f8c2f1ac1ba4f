"""Attention-guided reinforcement learning: a language model learns the order of its own reading.

The public names are loaded when they are first used, so importing the package costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from attention_rl_trainer._version import __version__

if TYPE_CHECKING:
    from attention_rl_trainer.adapters import AdapterSnapshot
    from attention_rl_trainer.articles import Article, ArticleStream, iter_wikipedia_articles, load_articles
    from attention_rl_trainer.attention import AttentionLayer, UnsupportedArchitectureError, extract_embeddings
    from attention_rl_trainer.base_models import choose_base_model, load_base_model, load_tokenizer
    from attention_rl_trainer.config import AttentionGuidedRLConfig
    from attention_rl_trainer.filtering import RewardStatistics
    from attention_rl_trainer.finiteness import NonFiniteError
    from attention_rl_trainer.key_index import KeyIndex
    from attention_rl_trainer.ledger import LedgerRow, read_ledger
    from attention_rl_trainer.memory import KVMemoryEnvironment, MemoryEnvironment, Selection
    from attention_rl_trainer.pairs import (
        add_embeddings,
        chunk_tokens,
        iter_key_value_pairs,
        sample_chunks,
        split_key_values,
    )
    from attention_rl_trainer.planning import ModelShape, RunShape, memory_warning, plan_memory, plan_time
    from attention_rl_trainer.report.summary import write_report
    from attention_rl_trainer.reward import calculate_reward
    from attention_rl_trainer.selector import compute_similarity, sample_key_value
    from attention_rl_trainer.trainer import AttentionGuidedRLTrainer
    from attention_rl_trainer.types import KeyValuePair, KeyValuePairs, Trajectory, TrajectoryStep

_MODULES = {
    "AdapterSnapshot": "adapters",
    "Article": "articles",
    "ArticleStream": "articles",
    "AttentionGuidedRLConfig": "config",
    "AttentionGuidedRLTrainer": "trainer",
    "AttentionLayer": "attention",
    "KVMemoryEnvironment": "memory",
    "KeyIndex": "key_index",
    "KeyValuePair": "types",
    "KeyValuePairs": "types",
    "LedgerRow": "ledger",
    "MemoryEnvironment": "memory",
    "ModelShape": "planning",
    "NonFiniteError": "finiteness",
    "RewardStatistics": "filtering",
    "RunShape": "planning",
    "Selection": "memory",
    "Trajectory": "types",
    "TrajectoryStep": "types",
    "UnsupportedArchitectureError": "attention",
    "add_embeddings": "pairs",
    "calculate_reward": "reward",
    "choose_base_model": "base_models",
    "chunk_tokens": "pairs",
    "compute_similarity": "selector",
    "extract_embeddings": "attention",
    "iter_key_value_pairs": "pairs",
    "iter_wikipedia_articles": "articles",
    "load_articles": "articles",
    "load_base_model": "base_models",
    "load_tokenizer": "base_models",
    "memory_warning": "planning",
    "plan_memory": "planning",
    "plan_time": "planning",
    "read_ledger": "ledger",
    "sample_chunks": "pairs",
    "sample_key_value": "selector",
    "split_key_values": "pairs",
    "write_report": "report.summary",
}

__all__ = [
    "AdapterSnapshot",
    "Article",
    "ArticleStream",
    "AttentionGuidedRLConfig",
    "AttentionGuidedRLTrainer",
    "AttentionLayer",
    "KVMemoryEnvironment",
    "KeyIndex",
    "KeyValuePair",
    "KeyValuePairs",
    "LedgerRow",
    "MemoryEnvironment",
    "ModelShape",
    "NonFiniteError",
    "RewardStatistics",
    "RunShape",
    "Selection",
    "Trajectory",
    "TrajectoryStep",
    "UnsupportedArchitectureError",
    "__version__",
    "add_embeddings",
    "calculate_reward",
    "choose_base_model",
    "chunk_tokens",
    "compute_similarity",
    "extract_embeddings",
    "iter_key_value_pairs",
    "iter_wikipedia_articles",
    "load_articles",
    "load_base_model",
    "load_tokenizer",
    "memory_warning",
    "plan_memory",
    "plan_time",
    "read_ledger",
    "sample_chunks",
    "sample_key_value",
    "split_key_values",
    "write_report",
]


def __getattr__(name: str) -> object:
    """Load a public name from its module on first use."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names, loaded or not."""
    return sorted(__all__)
