"""What a checkpoint holds of this method, as safetensors and JSON (design §10).

``attention_rl_state.json`` holds the reward statistics, the number of episodes and updates, the position in the data,
and the metrics that are not yet logged; ``previous_adapter.safetensors`` the adapter before the last update. What
belongs to any Trainer is in `durability`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from attention_rl_trainer.articles import StreamPosition
from attention_rl_trainer.durability import CheckpointError
from attention_rl_trainer.filtering import RewardStatistics

STATE_NAME = "attention_rl_state.json"
PREVIOUS_ADAPTER_NAME = "previous_adapter.safetensors"
_FORMAT = 3


@dataclass
class RunState:
    """How far a run has come.

    Attributes:
        statistics: the reward history.
        num_episodes: trajectories rolled out.
        num_updates: optimizer steps that moved weights.
        position: place in the articles right after the last batch used.
        skipped: articles passed over, by reason.
        metrics: numbers collected since the last log, by name.
        health: what the health monitor remembers.
        micro_batches: the size of micro-batches, and what it was halved from.
    """

    statistics: RewardStatistics = field(default_factory=RewardStatistics)
    num_episodes: int = 0
    num_updates: int = 0
    position: StreamPosition = field(default_factory=StreamPosition)
    skipped: dict[str, int] = field(default_factory=dict)
    metrics: dict[str, list[float]] = field(default_factory=dict)
    health: dict[str, Any] = field(default_factory=dict)
    micro_batches: dict[str, int] = field(default_factory=dict)

    def state_dict(self) -> dict[str, Any]:
        """Return the state as a JSON-able mapping."""
        return {
            "format": _FORMAT,
            "statistics": self.statistics.state_dict(),
            "num_episodes": self.num_episodes,
            "num_updates": self.num_updates,
            "position": self.position.to_dict(),
            "skipped": self.skipped,
            "metrics": self.metrics,
            "health": self.health,
            "micro_batches": self.micro_batches,
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> RunState:
        """Restore what `state_dict` returned.

        Args:
            state: the mapping.

        Raises:
            CheckpointError: it was written in another format.
        """
        if state.get("format") != _FORMAT:
            raise CheckpointError(f"the checkpoint has format {state.get('format')!r}, this version reads {_FORMAT}")
        return cls(
            RewardStatistics.from_state_dict(state["statistics"]),
            int(state["num_episodes"]),
            int(state["num_updates"]),
            StreamPosition.from_dict(state["position"]),
            {str(reason): int(count) for reason, count in state["skipped"].items()},
            {str(name): [float(value) for value in values] for name, values in state["metrics"].items()},
            dict(state["health"]),
            {str(name): int(value) for name, value in state["micro_batches"].items()},
        )


def save_run_state(folder: Path, state: RunState, previous_adapter: Mapping[str, Tensor]) -> None:
    """Write the two files.

    Args:
        folder: the checkpoint's folder, which exists.
        state: how far the run has come.
        previous_adapter: tensors of the adapter before the last update.
    """
    save_file({name: tensor.contiguous() for name, tensor in previous_adapter.items()}, folder / PREVIOUS_ADAPTER_NAME)
    (folder / STATE_NAME).write_text(json.dumps(state.state_dict(), indent=2) + "\n", encoding="utf-8")


def load_run_state(folder: Path) -> tuple[RunState, dict[str, Tensor]]:
    """Read the two files.

    Args:
        folder: the checkpoint's folder.

    Returns:
        How far the run had come, and the previous adapter's tensors.

    Raises:
        CheckpointError: they were written in another format.
    """
    return read_run_state(folder), load_file(folder / PREVIOUS_ADAPTER_NAME)


def read_run_state(folder: Path) -> RunState:
    """Read how far a checkpoint's run had come.

    Args:
        folder: the checkpoint's folder.

    Raises:
        CheckpointError: it was written in another format.
    """
    return RunState.from_state_dict(json.loads((folder / STATE_NAME).read_text(encoding="utf-8")))
