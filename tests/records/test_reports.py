"""What a report says of a run, however seldom the run logged and whatever became of its ledger."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from made_up_run import make_row
from tiny import tiny_trainer
from transformers import PreTrainedTokenizerFast

from attention_rl_trainer.records.summary import RunCounts, summarize_run
from attention_rl_trainer.trainer import AttentionGuidedRLTrainer

# Six steps, of which the last two update.
OPTIONS: dict[str, Any] = {
    "num_episodes": 24,
    "generation_batch_size": 4,
    "warmup_episodes": 16,
    "filter_threshold": float("-inf"),
    "report_at_end": True,
}


def figures(text: str) -> dict[str, str]:
    rows = (line.strip("| ").split(" | ", 1) for line in text.splitlines() if line.startswith("| "))
    return {row[0]: row[1] for row in rows if len(row) == 2}


class TestOfARun:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        return tmp_path / "run"

    def report(self, folder: Path) -> str:
        return (folder / "report" / "summary.md").read_text(encoding="utf-8")

    @pytest.mark.parametrize(
        "options",
        [
            {"logging_steps": 4},
            pytest.param({"logging_strategy": "no"}, marks=pytest.mark.slow),
            pytest.param({"logging_steps": 5, "logging_first_step": True, "num_iterations": 2}, marks=pytest.mark.slow),
        ],
        ids=["every fourth step", "never", "all but the last step"],
    )
    def test_the_steps_after_the_last_log_are_in_it(
        self, options: dict[str, Any], folder: Path, texts: list[str], tokenizer: PreTrainedTokenizerFast
    ) -> None:
        trainer = tiny_trainer(folder.parent, texts, tokenizer, **OPTIONS | options)
        trainer.train()
        text = self.report(folder)
        found = figures(text)
        assert "No optimizer update was made" not in text
        assert found["optimizer updates"] == str(2 * trainer.args.num_iterations)
        assert found["episodes"] == "24, of which 16 in warm-up"
        assert found["kept after warm-up"] == "8 of 8 (100.0%)"
        for name in ("time", "tokens per second, mean of the logged steps", "peak memory"):
            assert found[name] != "not logged"

    @pytest.mark.slow
    def test_a_report_that_was_lost_is_written_again(
        self, folder: Path, texts: list[str], tokenizer: PreTrainedTokenizerFast
    ) -> None:
        def build() -> AttentionGuidedRLTrainer:
            return tiny_trainer(folder.parent, texts, tokenizer, **OPTIONS, logging_steps=4)

        loss = build().train().training_loss
        before = figures(self.report(folder))
        (folder / "report" / "summary.md").unlink()
        again = build().train(resume_from_checkpoint=True)
        assert figures(self.report(folder)) | {"memory free": before["memory free"]} == before
        assert again.training_loss == pytest.approx(loss)
        assert loss != 0

    @pytest.mark.slow
    def test_a_ledger_that_lost_rows_does_not_shorten_the_run(
        self, folder: Path, texts: list[str], tokenizer: PreTrainedTokenizerFast
    ) -> None:
        def build() -> AttentionGuidedRLTrainer:
            return tiny_trainer(folder.parent, texts, tokenizer, **OPTIONS)

        build().train()
        (folder / "report" / "summary.md").unlink()
        ledger = folder / "trajectories.jsonl"
        ledger.write_text("".join(ledger.read_text().splitlines(keepends=True)[:18]))
        build().train(resume_from_checkpoint=True)
        found = figures(self.report(folder))
        assert found["episodes"] == "24, of which 6 are not in the ledger; of the others 16 in warm-up"
        assert found["optimizer updates"] == "2"
        ledger.write_text("")
        (folder / "report" / "summary.md").unlink()
        build().train(resume_from_checkpoint=True)
        assert "The ledger holds none of the 24 trajectories" in self.report(folder)


class TestSummary:
    def test_kept_trajectories_are_not_denied_by_an_old_log(self) -> None:
        rows = [make_row(episode, step=episode + 1, verdict="kept") for episode in range(6)]
        text = summarize_run(rows, [{"step": 4, "episodes": 4, "updates": 0}], {})
        assert "No optimizer update" not in text
        assert figures(text)["optimizer updates"] == "at least 0, as of episode 4; later steps were not logged"

    def test_the_state_knows_better_than_the_log(self) -> None:
        rows = [make_row(episode, step=episode + 1, verdict="kept") for episode in range(6)]
        log_history = [{"step": 4, "episodes": 4, "updates": 0}]
        text = summarize_run(rows, log_history, {}, counts=RunCounts(num_episodes=6, num_updates=2))
        assert figures(text)["optimizer updates"] == "2"
        text = summarize_run(rows, log_history, {}, counts=RunCounts(num_episodes=6, num_updates=0))
        assert "No optimizer update was made" in text

    def test_a_ledger_that_lost_rows_is_not_the_whole_run(self) -> None:
        counts = RunCounts(num_episodes=9, num_updates=2)
        rows = [make_row(0, verdict="warmup"), make_row(1)]
        found = figures(summarize_run(rows, [], {}, counts=counts))
        assert found["episodes"] == "9, of which 7 are not in the ledger; of the others 1 in warm-up"
        assert "The ledger holds none of the 9 trajectories" in summarize_run([], [], {}, counts=counts)

    def test_tokens_per_second_are_of_all_the_time(self) -> None:
        log_history = [
            {"episodes": 1, "tokens_per_second": 100.0, "rollout_seconds": 9.0, "update_seconds": 0.0},
            {"episodes": 2, "tokens_per_second": 500.0, "rollout_seconds": 1.0, "update_seconds": 0.0},
        ]
        found = figures(summarize_run([make_row(0), make_row(1)], log_history, {}))
        assert found["tokens per second, mean of the logged steps"] == "140.0"
