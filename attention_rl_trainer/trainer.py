"""`AttentionGuidedRLTrainer`: the loop that joins rollout, filter, loss and update (design §10).

A training step rolls one batch out, judges it by the history before it, and differentiates the loss of what was kept in
micro-batches. Everything that is computed lives in the modules before this one; this one decides when.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import logging
import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, set_seed
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK, TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PredictionOutput, TrainOutput

from attention_rl_trainer.accumulation import GradientAccumulator
from attention_rl_trainer.adapters import AdapterSnapshot, add_adapter
from attention_rl_trainer.articles import ArticleStream
from attention_rl_trainer.assembly import (
    build_policy,
    health_limits,
    load_named_model,
    loss_settings,
    rollout_settings,
    tokenizer_of,
)
from attention_rl_trainer.callbacks import (
    BeforeOptimizerStepCallback,
    EpisodeSaveCallback,
    ShareOfRunCallback,
    TrainEndCallback,
)
from attention_rl_trainer.checkpointing import (
    PREVIOUS_ADAPTER_NAME,
    STATE_NAME,
    RunState,
    load_run_state,
    read_run_state,
    save_run_state,
)
from attention_rl_trainer.config import AttentionGuidedRLConfig
from attention_rl_trainer.diagnostics import peak_memory_gib, phase
from attention_rl_trainer.durability import (
    Fact,
    adopt_checkpoint,
    checkpoint_step,
    find_checkpoint,
    set_aside_run,
)
from attention_rl_trainer.durability.trainer import DurableTrainer
from attention_rl_trainer.evaluation import TableBuilder, evaluate_policy, folder_name
from attention_rl_trainer.filtering import RewardStatistics, keep_mask
from attention_rl_trainer.finiteness import expect_finite
from attention_rl_trainer.health import HealthMonitor
from attention_rl_trainer.ledger import Ledger, LedgerRow
from attention_rl_trainer.loading import (
    Articles,
    article_collator,
    article_loader,
    evaluation_stream,
    training_stream,
)
from attention_rl_trainer.losses import step_advantages
from attention_rl_trainer.memory import DifferentiableEnvironment, KVMemoryEnvironment, MemoryEnvironment
from attention_rl_trainer.micro_batches import MicroBatchSize
from attention_rl_trainer.pairs import (
    ArticleBatch,
    ArticleReference,
)
from attention_rl_trainer.policy import (
    base_language_model,
    dropout_disabled,
    input_embeddings,
)
from attention_rl_trainer.preflight import (
    context_length,
    expect_double_precision,
    expect_fitting_context,
    expect_fitting_orders,
    expect_fitting_vocabulary,
    expect_one_process,
    expect_writable,
    memory_shortage,
    print_facts,
    run_facts,
)
from attention_rl_trainer.records import MetricsBuffer, ledger_rows, trajectory_metrics
from attention_rl_trainer.report.console import EpisodeProgressCallback
from attention_rl_trainer.report.summary import REPORT_FOLDER, SUMMARY_NAME, write_report
from attention_rl_trainer.rollback import OptimizerRestorePoint
from attention_rl_trainer.rollout import RolloutSettings, TrajectorySampler, trajectory_length
from attention_rl_trainer.run_identity import article_facts, model_facts, option_facts
from attention_rl_trainer.tokenization import PlainTextEncoder, Separators
from attention_rl_trainer.types import Trajectory
from attention_rl_trainer.update import KeptTrajectories, LossTerms, compute_loss_terms
from attention_rl_trainer.window import UpdateWindow

logger = logging.getLogger(__name__)

Optimizers: TypeAlias = tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None]

RUN_CONFIG_NAME = "attention_rl_config.json"
# What an error names where memory ran out.
_ROLLOUT_MEMORY_OPTIONS = "generation_batch_size, num_steps, tokens_per_query or tokens_per_value"
_UPDATE_MEMORY_OPTIONS = "training_batch_size or logits_chunk_size"


class AttentionGuidedRLTrainer(DurableTrainer):
    """Trains a language model to direct its own reading of articles.

    Args:
        model: the base model, or its name: a Hub name, a folder, ``"offline"`` or ``"auto"``; or a PEFT model.
        args: options; by default those of `AttentionGuidedRLConfig` with a folder named after the model.
        train_dataset: articles: a (streamed) `datasets` data set with a text column, or a list of rows or of `Article`.
        eval_dataset: articles for `evaluate`.
        processing_class: the tokenizer; by default the base model's own. It must be a fast one.
        peft_config: the adapter; by default LoRA of rank 8, alpha 16 on all attention projections.
        callbacks: further callbacks.
        environment: where queries draw pairs from; by default a `KVMemoryEnvironment`.
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
        optimizers: Optimizers = (None, None),
    ) -> None:
        if args is None:
            name = model if isinstance(model, str) else model.config.name_or_path
            args = AttentionGuidedRLConfig(output_dir=f"{Path(name or 'model').name}-attention-rl")
        expect_one_process(args.world_size, args.n_gpu)
        expect_double_precision(args.device)
        expect_writable(Path(str(args.output_dir)))
        # The base class does this too, but only after the adapter has drawn its first weights.
        set_seed(args.seed)
        if isinstance(model, str):
            model, processing_class = load_named_model(model, args, processing_class)
        if processing_class is None:
            processing_class = tokenizer_of(model)
        adapted = add_adapter(model, peft_config)
        adapted.add_model_tags(list(self._tag_names))
        self.encoder = PlainTextEncoder(processing_class)
        self.separators = Separators.encode(self.encoder)
        self.environment = environment or KVMemoryEnvironment(args.selection_temperature, args.head_aggregation)
        if args.selector_coef > 0 and not isinstance(self.environment, DifferentiableEnvironment):
            raise ValueError(
                f"selector_coef is {args.selector_coef}, but the environment {type(self.environment).__name__} has no "
                "log_prob(query_vectors, index); give it one, or set selector_coef to 0"
            )
        expect_fitting_vocabulary(self.encoder.max_token_id, input_embeddings(base_language_model(adapted)))
        self.trajectory_tokens = trajectory_length(
            self.separators, rollout_settings(args), args.tokens_per_key, args.tokens_per_value
        )
        num_separator = len(self.separators.query) + len(self.separators.response)
        expect_fitting_context(self.trajectory_tokens, context_length(adapted), args, num_separator)
        if eval_dataset is not None and args.eval_tables:
            expect_fitting_orders(self.separators, context_length(adapted), args)
        # The base class wants a number of steps for data without a length; a run's own number is set by `train`.
        with _max_steps(args, math.ceil(args.num_episodes / args.episodes_per_step)):
            super().__init__(
                model=adapted,
                args=args,
                data_collator=article_collator(args),
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                callbacks=callbacks,
                optimizers=optimizers,
            )
        if self.accelerator.mixed_precision != "no":
            raise ValueError(
                f"accelerate's mixed precision is {self.accelerator.mixed_precision!r}, but the rollout and the update "
                "must compute alike; launch with --mixed_precision no and set the precision of the weights "
                "(model_init_kwargs={'dtype': 'bfloat16'})"
            )
        # As the Trainer's option names its own.
        self._given_optimizer = None if optimizers[0] is None else type(optimizers[0]).__qualname__
        self._set_up_computation(adapted, processing_class)
        self._set_up_records()

    # ---- Set-up ----

    def _set_up_computation(self, model: PeftModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.policy = build_policy(model, tokenizer, self.args)
        self.sampler = self._new_sampler(rollout_settings(self.args))
        self.snapshot = AdapterSnapshot(model)
        self._trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.loss_settings = loss_settings(self.args)
        self._stream: ArticleStream | None = None
        self._start_afresh()

    def _start_afresh(self) -> None:
        """Forget the run before, but not what the model has learned in it."""
        self.run_state = RunState()
        self._identity: dict[str, Fact] | None = None
        self.snapshot.refresh()
        self._metrics = MetricsBuffer()
        self._health = HealthMonitor(health_limits(self.args))
        size = MicroBatchSize(self.args.training_batch_size)
        self._accumulator = GradientAccumulator(self._trainable, size, self.policy.device)
        # The rollout batches of the present update; `None` between two updates.
        self._window: UpdateWindow | None = None

    def _new_sampler(self, settings: RolloutSettings) -> TrajectorySampler:
        return TrajectorySampler(self.policy, self.environment, self.separators, settings)

    def _set_up_records(self) -> None:
        args = self.args
        self.ledger = Ledger(Path(str(args.output_dir)))
        self._latest_row: LedgerRow | None = None
        # By exact type: a subclass among the user's callbacks stays. Without a bar, the printer shows the metrics.
        shown = self.callback_handler.callbacks
        self.callback_handler.callbacks = [item for item in shown if type(item) is not DEFAULT_PROGRESS_CALLBACK]
        self.add_callback(ShareOfRunCallback())
        self.add_callback(BeforeOptimizerStepCallback(self._before_optimizer_step))
        self.add_callback(EpisodeSaveCallback(args.save_episodes, lambda: self.run_state.num_episodes))
        every = args.log_trajectory_steps * args.episodes_per_step
        self.add_callback(
            EpisodeProgressCallback(
                args.num_episodes,
                lambda: self.run_state.num_episodes,
                table_episodes=every or None,
                latest_trajectory=(lambda: self._latest_row) if every else None,
            )
        )
        self.add_callback(TrainEndCallback(self._on_begin, self._on_end))

    def facts(self) -> dict[str, str | int | float | bool | None]:
        """Collect what was found and what will run, as it is printed before the first step."""
        return run_facts(
            self.args,
            self.policy.model,
            self.policy.attention.heads,
            self.policy.attention.layer,
            self.trajectory_tokens,
            self.policy.device,
            self.args.world_size,
        )

    def _on_begin(self) -> None:
        folder = self.output_dir
        self.args.save_json(folder / RUN_CONFIG_NAME)
        print_facts(self.facts())
        shortage = memory_shortage(self.args, self.policy, self.separators)
        if shortage is not None:
            logger.warning("%s", shortage)
        # A report is of a run's end.
        (folder / REPORT_FOLDER / SUMMARY_NAME).unlink(missing_ok=True)

    def _on_end(self) -> None:
        if not self.args.report_at_end or self.run_state.num_episodes == 0:
            return
        if not self.ledger.path.is_file():
            logger.warning("No report: %s is not there", self.ledger.path)
            return
        with_plots = importlib.util.find_spec("matplotlib") is not None
        if not with_plots:
            logger.warning(
                'No plots: matplotlib is missing. Install it with: pip install "attention-rl-trainer[report]"'
            )
        skipped = ", ".join(f"{count} {reason}" for reason, count in sorted(self.run_state.skipped.items())) or "none"
        facts = self.facts() | {"articles skipped": skipped}
        folder = self.output_dir
        files = write_report(folder, self.state.log_history, facts, with_plots=with_plots)
        logger.warning("Report: %s", files[0])

    # ---- Data ----

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return an endless loader of article batches, from the position of the run on."""
        if self.train_dataset is None:
            raise ValueError("training needs a train_dataset of articles; give one to the trainer")
        self._stream = training_stream(self.train_dataset, self.encoder, self.args, self.run_state.position)
        self._skipped_before = dict(self.run_state.skipped)
        return article_loader(self._stream, self.encoder, self.args, self.args.generation_batch_size)

    def floating_point_ops(self, inputs: Mapping[str, Any]) -> int:
        """Return 0: a batch of articles is no model input whose operations the Trainer could count."""
        return 0

    # ---- A run ----

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
            checkpoint = find_checkpoint(resume_from_checkpoint, self.output_dir, self.run_trace)
            self._start_afresh()
            steps_before, episodes_before = 0, 0
            if checkpoint is not None:
                self.expect_own_checkpoint(checkpoint)
                steps_before = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME)).global_step
                episodes_before = read_run_state(checkpoint).num_episodes
            remaining = self.args.num_episodes - episodes_before
            if checkpoint is not None and remaining <= 0:
                return self._stay_finished(checkpoint, steps_before)
            checkpoint = self._clear_the_way(checkpoint)
            max_steps = steps_before + math.ceil(remaining / self.args.episodes_per_step)
            batch = self.args.episodes_per_step
            with _max_steps(self.args, max_steps), self._phase("run", batch, "generation_batch_size"):
                return self.train_from(checkpoint)

    def _clear_the_way(self, checkpoint: Path | None) -> Path | None:
        """Keep what this run does not go on from out of its way; returns the checkpoint, in the run's own folder."""
        is_own = checkpoint is not None and self._is_own(checkpoint)
        records = [self.ledger.path, self.output_dir / REPORT_FOLDER]
        after = checkpoint_step(checkpoint) if checkpoint is not None and is_own else -1
        aside = set_aside_run(self.output_dir, records, after)
        if aside is not None:
            logger.warning("%s held what this run does not go on from; it lies in %s now", self.output_dir, aside)
        if checkpoint is None:
            return None
        self._tell_changed_options(checkpoint)
        if is_own:
            return checkpoint
        self.ledger.take_over(checkpoint.parent / self.ledger.path.name)
        return adopt_checkpoint(checkpoint, self.output_dir)

    def _is_own(self, checkpoint: Path) -> bool:
        """Tell whether a checkpoint, or a link to it, lies in the run's folder."""
        return checkpoint.parent.resolve() == self.output_dir.resolve()

    def _tell_changed_options(self, checkpoint: Path) -> None:
        path = checkpoint / RUN_CONFIG_NAME
        before, now = json.loads(path.read_text(encoding="utf-8")), self.args.to_jsonable()
        places = {"output_dir", "logging_dir", "run_name", "num_episodes"}
        changed = [name for name in now if name not in places and name in before and before[name] != now[name]]
        if changed:
            listed = ", ".join(f"{name} ({before[name]!r} there, {now[name]!r} here)" for name in changed)
            logger.warning("Options that differ from those of %s: %s", checkpoint, listed)

    def _stay_finished(self, checkpoint: Path, steps: int) -> TrainOutput:
        """Load what a finished run has learned, and run nothing."""
        logger.warning("%s has all of num_episodes=%d behind it; nothing is run", checkpoint, self.args.num_episodes)
        self._load_from_checkpoint(str(checkpoint))
        self.load_run_state(checkpoint)
        self.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        if self._is_own(checkpoint):
            # A run that was killed after its last checkpoint did not come to these.
            self.rotate()
            if self.args.report_at_end and not (self.output_dir / REPORT_FOLDER / SUMMARY_NAME).is_file():
                self._cut_ledger()
                self._on_end()
        return TrainOutput(steps, 0.0, {})

    def predict(self, *args: Any, **kwargs: Any) -> PredictionOutput:
        """Refuse: there are no labels to predict; `evaluate` measures a policy."""
        raise NotImplementedError("there is nothing to predict; use evaluate()")

    # ---- A step ----

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Roll a batch out, judge it, and accumulate the gradient of what was kept.

        Args:
            model: the model as the Trainer wrapped it.
            inputs: ``{"articles": ArticleBatch}``.
            num_items_in_batch: unused; the loss is divided by the trajectories of the rollout batch.

        Returns:
            The loss, detached; 0 if nothing was kept, in which case there is no gradient either.

        Raises:
            NonFiniteError: a logit, vector, reward, statistic, the KL, the loss or the gradient is not finite; names
                which, where, and the articles. Weights, optimizer, statistics and ledger are those before the step.
        """
        model.train()
        batch = self._cut_to_run(inputs["articles"])
        if self._window is None:
            remaining = self.args.num_episodes - self.run_state.num_episodes
            self._window = UpdateWindow(min(remaining, self.args.episodes_per_step), copy.deepcopy(self.run_state))
        with self._undone_if_it_fails(self._window):
            if len(batch) > 0:
                return self._train_on(model, batch, self._window)
            with self._phase("update", 0, _UPDATE_MEMORY_OPTIONS):
                self._take_further_steps(model, self._window)
            return torch.zeros((), device=self.args.device)

    def _train_on(self, model: nn.Module, batch: ArticleBatch, window: UpdateWindow) -> Tensor:
        first = self.run_state.num_episodes
        started = time.perf_counter()
        with self._phase("rollout", len(batch), _ROLLOUT_MEMORY_OPTIONS):
            trajectory = self.sampler.sample(batch, range(first, first + len(batch)))
        rolled_out = time.perf_counter()
        with self._phase("filter", len(batch), _ROLLOUT_MEMORY_OPTIONS, batch.articles):
            history, keep = self._judge(trajectory)
        with self._phase("update", int(keep.sum()), _UPDATE_MEMORY_OPTIONS, batch.articles):
            rows = keep.nonzero().squeeze(1)
            kept = [self._kept(batch, trajectory, history, rows, window)] if len(rows) else []
            window.kept += kept
            loss = self._accumulate(model, kept)
            self._take_further_steps(model, window)
        window.rows += self._record(batch, trajectory, history, keep)
        self._record_times(trajectory, rolled_out - started, time.perf_counter() - rolled_out)
        return loss

    @contextmanager
    def _undone_if_it_fails(self, window: UpdateWindow) -> Iterator[None]:
        """Go back to where the run stood before the present update, should it fail."""
        try:
            yield
        except BaseException:
            self.run_state = window.run_state_before
            if window.weights_before is not None:
                window.weights_before.restore()
            self.policy.model.zero_grad()
            self._window = None
            raise

    def _take_further_steps(self, model: nn.Module, window: UpdateWindow) -> None:
        """Before the Trainer's own optimizer step, take those that ``num_iterations`` > 1 adds to it."""
        if not self.accelerator.sync_gradients or not window.kept or self.args.num_iterations == 1:
            return
        assert self.optimizer is not None
        changing = [*self._trainable.values(), *self.snapshot.state_dict().values()]
        window.weights_before = OptimizerRestorePoint(changing, self.optimizer)
        for iteration in range(2, self.args.num_iterations + 1):
            self._step_optimizer(model)
            self._accumulate(model, window.kept, iteration)

    def _cut_to_run(self, batch: ArticleBatch) -> ArticleBatch:
        """Leave out the rows of the last batch that go beyond ``num_episodes``."""
        remaining = self.args.num_episodes - self.run_state.num_episodes
        return batch if remaining >= len(batch) else batch.select_rows(range(max(0, remaining)))

    def _phase(
        self,
        name: str,
        rows: int,
        options: str,
        articles: Sequence[ArticleReference] = (),
        micro_batch_size: int | None = None,
    ) -> AbstractContextManager[None]:
        args = self.args
        shapes = {} if micro_batch_size is None else {"trajectories a micro-batch": micro_batch_size}
        shapes |= {
            "trajectories": rows,
            "steps": args.steps_per_trajectory,
            "tokens a trajectory": self.trajectory_tokens,
            "vocabulary": self.policy.head.linear.weight.shape[0],
        }
        return phase(name, self.state.global_step + 1, self.policy.device, shapes, options, articles)

    def _judge(self, trajectory: Trajectory) -> tuple[RewardStatistics, Tensor]:
        """Decide by the history before the batch, then add the batch to it."""
        history = RewardStatistics.from_state_dict(self.run_state.statistics.state_dict())
        keep = keep_mask(
            trajectory.avg_reward,
            history,
            filter_threshold=self.args.filter_threshold,
            warmup_episodes=self.args.warmup_episodes,
        )
        self.run_state.statistics.update(trajectory.avg_reward)
        return history, keep

    def _kept(
        self,
        batch: ArticleBatch,
        trajectory: Trajectory,
        history: RewardStatistics,
        rows: Tensor,
        window: UpdateWindow,
    ) -> KeptTrajectories:
        advantages = step_advantages(
            trajectory.stack("reward")[rows],
            history.mean,
            history.std,
            advantage=self.args.advantage,
            credit=self.args.credit,
        )
        articles = [batch.articles[row] for row in rows.tolist()]
        expect_finite({"advantage": advantages}, articles)
        weights = torch.full((len(rows),), 1 / window.num_trajectories, device=rows.device)
        return KeptTrajectories.select(trajectory, rows, advantages, weights, articles)

    def _accumulate(self, model: nn.Module, batches: Sequence[KeptTrajectories], iteration: int = 1) -> Tensor:
        """Differentiate the loss of kept trajectories in micro-batches that fit; returns it detached."""
        accumulated = self._accumulator.accumulate(
            partial(self._differentiate, model),
            batches,
            iteration,
            lambda rows, size: self._phase("update", rows, _UPDATE_MEMORY_OPTIONS, micro_batch_size=size),
        )
        for values in accumulated.metrics:
            self._metrics.add(values)
        if accumulated.halved_from is not None:
            logger.warning(
                "Memory ran out in the update of step %d; its micro-batches and those of all further steps have %d "
                "trajectories instead of %d. To begin with that, lower training_batch_size",
                self.state.global_step + 1,
                self._accumulator.size.size,
                accumulated.halved_from,
            )
        return accumulated.loss

    def _differentiate(self, model: nn.Module, micro_batch: KeptTrajectories) -> tuple[Tensor, LossTerms]:
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
    ) -> Tensor | tuple[Tensor, LossTerms]:
        """Compute the filtered REINFORCE and KL loss of a micro-batch of kept trajectories.

        Args:
            model: the model as the Trainer wrapped it.
            inputs: ``{"trajectories": KeptTrajectories}``.
            return_outputs: whether the parts of the loss are wanted too.
            num_items_in_batch: unused.

        Returns:
            The loss, a scalar with gradient; with ``return_outputs`` also its `LossTerms`.

        Raises:
            NonFiniteError: a logit, the KL or the loss is not finite.
        """
        terms = compute_loss_terms(
            self.policy, model, self.environment, self.snapshot, inputs["trajectories"], self.loss_settings
        )
        return (terms.loss, terms) if return_outputs else terms.loss

    def _step_optimizer(self, model: nn.Module) -> None:
        """One of the optimizer steps that ``num_iterations`` > 1 adds to the Trainer's own."""
        if self.args.max_grad_norm > 0:
            self.accelerator.clip_grad_norm_(model.parameters(), self.args.max_grad_norm)
        self._refresh_previous_adapter()
        assert self.optimizer is not None
        self.optimizer.step()
        model.zero_grad()

    def _before_optimizer_step(self) -> None:
        """Write down what the present update read, once nothing stands in the way of its last optimizer step."""
        window = self._window
        assert window is not None
        articles = window.articles
        with (
            self._undone_if_it_fails(window),
            self._phase("optimizer step", len(articles), _UPDATE_MEMORY_OPTIONS, articles),
        ):
            self._refresh_previous_adapter()
            self.ledger.append(window.rows)
        self._window = None

    def _refresh_previous_adapter(self) -> None:
        """Check the gradient and refresh the previous adapter, unless the step will move nothing."""
        if not self._accumulator.expect_finite():
            return
        self.snapshot.refresh()
        self.run_state.num_updates += 1

    # ---- Records ----

    def _record(
        self, batch: ArticleBatch, trajectory: Trajectory, history: RewardStatistics, keep: Tensor
    ) -> list[LedgerRow]:
        """Advance the run and its metrics by what the batch gave; returns the ledger's rows of it."""
        self.run_state.num_episodes += len(batch)
        self.run_state.position = batch.position_after
        self.run_state.skipped = dict(Counter(self._skipped_before) + Counter(batch.skipped))
        is_warmup = history.count < self.args.warmup_episodes
        threshold = None
        if not is_warmup and self.args.filter_threshold is not None and math.isfinite(self.args.filter_threshold):
            threshold = history.threshold(self.args.filter_threshold)
        rows = ledger_rows(
            trajectory,
            batch,
            self.encoder,
            step=self.state.global_step + 1,
            history=history,
            threshold=threshold,
            keep=keep,
            is_warmup=is_warmup,
        )
        self._latest_row = max(rows, key=lambda row: row.reward)
        self._metrics.add(trajectory_metrics(trajectory))
        self._metrics.add(
            {
                "history_mean": self.run_state.statistics.mean,
                "history_std": self.run_state.statistics.std,
                "threshold": threshold,
                "kept_fraction": keep.float().mean().item(),
                "kept_trajectories": int(keep.sum()),
                "episodes": self.run_state.num_episodes,
                "skipped_articles": sum(self.run_state.skipped.values()),
            }
        )
        return rows

    def _record_times(self, trajectory: Trajectory, rollout_seconds: float, update_seconds: float) -> None:
        self._metrics.add(
            {
                "tokens_per_second": trajectory.forward_tokens / rollout_seconds,
                "rollout_seconds": rollout_seconds,
                "update_seconds": update_seconds,
                "peak_memory_gib": peak_memory_gib(self.policy.device),
            }
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the Trainer's numbers together with what the steps since the last log collected.

        Args:
            logs: the Trainer's numbers.
            start_time: when training began.
        """
        if "loss" in logs:
            self._metrics.add({"updates": self.run_state.num_updates})
            logs = {**logs, **self._metrics.drain()}
            for warning in self._health.observe(logs):
                logger.warning("Step %d: %s", self.state.global_step, warning)
        super().log(logs, start_time)

    # ---- Evaluation ----

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
        articles = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(articles, dict):
            parts = [self.evaluate(part, ignore_keys, f"{metric_key_prefix}_{name}") for name, part in articles.items()]
            return {name: value for part in parts for name, value in part.items()}
        if articles is None:
            raise ValueError("evaluation needs an eval_dataset of articles; give one to the trainer or to evaluate()")
        stream = evaluation_stream(articles, self.args, num_epochs=self.args.eval_epochs)
        sampler = self._new_sampler(rollout_settings(self.args, evaluation=True))
        batch_size = min(self.args.generation_batch_size, self.args.eval_episodes)
        loader = article_loader(stream, self.encoder, self.args, batch_size)
        builder = None
        if self.args.eval_tables:
            expect_fitting_orders(self.separators, context_length(self.policy.model), self.args)
            builder = TableBuilder(sampler, self.encoder, num_order_episodes=self.args.eval_order_episodes)
        observe = None if builder is None else builder.add
        batches = (inputs["articles"] for inputs in loader)
        with self._phase("evaluation", self.args.generation_batch_size, "generation_batch_size"):
            results = evaluate_policy(sampler, batches, self.args.eval_episodes, observe)
        if builder is not None:
            tables = builder.build()
            tables.write(self.output_dir / "evaluation" / folder_name(metric_key_prefix))
            results |= tables.metrics()
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in results.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # ---- Checkpoints ----

    def run_identity(self) -> dict[str, Fact]:
        """Return what must be the same in a run that goes on: model, adapter, tokens and articles."""
        if self._identity is None:
            tokenizer = self.processing_class
            assert isinstance(tokenizer, PreTrainedTokenizerBase)
            articles = article_facts(self.train_dataset, self.args)
            parts = model_facts(self.policy.model, tokenizer) | option_facts(self.args) | articles
            parts["environment"] = type(self.environment).__qualname__
            if self._given_optimizer is not None:
                parts["optim"] = self._given_optimizer
            # Once a run: it reads rows of the data set.
            self._identity = super().run_identity() | parts
        return self._identity

    def save_extras(self, folder: Path) -> None:
        """Write the options beside a saved adapter, as JSON.

        Args:
            folder: where the adapter is saved.
        """
        self.args.save_json(folder / RUN_CONFIG_NAME)

    def save_run_state(self, folder: Path) -> None:
        """Write the reward history, the place in the articles, the metrics not yet logged, and the previous adapter.

        Args:
            folder: the checkpoint's folder.
        """
        super().save_run_state(folder)
        self.ledger.sync()
        state = replace(
            self.run_state,
            metrics=self._metrics.state_dict(),
            health=self._health.state_dict(),
            micro_batches=self._accumulator.size.state_dict(),
        )
        save_run_state(folder, state, self.snapshot.state_dict())

    def load_run_state(self, folder: Path) -> None:
        """Go back to what `save_run_state` wrote.

        Args:
            folder: the checkpoint's folder.
        """
        super().load_run_state(folder)
        state, previous_adapter = load_run_state(folder)
        self._metrics.load_state_dict(state.metrics)
        self._health.load_state_dict(state.health)
        self._accumulator.size.load_state_dict(state.micro_batches)
        self.run_state = replace(state, metrics={}, health={}, micro_batches={})
        self.snapshot.load_state_dict(previous_adapter)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        self._skipped_before = dict(self.run_state.skipped)
        if self._stream is not None:
            self._stream.position = self.run_state.position
        self._cut_ledger()

    def _cut_ledger(self) -> None:
        """Bring the ledger to where the run stands, and say what it lacks."""
        gaps = self.ledger.cut(self.run_state.num_episodes)
        if gaps.missing or gaps.copy is not None:
            logger.warning(
                "%s lacks %d of the %d trajectories before the checkpoint%s; the report lacks them, the run does not",
                self.ledger.path,
                gaps.missing,
                self.run_state.num_episodes,
                "" if gaps.copy is None else f", and had damaged lines or repeated ones (as it was: {gaps.copy})",
            )


@contextmanager
def _max_steps(args: AttentionGuidedRLConfig, steps: int) -> Iterator[None]:
    """Tell the Trainer its number of steps; outside of a run the options stay as the user made them."""
    args.max_steps = steps
    try:
        yield
    finally:
        args.max_steps = -1
