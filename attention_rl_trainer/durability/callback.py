"""What happens between the steps of a `DurableTrainer`."""
# ruff: noqa: D102  # the hooks are those of transformers

from __future__ import annotations

from typing import Any, Protocol

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class _Durable(Protocol):
    """What is asked of the trainer; each is described there."""

    is_in_train: bool

    def restore_loss(self) -> None: ...
    def restore_random_states(self) -> None: ...
    def begin(self) -> None: ...
    def before_optimizer_step(self) -> None: ...
    def checkpoint_is_due(self) -> bool: ...
    def interrupt_if_asked(self, control: TrainerControl, *, save: bool) -> None: ...
    def mute_closed_outputs(self) -> None: ...


class DurabilityCallback(TrainerCallback):
    """Tells a `DurableTrainer` when a run begins, when a step does, and when it may stop."""

    def __init__(self, trainer: _Durable) -> None:
        self._trainer = trainer
        self.saved_step = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._trainer.restore_loss()
        self.saved_step = state.global_step
        # A resumed Trainer would keep the intervals of the checkpoint.
        state.compute_steps(args, state.max_steps)  # type: ignore[no-untyped-call]  # not annotated there
        self._trainer.begin()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._trainer.restore_random_states()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # The Trainer derives it from the batches since the process began, which a resumed run would count from 0 again.
        state.epoch = state.global_step / state.max_steps
        control.should_save = control.should_save or self._trainer.checkpoint_is_due()
        self._trainer.interrupt_if_asked(control, save=True)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._trainer.mute_closed_outputs()

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # A signal that came during an evaluation within a run; the Trainer saves after it if asked.
        if self._trainer.is_in_train:
            self._trainer.interrupt_if_asked(control, save=self.saved_step != state.global_step)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.saved_step = state.global_step
        # A signal that came while the checkpoint was being written.
        self._trainer.interrupt_if_asked(control, save=False)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # The Trainer comes here after its last step, also where a callback ended the run; it saves afterwards if asked.
        if self.saved_step != state.global_step:
            control.should_save = True


class LastCallback(TrainerCallback):
    """Comes after those of others, which may change a gradient."""

    def __init__(self, trainer: _Durable) -> None:
        self._trainer = trainer

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._trainer.before_optimizer_step()
