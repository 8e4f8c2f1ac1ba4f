"""How far a run has come, and what a checkpoint holds of this method, as safetensors and JSON (design §10).

``attention_rl_state.json`` holds the state of every part of the run, ``previous_adapter.safetensors`` the adapter before
the last update. What belongs to any Trainer is in `durability`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from attention_rl_trainer.durability.discovery import CheckpointError
from attention_rl_trainer.memories.pairs import MemoryBatch
from attention_rl_trainer.types import StreamPosition

STATE_NAME = "attention_rl_state.json"
PREVIOUS_ADAPTER_NAME = "previous_adapter.safetensors"
_FORMAT = 4


class Progress:
    """Episodes done, and the place in the articles.

    Args:
        total_episodes: of the whole run.

    Attributes:
        num_episodes: trajectories rolled out.
        position: place in the articles right after the last batch used.
        skipped: articles passed over, by reason.
    """

    def __init__(self, total_episodes: int) -> None:
        self.total_episodes = total_episodes
        self.num_episodes = 0
        self.position = StreamPosition()
        self.skipped: dict[str, int] = {}
        self._skipped_before: dict[str, int] = {}

    @property
    def episodes_left(self) -> int:
        """Episodes that are still to be run."""
        return max(0, self.total_episodes - self.num_episodes)

    def next_episodes(self, batch: MemoryBatch) -> range:
        """Number the episodes of the next batch."""
        return range(self.num_episodes, self.num_episodes + len(batch))

    def open_stream(self) -> StreamPosition:
        """Return where a stream of articles begins; what it skips is added to what was skipped so far."""
        self._skipped_before = dict(self.skipped)
        return self.position

    def advance(self, batch: MemoryBatch) -> None:
        """Count a batch that was rolled out."""
        self.num_episodes += len(batch)
        self.position = batch.position_after
        self.skipped = dict(Counter(self._skipped_before) + Counter(batch.skipped))

    def state_dict(self) -> dict[str, Any]:
        """Return the state as a JSON-able mapping."""
        return {"num_episodes": self.num_episodes, "position": self.position.to_dict(), "skipped": self.skipped}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go back to what `state_dict` returned."""
        self.num_episodes = int(state["num_episodes"])
        self.position = StreamPosition.from_dict(state["position"])
        self.skipped = {str(reason): int(count) for reason, count in state["skipped"].items()}


def save_parts(folder: Path, states: Mapping[str, Any], previous_adapter: Mapping[str, Tensor]) -> None:
    """Write the two files into a checkpoint's folder.

    Args:
        folder: it exists.
        states: of the run's parts by name, JSON-able.
        previous_adapter: tensors of the adapter before the last update.
    """
    save_file({name: tensor.contiguous() for name, tensor in previous_adapter.items()}, folder / PREVIOUS_ADAPTER_NAME)
    text = json.dumps({"format": _FORMAT, **states}, indent=2)
    (folder / STATE_NAME).write_text(text + "\n", encoding="utf-8")


def load_parts(folder: Path) -> dict[str, Any]:
    """Read the states of the run's parts.

    Raises:
        CheckpointError: they were written in another format.
    """
    states: dict[str, Any] = json.loads((folder / STATE_NAME).read_text(encoding="utf-8"))
    found = states.pop("format", None)
    if found != _FORMAT:
        raise CheckpointError(
            f"{folder / STATE_NAME} has format {found!r}, but this version of attention_rl_trainer reads {_FORMAT}; "
            "resume with the version that wrote it, or start anew in another output_dir"
        )
    return states


def load_previous_adapter(folder: Path) -> dict[str, Tensor]:
    """Read the tensors of the adapter before the last update."""
    return load_file(folder / PREVIOUS_ADAPTER_NAME)
