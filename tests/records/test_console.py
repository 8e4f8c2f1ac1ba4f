"""The tables, and progress in episodes: a bar on a terminal that is a string, lines in a log that is one."""

from __future__ import annotations

import io
from pathlib import Path
from typing import ClassVar

import pytest
from rich.console import Console
from transformers import (
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from attention_rl_trainer.records.console import (
    EpisodeProgressCallback,
    metrics_table,
    trajectory_table,
    without_trainers_bar,
)
from attention_rl_trainer.records.ledger import LedgerRow


def make_row(episode: int = 12, **changes: object) -> LedgerRow:
    record: dict[str, object] = {
        "episode": episode,
        "step": 2,
        "epoch": 0,
        "article_index": 3,
        "title": "Amsterdam [red]",
        "source": "offline",
        "pair_numbers": [4, 9],
        "order": [9, 4],
        "reward": 0.02,
        "step_rewards": [0.01, 0.03],
        "query_gains": [0.0, 0.01],
        "model_gains": [0.01, 0.02],
        "order_gains": None,
        "history_mean": None,
        "history_std": None,
        "threshold": None,
        "verdict": "below_threshold",
        "selection_probabilities": [[0.25, 0.75], [1.0, 0.0]],
        "queries": [" what [bold]is[/bold] [[x]] :smile:", " \x1b[31mred\n"],
        "keys": [" k" * 100, " [/]"],
        "values": [" v", " w"],
    }
    return LedgerRow.from_json(record | changes)


def render(row: LedgerRow, **options: int) -> str:
    console = Console(file=io.StringIO(), width=200, force_terminal=False)
    console.print(trajectory_table(row, **options))
    output = console.file
    assert isinstance(output, io.StringIO)
    return output.getvalue()


class TestTrajectoryTable:
    def test_columns_and_rows(self) -> None:
        table = trajectory_table(make_row())
        headers = [str(column.header) for column in table.columns]
        assert headers == ["step", "query", "chosen key", "value", "probability", "reward"]
        assert table.row_count == 2

    def test_the_probability_is_that_of_the_chosen_pair(self) -> None:
        lines = render(make_row()).splitlines()
        assert any("0.750" in line and "+0.0100" in line for line in lines)
        assert any("1.000" in line and "+0.0300" in line for line in lines)

    def test_markup_is_printed_literally(self) -> None:
        shown = render(make_row())
        assert "what [bold]is[/bold] [[x]] :smile:" in shown
        assert "[/]" in shown
        assert "Amsterdam [red], episode 12, step 2" in shown

    def test_control_characters_are_escaped(self) -> None:
        shown = render(make_row())
        assert "\\x1b[31mred\\n" in shown
        assert "\x1b" not in shown

    def test_texts_are_shortened(self) -> None:
        assert "\u2502 k k k k\u2026" in render(make_row(), max_characters=8).replace("  ", " ")
        assert trajectory_table(make_row(), max_characters=1).row_count == 2

    def test_the_outcome_is_below_the_steps(self) -> None:
        shown = render(make_row())
        assert "threshold none yet: below threshold" in shown
        assert "threshold +0.5000: kept" in render(make_row(threshold=0.5, verdict="kept"))

    def test_a_length_below_one_is_refused(self) -> None:
        with pytest.raises(ValueError, match="max_characters must be at least 1, got 0"):
            trajectory_table(make_row(), max_characters=0)


class TestMetricsTable:
    METRICS: ClassVar = {"eval_query_over_empty": 0.12345, "eval_episodes": 64.0, "eval_reward": -0.5, "epoch": 0.0}

    def render(self) -> list[str]:
        console = Console(file=io.StringIO(), width=80)
        console.print(metrics_table(self.METRICS, "Evaluation on a[1].jsonl, split test"))
        assert isinstance(console.file, io.StringIO)
        return console.file.getvalue().splitlines()

    def test_the_reward_comes_first_and_each_value_has_four_digits(self) -> None:
        words = [line.split("│")[1:3] for line in self.render() if line.startswith("│")]
        assert [(name.strip(), value.strip()) for name, value in words] == [
            ("reward", "-0.5000"),
            ("query_over_empty", "0.1235"),
        ]

    def test_the_title_says_what_and_how_many_and_nothing_says_an_epoch(self) -> None:
        shown = " ".join(" ".join(self.render()).split())
        assert "Evaluation on a[1].jsonl, split test, 64 trajectories" in shown
        assert "epoch" not in shown


class Run:
    """Drives a callback as the Trainer does, with a string for a terminal, or for the file of a log."""

    def __init__(
        self, tmp_path: Path, *, disable_tqdm: bool = False, is_main: bool = True, is_terminal: bool = True
    ) -> None:
        self.args = TrainingArguments(output_dir=str(tmp_path), disable_tqdm=disable_tqdm, report_to=[], use_cpu=True)
        self.state = TrainerState(is_local_process_zero=is_main)
        self.control = TrainerControl()
        self.output = io.StringIO()
        self.console = Console(file=self.output, width=120, force_terminal=is_terminal, color_system=None)

    def begin(self, callback: EpisodeProgressCallback, global_step: int = 0) -> None:
        self.state.global_step = global_step
        callback.on_train_begin(self.args, self.state, self.control)

    def step(self, callback: EpisodeProgressCallback, logs: dict[str, float] | None) -> None:
        self.state.global_step += 1
        callback.on_step_end(self.args, self.state, self.control)
        if logs is not None:
            callback.on_log(self.args, self.state, self.control, logs=logs)

    def end(self, callback: EpisodeProgressCallback) -> None:
        callback.on_train_end(self.args, self.state, self.control)

    def done(self) -> int:
        return self.state.global_step * 8

    @property
    def last_bar(self) -> str:
        return self.output.getvalue().rstrip().rsplit("\r", 1)[-1]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


class TestEpisodeProgress:
    def test_counts_episodes_and_shows_metrics(self, run: Run) -> None:
        callback = EpisodeProgressCallback(20, run.done, console=run.console)
        run.begin(callback)
        run.step(callback, {"episodes": 8, "reward": 0.0123, "kept_fraction": 0.25, "query_gain": -0.5, "kl": 1.0})
        assert " 8/20 " in run.last_bar
        assert "reward +0.0123, kept 25%, query gain -0.5000" in run.last_bar
        run.end(callback)

    def test_a_step_that_logs_nothing_moves_the_bar(self, run: Run) -> None:
        callback = EpisodeProgressCallback(20, run.done, console=run.console)
        run.begin(callback)
        run.step(callback, None)
        run.step(callback, None)
        run.end(callback)
        assert " 16/20 " in run.last_bar

    def test_the_last_step_ends_at_the_total(self, run: Run) -> None:
        callback = EpisodeProgressCallback(20, run.done, console=run.console)
        run.begin(callback)
        for _ in range(3):
            run.step(callback, None)
        run.end(callback)
        assert " 20/20 " in run.last_bar

    def test_what_comes_before_the_first_episode_is_counted(self, run: Run) -> None:
        callback = EpisodeProgressCallback(28, run.done, console=run.console, num_before=8)
        run.begin(callback)
        run.step(callback, {"episodes": 5})
        run.end(callback)
        assert " 13/28 " in run.last_bar

    def test_the_logged_count_is_believed_over_the_estimate(self, run: Run) -> None:
        callback = EpisodeProgressCallback(20, run.done, console=run.console)
        run.begin(callback)
        run.step(callback, {"episodes": 5})
        run.end(callback)
        assert " 5/20 " in run.last_bar

    def test_a_resumed_run_starts_where_it_stopped(self, run: Run) -> None:
        callback = EpisodeProgressCallback(100, run.done, console=run.console)
        run.begin(callback, global_step=5)
        assert " 40/100 " in run.last_bar
        run.end(callback)

    def test_logs_without_episodes_are_left_alone(self, run: Run) -> None:
        callback = EpisodeProgressCallback(20, run.done, console=run.console)
        run.begin(callback)
        run.step(callback, {"eval_reward": 3.0, "reward": 5.0})
        callback.on_log(run.args, run.state, run.control)
        run.end(callback)
        assert "reward" not in run.output.getvalue()

    def test_other_processes_are_silent(self, tmp_path: Path) -> None:
        run = Run(tmp_path, is_main=False)
        callback = EpisodeProgressCallback(
            20, run.done, console=run.console, table_episodes=1, latest_trajectory=make_row
        )
        run.begin(callback)
        run.step(callback, {"episodes": 8, "reward": 0.1})
        run.end(callback)
        assert run.output.getvalue() == ""

    def test_a_disabled_bar_leaves_the_tables(self, tmp_path: Path) -> None:
        run = Run(tmp_path, disable_tqdm=True)
        callback = EpisodeProgressCallback(
            20, run.done, console=run.console, table_episodes=8, latest_trajectory=make_row
        )
        run.begin(callback)
        run.step(callback, {"episodes": 8, "reward": 0.1})
        run.end(callback)
        assert "8/20" not in run.output.getvalue()
        assert "chosen key" in run.output.getvalue()

    def test_tables_come_at_every_multiple_reached_or_passed(self, run: Run) -> None:
        callback = EpisodeProgressCallback(
            100, run.done, console=run.console, table_episodes=20, latest_trajectory=make_row
        )
        run.begin(callback)
        printed = []
        for episodes in range(8, 49, 8):
            before = run.output.getvalue().count("chosen key")
            run.step(callback, {"episodes": episodes})
            if run.output.getvalue().count("chosen key") > before:
                printed.append(episodes)
        run.end(callback)
        assert printed == [24, 40]

    def test_a_resumed_run_does_not_repeat_tables(self, run: Run) -> None:
        callback = EpisodeProgressCallback(
            100, run.done, console=run.console, table_episodes=20, latest_trajectory=make_row
        )
        run.begin(callback, global_step=3)
        run.step(callback, {"episodes": 32})
        run.end(callback)
        assert "chosen key" not in run.output.getvalue()

    def test_a_table_waits_for_a_trajectory(self, run: Run) -> None:
        latest: list[LedgerRow | None] = [None]
        callback = EpisodeProgressCallback(
            100, run.done, console=run.console, table_episodes=8, latest_trajectory=lambda: latest[-1]
        )
        run.begin(callback)
        run.step(callback, {"episodes": 8})
        assert "chosen key" not in run.output.getvalue()
        latest.append(make_row())
        run.step(callback, {"episodes": 9})
        run.end(callback)
        assert "chosen key" in run.output.getvalue()

    def test_a_log_has_a_line_at_every_fiftieth_of_the_run_and_at_its_end(self, tmp_path: Path) -> None:
        run = Run(tmp_path, is_terminal=False)
        callback = EpisodeProgressCallback(
            1000, run.done, console=run.console, table_episodes=500, latest_trajectory=make_row
        )
        run.begin(callback)
        for episodes in range(8, 1001, 8):
            run.step(callback, {"episodes": episodes, "reward": 0.5})
        run.end(callback)
        lines = [line for line in run.output.getvalue().splitlines() if line.startswith("episode ")]
        assert lines[0] == "episode 24/1000: reward +0.5000"
        assert lines[-1] == "episode 1000/1000: reward +0.5000"
        assert len(lines) == 50
        assert run.output.getvalue().count("chosen key") == 2
        assert "\r" not in run.output.getvalue()

    def test_a_short_run_has_a_line_for_each_step(self, tmp_path: Path) -> None:
        run = Run(tmp_path, is_terminal=False)
        callback = EpisodeProgressCallback(24, run.done, console=run.console)
        run.begin(callback, global_step=1)
        run.step(callback, {"episodes": 16})
        run.step(callback, None)
        run.step(callback, {"episodes": 24})
        run.end(callback)
        assert run.output.getvalue() == "episode 16/24\nepisode 24/24\n"

    def test_a_log_has_lines_of_what_comes_before_the_first_episode(self, tmp_path: Path) -> None:
        run = Run(tmp_path, is_terminal=False)
        callback = EpisodeProgressCallback(24, run.done, console=run.console, num_before=16)
        run.begin(callback)
        run.step(callback, {"warm_start_loss": 1.0})
        run.step(callback, None)
        run.step(callback, {"episodes": 8, "reward": 0.5})
        run.end(callback)
        lines = ["episode 8/24: warm start", "episode 16/24: warm start", "episode 24/24: reward +0.5000"]
        assert run.output.getvalue().splitlines() == lines

    def test_a_disabled_bar_leaves_no_lines_either(self, tmp_path: Path) -> None:
        run = Run(tmp_path, disable_tqdm=True, is_terminal=False)
        callback = EpisodeProgressCallback(8, run.done, console=run.console)
        run.begin(callback)
        run.step(callback, {"episodes": 8})
        run.end(callback)
        assert run.output.getvalue() == ""

    def test_only_the_trainers_bar_is_left_out(self) -> None:
        class OwnBar(ProgressCallback):
            """A user's."""

        kept = [OwnBar(), PrinterCallback(), TrainerCallback()]
        assert without_trainers_bar([ProgressCallback(), *kept]) == kept

    def test_a_table_is_written_above_the_bar(self, run: Run) -> None:
        callback = EpisodeProgressCallback(20, run.done, console=run.console)
        run.begin(callback)
        run.step(callback, {"episodes": 8})
        before = len(run.output.getvalue())
        callback.show_trajectory(make_row())
        cleared, _, rest = run.output.getvalue()[before:].partition("Amsterdam")
        run.end(callback)
        assert cleared.startswith("\r  ")
        assert "8/20" not in cleared
        assert " 8/20 " in rest.rsplit("\r", 1)[-1]

    def test_a_second_training_opens_a_new_bar(self, run: Run) -> None:
        callback = EpisodeProgressCallback(20, run.done, console=run.console)
        run.begin(callback)
        run.step(callback, {"episodes": 8})
        run.begin(callback)
        assert " 0/20 " in run.last_bar
        run.end(callback)
        run.end(callback)

    @pytest.mark.parametrize("name", ["num_episodes", "table_episodes"])
    def test_a_count_below_one_is_refused(self, name: str) -> None:
        counts = {"num_episodes": 1, "table_episodes": 1} | {name: 0}
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            EpisodeProgressCallback(**counts, episodes_done=int, latest_trajectory=make_row)

    def test_tables_need_a_source(self) -> None:
        with pytest.raises(ValueError, match="table_episodes and latest_trajectory go together"):
            EpisodeProgressCallback(20, int, table_episodes=5)
        with pytest.raises(ValueError, match="table_episodes and latest_trajectory go together"):
            EpisodeProgressCallback(20, int, latest_trajectory=make_row)
