"""A run's logged metrics and trajectories into PNG files (design §5, §7 to §9).

Each ``plot_*`` writes one file and returns its path; it raises an `ImportError` where matplotlib is not installed.
``log_history`` holds the metrics as logged, one mapping per step. matplotlib is used through its object interface, so
no window, backend or pyplot state of the caller is touched.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

Series = NDArray[np.float64]

# Okabe and Ito's palette: distinguishable with every common form of colour blindness.
_BLUE, _GREEN, _VERMILION, _GREY = "#0072B2", "#009E73", "#D55E00", "#595959"
_PIXELS_PER_INCH = 150
_MARKERS_UP_TO = 40
_NUMBERS_UP_TO = 12
_FONT = "DejaVu Sans"
_NOTHING_LOGGED = "no training step was logged"
_SELECTION_TITLE = "Which pair each query chose (outlined); grey: already read"


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


class SelectionRow(Protocol):
    """What `plot_selection` reads of a trajectory with T steps over M pairs; `LedgerRow` has it."""

    @property
    def episode(self) -> int:
        """Number of the trajectory in the run."""

    @property
    def step(self) -> int:
        """Trainer step that rolled it out."""

    @property
    def title(self) -> str:
        """Title of its article."""

    @property
    def reward(self) -> float:
        """Mean reward, nats per value token."""

    @property
    def pair_numbers(self) -> Sequence[int]:
        """The M pairs of the subset, as numbers in the article."""

    @property
    def order(self) -> Sequence[int]:
        """The T pair numbers chosen, in order."""

    @property
    def selection_probabilities(self) -> Sequence[Sequence[float]]:
        """T rows of M probabilities, columns in the order of `pair_numbers`."""


def plot_rewards(log_history: Sequence[Mapping[str, float]], path: Path) -> Path:
    """Plot the reward with its spread, history mean and threshold, and below it the fraction kept.

    Entries without `episodes` (evaluation, the closing summary) are left out, and a metric absent from a step is a gap.
    """
    steps = _training_steps(log_history)
    figure = _new_figure(8.0, 5.6)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[2.4, 1.0])
    _draw_reward(upper, steps)
    _frame(upper, "Reward of the rolled-out trajectories", "reward (nats per token)")
    _draw_trend(lower, *finite_points(steps, "kept_fraction"), colour=_GREEN)
    _start_at_zero(lower)
    _frame(lower, "Fraction of each batch above the threshold and trained on", "kept fraction")
    _label_episodes(lower)
    return _save(figure, path)


def plot_gains(rows: Sequence[GainRow], path: Path) -> Path:
    """Plot the query gain and the model gain, the two parts of the reward, with their 95% intervals.

    A point is the trailing mean over a tenth of the steps, of all their trajectories, taken as independent. It is
    hollow where the interval around it holds 0.
    """
    figure = _new_figure(8.0, 5.6)
    upper, lower = figure.subplots(2, 1, sharex=True, sharey=True)
    batches = _batches(rows)
    queries = [[row.query_gain for row in batch] for _, batch in batches]
    models = [[row.model_gain for row in batch] for _, batch in batches]
    episodes = np.array([done for done, _ in batches], dtype=np.float64)
    _draw_gain(upper, episodes, queries, colour=_BLUE)
    _frame(upper, "Query gain: better queries, judged by the frozen base model", "nats per token")
    _draw_gain(lower, episodes, models, colour=_VERMILION)
    _frame(lower, "Model gain: a better reader of the same context", "nats per token")
    _label_episodes(lower)
    return _save(figure, path)


def plot_kl(log_history: Sequence[Mapping[str, float]], path: Path) -> Path:
    """Plot the KL divergence of the steps that trained on something; `kl` is absent where none was computed."""
    figure = _new_figure(8.0, 3.4)
    axes = figure.subplots()
    steps = _training_steps(log_history)
    missing = "no KL was computed: no step kept a trajectory, or beta is 0" if steps else _NOTHING_LOGGED
    _draw_trend(axes, *finite_points(steps, "kl"), colour=_BLUE, missing=missing)
    _start_at_zero(axes)
    _frame(
        axes,
        "KL divergence of the policy from its reference, in steps that kept a trajectory",
        "KL (nats per query token)",
    )
    _label_episodes(axes)
    return _save(figure, path)


def plot_selection(rows: Sequence[SelectionRow], path: Path, trajectories_per_batch: int = 2) -> Path:
    """Draw the selection probabilities of a few trajectories of the first and of the last batch side by side.

    A heat map has one row per step and one column per pair, in article order. The chosen cell is outlined; pairs
    already read are grey.

    Args:
        rows: trajectories of a run, in any order.
        path: PNG file to write.
        trajectories_per_batch: how many trajectories of each batch are drawn, those with the lowest episode numbers.

    Raises:
        ValueError: `trajectories_per_batch` is below 1.
    """
    if trajectories_per_batch < 1:
        raise ValueError(f"trajectories_per_batch must be at least 1, got {trajectories_per_batch}")
    if not rows:
        figure = _new_figure(8.0, 3.4)
        axes = figure.subplots()
        _say(axes, "the ledger holds no trajectory")
        _frame(axes, _SELECTION_TITLE, "step")
        return _save(figure, path)
    columns = first_and_last_batch(rows, trajectories_per_batch)
    shown = [row for _, batch in columns for row in batch]
    num_panels = max(len(batch) for _, batch in columns)
    figure = _new_figure(1.6 + 4.6 * len(columns), 0.9 + num_panels * _panel_inches(shown))
    grid = figure.subplots(num_panels, len(columns), squeeze=False)
    scale = selection_scale(shown)
    for panel in grid.flat:
        panel.set_axis_off()
    for column, (name, batch) in enumerate(columns):
        for panel, row in zip(grid[:, column], batch, strict=False):
            panel.set_axis_on()
            image = _draw_selection(panel, row, name, scale)
    figure.colorbar(image, ax=grid, label="selection probability", shrink=0.8, extend="max")
    figure.suptitle(_SELECTION_TITLE, fontsize=12)
    return _save(figure, path)


def _new_figure(width_inches: float, height_inches: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('plots need matplotlib: pip install "attention-rl-trainer[report]"') from error
    return Figure(figsize=(width_inches, height_inches), dpi=_PIXELS_PER_INCH, layout="constrained", facecolor="white")


def _save(figure: Figure, path: Path) -> Path:
    # matplotlib writes its own version into a PNG; without it equal figures are equal files.
    figure.savefig(path, format="png", dpi=_PIXELS_PER_INCH, metadata={"Software": None})
    return path


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
        _say(axes, missing)
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
    axes.axhline(0.0, color=_GREY, linewidth=0.9)
    if not len(episodes):
        _say(axes, "the ledger holds no trajectory")
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
        _say(axes, _NOTHING_LOGGED)
        return
    _draw_spread(axes, *(_column(steps, name) for name in ("episodes", "reward", "reward_std")))
    for name, label, colour, style in (
        ("reward", "mean of the batch", _BLUE, "-"),
        ("history_mean", "mean of all history", _GREY, ":"),
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


def _frame(axes: Axes, title: str, y_label: str) -> None:
    axes.set_title(title, fontsize=11, loc="left")
    axes.set_ylabel(y_label)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _legend(axes: Axes) -> None:
    axes.legend(fontsize=8.5, frameon=True, framealpha=0.85, edgecolor="none", loc="best", ncols=2)


def _say(axes: Axes, message: str) -> None:
    axes.text(0.5, 0.5, message, transform=axes.transAxes, ha="center", va="center", color=_GREY, fontsize=10)
    axes.set_xticks([])
    axes.set_yticks([])


def first_and_last_batch(
    rows: Sequence[SelectionRow], trajectories_per_batch: int
) -> list[tuple[str, list[SelectionRow]]]:
    """Choose trajectories of the first batch and of the last, those of the lowest episodes, under a heading each."""
    ordered = sorted(rows, key=lambda row: row.episode)
    first, last = min(row.step for row in rows), max(row.step for row in rows)
    steps = {"Only batch": first} if first == last else {"First batch": first, "Last batch": last}
    return [
        (f"{name} (step {step})", [row for row in ordered if row.step == step][:trajectories_per_batch])
        for name, step in steps.items()
    ]


def _panel_inches(rows: Sequence[SelectionRow]) -> float:
    most_steps = max(len(row.order) for row in rows)
    return 1.1 + min(max(0.27 * most_steps, 1.0), 4.0)


def unread_pairs(row: SelectionRow) -> NDArray[np.bool_]:
    """Mark the pairs not yet read at each step, `[T, M]`."""
    numbers = np.array(row.pair_numbers)
    return np.array([~np.isin(numbers, row.order[:step]) for step in range(len(row.order))], dtype=np.bool_)


def selection_scale(rows: Sequence[SelectionRow]) -> Normalize:
    """Scale the colours of all panels alike, up to the largest probability of a step with more than one pair left."""
    from matplotlib.colors import PowerNorm

    largest = 0.0
    for row in rows:
        contested = unread_pairs(row).sum(axis=1) > 1
        largest = max(largest, float(np.max(np.array(row.selection_probabilities)[contested], initial=0.0)))
    # With many pairs nearly all probabilities are small; a square-root scale keeps their differences visible.
    return PowerNorm(0.5, vmin=0.0, vmax=largest or 1.0)


def _draw_selection(axes: Axes, row: SelectionRow, batch_name: str, scale: Normalize) -> AxesImage:
    import matplotlib

    by_number = np.argsort(np.array(row.pair_numbers), kind="stable")
    probabilities = np.where(unread_pairs(row), np.array(row.selection_probabilities), np.nan)[:, by_number]
    palette = matplotlib.colormaps["viridis"].with_extremes(bad="#e4e4e4")
    image = axes.imshow(probabilities, aspect="auto", cmap=palette, norm=scale, interpolation="nearest")
    numbers = [row.pair_numbers[column] for column in by_number]
    for step, chosen in enumerate(row.order):
        _outline_cell(axes, step, numbers.index(chosen))
    if max(probabilities.shape) <= _NUMBERS_UP_TO:
        _write_cells(axes, probabilities, image)
    _label_selection(axes, row, numbers, batch_name)
    return image


def _outline_cell(axes: Axes, step: int, column: int) -> None:
    """Outline a cell in white within black, which stands out from every colour of the scale."""
    from matplotlib.patches import Rectangle

    for colour, width in (("black", 3.6), ("white", 1.6)):
        corner = (column - 0.44, step - 0.44)
        axes.add_patch(Rectangle(corner, 0.88, 0.88, fill=False, edgecolor=colour, linewidth=width))


def _write_cells(axes: Axes, probabilities: Series, image: AxesImage) -> None:
    luminance = np.asarray(image.to_rgba(probabilities))[..., :3] @ np.array([0.30, 0.59, 0.11])
    for (step, column), value in np.ndenumerate(probabilities):
        if np.isfinite(value):
            colour = "white" if luminance[step, column] < 0.5 else "black"
            axes.text(column, step, f"{value:.2f}", ha="center", va="center", fontsize=7, color=colour)


def _label_selection(axes: Axes, row: SelectionRow, numbers: Sequence[int], batch_name: str) -> None:
    every = -(-len(numbers) // 16)
    axes.set_xticks(range(0, len(numbers), every), [str(number) for number in numbers[::every]], fontsize=8)
    every = -(-len(row.order) // 16)
    axes.set_yticks(
        range(0, len(row.order), every), [str(step + 1) for step in range(0, len(row.order), every)], fontsize=8
    )
    axes.set_xlabel("pair number in the article", fontsize=9)
    axes.set_ylabel("step", fontsize=9)
    subject = f"{drawable_title(row.title)}, episode {row.episode}, reward {row.reward:+.3f}"
    # An article title may hold dollar signs, which would otherwise be set as mathematics.
    axes.set_title(f"{batch_name}\n{subject}", fontsize=9, family=_FONT, parse_math=False)


def drawable_title(title: str, max_characters: int = 32) -> str:
    """Shorten a title and replace what the font has no glyph for, which matplotlib would warn about."""
    from matplotlib.font_manager import findfont, get_font

    font = get_font(findfont(_FONT))
    shown = "".join(c if c.isprintable() and font.get_char_index(ord(c)) else "\N{WHITE SQUARE}" for c in title)
    return shown if len(shown) <= max_characters else shown[: max_characters - 1] + "\N{HORIZONTAL ELLIPSIS}"
