"""What happens between the Trainer's steps, through its documented callback hooks.

Knows the trainer only as functions that are passed in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class EpisodeSaveCallback(TrainerCallback):
    """Saves at the first step that reaches or passes each multiple of ``save_episodes``, and at the last step.

    Args:
        save_episodes: episodes between checkpoints.
        num_episodes: returns the episodes done so far.
    """

    def __init__(self, save_episodes: int, num_episodes: Callable[[], int]) -> None:
        self._save_episodes = save_episodes
        self._num_episodes = num_episodes
        self._saved_multiple = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start from the episodes that a resumed run has behind it."""
        self._saved_multiple = self._num_episodes() // self._save_episodes

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask for a checkpoint where one is due."""
        multiple = self._num_episodes() // self._save_episodes
        if multiple > self._saved_multiple or state.global_step >= state.max_steps:
            self._saved_multiple = multiple
            control.should_save = True


class ShareOfRunCallback(TrainerCallback):
    """Sets the Trainer's ``epoch`` to the share of the run's steps done.

    The Trainer derives it from the batches since the process began, which a resumed run would count from 0 again.
    """

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Set the share."""
        state.epoch = state.global_step / state.max_steps


class BeforeOptimizerStepCallback(TrainerCallback):
    """Calls a function immediately before each of the Trainer's optimizer steps.

    Args:
        function: what to call.
    """

    def __init__(self, function: Callable[[], None]) -> None:
        self._function = function

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Call the function."""
        self._function()


class TrainEndCallback(TrainerCallback):
    """Calls functions when training begins and when it ended, on the main process.

    Args:
        begin: called before the first step.
        end: called after the last step.
    """

    def __init__(self, begin: Callable[[], None], end: Callable[[], None]) -> None:
        self._begin = begin
        self._end = end

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Call ``begin``."""
        if state.is_world_process_zero:
            self._begin()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Call ``end``."""
        if state.is_world_process_zero:
            self._end()
