"""What a checkpoint holds beside the Trainer's own files, as safetensors and JSON (design §10).

``attention_rl_state.json`` holds the reward statistics, the number of episodes and updates, and the position in the
data; ``previous_adapter.safetensors`` the adapter before the last update. Knows nothing about how a run goes on from
them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint

from attention_rl_trainer.articles import StreamPosition
from attention_rl_trainer.filtering import RewardStatistics

STATE_NAME = "attention_rl_state.json"
PREVIOUS_ADAPTER_NAME = "previous_adapter.safetensors"
_FORMAT = 1


class CheckpointError(ValueError):
    """A checkpoint lacks a part or does not fit the run."""


@dataclass
class RunState:
    """How far a run has come.

    Attributes:
        statistics: the reward history.
        num_episodes: trajectories rolled out.
        num_updates: optimizer steps that moved weights.
        position: place in the articles right after the last batch used.
        skipped: articles passed over, by reason.
    """

    statistics: RewardStatistics = field(default_factory=RewardStatistics)
    num_episodes: int = 0
    num_updates: int = 0
    position: StreamPosition = field(default_factory=StreamPosition)
    skipped: dict[str, int] = field(default_factory=dict)

    def state_dict(self) -> dict[str, Any]:
        """Return the state as a JSON-able mapping."""
        return {
            "format": _FORMAT,
            "statistics": self.statistics.state_dict(),
            "num_episodes": self.num_episodes,
            "num_updates": self.num_updates,
            "position": self.position.to_dict(),
            "skipped": self.skipped,
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
        CheckpointError: a file is missing; names it.
    """
    return _read_state(folder), load_file(folder / PREVIOUS_ADAPTER_NAME)


def _read_state(folder: Path) -> RunState:
    """Read how far the run had come, where both files are there."""
    for name in (STATE_NAME, PREVIOUS_ADAPTER_NAME):
        if not (folder / name).is_file():
            raise CheckpointError(
                f"{folder / name} is missing, so the run cannot go on from {folder}; choose another checkpoint with "
                "--resume_from_checkpoint"
            )
    return RunState.from_state_dict(json.loads((folder / STATE_NAME).read_text(encoding="utf-8")))


def find_checkpoint(resume_from_checkpoint: str | bool | None, output_dir: Path) -> Path | None:
    """Find the checkpoint to go on from.

    Args:
        resume_from_checkpoint: a folder, true for the newest in ``output_dir``, or nothing.
        output_dir: the run's folder.

    Returns:
        The folder, or ``None`` for a run from the start.

    Raises:
        CheckpointError: there is no such folder, or no checkpoint.
    """
    if not resume_from_checkpoint:
        return None
    if resume_from_checkpoint is True:
        newest: str | None = None
        if output_dir.is_dir():
            newest = get_last_checkpoint(str(output_dir))  # type: ignore[no-untyped-call]  # not annotated there
        if newest is None:
            raise CheckpointError(f"there is no checkpoint in {output_dir}; start without resume_from_checkpoint")
        return Path(newest)
    folder = Path(resume_from_checkpoint)
    if not folder.is_dir():
        raise CheckpointError(f"there is no checkpoint {folder}; check the path, or start without it")
    return folder


def steps_and_episodes(checkpoint: Path) -> tuple[int, int]:
    """Read how far a checkpoint's run had come.

    Args:
        checkpoint: its folder.

    Returns:
        The Trainer's steps and the episodes.

    Raises:
        CheckpointError: a file is missing; names it.
    """
    trainer_state = checkpoint / TRAINER_STATE_NAME
    if not trainer_state.is_file():
        raise CheckpointError(f"{trainer_state} is missing, so the run cannot go on from {checkpoint}")
    steps = TrainerState.load_from_json(str(trainer_state)).global_step
    return steps, _read_state(checkpoint).num_episodes
