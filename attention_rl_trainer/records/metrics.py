"""A rolled-out batch into metrics, and the metrics of the steps between two logs into one number each."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from attention_rl_trainer.models.sampling import entropy
from attention_rl_trainer.types import Trajectory


def repetition(token_ids: Tensor) -> Tensor:
    """Measure how much of each sequence repeats what comes earlier in it.

    Args:
        token_ids: ``[..., L]`` int64.

    Returns:
        Share of the tokens that occurred before, ``[...]``; 0 where all differ, 1 - 1/L where all are the same.
    """
    is_same = token_ids[..., :, None] == token_ids[..., None, :]
    earlier = torch.ones(token_ids.shape[-1:] * 2, dtype=torch.bool, device=token_ids.device).tril(-1)
    return (is_same & earlier).any(dim=-1).float().mean(dim=-1)


def trajectory_metrics(trajectory: Trajectory) -> dict[str, float]:
    """Summarize a rollout batch: means over trajectories and steps, by the names under which they are logged."""
    probabilities = trajectory.stack("selection_probabilities")
    metrics = {
        "reward": trajectory.avg_reward.mean(),
        "reward_std": trajectory.avg_reward.std(correction=0),
        "reward_max": trajectory.avg_reward.max(),
        "query_gain": trajectory.stack("query_gain").mean(),
        "model_gain": trajectory.stack("model_gain").mean(),
        "query_entropy": trajectory.stack("query_entropy").mean(),
        "query_repetition": repetition(trajectory.stack("query_tokens")).mean(),
        "selector_entropy": entropy(probabilities).mean(),
        "selector_max": probabilities.max(dim=-1).values.mean(),
    }
    if trajectory.steps[0].order_gain is not None:
        metrics["order_gain"] = trajectory.stack("order_gain").mean()
    return {name: value.item() for name, value in metrics.items()}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _latest(values: Sequence[float]) -> float:
    return values[-1]


# How a metric that is collected several times between two logs becomes one number; the others are averaged.
_REDUCTIONS: dict[str, Callable[[Sequence[float]], float]] = {
    "reward_max": max,
    "peak_memory_gib": max,
    **dict.fromkeys(("kept_trajectories", "rollout_seconds", "update_seconds"), sum),
    **dict.fromkeys(("episodes", "updates", "skipped_articles", "history_mean", "history_std", "threshold"), _latest),
}


class MetricsBuffer:
    """Collects the metrics of the steps between two logs."""

    def __init__(self) -> None:
        self._values: dict[str, list[float]] = defaultdict(list)

    def add(self, values: Mapping[str, float | None]) -> None:
        """Collect numbers by name; ``None`` stands for one that does not exist this time."""
        for name, value in values.items():
            if value is not None:
                self._values[name].append(float(value))

    def state_dict(self) -> dict[str, list[float]]:
        """Return what was collected and not yet joined."""
        return {name: list(values) for name, values in self._values.items()}

    def load_state_dict(self, state: Mapping[str, Sequence[float]]) -> None:
        """Go back to what `state_dict` returned."""
        self._values = defaultdict(list, {name: list(values) for name, values in state.items()})

    def drain(self) -> dict[str, float]:
        """Join what was collected into one number per name, and forget it."""
        joined = {name: float(_REDUCTIONS.get(name, _mean)(values)) for name, values in self._values.items()}
        self._values.clear()
        return joined
