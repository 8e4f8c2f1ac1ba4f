"""The summary's wording and the files of a report, on runs made up here."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_up_run import PNG_SIGNATURE, make_record, make_row, make_run, write_ledger

from attention_rl_trainer.records.ledger import LedgerRow
from attention_rl_trainer.records.summary import (
    RunCounts,
    escape_control_characters,
    read_settings,
    summarize_run,
    write_report,
)


class TestSummary:
    def test_only_the_model_gain_rose(self) -> None:
        text = summarize_run(*make_run(model_rise=0.1), {})
        assert "the reward rose (+0.0" in text
        assert "**Only the model gain rose**" in text
        assert "the query gain did not change distinguishably" in text
        assert "not distinguishable from those the base model samples for itself" in text

    def test_only_the_query_gain_rose(self) -> None:
        text = summarize_run(*make_run(query_rise=0.1), {})
        assert "**Only the query gain rose**" in text
        assert "queries are better than those the base model samples" in text

    def test_both_rose(self) -> None:
        assert "Both parts rose" in summarize_run(*make_run(query_rise=0.1, model_rise=0.1), {})

    def test_other_terms_are_not_passed_over(self) -> None:
        """As with an information reward, or a reward function of one's own."""
        rows, log_history = make_run(query_rise=0.1)
        assert "There are other terms" not in summarize_run(rows, log_history, {})
        assert f"reward {max(row.reward for row in rows):+.4f} = query gain" in summarize_run(rows, log_history, {})
        told = [dataclasses.replace(row, reward=row.reward + 0.3, information_gains=(0.3,) * 3) for row in rows]
        text = summarize_run(told, log_history, {})
        assert (
            "There are other terms in it than query and model gain. Of these two: **Only the query gain rose**" in text
        )
        assert "= query gain" not in text
        assert ", with other terms than its query gain " in text
        assert ", information gain +0.3000" in text

    def test_a_fall_is_said(self) -> None:
        text = summarize_run(*make_run(query_rise=-0.1), {})
        assert "the reward **fell** (-0.0" in text
        assert "Neither part rose: the query gain fell" in text
        assert "queries are worse than those the base model samples" in text

    def test_nothing_changed(self) -> None:
        text = summarize_run(*make_run(), {})
        assert "the reward did not change distinguishably" in text
        assert "Neither part rose" in text
        assert "| no |" in text

    def test_a_run_without_an_update_says_so_first(self) -> None:
        text = summarize_run(*make_run(model_rise=0.1, verdict="below_threshold"), {})
        assert text.splitlines()[2].startswith("**No optimizer update was made**")
        assert "| optimizer updates | 0 |" in text
        assert "| steps skipped because nothing was kept | 30 of 30 |" in text
        assert "| kept after warm-up | 0 of 120 (0.0%) |" in text

    def test_without_an_update_after_a_warm_start_the_weights_are_those_that_it_left(self) -> None:
        given = *make_run(verdict="warmup"), {}
        text = summarize_run(*given, counts=RunCounts(120, 0, 64))
        assert text.splitlines()[2].startswith(
            "**No optimizer update was made**: the weights are the ones that the warm start left"
        )
        assert "No optimizer update" not in summarize_run(*given, counts=RunCounts(120, 1, 64))

    def test_a_run_that_ends_in_warm_up_judged_nothing(self) -> None:
        text = summarize_run(*make_run(num_steps=4, verdict="warmup"), {})
        assert "| episodes | 16, of which 16 in warm-up |" in text
        assert "| kept after warm-up | nothing was judged |" in text

    def test_a_short_run_is_not_compared(self) -> None:
        text = summarize_run(*make_run(num_steps=1), {})
        assert (
            "**Too short to tell**: 4 episodes; a comparison of the first with the last third needs at least 12" in text
        )
        assert "First third against" not in text

    def test_an_empty_ledger_says_so(self) -> None:
        text = summarize_run([], [], {"seed": 3})
        assert "The ledger holds no trajectories" in text
        assert "| seed | 3 |" in text

    def test_figures_of_the_run(self) -> None:
        rows, log_history = make_run(model_rise=0.1)
        rows = [dataclasses.replace(row, verdict="warmup") if row.step <= 2 else row for row in rows]
        text = summarize_run(rows, log_history, {})
        assert "Episodes 0 to 39 against 80 to 119" in text
        assert "| episodes | 120, of which 8 in warm-up |" in text
        assert "| optimizer updates | 30 |" in text
        assert "| steps skipped because nothing was kept | 2 of 30 |" in text
        assert "| kept after warm-up | 112 of 112 (100.0%) |" in text
        assert "| time | rollout 75% (90.0 s), update 25% (30.0 s), over the logged steps |" in text
        assert "| tokens per second, mean of the logged steps | 100.0 |" in text
        assert "| peak memory | 31.00 GiB |" in text

    def test_what_was_not_logged_is_said(self) -> None:
        text = summarize_run([make_row()], [], {})
        for name in ("optimizer updates", "time", "tokens per second, mean of the logged steps", "peak memory"):
            assert f"| {name} | not logged |" in text

    def test_selector_entropy_beside_its_maximum(self) -> None:
        entropy = -sum(p * math.log(p) for p in (0.2, 0.5, 0.3, 0.6, 0.4))
        largest = math.log(3) + math.log(2)
        expected = f"{entropy:.3f} of at most {largest:.3f} nats per trajectory ({entropy / largest:.1%}) in the first"
        assert expected in summarize_run([make_row()], [], {})

    def test_a_selector_without_a_choice(self) -> None:
        single = {name: [value[0]] for name, value in make_record().items() if isinstance(value, list)}
        single |= {"pair_numbers": [9], "selection_probabilities": [[1.0]]}
        assert "nothing to choose" in summarize_run([LedgerRow.from_json(make_record(**single))], [], {})

    def test_order_gain_is_compared_where_every_trajectory_has_it(self) -> None:
        rows, log_history = make_run()
        assert "| order gain |" not in summarize_run(rows, log_history, {})
        with_order = [dataclasses.replace(row, order_gains=(0.1, 0.2, 0.3)) for row in rows]
        assert "| order gain | +0.2000 ± 0.0000" in summarize_run(with_order, log_history, {})
        assert "| order gain |" not in summarize_run([rows[0], *with_order[1:]], log_history, {})

    def test_the_order_of_the_rows_does_not_matter(self) -> None:
        rows, log_history = make_run(model_rise=0.1)
        assert summarize_run(rows[::-1], log_history, {}) == summarize_run(rows, log_history, {})

    def test_best_trajectory_is_shown_literally(self) -> None:
        hostile = ["```\n# Heading", "<script>", "\x1b[31m\u202e"]
        rows = [make_row(0), make_row(7, model_gain=1.0, queries=hostile)]
        text = summarize_run(rows, [], {})
        lines = text.splitlines()
        start = lines.index("````text")
        stop = lines.index("````", start)
        shown = "\n".join(lines[start:stop])
        assert "Amsterdam (episode 7, kept): reward +1.0100" in shown
        assert "query: ```\\n# Heading" in shown
        assert "query: <script>" in shown
        assert "query: \\x1b[31m\\u202e" in shown
        assert "# Heading" not in lines

    def test_settings_are_not_read_as_markup(self) -> None:
        text = summarize_run([], [], {"a|b": "<b>x</b>\n# y", "commit": None})
        assert "| a\\|b | \\<b\\>x\\</b\\>\\\\n\\# y |" in text
        assert "| commit | None |" in text


