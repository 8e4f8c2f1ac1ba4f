"""Columns of numbers: what they sum up, and that they stay short."""

from __future__ import annotations

import math
import statistics
from typing import Any

import numpy as np
import pytest
from made_up_run import make_row
from run_folder import log_of, make_rows

from attention_rl_trainer.pages.curves import (
    log_columns,
    point_columns,
    rounded,
    selector_entropy,
    step_columns,
    uniform_entropy,
)


class TestSteps:
    def test_a_group_per_step_by_hand(self) -> None:
        rows = [
            make_row(0, step=1, query_gain=0.1, verdict="warmup", threshold=None),
            make_row(1, step=1, query_gain=0.3, verdict="warmup", threshold=None),
            make_row(2, step=2, query_gain=0.5, threshold=0.25),
            make_row(3, step=2, query_gain=0.1, verdict="below_threshold", threshold=0.25),
        ]
        columns: dict[str, Any] = step_columns(rows)
        assert {name: columns[name] for name in ("first", "last", "step", "count", "judged", "kept", "threshold")} == {
            "first": [0, 2],
            "last": [1, 3],
            "step": [1, 2],
            "count": [2, 2],
            "judged": [0, 2],
            "kept": [0, 1],
            "threshold": [None, 0.25],
        }
        gains = columns["series"]["query_gain"]
        assert gains["n"] == [2, 2]
        assert gains["mean"] == pytest.approx([0.2, 0.3])
        assert gains["m2"] == pytest.approx([0.02, 0.08])
        assert columns["series"]["order_gain"] == {"n": [0, 0], "mean": [None, None], "m2": [0.0, 0.0]}

    def test_many_steps_are_joined_without_losing_a_trajectory(self) -> None:
        rows = make_rows(210, batch=2)
        columns: dict[str, Any] = step_columns(rows, max_groups=20)
        assert len(columns["step"]) == 18
        assert sum(columns["count"]) == 210
        reward = columns["series"]["reward"]
        mean = np.average(reward["mean"], weights=reward["n"])
        assert mean == pytest.approx(statistics.fmean(row.reward for row in rows), rel=1e-4)

    def test_nothing_gives_empty_columns(self) -> None:
        columns: dict[str, Any] = step_columns([])
        assert columns["step"] == []
        assert columns["series"]["reward"] == {"n": [], "mean": [], "m2": []}

    def test_entropies_by_hand(self) -> None:
        row = make_row(selection_probabilities=[[0.25, 0.5, 0.25], [0.5, 0.0, 0.5], [0.0, 0.0, 1.0]])
        assert selector_entropy(row) == pytest.approx((1.5 * math.log(2) + math.log(2) + 0) / 3)
        assert uniform_entropy(row) == pytest.approx((math.log(3) + math.log(2) + 0) / 3)


class TestLog:
    def test_gaps_are_none_and_steps_are_the_latest(self) -> None:
        columns = log_columns(log_of(make_rows()))
        assert columns["kl"] == [None, 0.002, 0.003, 0.004, 0.005, 0.006]
        halves = log_columns(log_of(make_rows()), max_groups=3)
        assert halves["step"] == [2, 4, 6]
        assert halves["episodes"] == [16, 32, 48]
        assert halves["kl"] == [0.002, 0.0035, 0.0055]

    def test_entries_without_a_step_are_left_out(self) -> None:
        assert log_columns([{"train_loss": 1.0}]) == {}


class TestPoints:
    @pytest.mark.parametrize(("max_points", "expected"), [(100, 48), (48, 48), (20, 16)])
    def test_are_thinned_evenly(self, max_points: int, expected: int) -> None:
        columns = point_columns(make_rows(), max_points)
        assert [len(column) for column in columns.values()] == [expected] * 3
        assert columns["episode"][1] == 48 // expected

    def test_nothing(self) -> None:
        assert point_columns([]) == {"episode": [], "reward": [], "verdict": []}


def test_rounding_keeps_five_digits() -> None:
    assert rounded(0.000123456789) == 0.00012346
    assert rounded(-123456.7) == -123460.0
