"""What keeps a run from losing anything: staged checkpoints, their manifest, a lock, and an orderly stop.

Works with any `transformers.Trainer` of a PEFT adapter. `DurableTrainer` is in `trainer`, what it pushes in `pushing`,
and `ResumePoint` in `resume`, so that what only writes files does not load transformers.
"""

from attention_rl_trainer.durability.discovery import CheckpointError, Fact, find_checkpoint
from attention_rl_trainer.durability.guard import RunLockedError
from attention_rl_trainer.durability.staging import (
    StagingError,
    adopt_checkpoint,
    checkpoint_step,
    set_aside_run,
    staged_files,
)

__all__ = [
    "CheckpointError",
    "Fact",
    "RunLockedError",
    "StagingError",
    "adopt_checkpoint",
    "checkpoint_step",
    "find_checkpoint",
    "set_aside_run",
    "staged_files",
]
