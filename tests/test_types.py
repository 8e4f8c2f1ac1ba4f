"""Records refuse tensors of the wrong shape or dtype when they are made."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from attention_rl_trainer.types import KeyValuePair, KeyValuePairs, Trajectory, TrajectoryStep


def pair(**changes: object) -> KeyValuePair:
    fields = {
        "key_tokens": torch.zeros(2, 3, dtype=torch.int64),
        "value_tokens": torch.zeros(2, 4, dtype=torch.int64),
        "key_embedding": torch.zeros(2, 8),
    }
    return KeyValuePair(**fields | changes)


def step(**changes: object) -> TrajectoryStep:
    numbers = torch.zeros(2)
    fields = {
        "context_tokens": torch.zeros(2, 9, dtype=torch.int64),
        "query_tokens": torch.zeros(2, 5, dtype=torch.int64),
        "selected_pair": pair(),
        "reward": numbers,
        "similarity_score": numbers,
        "selected_index": torch.zeros(2, dtype=torch.int64),
        "selection_probabilities": torch.zeros(2, 6),
        "query_logprobs": torch.zeros(2, 5),
        "query_entropy": torch.zeros(2, 5),
        "counterfactual_tokens": torch.zeros(2, 5, dtype=torch.int64),
        "policy_value_logprob": torch.tensor([-1.0, -2.0]),
        "base_value_logprob": torch.tensor([-1.5, -2.0]),
        "counterfactual_value_logprob": torch.tensor([-1.25, -3.0]),
    }
    return TrajectoryStep(**fields | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"key_tokens": torch.zeros(2, 3)}, "key_tokens must have torch.int64, got torch.float32"),
        ({"key_tokens": torch.zeros(3, dtype=torch.int64)}, r"key_tokens must have shape \[any, any\], got \[3\]"),
        ({"value_tokens": torch.zeros(3, 4, dtype=torch.int64)}, r"value_tokens must have shape \[2, any\]"),
        ({"key_embedding": torch.zeros(2, 8, dtype=torch.int64)}, "key_embedding must have a floating-point dtype"),
        ({"key_text": ["only one"]}, "key_text must hold one text for each of the 2 rows"),
    ],
)
def test_bad_pairs_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pair(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reward": torch.zeros(3)}, r"reward must have shape \[2\], got \[3\]"),
        ({"query_logprobs": torch.zeros(2, 4)}, r"query_logprobs must have shape \[2, 5\]"),
        ({"selected_index": torch.zeros(2)}, "selected_index must have torch.int64"),
        ({"order_gain": torch.zeros(1)}, "order_gain must have shape"),
        ({"query_text": ["x"]}, "query_text must hold one text"),
    ],
)
def test_bad_steps_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        step(**changes)


def test_gains_by_hand() -> None:
    item = step()
    assert item.query_gain.tolist() == [-0.25, 1.0]
    assert item.model_gain.tolist() == [0.5, 0.0]


def test_trajectory_checks_and_stacks() -> None:
    memory = KeyValuePairs(
        torch.zeros(2, 6, 3, dtype=torch.int64),
        torch.zeros(2, 6, 4, dtype=torch.int64),
        torch.zeros(2, 6, 2, 4),
        torch.arange(12).view(2, 6),
    )
    fields = {
        "steps": [step(), step()],
        "avg_reward": torch.zeros(2),
        "total_reward": torch.zeros(2),
        "token_ids": torch.zeros(2, 30, dtype=torch.int64),
        "query_starts": [9, 20],
        "value_starts": [14, 25],
        "memory": memory,
        "episodes": torch.arange(2),
    }
    trajectory = Trajectory(**fields)
    assert trajectory.stack("query_gain").shape == (2, 2)
    with pytest.raises(ValueError, match="at least one step"):
        Trajectory(**fields | {"steps": []})
    with pytest.raises(ValueError, match="query_starts must hold one position for each of 2 steps, got 1"):
        Trajectory(**fields | {"query_starts": [9]})
    taken = memory.gather(torch.tensor([1, 5]))
    assert taken.key_embedding.shape == (2, 8)
    assert memory.select_rows(torch.tensor([1])).pair_numbers.tolist() == [[6, 7, 8, 9, 10, 11]]
    with pytest.raises(dataclasses.FrozenInstanceError):
        trajectory.steps = []  # type: ignore[misc]
