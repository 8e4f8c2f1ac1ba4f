"""What is logged of a rolled-out batch, and how the numbers of several steps become one."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from tiny import make_sampler
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from attention_rl_trainer.memories.pairs import MemoryBatch
from attention_rl_trainer.records.ledger import LedgerRow
from attention_rl_trainer.records.metrics import (
    MetricsBuffer,
    distinct_queries,
    query_diversity,
    repetition,
    trajectory_metrics,
)
from attention_rl_trainer.types import Trajectory


def test_repetition_by_hand() -> None:
    ids = torch.tensor([[[1, 2, 3, 4], [1, 1, 2, 1]], [[5, 5, 5, 5], [1, 2, 1, 2]]])
    assert repetition(ids).tolist() == [[0.0, 0.5], [0.75, 0.5]]


def test_distinct_queries_by_hand() -> None:
    """Queries are the same if all of their tokens are; where each stands does not matter."""
    a, b, c = [1, 2, 3], [1, 2, 4], [3, 2, 1]
    ids = torch.tensor([[a, b, c, a], [a, a, a, a], [b, c, c, b], [a, b, c, [9, 9, 9]]])
    assert distinct_queries(ids).tolist() == [3, 1, 2, 4]


def test_query_diversity_by_hand() -> None:
    """All differ; none does; two and two; three and one."""
    a, b, c, d = [1, 2], [2, 1], [1, 1], [1, 3]
    ids = torch.tensor([[a, a, a, a], [b, a, b, b], [c, a, b, b], [d, a, a, b]])
    three_and_one = math.log(4) - 0.75 * math.log(3)
    assert query_diversity(ids).tolist() == pytest.approx([math.log(4), 0, math.log(2), three_and_one])


class TestTrajectoryMetrics:
    def test_against_a_loop_over_the_rows(self, rows: list[LedgerRow], trajectory: Trajectory) -> None:
        metrics = trajectory_metrics(trajectory)
        rewards = [row.reward for row in rows]
        mean = sum(rewards) / 4
        steps = [probabilities for row in rows for probabilities in row.selection_probabilities]
        entropies = [-sum(p * math.log(p) for p in probabilities if p > 0) for probabilities in steps]
        query_entropies = [float(step.query_entropy[row].mean()) for step in trajectory.steps for row in range(4)]
        queries = [step.query_tokens[row].tolist() for step in trajectory.steps for row in range(4)]
        information = []
        for step in trajectory.steps:
            assert step.selection_information is not None
            information += step.selection_information.tolist()
        assert max(information) > 0.01
        texts = [{str(step.query_tokens[row].tolist()) for step in trajectory.steps} for row in range(4)]
        expected = {
            "selection_information": sum(information) / 12,
            # A value has 5 tokens.
            "query_bound": sum(information) / 60,
            "distinct_queries": sum(map(len, texts)) / 4,
            # No two of the four rows ask alike.
            "query_diversity": math.log(4),
            "query_repetition": sum(1 - len(set(query)) / len(query) for query in queries) / 12,
            "reward": mean,
            "reward_std": math.sqrt(sum((reward - mean) ** 2 for reward in rewards) / 4),
            "reward_max": max(rewards),
            "query_gain": sum(sum(row.query_gains) for row in rows) / 12,
            "model_gain": sum(sum(row.model_gains) for row in rows) / 12,
            "query_entropy": sum(query_entropies) / 12,
            "selector_entropy": sum(entropies) / 12,
            "selector_max": sum(max(probabilities) for probabilities in steps) / 12,
        }
        assert metrics == pytest.approx(expected, abs=1e-5)
        assert metrics["query_gain"] + metrics["model_gain"] == pytest.approx(metrics["reward"], abs=1e-5)

    def test_order_gain_where_it_was_computed(
        self, llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, batch: MemoryBatch
    ) -> None:
        trajectory = make_sampler(llama, tokenizer, compute_order_gain=True).sample(batch, range(4))
        gains = [float(step.order_gain[row]) for step in trajectory.steps for row in range(4)]
        assert trajectory_metrics(trajectory)["order_gain"] == pytest.approx(sum(gains) / 12, abs=1e-6)

    @pytest.mark.parametrize("step", [0, 2])
    def test_what_the_environment_did_not_measure_is_absent(self, step: int, trajectory: Trajectory) -> None:
        steps = list(trajectory.steps)
        steps[step] = dataclasses.replace(steps[step], selection_information=None)
        less = trajectory_metrics(dataclasses.replace(trajectory, steps=steps))
        measured = trajectory_metrics(trajectory)
        assert measured.keys() - less.keys() == {"selection_information", "query_bound"}
        assert measured == measured | less

    def test_one_trajectory_shows_no_information(
        self, llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, batch: MemoryBatch
    ) -> None:
        alone = trajectory_metrics(make_sampler(llama, tokenizer).sample(batch.head(1), [20]))
        assert "selection_information" not in alone
        assert "query_bound" not in alone
        assert alone["distinct_queries"] >= 1


class TestMetricsBuffer:
    def test_each_name_has_its_way_of_becoming_one_number(self) -> None:
        buffer = MetricsBuffer()
        means, latest = ("reward", "kl", "kept_fraction"), ("episodes", "updates", "skipped_articles")
        history, sums = ("history_mean", "history_std", "threshold"), ("kept_trajectories", "rollout_seconds")
        names = (*means, *latest, *history, *sums, "update_seconds", "reward_max", "peak_memory_gib")
        for value in (1, 4, 2.5):
            buffer.add(dict.fromkeys(names, value))
        expected = dict.fromkeys(means, 2.5) | dict.fromkeys((*latest, *history), 2.5)
        expected |= dict.fromkeys((*sums, "update_seconds"), 7.5) | {"reward_max": 4, "peak_memory_gib": 4}
        assert buffer.drain() == expected

    def test_the_latest_is_not_the_mean(self) -> None:
        buffer = MetricsBuffer()
        for value in (8, 16, 24, 20):
            buffer.add({"episodes": value, "reward": value})
        assert buffer.drain() == {"episodes": 20.0, "reward": 17.0}

    def test_what_does_not_exist_is_left_out_of_the_mean(self) -> None:
        buffer = MetricsBuffer()
        buffer.add({"kl": None, "threshold": None})
        buffer.add({"kl": 3.0})
        buffer.add({"kl": None})
        assert buffer.drain() == {"kl": 3.0}

    def test_what_was_joined_is_forgotten(self) -> None:
        buffer = MetricsBuffer()
        buffer.add({"reward": 1.0})
        buffer.drain()
        assert buffer.drain() == {}
        buffer.add({"reward": 5.0})
        assert buffer.drain() == {"reward": 5.0}

    def test_the_state_survives_json_and_replaces_what_was_there(self) -> None:
        buffer, other = MetricsBuffer(), MetricsBuffer()
        buffer.add({"reward": 1 / 3, "episodes": 8})
        buffer.add({"reward": 1.0})
        other.add({"kl": 9.0, "reward": 100.0})
        state = json.loads(json.dumps(buffer.state_dict()))
        buffer.add({"reward": -50.0})
        other.load_state_dict(state)
        other.add({"reward": 2.0})
        assert other.drain() == {"reward": pytest.approx(10 / 9), "episodes": 8.0}
        assert state["joined"] == {"episodes": 8.0}
        assert state["means"] == {"reward": [pytest.approx(4 / 3), 2.0]}

    def test_what_is_held_does_not_grow(self) -> None:
        buffer, sizes = MetricsBuffer(), set()
        for _ in range(9):
            buffer.add({"kl": 0.5, "reward_max": 1.0, "updates": 1})
            buffer.add_rewards(torch.ones(1))
            buffer.count_step()
            sizes.add(len(json.dumps(buffer.state_dict())))
        # The number of digits may.
        assert max(sizes) - min(sizes) < 10

    def test_means_are_weighted(self) -> None:
        buffer = MetricsBuffer()
        buffer.add({"kl": 1.0, "reward_max": 1.0, "episodes": 3}, weight=3)
        buffer.add({"kl": 5.0, "reward_max": 0.5, "episodes": 4}, weight=1)
        assert buffer.drain() == {"kl": 2.0, "reward_max": 1.0, "episodes": 4.0}

    def test_rewards_are_those_of_all_trajectories(self) -> None:
        buffer, other = MetricsBuffer(), MetricsBuffer()
        buffer.add_rewards(torch.tensor([1.0, 3.0, 5.0]))
        other.load_state_dict(json.loads(json.dumps(buffer.state_dict())))
        other.add_rewards(torch.tensor([11.0]))
        assert other.drain() == {"reward": 5.0, "reward_std": pytest.approx(math.sqrt(14))}
        assert other.drain() == {}
