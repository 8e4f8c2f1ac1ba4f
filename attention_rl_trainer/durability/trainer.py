"""A `transformers.Trainer` whose checkpoints are whole, checked, and free of pickle.

The stock Trainer writes a checkpoint in place, file by file: killed while it does, it leaves a folder from which it
cannot resume by itself. It keeps the optimizer and the random states as pickles, and the options, the Hub token among
them, in ``training_args.bin``. Here a checkpoint is staged, listed in a manifest, and renamed in one step, and only
then are old ones removed and pushes begun.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_callback import ExportableState, TrainerControl
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput

from attention_rl_trainer.durability.callback import DurabilityCallback, LastCallback
from attention_rl_trainer.durability.discovery import CheckpointError, Fact, expect_same_identity, save_identity
from attention_rl_trainer.durability.guard import Interruption, run_lock
from attention_rl_trainer.durability.optimizers import OPTIMIZER_NAME, load_optimizer, save_optimizer
from attention_rl_trainer.durability.pushing import PushingTrainer
from attention_rl_trainer.durability.resume import ResumePoint, trainer_state
from attention_rl_trainer.durability.staging import clear_leftovers, rotate_checkpoints, staged_files, staged_folder
from attention_rl_trainer.durability.states import capture_random_states, load_tree, restore_random_states, save_tree
from attention_rl_trainer.durability.weights import adapter_digest, load_adapter, save_adapter

logger = logging.getLogger(__name__)

RANDOM_STATES_NAME = "random_states.safetensors"
RUN_STATE_NAME = "run_state.safetensors"
# What a checkpoint must hold for a run to resume from it.
_PARTS = (SAFETENSORS_WEIGHTS_NAME, OPTIMIZER_NAME, RANDOM_STATES_NAME, RUN_STATE_NAME, TRAINER_STATE_NAME)


class DurableTrainer(PushingTrainer):
    """A Trainer of an adapter that loses nothing when it is killed, interrupted, or out of disk space.

    Of several processes the first one writes and the others wait for it; all read.

    Subclasses extend `save_run_state`, `load_run_state` and `run_identity`.
    """

    free_options: Sequence[str] = ()
    checkpoint_parts: tuple[str, ...] = _PARTS
    """Files of a checkpoint that a run needs; a subclass adds its own."""
    run_trace: str
    """A file that a run leaves in its folder before its first checkpoint."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._interruption = Interruption()
        self._loss_before: tuple[Tensor, float, int] | None = None
        self._random_states_before: dict[str, Any] | None = None
        self._start: ResumePoint | None = None
        self._callback = DurabilityCallback(self)
        # Before those of others, which may print.
        self.callback_handler.callbacks.insert(0, self._callback)
        self.add_callback(LastCallback(self))

    # ---- A run ----

    @contextmanager
    def run_guarded(self) -> Iterator[None]:
        """Hold the run's folder, tidy up after a run that was killed there, and stop in order when a signal comes.

        Raises:
            RunLockedError: another run holds the folder.
            KeyboardInterrupt: SIGINT came, and a checkpoint was written.
            SystemExit: SIGTERM came, and a checkpoint was written; the code is 143.
        """
        with ExitStack() as held:

            def take_folder() -> None:
                held.enter_context(run_lock(self.output_dir))
                clear_leftovers(self.output_dir)

            self.processes.on_main(take_folder)
            with self._interruption:
                yield
            self._interruption.raise_received()

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Run all steps, or those that are left after a checkpoint; the mean loss is over all steps of the run.

        Args:
            resume_from_checkpoint: a checkpoint's folder, or true for the newest in ``output_dir``.
            trial: unused, like ``ignore_keys_for_eval``.

        Raises:
            CheckpointError: there is no such checkpoint, it is damaged, or it belongs to another run.
            StagingError: a checkpoint could not be written.
            RunLockedError: another run writes to ``output_dir``.
            KeyboardInterrupt: SIGINT came, and a checkpoint was written.
            SystemExit: SIGTERM came, and a checkpoint was written; the code is 143.
        """
        with self.run_guarded():
            found = resume_from_checkpoint, self.output_dir, self.run_trace
            start = self.processes.on_main(lambda: ResumePoint.find(*found))
            self.start_afresh()
            if start.checkpoint is not None:
                self.expect_own_checkpoint(start.checkpoint)
            steps = self.steps_left(start.checkpoint)
            if start.checkpoint is not None and steps == 0:
                return self._stay_finished(start, start.checkpoint)
            if self.processes.is_main:
                start.warn_of_changed_options(self.run_trace, self.run_options(), self.free_options)
            self._start = start
            with self.running(start.global_step + steps):
                self._loss_before, self._random_states_before = None, None
                output = super().train(None if start.checkpoint is None else str(start.checkpoint))
            self.processes.on_main(self.end_run)
            return TrainOutput(output.global_step, output.metrics["train_loss"], output.metrics)

    def _begin_writing(self) -> None:
        """Make the folder the run's own, once: set aside what is not resumed, take over what is from elsewhere."""
        start, self._start = self._start, None
        if start is None:
            return

        def begin() -> None:
            start.set_aside_others(self.records, self.outputs)
            start.adopted(self.records)
            self.begin_records(is_resumed=start.checkpoint is not None)

        self.processes.on_main(begin)

    @property
    def is_folder_own(self) -> bool:
        """Whether the run, if there is one, has begun to write, so that no earlier one is in its folder."""
        return self._start is None

    def _stay_finished(self, start: ResumePoint, checkpoint: Path) -> TrainOutput:
        """Load what a finished run has learned, and run nothing."""
        if self.processes.is_main:
            logger.warning("%s is the end of its run; nothing is run", checkpoint)
        self._load_from_checkpoint(str(checkpoint))
        self.load_run_state(checkpoint)
        self.state = trainer_state(checkpoint)
        loss = 0.0
        if self._loss_before is not None:
            since_last_log, total, _ = self._loss_before
            loss = (since_last_log.item() + total) / max(start.global_step, 1)
        if start.is_own:
            # A run that was killed after its last checkpoint did not come to these.
            self.processes.on_main(self.rotate)
            self.processes.on_main(lambda: self.end_run(is_repeated=True))
        return TrainOutput(start.global_step, loss, {})

    # What a subclass says of its runs.

    def start_afresh(self) -> None:
        """Forget the run before."""

    def steps_left(self, checkpoint: Path | None) -> int:
        """Count the Trainer's steps from a checkpoint, or from the start, to the end of the run."""
        raise NotImplementedError

    @property
    def records(self) -> Sequence[Path]:
        """What a run leaves in its folder beside checkpoints."""
        return ()

    @property
    def outputs(self) -> Sequence[Path]:
        """What is made of a run and is not resumed from: of a run that is set aside, it goes with it."""
        return ()

    def run_options(self) -> Mapping[str, Any]:
        """Return the options by name, as ``run_trace`` holds them."""
        return {}

    @contextmanager
    def running(self, max_steps: int) -> Iterator[None]:
        """Tell the Trainer its number of steps; outside of a run the options stay as the user made them."""
        self.args.max_steps = max_steps
        try:
            yield
        finally:
            self.args.max_steps = -1
            self._start, self.is_in_train = None, False

    def begin_run(self) -> None:
        """On all processes, before the first step; an earlier run may be in the folder still."""

    def begin_records(self, *, is_resumed: bool) -> None:
        """On the main process, when the folder is the run's own, in its first step."""

    def begin(self) -> None:
        """Begin a run.

        Where an earlier run is in the folder, nothing is written until the first step lacks nothing but its end: a
        start that fails, for want of usable articles or for numbers that are not finite, leaves the earlier run as it
        was.
        """
        self.begin_run()
        start = self._start
        if start is not None and self.processes.on_main(lambda: start.is_first_run(self.records, self.run_trace)):
            self._begin_writing()

    def before_optimizer_step(self) -> None:
        """Before each optimizer step of the Trainer."""
        self._begin_writing()

    def checkpoint_is_due(self) -> bool:
        """Whether the step that ended is to be saved; at a run's end, and when a signal comes, it is saved anyway."""
        return False

    def end_run(self, *, is_repeated: bool = False) -> None:
        """On the main process, after the last step; ``is_repeated`` where a finished run is resumed."""

    def _evaluate(self, trial: Any, ignore_keys_for_eval: list[str] | None, skip_scheduler: bool = False) -> Any:
        # The Trainer skips the scheduler for ``eval_on_start`` alone, which means a run's start, not a resumed one's.
        if skip_scheduler and self.state.global_step > 0:
            return {}
        # After the checkpoint that a signal asked for comes nothing but the end; the resumed run evaluates.
        is_saved = self._callback.saved_step == self.state.global_step
        if self._interruption.received is not None and is_saved and self.state.global_step < self.state.max_steps:
            return {}
        return super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        return bool(metrics) and super()._determine_best_metric(metrics, trial)

    def mute_closed_outputs(self) -> None:
        """Print into nothing where a signal came and nobody reads any more what is printed."""
        self._interruption.mute_closed_outputs()

    def expect_own_checkpoint(self, checkpoint: Path) -> None:
        """Refuse a checkpoint, undamaged as it is, from which this run cannot resume.

        Raises:
            CheckpointError: it lacks a part, or belongs to another run.
        """
        for name in self.checkpoint_parts:
            if not (checkpoint / name).is_file():
                raise CheckpointError(
                    f"{checkpoint / name} is missing, so a run cannot resume from {checkpoint} (was it written with "
                    "save_only_model?); choose another checkpoint"
                )
        expect_same_identity(checkpoint, self.run_identity())

    def run_identity(self) -> dict[str, Fact]:
        """Return what must be the same in a run that resumes."""
        return {}

    def interrupt_if_asked(self, control: TrainerControl, *, save: bool) -> None:
        """Have the Trainer stop if a signal came, with ``save`` after another checkpoint."""
        self.mute_closed_outputs()
        # A signal may reach one process alone, or one of them a step later.
        received = [number for number in self.processes.gather(self._interruption.received) if number is not None]
        if received:
            self._interruption.received = received[0]
            control.should_save = control.should_save or save
            control.should_training_stop = True

    def restore_loss(self) -> None:
        """Take up the loss summed since the checkpoint's last log, which the Trainer begins anew."""
        if self._loss_before is not None:
            loss, self._total_loss_scalar, self._globalstep_last_logged = self._loss_before
            self._tr_loss = loss.to(self.args.device)
            self._loss_before = None

    def restore_random_states(self) -> None:
        """Take up the random states of the checkpoint, once."""
        if self._random_states_before is not None:
            restore_random_states(self._random_states_before, self.args.device)
            self._random_states_before = None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log numbers; the mean loss is that of the whole run, also when it was resumed."""
        if "train_loss" in logs:
            logs["train_loss"] = self._total_loss_scalar / max(self.state.global_step, 1)
        super().log(logs, start_time)

    # ---- Writing ----

    def rotate(self) -> None:
        """Remove the oldest checkpoints beyond ``save_total_limit``; where the system refuses, they stay."""
        try:
            rotate_checkpoints(self.output_dir, self.args.save_total_limit)
        except OSError as error:
            logger.warning("Old checkpoints in %s could not be removed: %s", self.output_dir, error)

    def save_run_state(self, folder: Path) -> None:
        """Write what a run needs to resume, beside adapter, optimizer and random states."""
        tree = {"loss": self._tr_loss, "total_loss": self._total_loss_scalar, "logged": self._globalstep_last_logged}
        save_tree(folder / RUN_STATE_NAME, tree)

    def load_run_state(self, folder: Path) -> None:
        """Read what `save_run_state` wrote."""
        tree = load_tree(folder / RUN_STATE_NAME)
        self._loss_before = tree["loss"], tree["total_loss"], tree["logged"]

    def save_extras(self, folder: Path) -> None:
        """Write what belongs beside a saved model; nothing, unless a subclass says more."""

    def save_card(self, folder: Path, *, with_picture: bool) -> None:
        """Write the model card in the place of PEFT's; ``with_picture`` where it is not a checkpoint's."""

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if not self.processes.is_main:
            return
        # ``state_dict`` is only given by strategies that share the model over processes.
        folder = Path(output_dir or self.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        with staged_files(folder) as staging:
            self._write_model(staging, with_picture=True)
        (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)

    def _write_model(self, folder: Path, *, with_picture: bool = False) -> None:
        # Without training_args.bin: a pickle of the options, with the Hub token in plain bytes.
        save_adapter(folder, self._adapted)
        tokenizer: Any = self.processing_class
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        self.save_extras(folder)
        self.save_card(folder, with_picture=with_picture)

    @property
    def _adapted(self) -> PeftModel:
        assert isinstance(self.model, PeftModel)
        return self.model

    @property
    def _optimizer_and_scheduler(self) -> tuple[Optimizer, LRScheduler]:
        assert self.optimizer is not None
        assert self.lr_scheduler is not None
        return self.optimizer, self.lr_scheduler

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.store_flos()
        shares = self.processes.gather((adapter_digest(self._adapted), capture_random_states(self.args.device)))
        if len({digest for digest, _ in shares}) > 1:
            raise RuntimeError(
                f"the processes hold different adapters after step {self.state.global_step}; nothing was saved. Does a "
                "callback or a part of your own draw random numbers, or change weights, in some of them only?"
            )
        self.processes.on_main(lambda: self._write_checkpoint([states for _, states in shares]))

    def _write_checkpoint(self, random_states: list[dict[str, Any]]) -> None:
        target = self.output_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        with staged_folder(target) as folder:
            self._write_model(folder)
            if not self.args.save_only_model:
                save_optimizer(folder, *self._optimizer_and_scheduler)
                save_tree(folder / RANDOM_STATES_NAME, random_states)
                self.save_run_state(folder)
            self._export_callbacks()
            self.state.save_to_json(str(folder / TRAINER_STATE_NAME))
            save_identity(folder, self.run_identity())
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(target))
        self.rotate()

    def _export_callbacks(self) -> None:
        """Bring the exportable states in the Trainer's state up to date, as the Trainer does."""
        by_name: dict[str, list[Any]] = {}
        for callback in (*self.callback_handler.callbacks, self.control):
            if isinstance(callback, ExportableState):
                by_name.setdefault(type(callback).__name__, []).append(callback.state())
        # The Trainer annotates a list; what it keeps is a dict by name, of lists where there are several of a name.
        states: Any = {name: found[0] if len(found) == 1 else found for name, found in by_name.items()}
        self.state.stateful_callbacks = states

    # ---- Reading ----

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_adapter(Path(resume_from_checkpoint), self._adapted)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            folder = Path(checkpoint)
            load_optimizer(folder, *self._optimizer_and_scheduler, step=trainer_state(folder).global_step)
            self.load_run_state(folder)

    def _load_scaler(self, checkpoint: str | None) -> None:
        """Read nothing: there is no gradient scaler, and a file of its name would be a pickle of someone else's."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        # The Trainer calls this before it makes the loader's iterator, which draws a seed for workers; the whole run
        # drew that at its start. So they wait for the first step.
        if checkpoint is not None:
            states = load_tree(Path(checkpoint) / RANDOM_STATES_NAME)
            # A run of more processes than before has none of its own for the new ones.
            self._random_states_before = states[min(self.processes.index, len(states) - 1)]
