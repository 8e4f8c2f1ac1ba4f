"""A finished run with three checkpoints, and what is done to copies of it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from processes import Job
from transformers import TrainerCallback

from attention_rl_trainer.durability.manifest import MANIFEST_NAME, write_manifest

ALWAYS = float("-inf")


def copy_of(finished: Path, folder: Path) -> Job:
    shutil.copytree(finished, folder, dirs_exist_ok=True)
    return Job(folder, OPTIONS)


OPTIONS: dict[str, Any] = {
    "num_episodes": 24,
    "generation_batch_size": 4,
    "save_episodes": 8,
    "warmup_episodes": 1,
    "filter_threshold": ALWAYS,
}


def content_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class StopAt(TrainerCallback):
    """Raises what Ctrl-C would raise, in the middle of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 == self.step:
            raise KeyboardInterrupt


class EndAt(TrainerCallback):
    """Ends a run in order, as early stopping does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = control.should_training_stop or state.global_step == self.step


def write_manifest_anew(checkpoint: Path) -> None:
    (checkpoint / MANIFEST_NAME).unlink()
    write_manifest(checkpoint)
