"""A run's selection probabilities into a PNG file of heat maps (design §5)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from attention_rl_trainer.records.figures import Series, frame, new_figure, save_figure, say

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize
    from matplotlib.image import AxesImage

_NUMBERS_UP_TO = 12
_FONT = "DejaVu Sans"
_TITLE = "Which pair each query chose (outlined); grey: already read"


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
        ImportError: matplotlib is not installed.
    """
    if trajectories_per_batch < 1:
        raise ValueError(f"trajectories_per_batch must be at least 1, got {trajectories_per_batch}")
    if not rows:
        figure = new_figure(8.0, 3.4)
        axes = figure.subplots()
        say(axes, "the ledger holds no trajectory")
        frame(axes, _TITLE, "step")
        return save_figure(figure, path)
    columns = first_and_last_batch(rows, trajectories_per_batch)
    shown = [row for _, batch in columns for row in batch]
    num_panels = max(len(batch) for _, batch in columns)
    figure = new_figure(1.6 + 4.6 * len(columns), 0.9 + num_panels * _panel_inches(shown))
    grid = figure.subplots(num_panels, len(columns), squeeze=False)
    scale = selection_scale(shown)
    for panel in grid.flat:
        panel.set_axis_off()
    for column, (name, batch) in enumerate(columns):
        for panel, row in zip(grid[:, column], batch, strict=False):
            panel.set_axis_on()
            image = _draw_selection(panel, row, name, scale)
    figure.colorbar(image, ax=grid, label="selection probability", shrink=0.8, extend="max")
    figure.suptitle(_TITLE, fontsize=12)
    return save_figure(figure, path)


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
