"""Draw the learning curve of several seeds: mean and interval over the seeds, from the ledgers of their runs.

python examples/experiments/learning_curve.py out/recipe/recipe_seed_* --output docs/images/recipe_learning_curve.png
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy import stats

from attention_rl_trainer.records.ledger import LedgerRow, read_ledger

_PARTS = {
    "query_gains": ("Query gain: better queries, judged by the frozen base model", "#0072B2"),
    "model_gains": ("Model gain: a better reader of the same context", "#D55E00"),
}


def binned_means(ledgers: Sequence[Sequence[LedgerRow]], part: str, num_bins: int) -> NDArray[np.float64]:
    """Average a part of the reward over equal stretches of each run.

    Args:
        ledgers: trajectories of each seed; what is beyond the shortest run is left out.
        part: ``"query_gains"`` or ``"model_gains"``.
        num_bins: stretches.

    Returns:
        Nats per token, ``[seeds, num_bins]``.

    Raises:
        ValueError: the shortest run has fewer trajectories than stretches.
    """
    length = min(len(rows) for rows in ledgers)
    if length < num_bins:
        raise ValueError(f"the shortest run has {length} trajectories, fewer than the {num_bins} stretches")
    means = np.array([[np.mean(getattr(row, part)) for row in rows[:length]] for rows in ledgers])
    edges = np.linspace(0, length, num_bins + 1).astype(int)
    return np.stack([means[:, a:b].mean(axis=1) for a, b in itertools.pairwise(edges)], axis=1)


def draw(ledgers: Sequence[Sequence[LedgerRow]], path: Path, num_bins: int) -> None:
    """Draw both parts of the reward over the episodes.

    Args:
        ledgers: trajectories of each seed.
        path: PNG file to write.
        num_bins: points of a curve.
    """
    length = min(len(rows) for rows in ledgers)
    episodes = (np.arange(num_bins) + 0.5) * length / num_bins
    figure = Figure(figsize=(8.0, 5.6), dpi=150, layout="constrained")
    for axes, (part, (title, colour)) in zip(figure.subplots(2, 1, sharex=True), _PARTS.items(), strict=True):
        curves = binned_means(ledgers, part, num_bins)
        mean = curves.mean(axis=0)
        if len(curves) > 1:
            half = stats.t.ppf(0.975, len(curves) - 1) * curves.std(axis=0, ddof=1) / np.sqrt(len(curves))
            axes.fill_between(episodes, mean - half, mean + half, color=colour, alpha=0.2, linewidth=0)
        for curve in curves:
            axes.plot(episodes, curve, color=colour, linewidth=0.7, alpha=0.5)
        axes.plot(episodes, mean, color=colour, linewidth=2, marker="o", markersize=3.5)
        axes.axhline(0, color="#595959", linewidth=0.8)
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_ylabel("nats per token")
        axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel(f"episodes (mean of {len(ledgers)} seeds, 95% interval over the seeds, and each seed)")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main() -> None:
    """Read the ledgers, draw."""
    parser = argparse.ArgumentParser(description="Draw the learning curve of several seeds.")
    parser.add_argument("runs", nargs="+", type=Path, help="output_dir of each seed's run")
    parser.add_argument("--output", type=Path, required=True, help="PNG file to write")
    parser.add_argument("--bins", type=int, default=12, help="points of a curve")
    arguments = parser.parse_args()
    draw([read_ledger(run / "trajectories.jsonl") for run in arguments.runs], arguments.output, arguments.bins)


if __name__ == "__main__":
    main()
