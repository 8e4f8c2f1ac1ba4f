"""What a run of episodes is to a durable Trainer: its data, its length, what it leaves, and from where it resumes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

from torch.utils.data import DataLoader
from transformers.trainer_utils import PredictionOutput

from attention_rl_trainer.config import AttentionGuidedRLConfig
from attention_rl_trainer.durability.discovery import Fact
from attention_rl_trainer.durability.states import Stateful
from attention_rl_trainer.errors import RunContext
from attention_rl_trainer.evaluation.evaluate import expect_evaluable
from attention_rl_trainer.memories import ArticleStream, MemoryLoader, PlainTextEncoder
from attention_rl_trainer.models import PolicyModel
from attention_rl_trainer.models.base import ModelName
from attention_rl_trainer.models.causal_lm import quantized_bits
from attention_rl_trainer.models.trial import expect_trainable
from attention_rl_trainer.planning import preflight
from attention_rl_trainer.probing.calibrated import CalibratedSelector
from attention_rl_trainer.processes import SharedBatches
from attention_rl_trainer.publishing.card import CardFacts
from attention_rl_trainer.publishing.data import describe_data
from attention_rl_trainer.publishing.published import OUTPUTS, published_files
from attention_rl_trainer.publishing.reproduction import changed_options
from attention_rl_trainer.publishing.trainer import PublishingTrainer
from attention_rl_trainer.records.identity import calibration_origin, identity_facts, kind_of
from attention_rl_trainer.records.progress import CHECKPOINT_PARTS, Progress, expect_format, restore_run, save_run
from attention_rl_trainer.records.recorder import Recorder
from attention_rl_trainer.records.summary import REPORT_FOLDER
from attention_rl_trainer.rollout import Layout, MemoryEnvironment, RewardFunction, Separators
from attention_rl_trainer.update import TrajectoryFilter, Updater
from attention_rl_trainer.update.warm_start import WarmStartOptions

RUN_CONFIG_NAME = "attention_rl_config.json"
WARM_START = tuple(item.name for item in fields(WarmStartOptions))


class EpisodeTrainer(PublishingTrainer):
    """A Trainer whose run is counted in episodes and kept by its parts; a subclass makes the parts, and takes steps."""

    args: AttentionGuidedRLConfig
    checkpoint_parts = (*PublishingTrainer.checkpoint_parts, *CHECKPOINT_PARTS)
    run_trace = RUN_CONFIG_NAME
    free_options = ("num_episodes",)

    policy: PolicyModel
    encoder: PlainTextEncoder
    separators: Separators
    layout: Layout
    loader: MemoryLoader
    selector: CalibratedSelector
    environment: MemoryEnvironment
    reward_fn: RewardFunction | None
    filter: TrajectoryFilter
    progress: Progress
    recorder: Recorder
    updater: Updater
    context: RunContext
    _stream: ArticleStream | None
    _identity: dict[str, Fact] | None
    _waiting: list[Callable[[], object]]
    """What is to be written once the folder is the run's own."""
    _own_parts: Mapping[str, str]
    """Kinds of the parts that a user gave, by the name of the argument."""
    _given_optimizer: str | None
    """As the Trainer's option ``optim`` names its own."""

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return an endless loader of memories, from the run's position."""
        if self.train_dataset is None:
            raise ValueError("training needs a train_dataset of articles; give one to the trainer")
        self._stream = self.loader.training_stream(self.train_dataset, self.progress.open_stream())
        batches = self.loader.batches(self._stream, self.args.generation_batch_size * self.processes.count)
        if self.processes.count == 1:
            return batches
        # The Trainer does no more than iterate over it.
        return cast("DataLoader[Any]", SharedBatches(batches, self.processes))

    def floating_point_ops(self, inputs: Mapping[str, Any]) -> int:
        """Return 0: a batch of memories is not a model input whose operations the Trainer could count."""
        return 0

    def steps_left(self, checkpoint: Path | None) -> int:
        """Count the steps that warm start and ``num_episodes`` ask for beyond those of a checkpoint."""
        if checkpoint is not None:
            self.progress.read(checkpoint)
            if (left := self.progress.warm_start_left) % self.args.episodes_per_step:
                raise ValueError(
                    f"{checkpoint} stands in the warm start with {left} of its trajectories left, which are not whole "
                    f"steps of {self.args.episodes_per_step} (generation_batch_size × gradient_accumulation_steps × "
                    "processes); resume with the numbers that it was written with"
                )
        phases = self.progress.warm_start_left, self.progress.episodes_left
        return sum(math.ceil(left / self.args.episodes_per_step) for left in phases)

    @property
    def parts(self) -> dict[str, Stateful]:
        """The parts of a run whose states a checkpoint keeps, and a failed update restores."""
        return {"filter": self.filter, "progress": self.progress, "updater": self.updater, "recorder": self.recorder}

    @property
    def records(self) -> list[Path]:
        """The ledger and the report."""
        return [self.recorder.ledger.path, self.output_dir / REPORT_FOLDER]

    @property
    def outputs(self) -> list[Path]:
        """The adapter, with what is beside it, and the evaluations."""
        return [self.output_dir / name for name in OUTPUTS]

    def run_options(self) -> dict[str, Any]:
        """Return the options as they are written."""
        return self.args.to_jsonable()

    @contextmanager
    def running(self, max_steps: int) -> Iterator[None]:
        """Name the run in the errors raised inside."""
        with super().running(max_steps), self.context.phase("run", self.args.episodes_per_step):
            yield

    def begin_run(self) -> None:
        """Show what will run, and check what its evaluations need."""
        has_other_heads = self.calibrate()
        if self.args.gradient_checkpointing or has_other_heads:  # it was off when the trainer was made
            self._expect_trainable()
        if self.processes.is_main:
            preflight.print_facts(self._run_facts())
            preflight.warn_of_shortage(self.args, self.policy, self.separators)
        if self.args.eval_strategy != "no" or self.args.eval_on_start:
            expect_evaluable(self.loader, self.eval_dataset, self.args)

    def begin_records(self, *, is_resumed: bool) -> None:
        """Write the options and what waited, and remove what is not of this run from its ledger and its report."""
        self.save_extras(self.output_dir)
        if is_resumed:
            self.recorder.cut_ledger()
        self.recorder.forget_report()
        for write in self._waiting:
            write()

    def write_when_own(self, write: Callable[[], object]) -> None:
        """Write on the main process: now, or once an earlier run that is in the folder still is set aside."""
        if self.is_folder_own:
            write()
        else:
            self._waiting.append(write)

    def end_run(self, *, is_repeated: bool = False) -> None:
        """Write the report of what was run, unless an earlier end of the run did."""
        if not self.args.report_at_end or self.progress.num_episodes == 0 or (is_repeated and self.recorder.has_report):
            return
        if is_repeated:
            self.recorder.cut_ledger()
        self.recorder.write_report(self.state.log_history, self._run_facts(), self.updater.num_updates)

    def _run_facts(self) -> dict[str, Fact]:
        calibrated = self.selector.describe()
        facts = preflight.run_facts(self.args, self.policy, self.layout)
        return facts if calibrated is None else facts | {"calibration": calibrated}

    def checkpoint_is_due(self) -> bool:
        """Whether the step reached or passed a multiple of ``save_episodes``, or was the last one."""
        done, every = self.progress.num_trajectories, self.args.save_episodes
        passed = done // every > (done - self.args.episodes_per_step) // every
        return passed or self.state.global_step >= self.state.max_steps

    def predict(self, *args: Any, **kwargs: Any) -> PredictionOutput:
        """Refuse: there are no labels to predict; `evaluate` measures a policy."""
        raise NotImplementedError("there is nothing to predict; use evaluate()")

    def _expect_trainable(self) -> None:
        args = self.args
        needs = {
            "information_coef": args.information_coef > 0,
            "num_queries": args.num_queries > 1,
            "selector_gradient": args.needs_choice_values,
            "warm_start_temperature": args.warm_start_temperature is not None,
        }
        trees_for = [name for name, is_needed in needs.items() if is_needed]
        expect_trainable(self.policy, through_choice=args.selector_coef > 0, trees_for=trees_for)

    def calibrate(self) -> bool:
        """Fit heads, means and temperature of the selector, where the options ask for it and it was not done yet.

        `train` and `evaluate` do this by themselves; returns whether something was fitted.
        """
        described = self.policy.model, self.encoder.tokenizer, self.train_dataset, self.args
        return self.selector.ensure(self.train_dataset, lambda: calibration_origin(*described))

    # ---- Checkpoints ----

    def expect_own_checkpoint(self, checkpoint: Path) -> None:
        """Refuse a checkpoint of another format or another run, or one that lacks a part."""
        expect_format(checkpoint)
        self.selector.restore(checkpoint)
        super().expect_own_checkpoint(checkpoint)

    def run_identity(self) -> dict[str, Fact]:
        """Return what must be the same in a run that resumes: model, adapter, tokens, articles and parts."""
        if self._identity is None:  # once a run: it reads rows of the data set
            args, workers = self.args, self.args.dataloader_num_workers
            facts = identity_facts(self.policy.model, self.encoder.tokenizer, self.train_dataset, args, args, workers)
            parts = {"environment": self.environment, "reward_fn": self.reward_fn, "reward_filter": self.filter}
            facts |= {name: None if part is None else kind_of(part) for name, part in parts.items()}
            # The states of one optimizer mean nothing to another.
            optim = self._given_optimizer or str(getattr(args.optim, "value", args.optim))
            # Without a warm start the others say nothing.
            names = WARM_START if args.warm_start_episodes else ("warm_start_episodes",)
            warm_start = {name: getattr(args, name) for name in names}
            if args.warm_start_order == "random":  # older checkpoints know no other
                warm_start.pop("warm_start_order", None)
            self._identity = super().run_identity() | facts | warm_start | {"seed": args.seed, "optim": optim}
        # Each process has random numbers of its own for dropout; nothing else depends on their number.
        dropout = {"processes": self.processes.count} if self._draws_dropout else {}
        return self._identity | {"selector": self.selector.digest} | dropout

    @property
    def _draws_dropout(self) -> bool:
        rates = [getattr(item, "lora_dropout", 0) for item in self.policy.model.peft_config.values()]
        return not self.args.disable_dropout and any(rates)

    def save_extras(self, folder: Path) -> None:
        """Write the options beside a saved adapter, as JSON, and the selector's calibration."""
        self.args.save_json(folder / RUN_CONFIG_NAME)
        self.selector.save(folder)

    def save_run_state(self, folder: Path) -> None:
        """Write the states of the run's parts, and the previous adapter."""
        super().save_run_state(folder)
        self.recorder.ledger.sync()
        save_run(folder, self.parts, self.updater.previous_adapter)

    def load_run_state(self, folder: Path) -> None:
        """Go back to what `save_run_state` wrote."""
        super().load_run_state(folder)
        restore_run(folder, self.parts, self.updater.previous_adapter)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        position = self.progress.open_stream()
        if self._stream is not None:
            self._stream.position = position

    # ---- The card ----

    def save_card(self, folder: Path, *, with_picture: bool) -> None:
        """Write the card; the learning curve is drawn where reports are."""
        super().save_card(folder, with_picture=with_picture and self.args.report_at_end)

    @property
    def published_files(self) -> Sequence[str]:
        """Adapter, options, calibration, tokenizer, card and figures; the ledger and the report where it is asked."""
        return published_files(self.args)

    def card_facts(self) -> CardFacts:
        """Collect what the card says of the adapter."""
        config = self.policy.model.peft_config[self.policy.model.active_adapter].to_dict()
        return CardFacts(
            name=self._destination().repo_id.rpartition("/")[2],
            repo_id=self.hub_model_id or self.args.hub_model_id,
            tags=self._tag_names,
            base=ModelName(config.get("base_model_name_or_path") or "", config.get("revision")),
            dtype=str(self.policy.causal_lm.dtype).removeprefix("torch."),
            bits=quantized_bits(self.policy.causal_lm),
            adapter=config,
            num_parameters=sum(p.numel() for p in self.policy.model.parameters() if p.requires_grad),
            data=describe_data(self.train_dataset),
            options=changed_options(self.args),
            own_parts=self._own_parts,
            calibration=self.selector.describe(),
            counts=self.recorder.counts(self.updater.num_updates),
            planned_episodes=self.args.num_episodes,
            metadata=self.card_metadata,
        )
