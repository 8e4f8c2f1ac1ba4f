"""Where a run begins: at its start, at one of its own checkpoints, or at another run's."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState

from attention_rl_trainer.durability.discovery import find_checkpoint
from attention_rl_trainer.durability.staging import (
    adopt_checkpoint,
    checkpoint_step,
    copy_file,
    list_checkpoints,
    set_aside_run,
)

logger = logging.getLogger(__name__)

# Options of any Trainer that say where a run is, not what it does.
_PLACES = frozenset({"output_dir", "logging_dir", "run_name"})


def trainer_state(checkpoint: Path) -> TrainerState:
    """Read the Trainer's own state."""
    state: TrainerState = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
    return state


@dataclass(frozen=True)
class ResumePoint:
    """A checkpoint that a run resumes from, or its start."""

    output_dir: Path
    """The run's folder."""
    checkpoint: Path | None
    """A complete checkpoint, or ``None`` for a run from the start."""

    @classmethod
    def find(
        cls, resume_from_checkpoint: str | os.PathLike[str] | bool | None, output_dir: Path, trace: str
    ) -> ResumePoint:
        """Find the checkpoint; see `find_checkpoint`."""
        return cls(output_dir, find_checkpoint(resume_from_checkpoint, output_dir, trace))

    @property
    def is_own(self) -> bool:
        """Whether the checkpoint, or a link to it, is in the run's folder."""
        return self.checkpoint is not None and self.checkpoint.parent.resolve() == self.output_dir.resolve()

    @property
    def global_step(self) -> int:
        """The Trainer's steps before it."""
        return 0 if self.checkpoint is None else int(trainer_state(self.checkpoint).global_step)

    def is_first_run(self, records: Sequence[Path], trace: str) -> bool:
        """Whether the run's folder holds nothing of a run yet."""
        kept = [*list_checkpoints(self.output_dir), *records, self.output_dir / trace]
        return not any(path.exists() for path in kept)

    def set_aside_others(self, records: Sequence[Path], outputs: Sequence[Path] = ()) -> None:
        """Move what the run does not resume out of its way, also of its ``records``; nothing is lost.

        Args:
            outputs: moved with the records of a whole run, and no others: they may be there without one.
        """
        after = checkpoint_step(self.checkpoint) if self.checkpoint is not None and self.is_own else -1
        if after < 0 and any(record.exists() for record in records):
            records = [*records, *outputs]
        aside = set_aside_run(self.output_dir, records, after)
        if aside is not None:
            logger.warning("%s held what this run does not resume; it is in %s now", self.output_dir, aside)

    def adopted(self, records: Sequence[Path] = ()) -> ResumePoint:
        """Copy another run's checkpoint, and its records that are files, into the run's own folder; return the copy."""
        if self.checkpoint is None or self.is_own:
            return self
        for record in records:
            copy_file(self.checkpoint.parent / record.name, record)
        return ResumePoint(self.output_dir, adopt_checkpoint(self.checkpoint, self.output_dir))

    def warn_of_changed_options(self, name: str, present: Mapping[str, Any], expected: Collection[str] = ()) -> None:
        """Say which options differ from those of the checkpoint.

        Args:
            name: the file in the checkpoint that holds its options, as JSON.
            present: those of this run.
            expected: names of options that a resumed run is free to change.
        """
        if self.checkpoint is None:
            return
        before = json.loads((self.checkpoint / name).read_text(encoding="utf-8"))
        compared = [option for option in present if option in before and option not in _PLACES.union(expected)]
        changed = [option for option in compared if before[option] != present[option]]
        if changed:
            listed = ", ".join(f"{option} ({before[option]!r} there, {present[option]!r} here)" for option in changed)
            logger.warning("Options that differ from those of %s: %s", self.checkpoint, listed)
