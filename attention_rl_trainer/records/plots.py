"""A run's learning curves into PNG files (design §7 to §9).

Each ``plot_*`` writes one file and returns its path; it raises an `ImportError` where matplotlib is not installed.
``log_history`` holds the metrics as logged, one mapping per step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from attention_rl_trainer.records.figures import GREY, Series, frame, new_figure, save_figure, say

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's palette: distinguishable with every common form of colour blindness.
_BLUE, _GREEN, _VERMILION = "#0072B2", "#009E73", "#D55E00"
_MARKERS_UP_TO = 40
_NOTHING_LOGGED = "no training step was logged"


class GainRow(Protocol):
    """What `plot_gains` reads of a trajectory; `LedgerRow` has it."""

    @property
    def episode(self) -> int:
        """Number of the trajectory in the run."""

    @property
    def step(self) -> int:
        """Trainer step that rolled it out."""

    @property
    def query_gain(self) -> float:
        """Mean over its steps, nats per value token."""

    @property
    def model_gain(self) -> float:
        """Mean over its steps, nats per value token."""


def plot_rewards(log_history: Sequence[Mapping[str, float]], path: Path) -> Path:
    """Plot the reward with its spread, history mean and threshold, and below it the fraction kept.

    Entries without `episodes` (evaluation, the closing summary) are left out, and a metric absent from a step is a gap.
    """
    steps = _training_steps(log_history)
    figure = new_figure(8.0, 5.6)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[2.4, 1.0])
    _draw_reward(upper, steps)
    frame(upper, "Reward of the rolled-out trajectories", "reward (nats per token)")
    _draw_trend(lower, *finite_points(steps, "kept_fraction"), colour=_GREEN)
    _start_at_zero(lower)
    frame(lower, "Fraction of each batch above the threshold and trained on", "kept fraction")
    _label_episodes(lower)
    return save_figure(figure, path)


def plot_gains(rows: Sequence[GainRow], path: Path) -> Path:
    """Plot the query gain and the model gain, the two parts of the reward, with their 95% intervals.

    A point is the trailing mean over a tenth of the steps, of all their trajectories, taken as independent. It is
    hollow where the interval around it holds 0.
    """
    figure = new_figure(8.0, 5.6)
    upper, lower = figure.subplots(2, 1, sharex=True, sharey=True)
    batches = _batches(rows)
    queries = [[row.query_gain for row in batch] for _, batch in batches]
    models = [[row.model_gain for row in batch] for _, batch in batches]
    episodes = np.array([done for done, _ in batches], dtype=np.float64)
    _draw_gain(upper, episodes, queries, colour=_BLUE)
    frame(upper, "Query gain: better queries, judged by the frozen base model", "nats per token")
    _draw_gain(lower, episodes, models, colour=_VERMILION)
    frame(lower, "Model gain: a better reader of the same context", "nats per token")
    _label_episodes(lower)
    return save_figure(figure, path)


def plot_kl(log_history: Sequence[Mapping[str, float]], path: Path) -> Path:
    """Plot the KL divergence of the steps that trained on something; `kl` is absent where none was computed."""
    figure = new_figure(8.0, 3.4)
    axes = figure.subplots()
    steps = _training_steps(log_history)
    missing = "no KL was computed: no step kept a trajectory, or beta is 0" if steps else _NOTHING_LOGGED
    _draw_trend(axes, *finite_points(steps, "kl"), colour=_BLUE, missing=missing)
    _start_at_zero(axes)
    frame(
        axes,
        "KL divergence of the policy from its reference, in steps that kept a trajectory",
        "KL (nats per query token)",
    )
    _label_episodes(axes)
    return save_figure(figure, path)


def _training_steps(log_history: Sequence[Mapping[str, float]]) -> list[Mapping[str, float]]:
    return [entry for entry in log_history if "episodes" in entry and "reward" in entry]


def _column(steps: Sequence[Mapping[str, float]], name: str) -> Series:
    return np.array([step.get(name, np.nan) for step in steps], dtype=np.float64)


def finite_points(steps: Sequence[Mapping[str, float]], name: str) -> tuple[Series, Series]:
    """Return episodes and values of a metric in the steps where it is finite."""
    values = _column(steps, name)
    present = np.isfinite(values)
    return _column(steps, "episodes")[present], values[present]


def _draw_line(axes: Axes, episodes: Series, values: Series, *, colour: str, label: str, style: str = "-") -> None:
    marker = "o" if len(values) <= _MARKERS_UP_TO else None
    # A quantity that is 0 is on the axis, where half of its marker would be cut off.
    axes.plot(
        episodes, values, style, color=colour, label=label, linewidth=1.5, marker=marker, markersize=3.5, clip_on=False
    )


def _draw_trend(axes: Axes, episodes: Series, values: Series, *, colour: str, missing: str = _NOTHING_LOGGED) -> None:
    """Draw a noisy series, with its trailing mean on top where it is long enough to need one."""
    if not len(values):
        say(axes, missing)
        return
    window = -(-len(values) // 10)
    if window < 2:
        _draw_line(axes, episodes, values, colour=colour, label="each logged step")
        return
    axes.plot(episodes, values, color=colour, alpha=0.35, linewidth=0.9, label="each logged step")
    label = f"trailing mean of {window} steps"
    axes.plot(episodes, trailing_mean(values, window), color=colour, linewidth=2.0, label=label)
    _legend(axes)


def _batches(rows: Sequence[GainRow]) -> list[tuple[int, list[GainRow]]]:
    """Group trajectories by the step that rolled them out, each with the episodes done by its end."""
    steps: dict[int, list[GainRow]] = {}
    for row in sorted(rows, key=lambda row: row.episode):
        steps.setdefault(row.step, []).append(row)
    return [(batch[-1].episode + 1, batch) for batch in steps.values()]


def _draw_gain(axes: Axes, episodes: Series, batches: Sequence[Sequence[float]], *, colour: str) -> None:
    axes.axhline(0.0, color=GREY, linewidth=0.9)
    if not len(episodes):
        say(axes, "the ledger holds no trajectory")
        return
    window = -(-len(batches) // 10)
    mean, half_width = trailing_interval(batches, window)
    axes.fill_between(
        episodes, mean - half_width, mean + half_width, color=colour, alpha=0.18, linewidth=0, label="95% interval"
    )
    axes.plot(episodes, mean, color=colour, linewidth=1.5)
    # A few points, so that filled ones and hollow ones differ to the eye.
    shown = np.unique(np.linspace(0, len(mean) - 1, _MARKERS_UP_TO).round().astype(int))
    holds_zero = ~(np.abs(mean) > half_width)
    of = "of a step" if window == 1 else f"of {window} steps"
    for label, chosen, face in ((f"mean {of}", ~holds_zero, colour), ("the interval holds 0", holds_zero, "white")):
        points = shown[chosen[shown]]
        axes.plot(episodes[points], mean[points], "o", color=colour, markerfacecolor=face, markersize=5, label=label)
    _legend(axes)


def trailing_interval(batches: Sequence[Sequence[float]], window: int) -> tuple[Series, Series]:
    """Average the values of each batch and of those before it, up to `window` batches, with a 95% interval.

    Returns:
        Means, and half widths of Student's intervals around them: NaN for a single value.
    """
    from scipy import stats

    # About their mean, so that squares do not cancel.
    centre = float(np.mean(np.concatenate([np.asarray(batch, dtype=np.float64) for batch in batches])))
    shifted = [np.asarray(batch, dtype=np.float64) - centre for batch in batches]
    stop = np.arange(1, len(batches) + 1)
    start = np.maximum(stop - window, 0)

    def windowed(numbers: Sequence[float]) -> Series:
        sums = np.concatenate([np.zeros(1), np.cumsum(np.array(numbers, dtype=np.float64))])
        return np.asarray(sums[stop] - sums[start], dtype=np.float64)

    count = windowed([len(batch) for batch in shifted])
    mean = windowed([float(batch.sum()) for batch in shifted]) / count
    squares = windowed([float((batch**2).sum()) for batch in shifted])
    with np.errstate(invalid="ignore", divide="ignore"):
        variance = np.maximum(squares - count * mean**2, 0.0) / (count - 1)
        half_width = stats.t.ppf(0.975, count - 1) * np.sqrt(variance / count)
    return centre + mean, np.asarray(half_width, dtype=np.float64)


def _draw_reward(axes: Axes, steps: Sequence[Mapping[str, float]]) -> None:
    if not steps:
        say(axes, _NOTHING_LOGGED)
        return
    _draw_spread(axes, *(_column(steps, name) for name in ("episodes", "reward", "reward_std")))
    for name, label, colour, style in (
        ("reward", "mean of the batch", _BLUE, "-"),
        ("history_mean", "mean of all history", GREY, ":"),
        ("threshold", "threshold", _VERMILION, "--"),
    ):
        episodes, values = finite_points(steps, name)
        if len(values):
            _draw_line(axes, episodes, values, label=label, colour=colour, style=style)
    _legend(axes)


def _draw_spread(axes: Axes, episodes: Series, mean: Series, spread: Series) -> None:
    label = "± 1 SD of the batch"
    if len(episodes) == 1:
        axes.errorbar(episodes, mean, yerr=spread, color=_BLUE, alpha=0.5, capsize=4.0, label=label)
    else:
        axes.fill_between(episodes, mean - spread, mean + spread, color=_BLUE, alpha=0.18, linewidth=0, label=label)


def trailing_mean(values: Series, window: int) -> Series:
    """Average each value with those before it, up to `window` of them."""
    sums = np.concatenate([np.zeros(1), np.cumsum(values)])
    stop = np.arange(1, len(values) + 1)
    start = np.maximum(stop - window, 0)
    return np.asarray((sums[stop] - sums[start]) / (stop - start), dtype=np.float64)


def _start_at_zero(axes: Axes) -> None:
    """Show a quantity that cannot be negative from 0; one that is 0 throughout, up to 1."""
    drawn = [value for line in axes.get_lines() for value in np.asarray(line.get_ydata(), dtype=np.float64)]
    axes.set_ylim(0.0, 1.08 * max(drawn, default=0.0) or 1.0)


def _label_episodes(axes: Axes) -> None:
    axes.set_xlabel("episodes")


def _legend(axes: Axes) -> None:
    axes.legend(fontsize=8.5, frameon=True, framealpha=0.85, edgecolor="none", loc="best", ncols=2)
