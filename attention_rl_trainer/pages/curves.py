"""A ledger and a log into columns of numbers to draw, at most so many however long the run is."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeAlias, TypeVar

from attention_rl_trainer.records.ledger import LedgerRow

Column: TypeAlias = list[float | None]
Item = TypeVar("Item")

MAX_GROUPS = 400
MAX_POINTS = 4000
_DIGITS = 5


def rounded(value: float) -> float:
    """Round to five significant digits: no eye sees more, and a page of them is half as large."""
    return float(f"{value:.{_DIGITS}g}")


def step_columns(rows: Sequence[LedgerRow], max_groups: int = MAX_GROUPS) -> dict[str, object]:
    """Summarize the trajectories of each step, or of a few steps together where there are many.

    Args:
        rows: the ledger by episode.
        max_groups: number of groups not to exceed.

    Returns:
        Columns with an entry per group: ``first`` and ``last`` episode, ``step``, ``count`` of trajectories, ``judged``
        and ``kept`` ones; ``threshold``, ``history_mean`` and ``history_std``, the latest; and under ``series``, for
        each quantity, what a mean and its interval can be made of, also those of several groups: ``n``, ``mean`` and
        ``m2``, the sum of squares about the mean.
    """
    by_step = [list(group) for _, group in itertools.groupby(rows, key=lambda row: row.step)]
    groups = [list(itertools.chain(*batch)) for batch in _in_batches(by_step, max_groups)]
    judged = [[row for row in group if row.verdict != "warmup"] for group in groups]
    return {
        "first": [group[0].episode for group in groups],
        "last": [group[-1].episode for group in groups],
        "step": [group[-1].step for group in groups],
        "count": [len(group) for group in groups],
        "judged": [len(group) for group in judged],
        "kept": [sum(row.verdict == "kept" for row in group) for group in judged],
        "threshold": [_optional(group[-1].threshold) for group in groups],
        "history_mean": [_optional(group[-1].history_mean) for group in groups],
        "history_std": [_optional(group[-1].history_std) for group in groups],
        "series": {name: _sums(groups, quantity) for name, quantity in _QUANTITIES.items()},
    }


def _mean(values: tuple[float, ...] | None) -> float | None:
    return None if values is None else statistics.fmean(values)


def selector_entropy(row: LedgerRow) -> float:
    """Entropy of the selector's distribution, nats, mean over the draws of a trajectory."""
    entropies = [-math.fsum(p * math.log(p) for p in step if p > 0.0) for step in row.selection_probabilities]
    return statistics.fmean(entropies)


def uniform_entropy(row: LedgerRow) -> float:
    """Entropy that a uniform selector would have in the place of that of `selector_entropy`."""
    return statistics.fmean(math.log(len(row.pair_numbers) - step) for step in range(len(row.order)))


_QUANTITIES: dict[str, Callable[[LedgerRow], float | None]] = {
    "reward": lambda row: row.reward,
    "query_gain": lambda row: row.query_gain,
    "model_gain": lambda row: row.model_gain,
    "order_gain": lambda row: _mean(row.order_gains),
    "information_gain": lambda row: _mean(row.information_gains),
    "selector_entropy": selector_entropy,
    "uniform_entropy": uniform_entropy,
}


def _sums(groups: Sequence[Sequence[LedgerRow]], quantity: Callable[[LedgerRow], float | None]) -> dict[str, Column]:
    columns: dict[str, Column] = {"n": [], "mean": [], "m2": []}
    for group in groups:
        values = [value for value in map(quantity, group) if value is not None]
        mean = statistics.fmean(values) if values else None
        columns["n"].append(len(values))
        columns["mean"].append(_optional(mean))
        columns["m2"].append(rounded(math.fsum((value - (mean or 0.0)) ** 2 for value in values)))
    return columns


def log_columns(log_history: Sequence[Mapping[str, float]], max_groups: int = MAX_GROUPS) -> dict[str, Column]:
    """Turn logged metrics into columns, each entry a mean over a few logs where there are many.

    Returns:
        A column per name that was logged, ``None`` where it was not; ``step`` and ``episodes`` are the latest.
    """
    entries = [entry for entry in log_history if "step" in entry]
    groups = _in_batches(entries, max_groups)
    names = sorted({name for entry in entries for name in entry})
    columns: dict[str, Column] = {}
    for name in names:
        present = [[entry[name] for entry in group if name in entry] for group in groups]
        latest = name in ("step", "episodes")
        columns[name] = [
            None if not values else rounded(values[-1] if latest else statistics.fmean(values)) for values in present
        ]
    return columns


def point_columns(rows: Sequence[LedgerRow], max_points: int = MAX_POINTS) -> dict[str, list[object]]:
    """Reward and verdict of each trajectory, or of every so many where there are more."""
    shown = rows[:: -(-len(rows) // max_points) or 1]
    return {
        "episode": [row.episode for row in shown],
        "reward": [rounded(row.reward) for row in shown],
        "verdict": [row.verdict for row in shown],
    }


def _optional(value: float | None) -> float | None:
    return None if value is None else rounded(value)


def _in_batches(items: Sequence[Item], max_batches: int) -> list[list[Item]]:
    size = -(-len(items) // max_batches) or 1
    return [list(_slice) for _slice in _slices(items, size)]


def _slices(items: Sequence[Item], size: int) -> Iterable[Sequence[Item]]:
    return (items[start : start + size] for start in range(0, len(items), size))
