"""Kept trajectories: which rows, with which advantages and weights, in which micro-batches."""

from __future__ import annotations

import re

import pytest
import torch
from tiny import make_sampler, random_batch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from attention_rl_trainer.errors import NonFiniteError
from attention_rl_trainer.memories.pairs import MemoryBatch
from attention_rl_trainer.types import Trajectory
from attention_rl_trainer.update.filter import RewardStatistics, Verdict
from attention_rl_trainer.update.kept import KeptTrajectories
from attention_rl_trainer.update.losses import LossOptions, step_advantages

ROWS = [1, 2, 4]
HISTORY = RewardStatistics(20, -0.5, 0.8)  # a standard deviation of 0.2
AFTER = RewardStatistics(25, 1e6, 1e6)


def verdict(rows: list[int], history: RewardStatistics = HISTORY) -> Verdict:
    keep = torch.zeros(5, dtype=torch.bool)
    keep[rows] = True
    return Verdict(keep, history, AFTER)


@pytest.fixture
def batch() -> MemoryBatch:
    return random_batch(5)


@pytest.fixture
def trajectories(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, batch: MemoryBatch) -> Trajectory:
    return make_sampler(llama, tokenizer).sample(batch, range(5))


def test_takes_the_kept_rows(trajectories: Trajectory, batch: MemoryBatch) -> None:
    kept = KeptTrajectories.of(trajectories, verdict(ROWS), LossOptions(), 16, batch.articles)
    assert len(kept) == 3
    assert torch.equal(kept.token_ids, trajectories.token_ids[ROWS])
    assert torch.equal(kept.memory.key_vectors, trajectories.memory.key_vectors[ROWS])
    assert [article.title for article in kept.articles] == ["title 1", "title 2", "title 4"]
    assert kept.weights.tolist() == [1 / 16] * 3
    for step, (query_start, value_start) in enumerate(zip(kept.query_starts, kept.value_starts, strict=True)):
        read = trajectories.steps[step]
        queries = kept.token_ids[:, query_start : query_start + kept.query_length]
        values = kept.token_ids[:, value_start : value_start + kept.value_length]
        assert torch.equal(queries, read.query_tokens[ROWS])
        assert torch.equal(values, read.selected_pair.value_tokens[ROWS])
        assert torch.equal(kept.rollout_logprobs[:, step], read.query_logprobs[ROWS])
        assert torch.equal(kept.selected_index[:, step], read.selected_index[ROWS])


@pytest.mark.parametrize("advantage", ["reward", "centered", "whitened"])
@pytest.mark.parametrize("credit", ["trajectory", "return_to_go", "step"])
def test_advantages_are_over_the_history_before_the_batch(
    trajectories: Trajectory, advantage: str, credit: str
) -> None:
    kept = KeptTrajectories.of(trajectories, verdict(ROWS), LossOptions(advantage=advantage, credit=credit), 5)
    rewards = trajectories.stack("reward")[ROWS]
    expected = step_advantages(rewards, -0.5, HISTORY.std, advantage=advantage, credit=credit)
    assert torch.equal(kept.advantages, expected)


def test_none_are_kept(trajectories: Trajectory, batch: MemoryBatch) -> None:
    # Whitening by such a history would overflow, but there is nothing to whiten.
    options = LossOptions(advantage="whitened")
    kept = KeptTrajectories.of(trajectories, verdict([], RewardStatistics(20, 0.0, 1e-300)), options, 5, batch.articles)
    assert len(kept) == 0
    assert list(kept.split(4)) == []


def test_an_advantage_that_is_not_finite_names_its_article(trajectories: Trajectory, batch: MemoryBatch) -> None:
    trajectories.steps[1].reward[2] = torch.inf
    with pytest.raises(NonFiniteError, match=re.escape("advantage is not finite at step 2")) as caught:
        KeptTrajectories.of(trajectories, verdict(ROWS), LossOptions(credit="step"), 5, batch.articles)
    assert [article.title for article in caught.value.articles] == ["title 2"]
    KeptTrajectories.of(trajectories, verdict([1, 4]), LossOptions(credit="step"), 5, batch.articles)


def test_micro_batches_are_runs_of_rows(trajectories: Trajectory, batch: MemoryBatch) -> None:
    kept = KeptTrajectories.of(trajectories, verdict(list(range(5))), LossOptions(), 5, batch.articles)
    parts = list(kept.split(2))
    assert [len(part) for part in parts] == [2, 2, 1]
    assert [[article.title for article in part.articles] for part in parts] == [
        ["title 0", "title 1"],
        ["title 2", "title 3"],
        ["title 4"],
    ]
    for name in ("token_ids", "rollout_logprobs", "selected_index", "advantages", "weights"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(kept, name))
    assert all(part.query_starts == kept.query_starts for part in parts)
    without = KeptTrajectories.of(trajectories, verdict(list(range(5))), LossOptions(), 5)
    assert [part.articles for part in without.split(3)] == [(), ()]
