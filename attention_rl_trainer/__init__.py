"""Attention-guided reinforcement learning: a language model learns the order of its own reading.

The public names are loaded when they are first used, so importing the package costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from attention_rl_trainer._version import __version__

if TYPE_CHECKING:
    from attention_rl_trainer.config import AttentionGuidedRLConfig
    from attention_rl_trainer.errors import NonFiniteError
    from attention_rl_trainer.memories.articles.sources import load_articles
    from attention_rl_trainer.memories.loading import iter_key_value_pairs
    from attention_rl_trainer.memories.pairs import (
        MemoryBatch,
        add_embeddings,
        chunk_tokens,
        sample_chunks,
        split_key_values,
    )
    from attention_rl_trainer.memories.sources import load_memories
    from attention_rl_trainer.memories.stream import (
        Article,
        ArticleSource,
        ArticleStream,
        Entries,
        iter_wikipedia_articles,
    )
    from attention_rl_trainer.memories.tables.entries_table import EntriesTable
    from attention_rl_trainer.models.attention import AttentionLayer
    from attention_rl_trainer.models.base import load_base_model, load_tokenizer
    from attention_rl_trainer.models.choice import choose_base_model
    from attention_rl_trainer.models.heads import ChosenHeads, HeadNumber
    from attention_rl_trainer.models.key_vectors import extract_embeddings
    from attention_rl_trainer.models.projections import UnsupportedArchitectureError
    from attention_rl_trainer.ordering.adapter import OrderSettings
    from attention_rl_trainer.ordering.orderer import AttentionGuidedOrderer
    from attention_rl_trainer.ordering.result import ReadingOrder, ReadingStep
    from attention_rl_trainer.ordering.trust import OrderTrust
    from attention_rl_trainer.planning.footprint import memory_warning, plan_memory
    from attention_rl_trainer.planning.sizes import ModelShape, RunShape
    from attention_rl_trainer.planning.timing import plan_time
    from attention_rl_trainer.records.ledger import LedgerRow, read_ledger
    from attention_rl_trainer.records.summary import write_report
    from attention_rl_trainer.rollout.calibration import Calibration
    from attention_rl_trainer.rollout.environment import (
        CalibratedEnvironment,
        DifferentiableEnvironment,
        KVMemoryEnvironment,
        MemoryEnvironment,
        Selection,
        SelectionOptions,
    )
    from attention_rl_trainer.rollout.key_index import KeyIndex
    from attention_rl_trainer.rollout.reward import RewardFunction, calculate_reward
    from attention_rl_trainer.rollout.selector import compute_similarity, sample_key_value
    from attention_rl_trainer.trainer import AttentionGuidedRLTrainer
    from attention_rl_trainer.types import KeyValuePair, KeyValuePairs, Trajectory, TrajectoryStep
    from attention_rl_trainer.update.filter import RewardFilter, RewardStatistics, TrajectoryFilter, Verdict
    from attention_rl_trainer.update.kept import KeptTrajectories
    from attention_rl_trainer.update.previous_adapter import AdapterSnapshot

_MODULES = {
    "AdapterSnapshot": "update.previous_adapter",
    "Article": "memories.stream",
    "ArticleSource": "memories.stream",
    "ArticleStream": "memories.stream",
    "Entries": "memories.stream",
    "EntriesTable": "memories.tables.entries_table",
    "AttentionGuidedOrderer": "ordering.orderer",
    "AttentionGuidedRLConfig": "config",
    "AttentionGuidedRLTrainer": "trainer",
    "AttentionLayer": "models.attention",
    "CalibratedEnvironment": "rollout.environment",
    "Calibration": "rollout.calibration",
    "ChosenHeads": "models.heads",
    "DifferentiableEnvironment": "rollout.environment",
    "HeadNumber": "models.heads",
    "KVMemoryEnvironment": "rollout.environment",
    "KeptTrajectories": "update.kept",
    "KeyIndex": "rollout.key_index",
    "KeyValuePair": "types",
    "KeyValuePairs": "types",
    "LedgerRow": "records.ledger",
    "MemoryBatch": "memories.pairs",
    "MemoryEnvironment": "rollout.environment",
    "ModelShape": "planning.sizes",
    "NonFiniteError": "errors",
    "OrderSettings": "ordering.adapter",
    "OrderTrust": "ordering.trust",
    "ReadingOrder": "ordering.result",
    "ReadingStep": "ordering.result",
    "RewardFilter": "update.filter",
    "RewardFunction": "rollout.reward",
    "RewardStatistics": "update.filter",
    "RunShape": "planning.sizes",
    "Selection": "rollout.environment",
    "SelectionOptions": "rollout.environment",
    "Trajectory": "types",
    "TrajectoryFilter": "update.filter",
    "TrajectoryStep": "types",
    "UnsupportedArchitectureError": "models.projections",
    "Verdict": "update.filter",
    "add_embeddings": "memories.pairs",
    "calculate_reward": "rollout.reward",
    "choose_base_model": "models.choice",
    "chunk_tokens": "memories.pairs",
    "compute_similarity": "rollout.selector",
    "extract_embeddings": "models.key_vectors",
    "iter_key_value_pairs": "memories.loading",
    "iter_wikipedia_articles": "memories.stream",
    "load_articles": "memories.articles.sources",
    "load_base_model": "models.base",
    "load_memories": "memories.sources",
    "load_tokenizer": "models.base",
    "memory_warning": "planning.footprint",
    "plan_memory": "planning.footprint",
    "plan_time": "planning.timing",
    "read_ledger": "records.ledger",
    "sample_chunks": "memories.pairs",
    "sample_key_value": "rollout.selector",
    "split_key_values": "memories.pairs",
    "write_report": "records.summary",
}

__all__ = [
    "AdapterSnapshot",
    "Article",
    "ArticleSource",
    "ArticleStream",
    "AttentionGuidedOrderer",
    "AttentionGuidedRLConfig",
    "AttentionGuidedRLTrainer",
    "AttentionLayer",
    "CalibratedEnvironment",
    "Calibration",
    "ChosenHeads",
    "DifferentiableEnvironment",
    "Entries",
    "EntriesTable",
    "HeadNumber",
    "KVMemoryEnvironment",
    "KeptTrajectories",
    "KeyIndex",
    "KeyValuePair",
    "KeyValuePairs",
    "LedgerRow",
    "MemoryBatch",
    "MemoryEnvironment",
    "ModelShape",
    "NonFiniteError",
    "OrderSettings",
    "OrderTrust",
    "ReadingOrder",
    "ReadingStep",
    "RewardFilter",
    "RewardFunction",
    "RewardStatistics",
    "RunShape",
    "Selection",
    "SelectionOptions",
    "Trajectory",
    "TrajectoryFilter",
    "TrajectoryStep",
    "UnsupportedArchitectureError",
    "Verdict",
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
    "load_memories",
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
