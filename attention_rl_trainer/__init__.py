"""Attention-guided reinforcement learning: a language model learns the order of its own reading.

The public names are loaded when they are first used, so importing the package costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from attention_rl_trainer._version import __version__

if TYPE_CHECKING:
    from attention_rl_trainer.config import AttentionGuidedRLConfig
    from attention_rl_trainer.durability.discovery import CheckpointError
    from attention_rl_trainer.durability.guard import RunLockedError
    from attention_rl_trainer.durability.pushes import HubPushError
    from attention_rl_trainer.durability.staging import StagingError
    from attention_rl_trainer.durability.states import Stateful
    from attention_rl_trainer.errors import BaseModelError, NonFiniteError
    from attention_rl_trainer.evaluation.estimates import Estimate
    from attention_rl_trainer.hub import HubUnreachableError, UnwritableCacheError
    from attention_rl_trainer.memories.articles.dumps import BrokenDumpError
    from attention_rl_trainer.memories.articles.sources import load_articles
    from attention_rl_trainer.memories.loading import iter_key_value_pairs
    from attention_rl_trainer.memories.pairs import (
        MemoryBatch,
        PairOptions,
        add_embeddings,
        chunk_tokens,
        sample_chunks,
        split_key_values,
    )
    from attention_rl_trainer.memories.pieces import PieceEncoder, PiecewiseIds
    from attention_rl_trainer.memories.sources import load_memories
    from attention_rl_trainer.memories.stream import (
        Article,
        ArticleSource,
        ArticleStream,
        Entries,
        PositionedArticle,
        iter_wikipedia_articles,
    )
    from attention_rl_trainer.memories.tables.entries_table import EntriesTable
    from attention_rl_trainer.memories.tokenization import PlainTextEncoder
    from attention_rl_trainer.models.attention import AttentionLayer, VectorCapture
    from attention_rl_trainer.models.base import BaseModelChoice, load_base_model, load_tokenizer
    from attention_rl_trainer.models.choice import choose_base_model
    from attention_rl_trainer.models.heads import ChosenHeads, HeadNumber, JoinedCapture
    from attention_rl_trainer.models.key_vectors import extract_embeddings
    from attention_rl_trainer.models.policy import PolicyOptions
    from attention_rl_trainer.models.projections import UnsupportedArchitectureError
    from attention_rl_trainer.ordering.adapter import OrderSettings
    from attention_rl_trainer.ordering.orderer import AttentionGuidedOrderer
    from attention_rl_trainer.ordering.result import ReadingOrder, ReadingStep
    from attention_rl_trainer.ordering.trust import OrderTrust
    from attention_rl_trainer.planning.footprint import MemoryPart, MemoryPlan, Phase, memory_warning, plan_memory
    from attention_rl_trainer.planning.sizes import ModelShape, RunShape
    from attention_rl_trainer.planning.timing import Accelerator, MeasuredSpeed, TimePlan, plan_time
    from attention_rl_trainer.publishing.card import CardFacts
    from attention_rl_trainer.records.ledger import LedgerError, LedgerRow, read_ledger
    from attention_rl_trainer.records.summary import RunCounts, write_report
    from attention_rl_trainer.rollout.calibration import Calibration
    from attention_rl_trainer.rollout.environment import (
        CalibratedEnvironment,
        DifferentiableEnvironment,
        ExactEnvironment,
        KVMemoryEnvironment,
        MemoryEnvironment,
        Selection,
        SelectionOptions,
    )
    from attention_rl_trainer.rollout.key_index import KeyDistribution, KeyIndex
    from attention_rl_trainer.rollout.layout import Layout, LayoutOptions, Separators
    from attention_rl_trainer.rollout.reward import RewardFunction, calculate_reward
    from attention_rl_trainer.rollout.sampler import RolloutOptions
    from attention_rl_trainer.rollout.selector import Selector, compute_similarity, sample_key_value
    from attention_rl_trainer.trainer import AttentionGuidedRLTrainer
    from attention_rl_trainer.types import (
        ArticleReference,
        KeyValuePair,
        KeyValuePairs,
        StreamPosition,
        Trajectory,
        TrajectoryStep,
    )
    from attention_rl_trainer.update.filter import (
        FilterOptions,
        RewardFilter,
        RewardStatistics,
        TrajectoryFilter,
        Verdict,
    )
    from attention_rl_trainer.update.kept import KeptTrajectories, OtherQueries
    from attention_rl_trainer.update.losses import LossOptions
    from attention_rl_trainer.update.objective import LossTerms
    from attention_rl_trainer.update.previous_adapter import AdapterSnapshot

_MODULES = {
    "Accelerator": "planning.timing",
    "AdapterSnapshot": "update.previous_adapter",
    "Article": "memories.stream",
    "ArticleReference": "types",
    "ArticleSource": "memories.stream",
    "ArticleStream": "memories.stream",
    "AttentionGuidedOrderer": "ordering.orderer",
    "AttentionGuidedRLConfig": "config",
    "AttentionGuidedRLTrainer": "trainer",
    "AttentionLayer": "models.attention",
    "BaseModelChoice": "models.base",
    "BaseModelError": "errors",
    "BrokenDumpError": "memories.articles.dumps",
    "CalibratedEnvironment": "rollout.environment",
    "Calibration": "rollout.calibration",
    "CardFacts": "publishing.card",
    "CheckpointError": "durability.discovery",
    "ChosenHeads": "models.heads",
    "DifferentiableEnvironment": "rollout.environment",
    "Entries": "memories.stream",
    "EntriesTable": "memories.tables.entries_table",
    "Estimate": "evaluation.estimates",
    "ExactEnvironment": "rollout.environment",
    "FilterOptions": "update.filter",
    "HeadNumber": "models.heads",
    "HubPushError": "durability.pushes",
    "HubUnreachableError": "hub",
    "JoinedCapture": "models.heads",
    "KVMemoryEnvironment": "rollout.environment",
    "KeptTrajectories": "update.kept",
    "KeyDistribution": "rollout.key_index",
    "KeyIndex": "rollout.key_index",
    "KeyValuePair": "types",
    "KeyValuePairs": "types",
    "Layout": "rollout.layout",
    "LayoutOptions": "rollout.layout",
    "LedgerError": "records.ledger",
    "LedgerRow": "records.ledger",
    "LossOptions": "update.losses",
    "LossTerms": "update.objective",
    "MeasuredSpeed": "planning.timing",
    "MemoryBatch": "memories.pairs",
    "MemoryEnvironment": "rollout.environment",
    "MemoryPart": "planning.footprint",
    "MemoryPlan": "planning.footprint",
    "ModelShape": "planning.sizes",
    "NonFiniteError": "errors",
    "OrderSettings": "ordering.adapter",
    "OrderTrust": "ordering.trust",
    "OtherQueries": "update.kept",
    "PairOptions": "memories.pairs",
    "Phase": "planning.footprint",
    "PieceEncoder": "memories.pieces",
    "PiecewiseIds": "memories.pieces",
    "PlainTextEncoder": "memories.tokenization",
    "PolicyOptions": "models.policy",
    "PositionedArticle": "memories.stream",
    "ReadingOrder": "ordering.result",
    "ReadingStep": "ordering.result",
    "RewardFilter": "update.filter",
    "RewardFunction": "rollout.reward",
    "RewardStatistics": "update.filter",
    "RolloutOptions": "rollout.sampler",
    "RunCounts": "records.summary",
    "RunLockedError": "durability.guard",
    "RunShape": "planning.sizes",
    "Selection": "rollout.environment",
    "SelectionOptions": "rollout.environment",
    "Selector": "rollout.selector",
    "Separators": "rollout.layout",
    "StagingError": "durability.staging",
    "Stateful": "durability.states",
    "StreamPosition": "types",
    "TimePlan": "planning.timing",
    "Trajectory": "types",
    "TrajectoryFilter": "update.filter",
    "TrajectoryStep": "types",
    "UnsupportedArchitectureError": "models.projections",
    "UnwritableCacheError": "hub",
    "VectorCapture": "models.attention",
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
    "Accelerator",
    "AdapterSnapshot",
    "Article",
    "ArticleReference",
    "ArticleSource",
    "ArticleStream",
    "AttentionGuidedOrderer",
    "AttentionGuidedRLConfig",
    "AttentionGuidedRLTrainer",
    "AttentionLayer",
    "BaseModelChoice",
    "BaseModelError",
    "BrokenDumpError",
    "CalibratedEnvironment",
    "Calibration",
    "CardFacts",
    "CheckpointError",
    "ChosenHeads",
    "DifferentiableEnvironment",
    "Entries",
    "EntriesTable",
    "Estimate",
    "ExactEnvironment",
    "FilterOptions",
    "HeadNumber",
    "HubPushError",
    "HubUnreachableError",
    "JoinedCapture",
    "KVMemoryEnvironment",
    "KeptTrajectories",
    "KeyDistribution",
    "KeyIndex",
    "KeyValuePair",
    "KeyValuePairs",
    "Layout",
    "LayoutOptions",
    "LedgerError",
    "LedgerRow",
    "LossOptions",
    "LossTerms",
    "MeasuredSpeed",
    "MemoryBatch",
    "MemoryEnvironment",
    "MemoryPart",
    "MemoryPlan",
    "ModelShape",
    "NonFiniteError",
    "OrderSettings",
    "OrderTrust",
    "OtherQueries",
    "PairOptions",
    "Phase",
    "PieceEncoder",
    "PiecewiseIds",
    "PlainTextEncoder",
    "PolicyOptions",
    "PositionedArticle",
    "ReadingOrder",
    "ReadingStep",
    "RewardFilter",
    "RewardFunction",
    "RewardStatistics",
    "RolloutOptions",
    "RunCounts",
    "RunLockedError",
    "RunShape",
    "Selection",
    "SelectionOptions",
    "Selector",
    "Separators",
    "StagingError",
    "Stateful",
    "StreamPosition",
    "TimePlan",
    "Trajectory",
    "TrajectoryFilter",
    "TrajectoryStep",
    "UnsupportedArchitectureError",
    "UnwritableCacheError",
    "VectorCapture",
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
