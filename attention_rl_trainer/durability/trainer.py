"""A `transformers.Trainer` whose checkpoints are whole, checked, and free of pickle.

The stock Trainer writes a checkpoint in place, file by file: killed meanwhile, it leaves a folder from which it cannot
resume by itself. It keeps the optimizer and the random states as pickles, and the options, the Hub token among them,
in ``training_args.bin``. Here a checkpoint is staged, listed in a manifest, and renamed in one step, and only then are
old ones removed and pushes begun.

A subclass says what else belongs to a run's state, by `save_run_state` and `load_run_state`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils import CONFIG_NAME as ADAPTER_CONFIG_NAME
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_callback import ExportableState, TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy, TrainOutput
from transformers.utils.hub import PushInProgress

from attention_rl_trainer.durability.discovery import CheckpointError, Fact, expect_same_identity, save_identity
from attention_rl_trainer.durability.guard import Interruption, run_lock
from attention_rl_trainer.durability.staging import clear_leftovers, rotate_checkpoints, staged_files, staged_folder
from attention_rl_trainer.durability.states import capture_random_states, load_tree, restore_random_states, save_tree

logger = logging.getLogger(__name__)

OPTIMIZER_NAME = "optimizer.safetensors"
RANDOM_STATES_NAME = "random_states.safetensors"
RUN_STATE_NAME = "run_state.safetensors"
# Options in an optimizer's groups beside its learning rate; other entries may be state.
_GROUP_OPTIONS = ("initial_lr", "betas", "eps", "weight_decay", "momentum")
# What a checkpoint must hold for a run to go on from it.
_PARTS = (SAFETENSORS_WEIGHTS_NAME, OPTIMIZER_NAME, RANDOM_STATES_NAME, RUN_STATE_NAME, TRAINER_STATE_NAME)


class DurableTrainer(Trainer):
    """A Trainer that loses nothing when it is killed, interrupted, or out of disk space.

    Subclasses extend `save_run_state`, `load_run_state` and `run_identity`, name their files in ``checkpoint_parts``,
    and what a run leaves in its folder before its first checkpoint in ``run_trace``.

    Args:
        args: as of `transformers.Trainer`.
        kwargs: likewise.
    """

    checkpoint_parts: tuple[str, ...] = _PARTS
    run_trace: str

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._interruption = Interruption()
        self._loss_before: tuple[Tensor, float, int] | None = None
        self._random_states_before: dict[str, Any] | None = None
        self._callback = _DurabilityCallback(self)
        # Before those of others, which may print.
        self.callback_handler.callbacks.insert(0, self._callback)

    @property
    def output_dir(self) -> Path:
        """The run's folder."""
        return Path(str(self.args.output_dir))

    # ---- A run ----

    @contextmanager
    def run_guarded(self) -> Iterator[None]:
        """Hold the run's folder, tidy up after a run that was killed there, and stop in order when a signal comes.

        Raises:
            RunLockedError: another run holds the folder.
            KeyboardInterrupt: SIGINT came, and a checkpoint was written.
            SystemExit: SIGTERM came, and a checkpoint was written; the code is 143.
        """
        with run_lock(self.output_dir):
            clear_leftovers(self.output_dir)
            with self._interruption:
                yield
            self._interruption.raise_received()

    def train_from(self, checkpoint: Path | None) -> TrainOutput:
        """Train as `transformers.Trainer` does, from a checkpoint on or from the start.

        Args:
            checkpoint: as `find_checkpoint` returned it.

        Returns:
            Steps, mean loss over all steps of the run, and the Trainer's metrics.
        """
        self._loss_before, self._random_states_before = None, None
        output = Trainer.train(self, None if checkpoint is None else str(checkpoint))
        return TrainOutput(output.global_step, output.metrics["train_loss"], output.metrics)

    def load_finished(self, checkpoint: Path) -> None:
        """Go back to a checkpoint of a run that has nothing left to do."""
        self._load_from_checkpoint(str(checkpoint))
        self.load_run_state(checkpoint)
        self.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))

    def _evaluate(self, trial: Any, ignore_keys_for_eval: list[str] | None, skip_scheduler: bool = False) -> Any:
        # The Trainer skips the scheduler for ``eval_on_start`` alone, which means a run's start, not any that goes on.
        if skip_scheduler and self.state.global_step > 0:
            return {}
        # Behind the checkpoint that a signal asked for comes nothing but the end; the run that goes on evaluates.
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
        """Refuse a checkpoint from which this run cannot go on.

        Args:
            checkpoint: its folder, whose files are as they were written.

        Raises:
            CheckpointError: it lacks a part, or belongs to another run.
        """
        for name in self.checkpoint_parts:
            if not (checkpoint / name).is_file():
                raise CheckpointError(
                    f"{checkpoint / name} is missing, so a run cannot go on from {checkpoint} (was it written with "
                    "save_only_model?); choose another checkpoint"
                )
        expect_same_identity(checkpoint, self.run_identity())

    def run_identity(self) -> dict[str, Fact]:
        """Return what must be the same in a run that goes on."""
        return {"world_size": self.args.world_size}

    def interrupt_if_asked(self, control: TrainerControl, *, save: bool) -> None:
        """Have the Trainer stop, and save before, if a signal came.

        Args:
            control: the Trainer's.
            save: whether a checkpoint is still to be written.
        """
        self.mute_closed_outputs()
        if self._interruption.received is not None:
            control.should_save = control.should_save or save
            control.should_training_stop = True

    def restore_loss(self) -> None:
        """Go on with the loss that was summed up since the last log, which the Trainer begins anew."""
        if self._loss_before is not None:
            loss, self._total_loss_scalar, self._globalstep_last_logged = self._loss_before
            self._tr_loss = loss.to(self.args.device)
            self._loss_before = None

    def restore_random_states(self) -> None:
        """Go on with the random states of the checkpoint, once."""
        if self._random_states_before is not None:
            restore_random_states(self._random_states_before, self.args.device)
            self._random_states_before = None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log numbers; the mean loss is that of the whole run, also when it was resumed.

        Args:
            logs: numbers by name.
            start_time: when training began.
        """
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
        """Write what a run needs to go on, beside adapter, optimizer and random states.

        Args:
            folder: the checkpoint's folder.
        """
        tree = {"loss": self._tr_loss, "total_loss": self._total_loss_scalar, "logged": self._globalstep_last_logged}
        save_tree(folder / RUN_STATE_NAME, tree)

    def load_run_state(self, folder: Path) -> None:
        """Read what `save_run_state` wrote.

        Args:
            folder: the checkpoint's folder.
        """
        tree = load_tree(folder / RUN_STATE_NAME)
        self._loss_before = tree["loss"], tree["total_loss"], tree["logged"]

    def save_extras(self, folder: Path) -> None:
        """Write what belongs beside a saved model; nothing, unless a subclass says more.

        Args:
            folder: where the model is saved.
        """

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        # ``state_dict`` is only given by strategies that need several processes.
        folder = Path(output_dir or self.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        with staged_files(folder) as staging:
            self._write_model(staging)
        (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)

    def _write_model(self, folder: Path) -> None:
        # Without training_args.bin: a pickle of the options, with the Hub token in plain bytes.
        parts: list[Any] = [self.model, self.processing_class]
        for part in parts:
            if part is not None:
                part.save_pretrained(folder)
        _sort_sets(folder / ADAPTER_CONFIG_NAME, self.model)
        self.save_extras(folder)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.store_flos()
        target = self.output_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        with staged_folder(target) as folder:
            self._write_model(folder)
            if not self.args.save_only_model:
                assert self.optimizer is not None
                assert self.lr_scheduler is not None
                states = {
                    "optimizer": self.optimizer.state_dict(),
                    "scheduler": self.lr_scheduler.state_dict(),
                    "scheduler_kind": type(self.lr_scheduler).__name__,
                }
                save_tree(folder / OPTIMIZER_NAME, states)
                save_tree(folder / RANDOM_STATES_NAME, capture_random_states(self.args.device))
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

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        # The Trainer annotates ``None`` alone.
        progress: Any = self.push_in_progress
        busy = progress is not None and not progress.is_done()
        if busy and not self.args.hub_always_push:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.save_model(_internal_call=True)
        message = f"Training in progress, step {self.state.global_step}"
        jobs = [self._upload(self.output_dir, message, ignore_patterns=["_*", f"{PREFIX_CHECKPOINT_DIR}-*"])]
        if self.args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            newest = self.args.hub_strategy == HubStrategy.CHECKPOINT
            place = "last-checkpoint" if newest else Path(checkpoint_folder).name
            jobs.append(self._upload(Path(checkpoint_folder), f"{message}, checkpoint", path_in_repo=place))
        if busy:
            progress.jobs.extend(jobs)
        else:
            progress = PushInProgress(jobs)  # type: ignore[arg-type]  # annotated as a single one
            self.push_in_progress = progress

    def _upload(
        self, folder: Path, message: str, path_in_repo: str | None = None, ignore_patterns: list[str] | None = None
    ) -> Future[CommitInfo]:
        assert self.hub_model_id is not None
        return HfApi().upload_folder(
            repo_id=self.hub_model_id,
            folder_path=folder,
            commit_message=message,
            token=self.args.hub_token,
            run_as_future=True,
            revision=self.args.hub_revision,
            path_in_repo=path_in_repo,
            ignore_patterns=ignore_patterns,
        )

    # ---- Reading ----

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        # The Trainer would take a model.safetensors, a pytorch_model.bin or a second adapter that someone left there.
        path = Path(resume_from_checkpoint) / SAFETENSORS_WEIGHTS_NAME
        weights, adapted = load_file(path), self.model
        expected = get_peft_model_state_dict(adapted)
        differing = sorted(
            name
            for name in weights.keys() | expected.keys()
            if name not in weights or name not in expected or weights[name].shape != expected[name].shape
        )
        if differing:
            raise CheckpointError(f"{path} does not fit the adapter; these tensors differ: {', '.join(differing[:5])}")
        set_peft_model_state_dict(adapted, weights)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        states = load_tree(Path(checkpoint) / OPTIMIZER_NAME)
        assert self.optimizer is not None
        assert self.lr_scheduler is not None
        scheduler = self.lr_scheduler
        present = [{name: group[name] for name in _GROUP_OPTIONS if name in group} for group in self._groups()]
        self.optimizer.load_state_dict(states["optimizer"])
        if type(scheduler).__name__ == states["scheduler_kind"]:
            scheduler.load_state_dict(states["scheduler"])
        elif isinstance(scheduler, LambdaLR):
            scheduler.last_epoch = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME)).global_step
        if isinstance(scheduler, LambdaLR):
            # The states are the checkpoint's, the options this run's: a changed learning rate acts.
            for group, options in zip(self._groups(), present, strict=True):
                group.update(options)
            # In closed form, as the schedule computes it: unchanged options give the same rates.
            scheduler.base_lrs = [group["initial_lr"] for group in self._groups()]
            factors = [function(scheduler.last_epoch) for function in scheduler.lr_lambdas]
            rates = [base * factor for base, factor in zip(scheduler.base_lrs, factors, strict=True)]
            for group, rate in zip(self._groups(), rates, strict=True):
                group["lr"] = rate
            scheduler._last_lr = rates
        else:
            # It keeps the rate in the groups alone, and may change more than the rate.
            logger.warning(
                "%s goes on with the learning rate and the other options of the optimizer that the checkpoint holds",
                type(scheduler).__name__,
            )
        self.load_run_state(Path(checkpoint))

    def _groups(self) -> list[dict[str, Any]]:
        assert self.optimizer is not None
        return list(self.optimizer.param_groups)

    def _load_scaler(self, checkpoint: str | None) -> None:
        """Read nothing: there is no gradient scaler, and a file of its name would be a pickle of someone else's."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        # The Trainer calls this before it makes the loader's iterator, which draws a seed for workers; the whole run
        # drew that at its start. So they wait for the first step.
        if checkpoint is not None:
            self._random_states_before = load_tree(Path(checkpoint) / RANDOM_STATES_NAME)


def _sort_sets(path: Path, model: Any) -> None:
    """Give an adapter's module names an order: PEFT keeps sets, which come out differently in each process."""
    if not path.is_file():
        return
    options = vars(model.peft_config[model.active_adapter])
    names = [name for name, value in options.items() if isinstance(value, set)]
    config = json.loads(path.read_text(encoding="utf-8"))
    config |= {name: sorted(config[name]) for name in names}
    path.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


class _DurabilityCallback(TrainerCallback):
    """Tells a `DurableTrainer` when a run begins and when it may stop."""

    def __init__(self, trainer: DurableTrainer) -> None:
        self._trainer = trainer
        self.saved_step = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._trainer.restore_loss()
        self.saved_step = state.global_step
        # A resumed Trainer would go on with the intervals of the checkpoint.
        state.compute_steps(args, state.max_steps)  # type: ignore[no-untyped-call]  # not annotated there

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._trainer.restore_random_states()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
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
