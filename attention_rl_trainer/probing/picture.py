"""The accuracy of every head as a picture, layers by heads (design §5)."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from attention_rl_trainer.models.heads import HeadNumber
from attention_rl_trainer.probing.fit import HeadScores

_PIXELS_PER_INCH = 150


def plot_heads(scores: HeadScores, chosen: tuple[HeadNumber, ...] | None, path: Path) -> Path:
    """Draw how often each head ranks the right pair first, the chosen ones outlined; returns the file's path.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    layers = sorted(scores.accuracy)
    num_heads = max(len(values) for values in scores.accuracy.values())
    # Layers may differ in their number of heads.
    table = np.full((num_heads, len(layers)), np.nan)
    for column, layer in enumerate(layers):
        values = scores.accuracy[layer].numpy()
        table[: len(values), column] = values
    figure = Figure(figsize=(max(5.0, 1.6 + 0.28 * len(layers)), max(2.6, 1.2 + 0.28 * num_heads)))
    axes = figure.add_subplot()
    image = axes.imshow(table, cmap="cividis", vmin=scores.chance, vmax=1, aspect="auto")
    for number in chosen or ():
        corner = layers.index(number.layer) - 0.5, number.head - 0.5
        axes.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor="#D55E00", linewidth=2))
    step = -(-len(layers) // 20)
    axes.set_xticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
    axes.set_yticks(range(num_heads))
    axes.set_xlabel("layer")
    axes.set_ylabel("head")
    outlined = "; outlined: those that select" if chosen else ""
    title = f"How often half a key finds its pair, each head alone (chance {scores.chance:.2f})"
    axes.set_title(title + outlined, size=9)
    figure.colorbar(image, ax=axes, label="share of the half keys")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=_PIXELS_PER_INCH)
    return path
