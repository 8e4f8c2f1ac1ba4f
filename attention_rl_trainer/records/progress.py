"""How far a run has come, and what a checkpoint holds of this method, as safetensors and JSON (design §10).

What belongs to any Trainer is in `durability`.
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
from attention_rl_trainer.durability.states import Stateful
from attention_rl_trainer.memories.pairs import MemoryBatch
from attention_rl_trainer.types import StreamPosition

STATE_NAME = "attention_rl_state.json"
"""The state of every part of the run."""
PREVIOUS_ADAPTER_NAME = "previous_adapter.safetensors"
CHECKPOINT_PARTS = (STATE_NAME, PREVIOUS_ADAPTER_NAME)
"""The adapter before the last update."""
_FORMAT = 7


class Progress:
    """Episodes done of ``total_episodes``, those of a warm start before them, and the place in the articles."""

    def __init__(self, total_episodes: int, warm_start_episodes: int = 0) -> None:
        self.total_episodes = total_episodes
        self.warm_start_episodes = warm_start_episodes
        self.num_episodes = 0
        """Trajectories rolled out."""
        self.num_warm_start = 0
        """Trajectories of the warm start that were learned from."""
        self.num_warm_start_updates = 0
        """Optimizer steps of the warm start, known when it has ended."""
        self.position = StreamPosition()
        """Place in the articles right after the last batch used."""
        self.skipped: dict[str, int] = {}
        """Articles passed over, by reason."""
        self._skipped_before: dict[str, int] = {}
        self._episodes_before = 0

    @property
    def episodes_of_process(self) -> int:
        """Trajectories rolled out since the stream was opened, without those before a checkpoint."""
        return self.num_episodes - self._episodes_before

    @property
    def episodes_left(self) -> int:
        """Episodes that are still to run."""
        return max(0, self.total_episodes - self.num_episodes)

    @property
    def warm_start_left(self) -> int:
        """Trajectories that are still to be learned from before the next episode."""
        return max(0, self.warm_start_episodes - self.num_warm_start)

    @property
    def num_trajectories(self) -> int:
        """Those of the warm start and of the episodes done."""
        return self.num_warm_start + self.num_episodes

    def next_episodes(self, rows: range) -> range:
        """Number the episodes of rows of the next batch that is rolled out."""
        return range(self.num_episodes + rows.start, self.num_episodes + rows.stop)

    def read(self, checkpoint: Path) -> None:
        """Go to where a checkpoint's run stood."""
        self.load_state_dict(load_parts(checkpoint)["progress"])

    def open_stream(self) -> StreamPosition:
        """Return where a stream of articles begins; what it skips is added to what was skipped so far."""
        self._skipped_before = dict(self.skipped)
        self._episodes_before = self.num_episodes
        return self.position

    def advance(self, batch: MemoryBatch) -> None:
        """Count a batch that was rolled out, or learned from in the warm start."""
        if self.warm_start_left > 0:
            self.num_warm_start += len(batch)
        else:
            self.num_episodes += len(batch)
        self.position = batch.position_after
        self.skipped = dict(Counter(self._skipped_before) + Counter(batch.skipped))

    def state_dict(self) -> dict[str, Any]:
        """Return the state, JSON-able."""
        return {
            "num_episodes": self.num_episodes,
            "num_warm_start": self.num_warm_start,
            "num_warm_start_updates": self.num_warm_start_updates,
            "position": self.position.to_dict(),
            "skipped": self.skipped,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go back to what `state_dict` returned."""
        self.num_episodes = int(state["num_episodes"])
        self.num_warm_start = int(state["num_warm_start"])
        # Older checkpoints do not know it.
        self.num_warm_start_updates = int(state.get("num_warm_start_updates", 0))
        self.position = StreamPosition.from_dict(state["position"])
        self.skipped = {str(reason): int(count) for reason, count in state["skipped"].items()}


def save_parts(folder: Path, states: Mapping[str, Any], previous_adapter: Mapping[str, Tensor]) -> None:
    """Write the states of the run's parts, JSON-able, and the previous adapter's tensors into a checkpoint's folder."""
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
        stated = "no format" if found is None else f"format {found!r}"
        raise CheckpointError(
            f"{folder / STATE_NAME} has {stated}, but this version of attention_rl_trainer reads format {_FORMAT}; "
            "resume with the version that wrote it, or start anew in another output_dir"
        )
    return states


def load_previous_adapter(folder: Path) -> dict[str, Tensor]:
    """Read the tensors of the adapter before the last update."""
    return load_file(folder / PREVIOUS_ADAPTER_NAME)


def save_run(folder: Path, parts: Mapping[str, Stateful], previous_adapter: Stateful) -> None:
    """Write the present states of a run's parts, and the adapter before the last update."""
    states = {name: part.state_dict() for name, part in parts.items()}
    save_parts(folder, states, previous_adapter.state_dict())


def restore_run(folder: Path, parts: Mapping[str, Stateful], previous_adapter: Stateful) -> None:
    """Go back to what `save_run` wrote."""
    states = load_parts(folder)
    for name, part in parts.items():
        part.load_state_dict(states[name])
    previous_adapter.load_state_dict(load_previous_adapter(folder))


def expect_format(folder: Path) -> None:
    """Refuse a checkpoint whose parts were written in another format; one without parts is for others to refuse.

    Raises:
        CheckpointError: names both formats.
    """
    if (folder / STATE_NAME).is_file():
        load_parts(folder)
