"""`AttentionGuidedRLTrainer`: when a run rolls out, judges, updates and writes down (design §10).

What each of these computes is in the rooms below: `rollout`, `update`, `records`, `evaluation`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, set_seed
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK
from transformers.trainer_callback import TrainerControl, TrainerState
from transformers.trainer_utils import PredictionOutput, TrainOutput

from attention_rl_trainer.config import AttentionGuidedRLConfig
from attention_rl_trainer.durability.discovery import Fact
from attention_rl_trainer.durability.resume import ResumePoint
from attention_rl_trainer.durability.states import Stateful
from attention_rl_trainer.durability.trainer import DurableTrainer
from attention_rl_trainer.errors import RunContext
from attention_rl_trainer.evaluation.evaluate import SEED_OFFSET, evaluate
from attention_rl_trainer.evaluation.tables import folder_name
from attention_rl_trainer.memories.loading import Articles, MemoryLoader, collate_inputs
from attention_rl_trainer.memories.stream import ArticleStream
from attention_rl_trainer.memories.tokenization import PlainTextEncoder
from attention_rl_trainer.models.adapters import add_adapter
from attention_rl_trainer.models.causal_lm import base_language_model, dropout_disabled, input_embeddings
from attention_rl_trainer.models.choice import load_named_model, tokenizer_of
from attention_rl_trainer.models.policy import PolicyModel
from attention_rl_trainer.planning import preflight
from attention_rl_trainer.records.console import EpisodeProgressCallback
from attention_rl_trainer.records.health import HealthLimits
from attention_rl_trainer.records.identity import article_facts, model_facts, option_facts
from attention_rl_trainer.records.progress import (
    PREVIOUS_ADAPTER_NAME,
    STATE_NAME,
    Progress,
    load_parts,
    load_previous_adapter,
    save_parts,
)
from attention_rl_trainer.records.recorder import Recorder
from attention_rl_trainer.records.summary import REPORT_FOLDER
from attention_rl_trainer.rollout.environment import KVMemoryEnvironment, MemoryEnvironment
from attention_rl_trainer.rollout.layout import Layout, Separators
from attention_rl_trainer.rollout.reward import RewardFunction
from attention_rl_trainer.rollout.sampler import TrajectorySampler
from attention_rl_trainer.update.filter import RewardFilter, TrajectoryFilter
from attention_rl_trainer.update.kept import KeptTrajectories
from attention_rl_trainer.update.objective import LossTerms, compute_loss_terms
from attention_rl_trainer.update.updater import Updater

logger = logging.getLogger(__name__)

Optimizers: TypeAlias = tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None]

RUN_CONFIG_NAME = "attention_rl_config.json"


class AttentionGuidedRLTrainer(DurableTrainer):
    """Trains a language model to direct its own reading of articles.

    Args:
        model: the base model, or its name: a Hub name, a folder, ``"offline"`` or ``"auto"``; or a PEFT model.
        args: options; by default those of `AttentionGuidedRLConfig` with a folder named after the model.
        train_dataset: articles: a (streamed) `datasets` data set with a text column, or an `ArticleSource` such as a list
            of rows.
        eval_dataset: articles for `evaluate`.
        processing_class: the tokenizer; by default the base model's own. It must be a fast one.
        peft_config: the adapter; by default LoRA of rank 8, alpha 16 on all attention projections.
        callbacks: further callbacks.
        environment: where queries draw pairs from; by default a `KVMemoryEnvironment`.
        reward_fn: a `RewardFunction`, step to ``[B]``, in place of the default reward.
        reward_filter: a `TrajectoryFilter`, which trajectories are trained on; by default a `RewardFilter`.
        optimizers: an optimizer and a scheduler to use instead of those that ``args`` names.

    Raises:
        ValueError: an option, the data or the model cannot work; names what and the way out.
    """

    _tag_names = ("attention-guided-rl", "reinforcement-learning", "lora")

    args: AttentionGuidedRLConfig
    checkpoint_parts = (*DurableTrainer.checkpoint_parts, STATE_NAME, PREVIOUS_ADAPTER_NAME)
    run_trace = RUN_CONFIG_NAME

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: AttentionGuidedRLConfig | None = None,
        train_dataset: Articles | None = None,
        eval_dataset: Articles | dict[str, Articles] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: PeftConfig | None = None,
        callbacks: list[TrainerCallback] | None = None,
        environment: MemoryEnvironment | None = None,
        reward_fn: RewardFunction | None = None,
        reward_filter: TrajectoryFilter | None = None,
        optimizers: Optimizers = (None, None),
    ) -> None:
        if args is None:
            name = model if isinstance(model, str) else model.config.name_or_path
            args = AttentionGuidedRLConfig(output_dir=f"{Path(name or 'model').name}-attention-rl")
        preflight.expect_one_process(args.world_size, args.n_gpu)
        preflight.expect_double_precision(args.device)
        preflight.expect_writable(Path(str(args.output_dir)))
        # The base class does this too, but only after the adapter has drawn its first weights.
        set_seed(args.seed)
        if isinstance(model, str):
            loading = args.model_init_kwargs if isinstance(args.model_init_kwargs, dict) else {}
            model, processing_class = load_named_model(model, args.device, loading, processing_class)
        processing_class = processing_class or tokenizer_of(model)
        adapted = add_adapter(model, peft_config)
        adapted.add_model_tags(list(self._tag_names))
        self.encoder = PlainTextEncoder(processing_class)
        self.separators = Separators.encode(self.encoder)
        self.layout = Layout.of(args, self.separators)
        self.environment = environment or KVMemoryEnvironment(args)
        self.reward_fn = reward_fn
        self.filter = reward_filter or RewardFilter(args)
        preflight.expect_log_prob(self.environment, args.selector_coef)
        preflight.expect_fitting_vocabulary(self.encoder.max_token_id, input_embeddings(base_language_model(adapted)))
        preflight.expect_fitting_context(self.layout, preflight.context_length(adapted))
        if eval_dataset is not None:
            preflight.expect_fitting_orders(self.layout, preflight.context_length(adapted), args)
        # The base class wants a number of steps for data without a length; a run's own number is set by `train`.
        with _max_steps(args, math.ceil(args.num_episodes / args.episodes_per_step)):
            super().__init__(
                model=adapted,
                args=args,
                data_collator=partial(collate_inputs, tokens_per_key=args.tokens_per_key),
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                callbacks=callbacks,
                optimizers=optimizers,
            )
        preflight.expect_no_mixed_precision(self.accelerator.mixed_precision)
        # As the Trainer's option names its own.
        self._given_optimizer = None if optimizers[0] is None else type(optimizers[0]).__qualname__
        self.policy = PolicyModel.of(adapted, processing_class, args)
        self.sampler = TrajectorySampler(
            self.policy, self.environment, self.separators, args, args.seed, reward_fn=reward_fn
        )
        sizes = {
            "steps": self.layout.num_steps,
            "tokens per trajectory": self.layout.trajectory_tokens,
            "vocabulary": self.policy.head.linear.weight.shape[0],
        }
        self.context = RunContext(self.policy.device, sizes, lambda: self.state.global_step + 1)
        self._first_filter_state = self.filter.state_dict()
        self._start_afresh()
        self._add_callbacks()

    def _start_afresh(self) -> None:
        """Forget the run before, but not what the model has learned in it."""
        args = self.args
        self.filter.load_state_dict(self._first_filter_state)
        self.progress = Progress(args.num_episodes)
        self.recorder = Recorder(
            self.output_dir, self.encoder, self.progress, HealthLimits.of(args, args, args), self.context
        )
        self.updater = Updater(self.policy.model, args, self.context, self.recorder.add_metrics)
        self._stream: ArticleStream | None = None
        self._identity: dict[str, Fact] | None = None

    @property
    def parts(self) -> dict[str, Stateful]:
        """The parts of a run whose states a checkpoint keeps, and a failed update restores."""
        return {
            "filter": self.filter,
            "progress": self.progress,
            "updater": self.updater,
            "recorder": self.recorder,
        }

    def _add_callbacks(self) -> None:
        # By exact type: a subclass among the user's callbacks stays. Without a bar, the printer shows the metrics.
        shown = self.callback_handler.callbacks
        self.callback_handler.callbacks = [item for item in shown if type(item) is not DEFAULT_PROGRESS_CALLBACK]
        self.add_callback(_RunCallback(self))
        every = self.args.log_trajectory_steps * self.args.episodes_per_step
        self.add_callback(
            EpisodeProgressCallback(
                self.args.num_episodes,
                lambda: self.progress.num_episodes,
                table_episodes=every or None,
                latest_trajectory=(lambda: self.recorder.latest_row) if every else None,
            )
        )

    def facts(self) -> dict[str, str | int | float | bool | None]:
        """Collect what was found and what will run, as it is printed before the first step."""
        return preflight.run_facts(self.args, self.policy, self.layout, self.args.world_size)

    # ---- A step ----

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Roll out a batch, judge it, and accumulate the gradient of what was kept.

        Args:
            model: the model as the Trainer wrapped it.
            inputs: ``{"memories": MemoryBatch}``.
            num_items_in_batch: unused; the loss is divided by the trajectories of the update.

        Returns:
            The loss, detached; 0 if nothing was kept, in which case there is no gradient either.

        Raises:
            NonFiniteError: a logit, vector, reward, statistic, the KL, the loss or the gradient is not finite; names
                which, where, and the articles. Weights, optimizer, statistics and ledger are those before the step.
        """
        model.train()
        batch = inputs["memories"].head(self.progress.episodes_left)
        differentiate = partial(self._differentiate, model)
        with self._all_or_nothing():
            if len(batch) == 0:  # the last update has fewer rollout batches
                with self.context.phase("update", 0):
                    self._take_further_steps(model, differentiate)
                return torch.zeros((), device=self.args.device)
            with self.context.phase("rollout", len(batch)):
                trajectories = self.sampler.sample(batch, self.progress.next_episodes(batch))
            with self.context.phase("filter", len(batch), batch.articles):
                verdict = self.filter.judge(trajectories.avg_reward)
            with self.context.phase("update", int(verdict.keep.sum()), batch.articles):
                kept = KeptTrajectories.of(
                    trajectories, verdict, self.args, self.updater.num_trajectories, batch.articles
                )
                loss = self.updater.accumulate(kept, differentiate)
                self._take_further_steps(model, differentiate)
            self.progress.advance(batch)
            self.recorder.add(batch, trajectories, verdict)
            self.recorder.add_times(trajectories)
        return loss

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        trajectories = min(self.progress.episodes_left, self.args.episodes_per_step)
        with self.updater.all_or_nothing(self.parts, trajectories):
            yield

    def _take_further_steps(self, model: nn.Module, differentiate: Any) -> None:
        if not self.accelerator.sync_gradients:
            return
        assert self.optimizer is not None
        self.updater.take_further_steps(differentiate, self.optimizer, lambda: self._clip(model))

    def _clip(self, model: nn.Module) -> None:
        if self.args.max_grad_norm > 0:
            self.accelerator.clip_grad_norm_(model.parameters(), self.args.max_grad_norm)

    def _differentiate(self, model: nn.Module, micro_batch: KeptTrajectories) -> tuple[Tensor, LossTerms | None]:
        """Add a micro-batch's gradient to what is there; returns the loss, detached, and its parts."""
        # Activation checkpointing runs the layers again in the backward, which must see the same dropout.
        with dropout_disabled(model) if self.args.disable_dropout else nullcontext():
            with self.compute_loss_context_manager():
                loss, terms = self.compute_loss(model, {"trajectories": micro_batch}, return_outputs=True)
            self.accelerator.backward(loss)
        return loss.detach(), terms

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Compute the filtered REINFORCE loss and the KL to the previous adapter, for a micro-batch.

        A subclass may add to the loss, or compute another. It returns what the base class does; in place of `LossTerms`,
        whose parts are logged, it may return ``None``.

        Args:
            model: the model as the Trainer wrapped it.
            inputs: ``{"trajectories": KeptTrajectories}``.
            return_outputs: whether the parts of the loss are wanted too; so it is called in training.
            num_items_in_batch: unused.

        Returns:
            The loss, a scalar with gradient; with ``return_outputs`` also its `LossTerms`.

        Raises:
            NonFiniteError: a logit, the KL or the loss is not finite.
        """
        terms = compute_loss_terms(
            self.policy, model, self.environment, self.updater.previous_adapter, inputs["trajectories"], self.args
        )
        return (terms.loss, terms) if return_outputs else terms.loss

    def before_optimizer_step(self) -> None:
        """Refresh the previous adapter, and write down what the update read; called before the Trainer's own step."""
        with self._all_or_nothing(), self.updater.last_step():
            self.recorder.commit()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the Trainer's numbers together with what the steps since the last log collected."""
        if "loss" in logs:
            logs = self.recorder.log(logs, self.updater.num_updates)
        super().log(logs, start_time)

    # ---- A run ----

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return an endless loader of memories, from the run's position."""
        if self.train_dataset is None:
            raise ValueError("training needs a train_dataset of articles; give one to the trainer")
        loader = self._memory_loader()
        self._stream = loader.training_stream(self.train_dataset, self.progress.open_stream())
        return loader.batches(self._stream, self.args.generation_batch_size)

    def _memory_loader(self) -> MemoryLoader:
        args = self.args
        return MemoryLoader(
            args,
            self.encoder,
            args.seed,
            process_index=args.process_index,
            num_processes=args.world_size,
            num_workers=args.dataloader_num_workers,
        )

    def floating_point_ops(self, inputs: Mapping[str, Any]) -> int:
        """Return 0: a batch of memories is not a model input whose operations the Trainer could count."""
        return 0

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Run ``num_episodes`` episodes, or what is left of them after a checkpoint.

        Args:
            resume_from_checkpoint: a checkpoint's folder, or true for the newest in ``output_dir``.
            trial: unused; there is no hyperparameter search.
            ignore_keys_for_eval: unused.

        Returns:
            Steps, mean loss and the Trainer's speed metrics.

        Raises:
            CheckpointError: there is no such checkpoint, it is damaged, or it belongs to another run.
            StagingError: a checkpoint could not be written.
            RunLockedError: another run writes to ``output_dir``.
            KeyboardInterrupt: SIGINT came, and a checkpoint was written.
            SystemExit: SIGTERM came, and a checkpoint was written; the code is 143.
        """
        with self.run_guarded():
            start = ResumePoint.find(resume_from_checkpoint, self.output_dir, self.run_trace)
            self._start_afresh()
            if start.checkpoint is not None:
                self.expect_own_checkpoint(start.checkpoint)
                self.progress.load_state_dict(load_parts(start.checkpoint)["progress"])
                if self.progress.episodes_left == 0:
                    return self._stay_finished(start, start.checkpoint)
            left = self.progress.episodes_left
            start.set_aside_others([self.recorder.ledger.path, self.output_dir / REPORT_FOLDER])
            start.warn_of_changed_options(RUN_CONFIG_NAME, self.args.to_jsonable())
            if start.checkpoint is not None and not start.is_own:
                self.recorder.ledger.take_over(start.checkpoint.parent / self.recorder.ledger.path.name)
                start = start.adopted()
            max_steps = start.global_step + math.ceil(left / self.args.episodes_per_step)
            with _max_steps(self.args, max_steps), self.context.phase("run", self.args.episodes_per_step):
                return self.train_from(start.checkpoint)

    def _stay_finished(self, start: ResumePoint, checkpoint: Path) -> TrainOutput:
        """Load what a finished run has learned, and run nothing."""
        logger.warning("%s has all of num_episodes=%d; nothing is run", checkpoint, self.args.num_episodes)
        self.load_finished(checkpoint)
        if start.is_own:
            # A run that was killed after its last checkpoint did not come to these.
            self.rotate()
            if self.args.report_at_end and not self.recorder.has_report:
                self.recorder.cut_ledger()
                self.end_run()
        return TrainOutput(start.global_step, 0.0, {})

    def begin_run(self) -> None:
        """Write the options, and show what will run."""
        self.args.save_json(self.output_dir / RUN_CONFIG_NAME)
        preflight.print_facts(self.facts())
        shortage = preflight.memory_shortage(self.args, self.policy, self.separators)
        if shortage is not None:
            logger.warning("%s", shortage)
        self.recorder.forget_report()

    def end_run(self) -> None:
        """Write the report of what was run."""
        if self.args.report_at_end and self.progress.num_episodes > 0:
            self.recorder.write_report(self.state.log_history, self.facts())

    def predict(self, *args: Any, **kwargs: Any) -> PredictionOutput:
        """Refuse: there are no labels to predict; `evaluate` measures a policy."""
        raise NotImplementedError("there is nothing to predict; use evaluate()")

    def evaluate(
        self,
        eval_dataset: Articles | dict[str, Articles] | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Roll out trajectories on held-out articles, without training on them.

        The articles are read in their order, ``eval_epochs`` times each, until ``eval_episodes`` trajectories are
        there. The random numbers are the same at every call, so two evaluations differ by the policy alone. With
        ``eval_tables`` the worth of orders and of queries is written to ``output_dir/evaluation/<metric_key_prefix>``
        as Markdown and JSON, with intervals.

        Args:
            eval_dataset: articles, or several sets by name; by default those given to the trainer.
            ignore_keys: unused.
            metric_key_prefix: put before each metric's name.

        Returns:
            Reward, its parts, the order gain, what is logged of selector and queries in training, and, with
            ``eval_tables``, the policy's orders and queries against baselines.

        Raises:
            ValueError: there are no articles to evaluate on, or with ``eval_tables`` a single one, or a context that
                does not hold a whole memory.
        """
        args = self.args
        articles = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(articles, dict):
            parts = [self.evaluate(part, ignore_keys, f"{metric_key_prefix}_{name}") for name, part in articles.items()]
            return {name: value for part in parts for name, value in part.items()}
        if articles is None:
            raise ValueError("evaluation needs an eval_dataset of articles; give one to the trainer or to evaluate()")
        preflight.expect_fitting_orders(self.layout, preflight.context_length(self.policy.model), args)
        loader = self._memory_loader()
        stream = loader.evaluation_stream(articles, num_epochs=args.eval_epochs)
        batches = loader.batches(stream, min(args.generation_batch_size, args.eval_episodes))
        sampler = TrajectorySampler(
            self.policy,
            self.environment,
            self.separators,
            args,
            args.seed + SEED_OFFSET,
            reward_fn=self.reward_fn,
            compute_order_gain=True,
        )
        folder = self.output_dir / "evaluation" / folder_name(metric_key_prefix)
        with self.context.phase("evaluation", args.generation_batch_size):
            results = evaluate(sampler, (inputs["memories"] for inputs in batches), self.encoder, args, folder)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in results.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(args, self.state, self.control, metrics)
        return metrics

    # ---- Checkpoints ----

    def run_identity(self) -> dict[str, Fact]:
        """Return what must be the same in a run that resumes: model, adapter, tokens and articles."""
        if self._identity is None:
            args, tokenizer = self.args, self.processing_class
            assert isinstance(tokenizer, PreTrainedTokenizerBase)
            parts = model_facts(self.policy.model, tokenizer) | option_facts(args, args)
            parts |= {
                "seed": args.seed,
                "optim": self._given_optimizer or str(getattr(args.optim, "value", args.optim)),
            }
            parts |= article_facts(self.train_dataset, args.dataset_text_column, args.dataloader_num_workers)
            parts |= {
                "environment": type(self.environment).__qualname__,
                "reward_fn": None if self.reward_fn is None else _name_of(self.reward_fn),
                "reward_filter": type(self.filter).__qualname__,
            }
            # Once a run: it reads rows of the data set.
            self._identity = super().run_identity() | parts
        return self._identity

    def save_extras(self, folder: Path) -> None:
        """Write the options beside a saved adapter, as JSON."""
        self.args.save_json(folder / RUN_CONFIG_NAME)

    def save_run_state(self, folder: Path) -> None:
        """Write the states of the run's parts, and the previous adapter."""
        super().save_run_state(folder)
        self.recorder.ledger.sync()
        states = {name: part.state_dict() for name, part in self.parts.items()}
        save_parts(folder, states, self.updater.previous_adapter.state_dict())

    def load_run_state(self, folder: Path) -> None:
        """Go back to what `save_run_state` wrote."""
        super().load_run_state(folder)
        states = load_parts(folder)
        for name, part in self.parts.items():
            part.load_state_dict(states[name])
        self.updater.previous_adapter.load_state_dict(load_previous_adapter(folder))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        position = self.progress.open_stream()
        if self._stream is not None:
            self._stream.position = position
        self.recorder.cut_ledger()


