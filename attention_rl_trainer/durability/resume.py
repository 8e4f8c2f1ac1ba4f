"""Where a run begins: at its start, at one of its own checkpoints, or at another run's."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState

from attention_rl_trainer.durability.discovery import find_checkpoint
from attention_rl_trainer.durability.staging import adopt_checkpoint, checkpoint_step, set_aside_run

logger = logging.getLogger(__name__)

_PLACES = frozenset({"output_dir", "logging_dir", "run_name", "num_episodes"})


@dataclass(frozen=True)
class ResumePoint:
    """A checkpoint that a run resumes from, or its start.

    Attributes:
        output_dir: the run's folder.
        checkpoint: a complete checkpoint, or ``None`` for a run from the start.
    """

    output_dir: Path
    checkpoint: Path | None

    @classmethod
    def find(cls, resume_from_checkpoint: str | bool | None, output_dir: Path, trace: str) -> ResumePoint:
        """Find the checkpoint; see `find_checkpoint`."""
        return cls(output_dir, find_checkpoint(resume_from_checkpoint, output_dir, trace))

    @property
    def is_own(self) -> bool:
        """Whether the checkpoint, or a link to it, is in the run's folder."""
        return self.checkpoint is not None and self.checkpoint.parent.resolve() == self.output_dir.resolve()

    @property
    def global_step(self) -> int:
        """The Trainer's steps before it."""
        if self.checkpoint is None:
            return 0
        return int(TrainerState.load_from_json(str(self.checkpoint / TRAINER_STATE_NAME)).global_step)

    def set_aside_others(self, records: Sequence[Path]) -> None:
        """Move what the run does not resume out of its way; nothing is lost.

        Args:
            records: files and folders of the run beside its checkpoints.
        """
        after = checkpoint_step(self.checkpoint) if self.checkpoint is not None and self.is_own else -1
        aside = set_aside_run(self.output_dir, records, after)
        if aside is not None:
            logger.warning("%s held what this run does not resume; it is in %s now", self.output_dir, aside)

    def adopted(self) -> ResumePoint:
        """Copy another run's checkpoint into the run's own folder."""
        if self.checkpoint is None or self.is_own:
            return self
        return ResumePoint(self.output_dir, adopt_checkpoint(self.checkpoint, self.output_dir))

    def warn_of_changed_options(self, name: str, present: Mapping[str, Any]) -> None:
        """Say which options differ from those of the checkpoint.

        Args:
            name: the file in the checkpoint that holds its options, as JSON.
            present: those of this run.
        """
        if self.checkpoint is None:
            return
        before = json.loads((self.checkpoint / name).read_text(encoding="utf-8"))
        changed = [option for option in present if option not in _PLACES and option in before]
        changed = [option for option in changed if before[option] != present[option]]
        if changed:
            listed = ", ".join(f"{option} ({before[option]!r} there, {present[option]!r} here)" for option in changed)
            logger.warning("Options that differ from those of %s: %s", self.checkpoint, listed)
