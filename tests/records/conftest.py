"""A rolled-out batch, a verdict on it, and the rows that they give."""

from __future__ import annotations

import pytest
import torch
from tiny import make_sampler, random_batch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from attention_rl_trainer.memories.pairs import MemoryBatch
from attention_rl_trainer.memories.tokenization import PlainTextEncoder
from attention_rl_trainer.records.ledger import LedgerRow
from attention_rl_trainer.records.recorder import ledger_rows
from attention_rl_trainer.types import Trajectory
from attention_rl_trainer.update.filter import RewardStatistics, Verdict


@pytest.fixture
def batch() -> MemoryBatch:
    return random_batch(4)


@pytest.fixture
def trajectory(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, batch: MemoryBatch) -> Trajectory:
    return make_sampler(llama, tokenizer).sample(batch, range(20, 24))


@pytest.fixture
def encoder(tokenizer: PreTrainedTokenizerFast) -> PlainTextEncoder:
    return PlainTextEncoder(tokenizer)


@pytest.fixture
def verdict() -> Verdict:
    return Verdict(
        keep=torch.tensor([True, False, False, True]),
        history=RewardStatistics(20, -0.5, 0.8),
        history_after=RewardStatistics(24, -0.25, 6.0),
        threshold=-0.3,
    )


@pytest.fixture
def rows(trajectory: Trajectory, batch: MemoryBatch, encoder: PlainTextEncoder, verdict: Verdict) -> list[LedgerRow]:
    return ledger_rows(trajectory, batch, encoder, verdict, step=6)
