"""The ledger file, and the rows and metrics that a rolled-out batch gives."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_sampler, random_batch, tiny_llama
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from attention_rl_trainer.memories.pairs import MemoryBatch
from attention_rl_trainer.memories.tokenization import PlainTextEncoder
from attention_rl_trainer.records.ledger import LEDGER_NAME, Ledger, LedgerGaps, LedgerRow, read_ledger
from attention_rl_trainer.records.metrics import trajectory_metrics
from attention_rl_trainer.records.recorder import ledger_rows
from attention_rl_trainer.types import Trajectory
from attention_rl_trainer.update.filter import RewardStatistics


def make_row(episode: int, **changes: Any) -> LedgerRow:
    """A row of one step over two pairs."""
    record: dict[str, Any] = {
        "episode": episode,
        "step": 1,
        "epoch": 0,
        "article_index": episode,
        "title": f"title {episode}",
        "source": "made up",
        "pair_numbers": [4, 9],
        "order": [9],
        "reward": 0.1,
        "step_rewards": [0.1],
        "query_gains": [0.3],
        "model_gains": [-0.2],
        "order_gains": None,
        "history_mean": None,
        "history_std": None,
        "threshold": None,
        "verdict": "warmup",
        "selection_probabilities": [[0.25, 0.75]],
        "queries": ["What"],
        "keys": ["a key"],
        "values": ["a value"],
    }
    return LedgerRow.from_json(record | changes)


def episodes_of(ledger: Ledger) -> list[int]:
    return [row.episode for row in read_ledger(ledger.path)]


class TestAppend:
    def test_rows_come_back_in_order(self, tmp_path: Path) -> None:
        ledger = Ledger(tmp_path)
        ledger.append([make_row(0), make_row(1, reward=1 / 3)])
        ledger.append([make_row(2)])
        assert read_ledger(tmp_path / LEDGER_NAME) == [make_row(0), make_row(1, reward=1 / 3), make_row(2)]

    def test_no_rows_leave_an_empty_file(self, tmp_path: Path) -> None:
        ledger = Ledger(tmp_path)
        ledger.append([])
        assert ledger.path.read_bytes() == b""

    @pytest.mark.parametrize(
        "text", ["Ærø, 東京 and 🙂", "two\nlines\r\n\u2028 and a \x00 and \\", '"quoted"', "\ufffd"]
    )
    def test_any_text_is_one_line(self, tmp_path: Path, text: str) -> None:
        ledger = Ledger(tmp_path)
        ledger.append([make_row(0, title=text, queries=[text]), make_row(1)])
        first, _ = read_ledger(ledger.path)
        assert (first.title, first.queries) == (text, (text,))
        assert ledger.path.read_bytes().count(b"\n") == 2

    def test_letters_are_written_as_themselves(self, tmp_path: Path) -> None:
        ledger = Ledger(tmp_path)
        ledger.append([make_row(0, title="東京")])
        assert "東京" in ledger.path.read_text(encoding="utf-8")


class TestCut:
    def test_rows_past_a_checkpoint_go(self, tmp_path: Path) -> None:
        ledger = Ledger(tmp_path)
        ledger.append([make_row(episode) for episode in range(6)])
        ledger.cut(4)
        assert episodes_of(ledger) == [0, 1, 2, 3]
        ledger.append([make_row(4)])
        assert episodes_of(ledger) == [0, 1, 2, 3, 4]
        assert [path.name for path in tmp_path.iterdir()] == [LEDGER_NAME]

    def test_rows_that_stay_are_the_same_bytes(self, tmp_path: Path) -> None:
        ledger = Ledger(tmp_path)
        ledger.append([make_row(0, title="東京", reward=1 / 3)])
        before = ledger.path.read_bytes()
        ledger.append([make_row(1)])
        ledger.cut(1)
        assert ledger.path.read_bytes() == before

    @pytest.mark.parametrize("length", [1, 20, -1])
    def test_an_unfinished_last_line_goes(self, tmp_path: Path, length: int) -> None:
        ledger = Ledger(tmp_path)
        ledger.append([make_row(0), make_row(1)])
        # A kill may even leave a whole object without its line end, or half a letter.
        whole = json.dumps(make_row(2, title="東").to_json(), ensure_ascii=False).encode() + b"\n"
        with ledger.path.open("ab") as file:
            file.write(whole[:length])
        ledger.cut(10)
        assert episodes_of(ledger) == [0, 1]

    def test_everything_goes_before_the_first_episode(self, tmp_path: Path) -> None:
        ledger = Ledger(tmp_path)
        ledger.append([make_row(0)])
        ledger.cut(0)
        assert ledger.path.read_bytes() == b""

    @pytest.mark.parametrize("damage", [b"[]\n", b"\x00\x00\n", b'{"episode": 1}\n', b"\xff\n"])
    def test_a_damaged_line_is_left_out_and_kept_beside(self, damage: bytes, tmp_path: Path) -> None:
        ledger = Ledger(tmp_path)
        ledger.append([make_row(0)])
        with ledger.path.open("ab") as file:
            file.write(damage)
        ledger.append([make_row(2), make_row(3)])
        before = ledger.path.read_bytes()
        gaps = ledger.cut(3)
        assert episodes_of(ledger) == [0, 2]
        assert gaps == LedgerGaps(1, tmp_path / f"_damaged-{LEDGER_NAME}")
        assert gaps.copy.read_bytes() == before

    def test_repeated_rows_do_not_hide_missing_ones(self, tmp_path: Path) -> None:
        ledger = Ledger(tmp_path)
        ledger.append([make_row(episode) for episode in (0, 1, 0, 1, 2)])
        gaps = ledger.cut(5)
        assert episodes_of(ledger) == [0, 1, 2]
        assert gaps.missing == 2
        assert gaps.copy is not None

    def test_nothing_is_missing_of_a_whole_ledger(self, tmp_path: Path) -> None:
        ledger = Ledger(tmp_path)
        ledger.append([make_row(episode) for episode in range(4)])
        assert ledger.cut(3) == LedgerGaps(0, None)

    def test_without_a_file_all_is_missing(self, tmp_path: Path) -> None:
        assert Ledger(tmp_path).cut(3) == LedgerGaps(3, None)
        assert not list(tmp_path.iterdir())

    def test_another_runs_rows_are_taken_over(self, tmp_path: Path) -> None:
        (tmp_path / "other").mkdir()
        other, ledger = Ledger(tmp_path / "other"), Ledger(tmp_path)
        ledger.take_over(other.path)
        assert not ledger.path.exists()
        other.append([make_row(0)])
        ledger.take_over(other.path)
        assert episodes_of(ledger) == episodes_of(other) == [0]


@pytest.fixture
def batch() -> MemoryBatch:
    return random_batch(4)


@pytest.fixture
def trajectory(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, batch: MemoryBatch) -> Trajectory:
    return make_sampler(llama, tokenizer).sample(batch, range(20, 24))


KEEP = torch.tensor([True, False, False, True])
HISTORY = RewardStatistics(20, -0.5, 0.8)


@pytest.fixture
def rows(trajectory: Trajectory, batch: MemoryBatch, tokenizer: PreTrainedTokenizerFast) -> list[LedgerRow]:
    encoder = PlainTextEncoder(tokenizer)
    return ledger_rows(trajectory, batch, encoder, step=6, history=HISTORY, threshold=-0.3, keep=KEEP, is_warmup=False)


class TestLedgerRows:
    def test_episodes_and_articles_are_those_of_the_batch(self, rows: list[LedgerRow]) -> None:
        assert [(row.episode, row.article_index, row.title) for row in rows] == [
            (20 + number, number, f"title {number}") for number in range(4)
        ]
        assert {(row.step, row.epoch, row.source) for row in rows} == {(6, 0, "made up")}

    def test_order_names_the_pairs_by_their_number_in_the_article(
        self, rows: list[LedgerRow], trajectory: Trajectory, batch: MemoryBatch
    ) -> None:
        for number, row in enumerate(rows):
            assert row.pair_numbers == (1, 2, 3, 4, 5)
            for step, pair in enumerate(row.order):
                value = batch.value_tokens[number, row.pair_numbers.index(pair)]
                assert torch.equal(trajectory.steps[step].selected_pair.value_tokens[number], value)

    def test_probabilities_are_those_of_the_draws(self, rows: list[LedgerRow], trajectory: Trajectory) -> None:
        for number, row in enumerate(rows):
            assert len(row.selection_probabilities) == 3
            for step, probabilities in enumerate(row.selection_probabilities):
                assert sum(probabilities) == pytest.approx(1, abs=1e-5)
                used = [row.pair_numbers.index(pair) for pair in row.order[:step]]
                assert all(probabilities[column] == 0 for column in used)
                index = int(trajectory.steps[step].selected_index[number])
                assert row.chosen_probabilities[step] == probabilities[index] > 0

    def test_a_probability_above_one_by_rounding_is_written_as_one(
        self, trajectory: Trajectory, batch: MemoryBatch, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        certain = torch.nn.functional.one_hot(trajectory.steps[0].selected_index, 5) * (1 + 2**-23)
        first = dataclasses.replace(trajectory.steps[0], selection_probabilities=certain)
        rounded = dataclasses.replace(trajectory, steps=[first, *trajectory.steps[1:]])
        encoder = PlainTextEncoder(tokenizer)
        rows = ledger_rows(rounded, batch, encoder, step=1, history=HISTORY, threshold=None, keep=KEEP, is_warmup=False)
        assert [row.chosen_probabilities[0] for row in rows] == [1.0] * 4

    def test_gains_sum_to_the_reward(self, rows: list[LedgerRow], trajectory: Trajectory) -> None:
        for number, row in enumerate(rows):
            for reward, query_gain, model_gain in zip(row.step_rewards, row.query_gains, row.model_gains, strict=True):
                assert query_gain + model_gain == pytest.approx(reward, abs=1e-5)
            assert row.reward == pytest.approx(sum(row.step_rewards) / 3, abs=1e-6)
            assert row.reward == trajectory.avg_reward[number].item()

    def test_texts_are_what_was_written_and_read(
        self, rows: list[LedgerRow], trajectory: Trajectory, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        for number, row in enumerate(rows):
            for step, item in enumerate(trajectory.steps):
                assert row.queries[step] == tokenizer.decode(item.query_tokens[number])
                assert row.keys[step] == tokenizer.decode(item.selected_pair.key_tokens[number])
                assert row.values[step] == tokenizer.decode(item.selected_pair.value_tokens[number])

    def test_verdicts_follow_the_mask_and_the_history(self, rows: list[LedgerRow]) -> None:
        assert [row.verdict for row in rows] == ["kept", "below_threshold", "below_threshold", "kept"]
        assert {(row.history_mean, row.history_std, row.threshold) for row in rows} == {(-0.5, math.sqrt(0.04), -0.3)}

    def test_warm_up_without_history(
        self, trajectory: Trajectory, batch: MemoryBatch, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        rows = ledger_rows(
            trajectory,
            batch,
            PlainTextEncoder(tokenizer),
            step=1,
            history=RewardStatistics(),
            threshold=None,
            keep=torch.zeros(4, dtype=torch.bool),
            is_warmup=True,
        )
        assert {(row.verdict, row.history_mean, row.history_std, row.threshold) for row in rows} == {
            ("warmup", None, None, None)
        }

    def test_order_gains_only_where_they_were_computed(
        self, rows: list[LedgerRow], tokenizer: PreTrainedTokenizerFast, batch: MemoryBatch
    ) -> None:
        assert all(row.order_gains is None for row in rows)
        with_gains = make_sampler(tiny_llama(), tokenizer, compute_order_gain=True).sample(batch, range(4))
        encoder = PlainTextEncoder(tokenizer)
        for number, row in enumerate(
            ledger_rows(with_gains, batch, encoder, step=1, history=HISTORY, threshold=None, keep=KEEP, is_warmup=False)
        ):
            assert row.order_gains == tuple(with_gains.stack("order_gain")[number].tolist())

    def test_rows_survive_the_file(self, rows: list[LedgerRow], tmp_path: Path) -> None:
        Ledger(tmp_path).append(rows)
        assert read_ledger(tmp_path / LEDGER_NAME) == rows


class TestTrajectoryMetrics:
    def test_against_a_loop_over_the_rows(self, rows: list[LedgerRow], trajectory: Trajectory) -> None:
        metrics = trajectory_metrics(trajectory)
        rewards = [row.reward for row in rows]
        mean = sum(rewards) / 4
        steps = [probabilities for row in rows for probabilities in row.selection_probabilities]
        entropies = [-sum(p * math.log(p) for p in probabilities if p > 0) for probabilities in steps]
        query_entropies = [float(step.query_entropy[row].mean()) for step in trajectory.steps for row in range(4)]
        queries = [step.query_tokens[row].tolist() for step in trajectory.steps for row in range(4)]
        expected = {
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
