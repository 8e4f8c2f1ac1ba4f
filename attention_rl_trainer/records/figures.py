"""What the pictures of a run have in common.

matplotlib is used through its object interface, so no window, backend or pyplot state of the caller is touched.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Series = NDArray[np.float64]

GREY = "#595959"
_PIXELS_PER_INCH = 150


def new_figure(width_inches: float, height_inches: float) -> Figure:
    """Make an empty figure.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('plots need matplotlib: pip install "attention-rl-trainer[report]"') from error
    return Figure(figsize=(width_inches, height_inches), dpi=_PIXELS_PER_INCH, layout="constrained", facecolor="white")


def save_figure(figure: Figure, path: Path) -> Path:
    """Write a figure as PNG; returns the path."""
    # matplotlib writes its own version into a PNG; without it equal figures are equal files.
    figure.savefig(path, format="png", dpi=_PIXELS_PER_INCH, metadata={"Software": None})
    return path


def frame(axes: Axes, title: str, y_label: str) -> None:
    """Write title and label, and draw a grid."""
    axes.set_title(title, fontsize=11, loc="left")
    axes.set_ylabel(y_label)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def say(axes: Axes, message: str) -> None:
    """Write why there is nothing to draw."""
    axes.text(0.5, 0.5, message, transform=axes.transAxes, ha="center", va="center", color=GREY, fontsize=10)
    axes.set_xticks([])
    axes.set_yticks([])
