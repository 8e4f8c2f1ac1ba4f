"""What a recorder writes of a rolled-out batch, when, and what it forgets."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import logging
import math
import statistics
from pathlib import Path

import pytest
import torch
from made_up_run import make_row
from tiny import make_sampler, random_batch, tiny_llama
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from attention_rl_trainer.errors import RunContext
from attention_rl_trainer.memories.pairs import MemoryBatch
from attention_rl_trainer.memories.tokenization import PlainTextEncoder
from attention_rl_trainer.records.health import HealthLimits
from attention_rl_trainer.records.ledger import LEDGER_NAME, Ledger, LedgerRow, read_ledger
from attention_rl_trainer.records.metrics import trajectory_metrics
from attention_rl_trainer.records.progress import Progress
from attention_rl_trainer.records.recorder import Recorder, ledger_rows
from attention_rl_trainer.types import Trajectory
from attention_rl_trainer.update.filter import RewardStatistics, Verdict
from attention_rl_trainer.update.micro_batches import LossSums


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
        self, trajectory: Trajectory, batch: MemoryBatch, encoder: PlainTextEncoder, verdict: Verdict
    ) -> None:
        certain = torch.nn.functional.one_hot(trajectory.steps[0].selected_index, 5) * (1 + 2**-23)
        first = dataclasses.replace(trajectory.steps[0], selection_probabilities=certain)
        rounded = dataclasses.replace(trajectory, steps=[first, *trajectory.steps[1:]])
        rows = ledger_rows(rounded, batch, encoder, verdict, step=1)
        assert [row.chosen_probabilities[0] for row in rows] == [1.0] * 4

    def test_the_gains_of_a_values_tokens_make_its_reward(self, rows: list[LedgerRow], trajectory: Trajectory) -> None:
        for row in rows:
            assert row.token_gains is not None
            for step, tokens in enumerate(row.token_gains):
                assert len(tokens) == trajectory.steps[step].selected_pair.value_tokens.shape[1]
                assert "".join(text for text, _ in tokens) == row.values[step]
                mean = sum(gain for _, gain in tokens) / len(tokens)
                assert mean == pytest.approx(row.step_rewards[step], abs=1e-4)

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

    def test_a_filter_without_a_threshold(
        self, trajectory: Trajectory, batch: MemoryBatch, encoder: PlainTextEncoder, verdict: Verdict
    ) -> None:
        rows = ledger_rows(trajectory, batch, encoder, dataclasses.replace(verdict, threshold=None), step=1)
        assert [row.verdict for row in rows] == ["kept", "below_threshold", "below_threshold", "kept"]
        assert {(row.history_mean, row.threshold) for row in rows} == {(-0.5, None)}

    def test_warm_up_without_history(
        self, trajectory: Trajectory, batch: MemoryBatch, encoder: PlainTextEncoder, verdict: Verdict
    ) -> None:
        nothing = torch.zeros(4, dtype=torch.bool)
        warmup = Verdict(nothing, RewardStatistics(), verdict.history_after, threshold=None, is_warmup=True)
        rows = ledger_rows(trajectory, batch, encoder, warmup, step=1)
        assert {(row.verdict, row.history_mean, row.history_std, row.threshold) for row in rows} == {
            ("warmup", None, None, None)
        }

    def test_order_gains_only_where_they_were_computed(
        self,
        rows: list[LedgerRow],
        tokenizer: PreTrainedTokenizerFast,
        batch: MemoryBatch,
        encoder: PlainTextEncoder,
        verdict: Verdict,
    ) -> None:
        assert all(row.order_gains is None for row in rows)
        with_gains = make_sampler(tiny_llama(), tokenizer, compute_order_gain=True).sample(batch, range(4))
        for number, row in enumerate(ledger_rows(with_gains, batch, encoder, verdict, step=1)):
            assert row.order_gains == tuple(with_gains.stack("order_gain")[number].tolist())

    def test_rows_survive_the_file(self, rows: list[LedgerRow], tmp_path: Path) -> None:
        Ledger(tmp_path).append(rows)
        assert read_ledger(tmp_path / LEDGER_NAME) == rows


@pytest.fixture
def progress() -> Progress:
    return Progress(total_episodes=48)


@dataclasses.dataclass
class Clock:
    """The step that a run is at."""

    step: int = 6


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def context(clock: Clock) -> RunContext:
    return RunContext(torch.device("cpu"), {}, lambda: clock.step)


@pytest.fixture
def recorder(tmp_path: Path, encoder: PlainTextEncoder, progress: Progress, context: RunContext) -> Recorder:
    limits = HealthLimits(max_selector_entropy=2.0, expected_kept=0.16, has_kl=True, window=2)
    return Recorder(tmp_path, encoder, progress, limits, context)


class TestStep:
    def test_rows_wait_for_the_commit(
        self,
        recorder: Recorder,
        batch: MemoryBatch,
        trajectory: Trajectory,
        verdict: Verdict,
        rows: list[LedgerRow],
    ) -> None:
        recorder.add(batch, trajectory, verdict)
        assert not recorder.ledger.path.exists()
        recorder.commit()
        assert read_ledger(recorder.ledger.path) == rows
        recorder.commit()
        assert read_ledger(recorder.ledger.path) == rows

    def test_the_batches_of_an_update_are_committed_together(
        self,
        recorder: Recorder,
        batch: MemoryBatch,
        trajectory: Trajectory,
        verdict: Verdict,
        rows: list[LedgerRow],
    ) -> None:
        later = dataclasses.replace(trajectory, episodes=trajectory.episodes + 4)
        recorder.add(batch, trajectory, verdict)
        recorder.add(batch, later, verdict)
        recorder.commit()
        assert read_ledger(recorder.ledger.path) == [
            *rows,
            *(dataclasses.replace(row, episode=row.episode + 4) for row in rows),
        ]

    def test_the_latest_row_is_the_best_of_the_last_batch(
        self,
        recorder: Recorder,
        batch: MemoryBatch,
        trajectory: Trajectory,
        verdict: Verdict,
        rows: list[LedgerRow],
    ) -> None:
        assert recorder.latest_row is None
        recorder.add(batch, trajectory, verdict)
        assert recorder.latest_row == rows[int(trajectory.avg_reward.argmax())]
        worse = dataclasses.replace(trajectory, avg_reward=trajectory.avg_reward - 100)
        recorder.add(batch, worse, verdict)
        assert recorder.latest_row is not None
        assert recorder.latest_row.reward == worse.avg_reward.max().item()

    def test_going_back_drops_the_rows_that_wait(
        self,
        recorder: Recorder,
        batch: MemoryBatch,
        trajectory: Trajectory,
        verdict: Verdict,
    ) -> None:
        before = json.loads(json.dumps(recorder.state_dict()))
        recorder.add(batch, trajectory, verdict)
        recorder.load_state_dict(before)
        recorder.commit()
        assert read_ledger(recorder.ledger.path) == []
        assert recorder.log({"loss": 1.0}, 0) == {"loss": 1.0, "updates": 0.0}

    def test_the_state_holds_what_is_not_logged_yet(
        self, recorder: Recorder, batch: MemoryBatch, trajectory: Trajectory, verdict: Verdict
    ) -> None:
        recorder.add(batch, trajectory, verdict)
        state = json.loads(json.dumps(recorder.state_dict()))
        first = recorder.log({}, 1)
        assert recorder.log({}, 1) == {"updates": 1.0}
        recorder.load_state_dict(state)
        assert recorder.log({}, 1) == first

    def test_log_joins_the_trainers_numbers_with_what_was_collected(
        self, recorder: Recorder, progress: Progress, batch: MemoryBatch, trajectory: Trajectory, verdict: Verdict
    ) -> None:
        progress.advance(dataclasses.replace(batch, skipped={"too short": 2, "empty": 1}))
        recorder.add(batch, trajectory, verdict)
        recorder.add_update(LossSums(torch.zeros(()), policy=0.75, kl=6.0, num_query_tokens=24))
        logged = recorder.log({"loss": 0.5, "epoch": 0.1}, num_updates=3)
        assert logged == pytest.approx(
            {
                "loss": 0.5,
                "epoch": 0.1,
                **trajectory_metrics(trajectory),
                "history_mean": -0.25,
                "history_std": 0.5,
                "threshold": -0.3,
                "kept_fraction": 0.5,
                "kept_trajectories": 2.0,
                "episodes": 4.0,
                "skipped_articles": 3.0,
                "policy_loss": 0.75,
                "kl": 0.25,
                "updates": 3.0,
            }
        )

    def test_numbers_of_batches_of_different_sizes_are_those_of_all_trajectories(
        self, recorder: Recorder, llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        sampler = make_sampler(llama, tokenizer)
        rewards: list[float] = []
        gains: list[float] = []
        for rows, keep in ((4, [True, False, False, False]), (1, [True])):
            batch = random_batch(rows, seed=rows)
            trajectory = sampler.sample(batch, range(rows))
            history = RewardStatistics(4, 0.0, 1.0)
            recorder.add(batch, trajectory, Verdict(torch.tensor(keep), history, history, threshold=0.5))
            rewards += trajectory.avg_reward.tolist()
            gains += trajectory.stack("query_gain").mean(dim=1).tolist()
        logged = recorder.log({}, 0)
        assert logged["reward"] == pytest.approx(statistics.fmean(rewards))
        assert logged["reward_std"] == pytest.approx(statistics.pstdev(rewards))
        assert logged["query_gain"] == pytest.approx(statistics.fmean(gains), abs=1e-7)
        assert logged["kept_fraction"] == 2 / 5

    def test_a_step_that_keeps_nothing_counts_in_the_policy_loss_and_not_in_the_kl(self, recorder: Recorder) -> None:
        nothing = torch.zeros(())
        recorder.add_update(LossSums(nothing, policy=0.75, kl=6.0, num_query_tokens=24))
        recorder.add_update(LossSums(nothing))
        recorder.add_update(LossSums(nothing, policy=0.15, kl=3.0, num_query_tokens=6))
        assert recorder.log({}, 2) == pytest.approx({"policy_loss": 0.3, "kl": 0.3, "updates": 2.0})
        recorder.add_update(LossSums(nothing))
        assert recorder.log({}, 2) == {"updates": 2.0}

    def test_totals_of_a_run(self, recorder: Recorder, progress: Progress) -> None:
        progress.num_episodes = 8
        progress.open_stream()
        progress.num_episodes = 21
        totals = {"train_runtime": 2.0, "train_samples_per_second": 12.0, "total_flos": 0.0, "train_loss": 0.5}
        recorder.correct_totals(totals)
        assert totals == {"train_runtime": 2.0, "train_samples_per_second": 6.5, "train_loss": 0.5}

    def test_times_of_the_phases(self, recorder: Recorder, context: RunContext, trajectory: Trajectory) -> None:
        context.seconds |= {"rollout": 2.0, "filter": 0.5, "update": 1.0}
        recorder.add_times(trajectory)
        logged = recorder.log({}, 0)
        assert logged.pop("peak_memory_gib") > 0
        assert logged == {
            "tokens_per_second": trajectory.forward_tokens / 2,
            "rollout_seconds": 2.0,
            "update_seconds": 1.5,
            "updates": 0.0,
        }
        # Three times as many tokens in nine times the time, and then the rest of an update.
        context.seconds |= {"rollout": 1.0, "filter": 0.0}
        recorder.add_times(trajectory)
        context.seconds |= {"rollout": 9.0}
        recorder.add_times(dataclasses.replace(trajectory, forward_tokens=3 * trajectory.forward_tokens))
        context.seconds |= {"update": 4.0}
        recorder.add_update_time()
        logged = recorder.log({}, 0)
        assert logged["tokens_per_second"] == pytest.approx(4 * trajectory.forward_tokens / 10)
        assert (logged["rollout_seconds"], logged["update_seconds"]) == (10.0, 6.0)

    def test_log_warns_of_the_step_that_ended(
        self, recorder: Recorder, clock: Clock, caplog: pytest.LogCaptureFixture
    ) -> None:
        for step in (1, 2, 3):
            # The Trainer has counted the step when it logs.
            clock.step = step + 1
            recorder.log({"query_entropy": 0.01}, 0)
        (said,) = [record.getMessage() for record in caplog.records]
        assert said.startswith("Step 2: [queries-certain] query tokens are almost certain (entropy 0.010 nats)")


class TestRun:
    def test_a_report_of_the_ledger(
        self, recorder: Recorder, progress: Progress, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        recorder.ledger.append([make_row(0), make_row(1)])
        progress.skipped = {"too short": 2, "empty": 1}
        assert not recorder.has_report
        facts = {"model": "tiny", "seed": 5, "learning rate": 1e-3, "adapter": None, "order": True}
        with caplog.at_level(logging.INFO):
            recorder.write_report([], facts, 0)
        assert recorder.has_report
        summary = tmp_path / "report" / "summary.md"
        assert f"Report: {summary}" in caplog.text
        settings = summary.read_text(encoding="utf-8").split("## Settings")[1].split("## Plots")[0]
        assert [line for line in settings.splitlines() if line] == [
            "| | |",
            "| --- | --- |",
            "| model | tiny |",
            "| seed | 5 |",
            "| learning rate | 0.001 |",
            "| adapter | None |",
            "| order | True |",
            "| articles skipped | 1 empty, 2 too short |",
        ]
        assert (tmp_path / "report" / "rewards.png").is_file()
        recorder.forget_report()
        recorder.forget_report()
        assert not recorder.has_report

    def test_no_articles_were_skipped(self, recorder: Recorder, tmp_path: Path) -> None:
        recorder.ledger.append([make_row(0)])
        recorder.write_report([], {}, 0)
        assert "| articles skipped | none |" in (tmp_path / "report" / "summary.md").read_text(encoding="utf-8")

    def test_without_a_ledger_there_is_no_report(
        self, recorder: Recorder, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        recorder.write_report([], {}, 0)
        assert f"No report: {tmp_path / LEDGER_NAME} is missing" in caplog.text
        assert not list(tmp_path.iterdir())

    def test_without_matplotlib_there_are_no_plots(
        self,
        recorder: Recorder,
        tmp_path: Path,
        caplog: pytest.LogCaptureFixture,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        recorder.ledger.append([make_row(0)])
        recorder.write_report([], {}, 0)
        assert [path.name for path in (tmp_path / "report").iterdir()] == ["summary.md"]
        assert 'pip install "attention-rl-trainer[report]"' in caplog.text

    def test_a_whole_ledger_is_cut_in_silence(
        self, recorder: Recorder, progress: Progress, caplog: pytest.LogCaptureFixture
    ) -> None:
        recorder.ledger.append([make_row(episode) for episode in range(6)])
        progress.num_episodes = 4
        recorder.cut_ledger()
        assert [row.episode for row in read_ledger(recorder.ledger.path)] == [0, 1, 2, 3]
        assert not caplog.records

    def test_what_a_ledger_lacks_is_said(
        self, recorder: Recorder, progress: Progress, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        recorder.ledger.append([make_row(episode) for episode in (0, 3, 4)])
        progress.num_episodes = 4
        recorder.cut_ledger()
        path = recorder.ledger.path
        missing = f"{path} lacks 2 of the 4 trajectories before the checkpoint"
        assert f"{missing}; the report lacks them, the run does not" in caplog.text
        caplog.clear()
        with path.open("ab") as file:
            file.write(b"\x00\n")
        recorder.cut_ledger()
        copy = tmp_path / f"_damaged-{LEDGER_NAME}"
        assert f"{missing}, and had damaged lines or repeated ones (as it was: {copy})" in caplog.text
        assert [row.episode for row in read_ledger(path)] == [0, 3]
