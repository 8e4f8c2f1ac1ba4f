"""The learning curves: the same numbers give the same file, any length is drawn, and what each is drawn from."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_up_run import PNG_SIGNATURE, make_run
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats

from attention_rl_trainer.records.plots import (
    finite_points,
    plot_gains,
    plot_kl,
    plot_rewards,
    trailing_interval,
    trailing_mean,
)

Plot = Callable[[Sequence[Mapping[str, float]], Path], Path]
AxesOf = Callable[[Callable[..., Path], Sequence[Any], Path], list[Axes]]


@pytest.fixture
def axes_of(monkeypatch: pytest.MonkeyPatch) -> AxesOf:
    """Draw, and return what was drawn on."""

    def draw(plot: Callable[..., Path], numbers: Sequence[Any], path: Path) -> list[Axes]:
        figures: list[Figure] = []
        monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
        plot(numbers, path)
        (figure,) = figures
        return figure.axes

    return draw


class TestPlots:
    def test_same_metrics_give_the_same_file(self, tmp_path: Path) -> None:
        _, log_history = make_run(model_rise=0.1)
        first = plot_rewards(log_history, tmp_path / "a.png").read_bytes()
        assert first.startswith(PNG_SIGNATURE)
        assert plot_rewards(log_history, tmp_path / "b.png").read_bytes() == first
        log_history[3]["reward"] += 0.1
        assert plot_rewards(log_history, tmp_path / "c.png").read_bytes() != first

    @pytest.mark.parametrize("plot", [plot_rewards, plot_kl])
    @pytest.mark.parametrize("num_steps", [0, 1, 12])
    @pytest.mark.parametrize("verdict", ["kept", "warmup"])
    def test_any_length_is_drawn(self, tmp_path: Path, plot: Plot, num_steps: int, verdict: str) -> None:
        path = tmp_path / "plot.png"
        assert plot(make_run(num_steps=num_steps, verdict=verdict)[1], path) == path
        assert path.read_bytes().startswith(PNG_SIGNATURE)

    @pytest.mark.parametrize(("num_steps", "batch"), [(0, 4), (1, 1), (1, 4), (30, 1), (12, 4)])
    def test_gains_of_any_length_are_drawn(self, tmp_path: Path, num_steps: int, batch: int) -> None:
        path = tmp_path / "plot.png"
        assert plot_gains(make_run(num_steps=num_steps, batch=batch)[0], path) == path
        assert path.read_bytes().startswith(PNG_SIGNATURE)

    def test_axes_fit_the_data(self, tmp_path: Path, axes_of: AxesOf) -> None:
        rows, log_history = make_run(num_steps=12, query_rise=0.1)
        log_history = [entry | {"kl": 1e-4} for entry in log_history if entry["step"] > 8]
        (axes,) = axes_of(plot_kl, log_history, tmp_path / "kl.png")
        # From the ninth step on, 36 episodes to 48.
        assert 34 < axes.get_xlim()[0] <= 36
        assert axes.get_ylim() == pytest.approx((0.0, 1.08e-4))
        (axes, _) = axes_of(plot_gains, [row for row in rows if row.step > 8], tmp_path / "gains.png")
        assert 34 < axes.get_xlim()[0] <= 36

    def test_gains_that_may_be_nothing_are_hollow(self, tmp_path: Path, axes_of: AxesOf) -> None:
        queries, models = axes_of(plot_gains, make_run(query_rise=0.5)[0], tmp_path / "gains.png")
        hollow, solid = ({line.get_label(): line for line in axes.get_lines()} for axes in (models, queries))
        assert len(hollow["the interval holds 0"].get_xdata()) > 20
        assert len(solid["the interval holds 0"].get_xdata()) < 5
        assert len(solid["mean of 3 steps"].get_xdata()) > 25
        assert hollow["the interval holds 0"].get_markerfacecolor() == "white"

    def test_a_quantity_that_is_0_has_an_axis(self, tmp_path: Path, axes_of: AxesOf) -> None:
        (axes,) = axes_of(plot_kl, [{"episodes": 4.0, "reward": 0.0, "kl": 0.0}], tmp_path / "kl.png")
        assert axes.get_ylim() == (0.0, 1.0)

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
        episodes, values = finite_points(steps, "kl")
        assert episodes.tolist() == [4.0, 16.0]
        assert values.tolist() == [0.1, 0.2]

    def test_trailing_mean_against_a_loop(self) -> None:
        values = np.random.default_rng(0).normal(size=23)
        expected = [np.mean(values[max(0, i - 4) : i + 1]) for i in range(23)]
        assert np.allclose(trailing_mean(values, 5), expected)

    def test_trailing_interval_against_a_loop(self) -> None:
        generator = np.random.default_rng(0)
        # A level far from 0, where sums of squares would cancel.
        batches = [1e6 + generator.normal(size=size) for size in (1, 4, 2, 5, 3, 4)]
        mean, half_width = trailing_interval(batches, 3)
        for step in range(6):
            together = np.concatenate(batches[max(0, step - 2) : step + 1])
            assert mean[step] == pytest.approx(together.mean(), abs=1e-8)
            if len(together) > 1:
                expected = stats.t.interval(0.95, len(together) - 1, together.mean(), stats.sem(together))
                assert (mean[step] - half_width[step], mean[step] + half_width[step]) == pytest.approx(expected)
            else:
                assert math.isnan(half_width[step])

    def test_missing_matplotlib_names_the_extra(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        with pytest.raises(ImportError, match=r'pip install "attention-rl-trainer\[report\]"'):
            plot_kl([], tmp_path / "kl.png")
