"""An orderer over a tiny adapter, made in process."""

from __future__ import annotations

from typing import Any

import pytest
from tiny import adapted, tiny_llama
from transformers import PreTrainedTokenizerFast

from attention_rl_trainer.ordering import AttentionGuidedOrderer, OrderSettings

OPTIONS: dict[str, Any] = {
    "tokens_per_query": 4,
    "tokens_per_key": 6,
    "tokens_per_value": 6,
    "selection_temperature": 0.2,
    # Of training, and of no memory here.
    "num_kv_pairs": 8,
    "subset_fraction": 0.5,
    "num_steps": 3,
}


@pytest.fixture(scope="session")
def orderer(tokenizer: PreTrainedTokenizerFast) -> AttentionGuidedOrderer:
    return AttentionGuidedOrderer(adapted(tiny_llama()), tokenizer, OrderSettings(OPTIONS))


@pytest.fixture(scope="session")
def passages(texts: list[str]) -> list[str]:
    """Four passages of different lengths."""
    return [" ".join(text.split()[:count]) for text, count in zip(texts, (5, 9, 20, 12), strict=False)]