def test_escaped_text_keeps_what_can_be_printed() -> None:
    assert escape_control_characters("caf\u00e9 \u6771 a\u00a0b") == "caf\u00e9 \u6771 a b"
    assert escape_control_characters("\t\x00\ud800\u2028") == "\\t\\x00\\ud800\\u2028"


class TestWriteReport:
    @pytest.mark.parametrize("num_steps", [0, 1, 4])
    def test_writes_every_file(self, tmp_path: Path, num_steps: int) -> None:
        rows, log_history = make_run(num_steps=num_steps)
        write_ledger(tmp_path / "trajectories.jsonl", rows)
        written = write_report(tmp_path, log_history, {"seed": 5})
        names = ["summary.md", "rewards.png", "gains.png", "kl.png", "selection.png"]
        assert written == [tmp_path / "report" / name for name in names]
        text = written[0].read_text(encoding="utf-8")
        assert "| seed | 5 |" in text
        for path in written[1:]:
            assert path.read_bytes().startswith(PNG_SIGNATURE)
            assert f"]({path.name})" in text

    def test_a_second_report_replaces_the_first(self, tmp_path: Path) -> None:
        rows, log_history = make_run(num_steps=2)
        write_ledger(tmp_path / "trajectories.jsonl", rows)
        before = [path.read_bytes() for path in write_report(tmp_path, log_history)]
        assert [path.read_bytes() for path in write_report(tmp_path, log_history)] == before

    def test_a_later_report_keeps_the_settings(self, tmp_path: Path) -> None:
        rows, log_history = make_run(num_steps=2)
        write_ledger(tmp_path / "trajectories.jsonl", rows)
        settings = {"---": "---", "model": "a | b \\ <c>", "seed": 5, "articles": "one\ntwo", "nothing": None}
        before = write_report(tmp_path, log_history, settings, with_plots=False)[0].read_text(encoding="utf-8")
        assert write_report(tmp_path, log_history, with_plots=False)[0].read_text(encoding="utf-8") == before
        found = read_settings(tmp_path / "report" / "summary.md")
        assert found == {"---": "---", "model": "a | b \\ <c>", "seed": "5", "articles": "one\\ntwo", "nothing": "None"}

    def test_without_settings_there_are_none(self, tmp_path: Path) -> None:
        assert read_settings(tmp_path / "summary.md") == {}
        (tmp_path / "summary.md").write_text(summarize_run(*make_run(), {}), encoding="utf-8")
        assert read_settings(tmp_path / "summary.md") == {}

    @given(st.dictionaries(st.text(min_size=1), st.text(), max_size=5))
    def test_any_settings_come_back_as_they_are_shown(self, settings: dict[str, str]) -> None:
        shown = {escape_control_characters(name): escape_control_characters(text) for name, text in settings.items()}
        with TemporaryDirectory() as folder:
            path = Path(folder) / "summary.md"
            path.write_text(summarize_run([make_row(title="## Settings")], [], settings), encoding="utf-8")
            assert read_settings(path) == shown

    def test_a_run_without_a_ledger_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="no ledger here"):
            write_report(tmp_path, [])
        assert not (tmp_path / "report").exists()


@pytest.mark.parametrize("module", ["ledger", "summary", "thirds", "plots"])
def test_a_finished_runs_files_are_read_without_the_training_stack(module: str) -> None:
    slow = ("torch", "transformers", "matplotlib", "scipy")
    code = f"import sys, attention_rl_trainer.records.{module}; print([name for name in {slow} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"