def _name_of(function: RewardFunction) -> str:
    return str(getattr(function, "__qualname__", type(function).__qualname__))


@contextmanager
def _max_steps(args: AttentionGuidedRLConfig, steps: int) -> Iterator[None]:
    """Tell the Trainer its number of steps; outside of a run the options stay as the user made them."""
    args.max_steps = steps
    try:
        yield
    finally:
        args.max_steps = -1


class _RunCallback(TrainerCallback):
    """What happens between the Trainer's steps; on the main process, what is written and shown."""

    def __init__(self, trainer: AttentionGuidedRLTrainer) -> None:
        self._trainer = trainer
        self._saved_multiple = 0

    @property
    def _multiple(self) -> int:
        return self._trainer.progress.num_episodes // self._trainer.args.save_episodes

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._saved_multiple = self._multiple
        if state.is_world_process_zero:
            self._trainer.begin_run()

    def on_pre_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._trainer.before_optimizer_step()

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # The Trainer derives it from the batches since the process began, which a resumed run would count from 0 again.
        state.epoch = state.global_step / state.max_steps
        # At the first step that reaches or passes each multiple of save_episodes, and at the last one.
        if self._multiple > self._saved_multiple or state.global_step >= state.max_steps:
            self._saved_multiple = self._multiple
            control.should_save = True

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self._trainer.end_run()
