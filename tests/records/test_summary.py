"""The ledger reader, the comparison of thirds, the summary's wording and the plots, on ledgers made up here."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

from attention_rl_trainer.records import plots
from attention_rl_trainer.records.ledger import LedgerError, LedgerRow, read_ledger
from attention_rl_trainer.records.plots import plot_gains, plot_kl, plot_rewards, plot_selection
from attention_rl_trainer.records.summary import (
    Change,
    Mean,
    compare_thirds,
    escape_control_characters,
    summarize_run,
    write_report,
)

Plot = Callable[[Sequence[Mapping[str, float]], Path], Path]
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def make_record(episode: int = 0, **changes: object) -> dict[str, object]:
    """Return a ledger object with three pairs, all read, in the order 9, 4, 7."""
    record: dict[str, object] = {
        "episode": episode,
        "step": 1,
        "epoch": 0,
        "article_index": 3,
        "title": "Amsterdam",
        "source": "offline",
        "pair_numbers": [4, 9, 7],
        "order": [9, 4, 7],
        "reward": 0.03,
        "step_rewards": [0.01, 0.03, 0.05],
        "query_gains": [0.0, 0.01, 0.02],
        "model_gains": [0.01, 0.02, 0.03],
        "order_gains": None,
        "history_mean": 0.0,
        "history_std": 0.02,
        "threshold": 0.02,
        "verdict": "kept",
        "selection_probabilities": [[0.2, 0.5, 0.3], [0.6, 0.0, 0.4], [0.0, 0.0, 1.0]],
        "queries": [" What is it", " Where is it", " Who"],
        "keys": [" The city", " It lies", " Its people"],
        "values": [" of canals", " on the Amstel", " are many"],
    }
    return record | changes


def make_row(episode: int = 0, *, query_gain: float = 0.01, model_gain: float = 0.02, **changes: object) -> LedgerRow:
    rewards = {
        "reward": query_gain + model_gain,
        "step_rewards": [query_gain + model_gain] * 3,
        "query_gains": [query_gain] * 3,
        "model_gains": [model_gain] * 3,
    }
    return LedgerRow.from_json(make_record(episode, **(rewards | changes)))


def make_run(
    *, query_rise: float = 0.0, model_rise: float = 0.0, num_steps: int = 30, batch: int = 4, verdict: str = "kept"
) -> tuple[list[LedgerRow], list[dict[str, float]]]:
    """Roll out a made-up run whose gains rise linearly by the given amounts, with noise of SD 0.01."""
    generator = np.random.default_rng(0)
    rows, log_history = [], []
    for step in range(1, num_steps + 1):
        share = step / num_steps
        for _ in range(batch):
            query = float(generator.normal(query_rise * share, 0.01))
            model = float(generator.normal(model_rise * share, 0.01))
            rows.append(make_row(len(rows), query_gain=query, model_gain=model, step=step, verdict=verdict))
        rewards = [row.reward for row in rows[-batch:]]
        log_history.append(
            {
                "step": step,
                "episodes": len(rows),
                "updates": step if verdict == "kept" else 0,
                "reward": float(np.mean(rewards)),
                "reward_std": float(np.std(rewards)),
                "query_gain": query_rise * share,
                "model_gain": model_rise * share,
                "kept_fraction": float(verdict == "kept"),
                "rollout_seconds": 3.0,
                "update_seconds": 1.0,
                "tokens_per_second": 100.0,
                "peak_memory_gib": 1.0 + step,
            }
            | ({"history_mean": 0.0, "threshold": 0.01, "kl": 0.001 * step} if verdict == "kept" else {})
        )
    return rows, log_history


def write_ledger(path: Path, rows: list[LedgerRow]) -> Path:
    path.write_text("".join(json.dumps(row.to_json()) + "\n" for row in rows), encoding="utf-8")
    return path


class TestLedger:
    def test_rows_survive_a_round_trip(self, tmp_path: Path) -> None:
        rows = [make_row(0), make_row(1, order_gains=[0.1, 0.0, -0.1], threshold=None, title="\ud800 \u6771\u4eac")]
        assert read_ledger(write_ledger(tmp_path / "trajectories.jsonl", rows)) == rows

    def test_chosen_probabilities_follow_the_order_and_the_columns(self) -> None:
        assert make_row().chosen_probabilities == (0.5, 0.6, 1.0)

    def test_means_of_the_gains(self) -> None:
        row = LedgerRow.from_json(make_record())
        assert row.query_gain == pytest.approx(0.01)
        assert row.model_gain == pytest.approx(0.02)

    def test_an_empty_file_has_no_rows(self, tmp_path: Path) -> None:
        assert read_ledger(write_ledger(tmp_path / "trajectories.jsonl", [])) == []

    def test_a_missing_file_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"no ledger here; expected the trajectories\.jsonl"):
            read_ledger(tmp_path / "trajectories.jsonl")

    @pytest.mark.parametrize(
        "line",
        [b'{"episode": 1, "ti', b"", b"\xff\xfe", b"[" * 100_000, b'{"episode": NaN}', b"[1]"],
        ids=["cut", "blank", "not-utf8", "too-deep", "missing-keys", "list"],
    )
    def test_a_broken_line_is_named_with_its_number(self, tmp_path: Path, line: bytes) -> None:
        path = write_ledger(tmp_path / "trajectories.jsonl", [make_row(0), make_row(1)])
        path.write_bytes(path.read_bytes() + line + b"\n")
        with pytest.raises(LedgerError, match=r"trajectories\.jsonl, line 3: .*remove the line"):
            read_ledger(path)

    def test_an_integer_too_large_for_a_float_is_named(self, tmp_path: Path) -> None:
        path = tmp_path / "trajectories.jsonl"
        path.write_text(json.dumps(make_record(reward=10**400)), encoding="utf-8")
        with pytest.raises(LedgerError, match="line 1"):
            read_ledger(path)

    def test_keys_that_are_not_fields_are_ignored(self) -> None:
        assert LedgerRow.from_json(make_record(added_later=1)) == LedgerRow.from_json(make_record())

    def test_missing_keys_are_named(self) -> None:
        record = make_record()
        del record["queries"], record["verdict"]
        with pytest.raises(LedgerError, match="missing keys: queries, verdict"):
            LedgerRow.from_json(record)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"reward": math.nan}, "'reward' must be a finite number, got nan"),
            ({"reward": True}, "'reward' must be a finite number, got True"),
            ({"threshold": "0.1"}, "'threshold' must be a finite number"),
            ({"episode": 1.0}, "'episode' must be an integer, got 1.0"),
            ({"episode": False}, "'episode' must be an integer, got False"),
            ({"title": None}, "'title' must be a string, got None"),
            ({"queries": "abc"}, "'queries' must be a list, got 'abc'"),
            ({"queries": ["a", "b", 3]}, "'queries' must be a string, got 3"),
            ({"verdict": "dropped"}, "'verdict' must be kept, below_threshold or warmup, got 'dropped'"),
            ({"keys": ["a"]}, r"'keys' must have 3 entries \(one for each step of 'order'\), got 1"),
            ({"order_gains": [0.1]}, "'order_gains' must have 3 entries"),
            ({"order": [9, 9, 7]}, "'order' must be one or more distinct pairs"),
            ({"order": [9, 4, 5]}, "'order' must be one or more distinct pairs"),
            ({"pair_numbers": [4, 9, 9]}, "'pair_numbers' must be distinct"),
            (
                {"selection_probabilities": [[0.5, 0.5], [1.0, 0.0], [0.0, 1.0]]},
                r"'selection_probabilities' must have 3 entries \(one for each pair\), got 2",
            ),
            (
                {"selection_probabilities": [[0.2, 0.5, 0.3], [1.6, 0.0, 0.4], [0.0, 0.0, 1.0]]},
                r"'selection_probabilities' must lie in \[0, 1\]",
            ),
        ],
    )
    def test_a_wrong_value_is_named(self, changes: dict[str, object], message: str) -> None:
        with pytest.raises(LedgerError, match=message):
            LedgerRow.from_json(make_record(**changes))

    def test_a_probability_may_exceed_one_by_rounding(self) -> None:
        rounded = [[0.2, 0.5, 0.3], [0.6, 0.0, 0.4], [0.0, 0.0, 1.0000001]]
        assert make_row(selection_probabilities=rounded).chosen_probabilities[-1] == 1.0000001

    def test_a_trajectory_without_steps_is_refused(self) -> None:
        nothing: list[object] = []
        empty = dict.fromkeys(
            ("order", "step_rewards", "query_gains", "model_gains", "queries", "keys", "values"), nothing
        )
        with pytest.raises(LedgerError, match="'order' must be one or more"):
            LedgerRow.from_json(make_record(selection_probabilities=[], **empty))


class TestThirds:
    def test_by_hand(self) -> None:
        change = compare_thirds([1.0, 2.0, 3.0, 4.0, 99.0, 99.0, 99.0, 99.0, 99.0, 6.0, 7.0, 8.0, 9.0])
        assert change is not None
        assert change.first.value == 2.5
        assert change.last.value == 7.5
        assert change.difference == 5.0
        # Both thirds have a sample variance of 5/3, so each mean has sqrt(5/3/4), and t has 6 degrees of freedom.
        assert change.standard_error == pytest.approx(math.sqrt(2 * 5 / 12))
        assert change.half_width == pytest.approx(2.4469 * change.standard_error, rel=1e-3)
        assert change.direction == 1

    @pytest.mark.parametrize(("degrees", "quantile"), [(3, 3.1824), (6, 2.4469), (30, 2.0423), (1e6, 1.95996)])
    def test_interval_is_students(self, degrees: float, quantile: float) -> None:
        # With all the uncertainty in one mean, Welch's degrees of freedom are those of that mean.
        change = Change(Mean(0.0, 1.0, int(degrees) + 1), Mean(0.0, 0.0, 5))
        assert change.half_width == pytest.approx(quantile, rel=0.01)

    def test_too_few_values_are_not_compared(self) -> None:
        assert compare_thirds([0.0] * 11) is None
        assert compare_thirds([0.0] * 12) is not None

    def test_direction_is_zero_within_the_interval_and_signed_outside(self) -> None:
        noise = [0.01, -0.01, 0.02, -0.02]
        assert [
            Change(Mean.of(noise), Mean.of([value + shift for value in noise])).direction
            for shift in (-1.0, -0.001, 0.0, 0.001, 1.0)
        ] == [-1, 0, 0, 0, 1]

    def test_constant_values_need_no_interval(self) -> None:
        assert Change(Mean.of([1.0, 1.0]), Mean.of([1.0, 1.0])).direction == 0
        assert Change(Mean.of([1.0, 1.0]), Mean.of([2.0, 2.0])).direction == 1

    def test_false_alarms_are_one_in_twenty(self) -> None:
        generator = np.random.default_rng(1)
        alarms = [compare_thirds(generator.normal(size=18).tolist()) for _ in range(2000)]
        rate = np.mean([change is not None and change.direction != 0 for change in alarms])
        assert 0.035 < rate < 0.065


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
        assert "Both of its parts rose" in summarize_run(*make_run(query_rise=0.1, model_rise=0.1), {})

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
        expected = f"{entropy:.3f} of at most {largest:.3f} nats a trajectory ({entropy / largest:.1%}) in the first"
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


class TestPlots:
    def test_same_metrics_give_the_same_file(self, tmp_path: Path) -> None:
        _, log_history = make_run(model_rise=0.1)
        first = plot_rewards(log_history, tmp_path / "a.png").read_bytes()
        assert first.startswith(PNG_SIGNATURE)
        assert plot_rewards(log_history, tmp_path / "b.png").read_bytes() == first
        log_history[3]["reward"] += 0.1
        assert plot_rewards(log_history, tmp_path / "c.png").read_bytes() != first

    @pytest.mark.parametrize("plot", [plot_rewards, plot_gains, plot_kl])
    @pytest.mark.parametrize("num_steps", [0, 1, 12])
    @pytest.mark.parametrize("verdict", ["kept", "warmup"])
    def test_any_length_is_drawn(self, tmp_path: Path, plot: Plot, num_steps: int, verdict: str) -> None:
        path = tmp_path / "plot.png"
        assert plot(make_run(num_steps=num_steps, verdict=verdict)[1], path) == path
        assert path.read_bytes().startswith(PNG_SIGNATURE)

    def test_entries_that_are_not_training_steps_are_left_out(self, tmp_path: Path) -> None:
        _, log_history = make_run(num_steps=1)
        alone = plot_rewards(log_history, tmp_path / "a.png").read_bytes()
        others = [{"step": 1, "eval_reward": 9.0, "episodes": 9}, {"step": 1, "train_loss": 3.0}]
        assert plot_rewards(log_history + others, tmp_path / "b.png").read_bytes() == alone

    def test_absent_and_non_finite_values_are_gaps(self) -> None:
        steps = [
            {"episodes": 4.0, "kl": 0.1},
            {"episodes": 8.0},
            {"episodes": 12.0, "kl": math.nan},
            {"episodes": 16.0, "kl": 0.2},
        ]
        episodes, values = plots._points(steps, "kl")
        assert episodes.tolist() == [4.0, 16.0]
        assert values.tolist() == [0.1, 0.2]

    def test_trailing_mean_against_a_loop(self) -> None:
        values = np.random.default_rng(0).normal(size=23)
        expected = [np.mean(values[max(0, i - 4) : i + 1]) for i in range(23)]
        assert np.allclose(plots._trailing_mean(values, 5), expected)

    def test_first_and_last_batch_are_chosen(self) -> None:
        rows = [make_row(episode, step=1 + episode // 3) for episode in (8, 7, 6, 5, 4, 3, 2, 1, 0)]
        columns = plots._first_and_last_batch(rows, 2)
        assert [(name, [row.episode for row in batch]) for name, batch in columns] == [
            ("First batch (step 1)", [0, 1]),
            ("Last batch (step 3)", [6, 7]),
        ]
        assert [name for name, _ in plots._first_and_last_batch(rows[:3], 2)] == ["Only batch (step 3)"]

    def test_used_pairs_are_masked_by_the_order_not_by_a_zero(self) -> None:
        row = make_row(selection_probabilities=[[0.0, 0.7, 0.3], [0.6, 0.0, 0.4], [0.0, 0.0, 1.0]])
        # Columns are the pairs 4, 9 and 7, read in the order 9, 4, 7.
        expected = [[True, True, True], [True, False, True], [False, False, True]]
        assert plots._open_cells(row).tolist() == expected

    def test_colour_scale_leaves_out_the_forced_last_step(self) -> None:
        assert plots._shared_scale([make_row()]).vmax == 0.6
        single = {name: [value[0]] for name, value in make_record().items() if isinstance(value, list)}
        forced = make_record(**(single | {"pair_numbers": [9], "selection_probabilities": [[1.0]]}))
        assert plots._shared_scale([LedgerRow.from_json(forced)]).vmax == 1.0

    def test_selection_of_unequal_batches_and_subsets(self, tmp_path: Path) -> None:
        many = list(range(1, 16))
        uniform = [[1.0 / 15] * 15] * 15
        wide = make_row(
            3,
            step=2,
            pair_numbers=many,
            order=many[::-1],
            selection_probabilities=uniform,
            **{name: [0.0] * 15 for name in ("step_rewards", "query_gains", "model_gains")},
            **{name: ["x"] * 15 for name in ("queries", "keys", "values")},
        )
        path = plot_selection([make_row(0), make_row(1), wide], tmp_path / "selection.png")
        assert path.read_bytes().startswith(PNG_SIGNATURE)

    @pytest.mark.filterwarnings("error")
    def test_titles_are_drawn_literally_in_any_script(self, tmp_path: Path) -> None:
        rows = [make_row(0, title="A$AP^{ $x"), make_row(1, title="\u6771\u4eac\n\x1b" + "x" * 200)]
        assert plot_selection(rows, tmp_path / "selection.png").exists()
        assert plots._drawable("\u6771 \u017di\u017eek") == "\u25a1 \u017di\u017eek"
        assert plots._drawable("x" * 200) == "x" * 31 + "\u2026"

    def test_the_number_of_trajectories_is_checked(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="trajectories_per_batch must be at least 1, got 0"):
            plot_selection([make_row()], tmp_path / "selection.png", trajectories_per_batch=0)

    def test_missing_matplotlib_names_the_extra(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        with pytest.raises(ImportError, match=r'pip install "attention-rl-trainer\[report\]"'):
            plot_kl([], tmp_path / "kl.png")


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

    def test_a_run_without_a_ledger_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="no ledger here"):
            write_report(tmp_path, [])
        assert not (tmp_path / "report").exists()
