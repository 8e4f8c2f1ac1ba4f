"""`AttentionGuidedRLTrainer`: when a run rolls out, judges, updates and writes down (design §10).

What each of these computes is in the rooms below: `rollout`, `update`, `records`, `evaluation`.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, set_seed

from attention_rl_trainer.config import NOT_OPTIONS, AttentionGuidedRLConfig
from attention_rl_trainer.episodes import EpisodeTrainer
from attention_rl_trainer.errors import RunContext
from attention_rl_trainer.evaluation.asking import AskedQuestions
from attention_rl_trainer.evaluation.evaluate import evaluate
from attention_rl_trainer.evaluation.tables import folder_name
from attention_rl_trainer.memories import Articles, MemoryLoader, PlainTextEncoder
from attention_rl_trainer.memories.given import expect_data
from attention_rl_trainer.memories.pairs import MemoryBatch
from attention_rl_trainer.models import PolicyModel, add_adapter, left_bare_on_failure, take_model, with_tokenizer
from attention_rl_trainer.models.modes import update_mode
from attention_rl_trainer.models.readers import expect_reads_padding
from attention_rl_trainer.options import takes_names
from attention_rl_trainer.planning import preflight
from attention_rl_trainer.planning.arguments import expect_arguments
from attention_rl_trainer.probing.calibrated import CalibratedSelector
from attention_rl_trainer.publishing.card import write_evaluation
from attention_rl_trainer.records.console import EpisodeProgressCallback, without_trainers_bar
from attention_rl_trainer.records.health import HealthLimits
from attention_rl_trainer.records.identity import kind_of
from attention_rl_trainer.records.progress import Progress
from attention_rl_trainer.records.recorder import Recorder
from attention_rl_trainer.records.trackers import TrajectoryTrackingCallback, expect_trackers
from attention_rl_trainer.rollout import (
    Calibration,
    KVMemoryEnvironment,
    Layout,
    MemoryEnvironment,
    RewardFunction,
    Separators,
)
from attention_rl_trainer.rollout.sampler import TrajectorySampler
from attention_rl_trainer.update import KeptTrajectories, LossTerms, RewardFilter, TrajectoryFilter, Updater
from attention_rl_trainer.update.agreement import RolloutAgreement
from attention_rl_trainer.update.kept import with_choice_values
from attention_rl_trainer.update.objective import compute_loss_terms
from attention_rl_trainer.update.warm_start import (
    WarmStartTerms,
    lay_out_lessons,
    lesson_scores,
    warm_start_terms,
)

Optimizers: TypeAlias = tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None]

BEFORE_TRAINING = "_before_training"
"""After the name of an evaluation's folder where ``eval_on_start`` asked for it."""


@takes_names(
    {},
    {
        "reward_funcs": NOT_OPTIONS["reward_funcs"],
        "tokenizer": "give it as processing_class",
        "data_collator": "memories are joined by the trainer; give articles or entries as train_dataset",
    },
)
class AttentionGuidedRLTrainer(EpisodeTrainer):
    """Trains a language model to direct its own reading of articles.

    Args:
        model: the base model, or its name: a Hub name, a folder, ``"offline"`` or ``"auto"``; or a PEFT model, whose
            adapter is trained further. A base model is left as it was where the construction fails.
        args: options; by default those of `AttentionGuidedRLConfig` with a folder named after the model.
        train_dataset: articles: a `datasets` data set with a text column, or an `ArticleSource` such as a list of rows.
        eval_dataset: articles for `evaluate`.
        processing_class: the tokenizer; by default the base model's own. It must be a fast one.
        peft_config: the adapter; by default LoRA of rank 8, alpha 16 on all attention projections.
        environment: where queries draw pairs from; by default a `KVMemoryEnvironment`.
        reward_fn: a `RewardFunction`, step to ``[B]``, in place of the default reward.
        reward_filter: a `TrajectoryFilter`, which trajectories are trained on; by default a `RewardFilter`.
        optimizers: an optimizer and a scheduler to use instead of those that ``args`` names.
        calibration: of the selector, or the folder that has one, such as a trained adapter's; by default it is fitted
            to the training articles, where the options ask for one.

    Raises:
        ValueError: an option, the data or the model cannot work; names what and the way out.
    """

    _tag_names = ("attention-guided-rl", "reinforcement-learning", "lora")

    @left_bare_on_failure
    def __init__(
        self,
        model: str | Path | PreTrainedModel | PeftModel,
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
        calibration: Calibration | str | Path | None = None,
    ) -> None:
        model = take_model(model, processing_class, peft_config)
        parts = {"environment": environment, "reward_fn": reward_fn, "reward_filter": reward_filter}
        expect_arguments(args, eval_dataset=eval_dataset, callbacks=callbacks, optimizers=optimizers, **parts)
        args = args or AttentionGuidedRLConfig.for_model(model)
        expect_data(train_dataset, eval_dataset, args.dataset_text_column)
        preflight.expect_usable_machine(args)
        expect_trackers(args.report_to)
        # The base class does this too, but only after the adapter has drawn its first weights.
        set_seed(args.seed)
        base, tokenizer = with_tokenizer(model, args.device, args.model_init_kwargs, processing_class)
        adapted = add_adapter(base, peft_config)
        adapted.add_model_tags(list(self._tag_names))
        self.encoder = PlainTextEncoder(tokenizer)
        self.separators = Separators.encode(self.encoder, args)
        self.layout = Layout.of(args, self.separators)
        self.loader = MemoryLoader(args, self.encoder, args.seed, num_workers=args.dataloader_num_workers)
        self.environment = KVMemoryEnvironment(args) if environment is None else environment
        self.reward_fn = reward_fn
        self.filter = RewardFilter(args) if reward_filter is None else reward_filter
        preflight.expect_log_prob(self.environment, args)
        preflight.expect_fitting(adapted, self.layout, self.encoder, args, with_orders=eval_dataset is not None)
        # Without the data: of a stream the base class wants to know the number of steps now, which `train` finds out.
        taken = {"eval_dataset": eval_dataset, "callbacks": callbacks, "optimizers": optimizers}
        super().__init__(adapted, args, processing_class=tokenizer, **taken)
        self.train_dataset = train_dataset
        preflight.expect_plain_accelerator(self.accelerator)
        # As the Trainer's option names its own.
        self._given_optimizer = None if optimizers[0] is None else type(optimizers[0]).__qualname__
        own = {name: kind_of(part) for name, part in parts.items() if part is not None}
        self._own_parts = own if self._given_optimizer is None else own | {"optimizers": self._given_optimizer}
        self.policy = PolicyModel.of(adapted, tokenizer, args)
        selecting = self.policy, self.environment, self.layout, self.loader, args, args
        self.selector = CalibratedSelector(
            *selecting, calibration, show_progress=not args.disable_tqdm, processes=self.processes
        )
        sampled = self.policy, self.environment, self.separators
        self.sampler = TrajectorySampler(*sampled, args, args.seed, reward_fn=reward_fn)
        self._expect_trainable()
        sizes = self.layout.sizes | {"vocabulary": self.policy.head.linear.weight.shape[0]}
        self.context = RunContext(self.policy.device, sizes, lambda: self.state.global_step + 1)
        self._first_filter_state = self.filter.state_dict()
        self.start_afresh()
        self.callback_handler.callbacks = without_trainers_bar(self.callback_handler.callbacks)
        every = args.log_trajectory_steps * args.episodes_per_step
        latest = (lambda: self.recorder.latest_row) if every else None
        counts = args.warm_start_episodes + args.num_episodes, lambda: self.progress.num_trajectories
        bar = partial(EpisodeProgressCallback, table_episodes=every or None, latest_trajectory=latest)
        self.add_callback(bar(*counts, num_before=args.warm_start_episodes))
        if args.log_trajectories and args.log_trajectory_steps:
            given = (lambda: self.recorder.latest_rows), (lambda: self.callback_handler.callbacks)
            self.add_callback(TrajectoryTrackingCallback(*given, args.log_trajectory_steps))

    def start_afresh(self) -> None:
        """Forget the run before, but not what the model has learned in it."""
        args = self.args
        self.filter.load_state_dict(self._first_filter_state)
        self.progress = Progress(args.num_episodes, args.warm_start_episodes)
        limits, processes = HealthLimits.of(args, args, args), self.processes
        self.recorder = Recorder(self.output_dir, self.encoder, self.progress, limits, self.context, processes)
        self.updater = Updater(self.policy.model, args, self.context, self.recorder.add_update, processes)
        self.agreement = RolloutAgreement(self.policy, args.training_batch_size)
        self._stream, self._identity, self._waiting = None, None, []

    # ---- A step ----

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Roll out a batch, judge it, and accumulate the gradient of what was kept.

        Args:
            inputs: ``{"memories": MemoryBatch}``, of all processes; each takes its share.

        Returns:
            Its share of the update's loss, a mean over ``num_iterations``, detached, of all processes; 0, without a
            gradient, if nothing was kept.

        Raises:
            NonFiniteError: a number is not finite; names which, where, and the articles. Nothing of the step is kept.
        """
        # What spreads the model over processes counts its backwards, of which each process has as many as it keeps.
        model = model.module if isinstance(model, DistributedDataParallel) else model
        model.train()
        if self.progress.warm_start_left > 0:
            return self._warm_start_step(model, inputs["memories"])
        if self.progress.num_episodes == 0 and self.updater.num_updates > 0:
            # After a warm start: what the KL begins from.
            self.updater.previous_adapter.refresh()
            self.progress.num_warm_start_updates = self.updater.num_updates
        whole = inputs["memories"].head(self.progress.episodes_left)
        rows = self.processes.share(len(whole))
        batch, trajectories = whole.select_rows(rows), None
        differentiate = partial(self._differentiate, model)
        with self._all_or_nothing():
            if len(whole) == 0:  # the last update has fewer rollout batches
                with self.context.phase("update", 0):
                    loss = self._take_further_steps(model, differentiate)
                self.recorder.add_update_time()
                return self.processes.sum(loss)
            with self.context.phase("rollout", len(batch)):
                if len(batch) > 0:
                    trajectories = self.sampler.sample(batch, self.progress.next_episodes(rows))
            with self.context.phase("filter", len(whole), whole.articles):
                rewards = torch.empty(0) if trajectories is None else trajectories.avg_reward
                verdict = self.filter.judge(self.processes.join_rows(rewards))
            with self.context.phase("update", int(verdict.keep.sum()), batch.articles):
                loss = torch.zeros((), device=self.args.device)
                if trajectories is not None:
                    mine = replace(verdict, keep=self.processes.own(verdict.keep))
                    self.agreement.expect(model, trajectories, mine.keep, self.updater.num_updates)
                    num_trajectories = self.updater.num_trajectories
                    kept = KeptTrajectories.of(trajectories, mine, self.args, num_trajectories, batch.articles)
                    if self.args.needs_choice_values and len(kept) > 0:
                        kept = with_choice_values(kept, self.policy, self.layout.for_batch(batch))
                    loss = self.updater.accumulate(kept, differentiate)
                loss = loss + self._take_further_steps(model, differentiate)
            self.progress.advance(whole)
            self.recorder.add(batch, trajectories, verdict)
            self.recorder.add_times(trajectories)
        return self.processes.sum(loss)

    def _warm_start_step(self, model: nn.Module, memories: MemoryBatch) -> Tensor:
        """Accumulate the gradient of a batch of the warm start."""
        if memories.is_padded:
            expect_reads_padding(self.policy)
        whole, done = memories.head(self.progress.warm_start_left), self.progress.num_warm_start
        rows = self.processes.share(len(whole))
        batch = whole.select_rows(rows)
        learned: list[tuple[WarmStartTerms, int]] = []

        def differentiate(micro_batch: KeptTrajectories) -> tuple[Tensor, None]:
            if micro_batch.articles[0] is batch.articles[0]:
                # Where memory ran out in a later one, all come again.
                learned.clear()
            with update_mode(model, adapter_dropout=not self.args.disable_dropout):
                with self.compute_loss_context_manager():
                    terms = warm_start_terms(self.policy, model, micro_batch)
                self.accelerator.backward(terms.loss)
            terms = replace(terms, loss=terms.loss.detach())
            learned.append((terms, len(micro_batch)))
            return terms.loss, None

        with self._all_or_nothing(), self.context.phase("update", len(batch), batch.articles):
            numbers = range(done + rows.start, done + rows.stop)
            lessons = lay_out_lessons(
                batch,
                self.layout,
                self.encoder,
                numbers,
                self.args.seed,
                self.updater.num_trajectories,
                self.args,
                self.policy.device,
                lesson_scores(self.policy, self.layout, batch, self.args),
            )
            # The updater's is a mean over num_iterations, of which there is one here.
            loss = self.updater.accumulate(lessons, differentiate)
            loss = loss * self.args.num_iterations
            if self.accelerator.sync_gradients:
                self.updater.join()
            self.progress.advance(whole)
            self.recorder.add_warm_start(learned)
        self.recorder.add_update_time()
        return self.processes.sum(loss)

    def _all_or_nothing(self) -> AbstractContextManager[None]:
        left = self.progress.warm_start_left or self.progress.episodes_left
        trajectories = min(left, self.args.episodes_per_step)
        return self.updater.all_or_nothing(self.parts, trajectories)

    def _take_further_steps(self, model: nn.Module, differentiate: Any) -> Tensor:
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)
        assert self.optimizer is not None
        self.updater.join()
        parameters, largest = list(model.parameters()), self.args.max_grad_norm or math.inf
        clip = partial(self.accelerator.clip_grad_norm_, parameters, largest)
        return self.updater.take_further_steps(differentiate, self.optimizer, clip)

    def _differentiate(self, model: nn.Module, micro_batch: KeptTrajectories) -> tuple[Tensor, LossTerms | None]:
        """Add a micro-batch's gradient to what is there; returns the loss, detached, and its parts."""
        # Activation checkpointing runs the layers again in the backward, which must compute alike.
        with update_mode(model, adapter_dropout=not self.args.disable_dropout):
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

        A subclass may add to the loss, or compute another; in place of `LossTerms`, which are logged, it may return
        ``None``.

        Args:
            inputs: ``{"trajectories": KeptTrajectories}``.
            return_outputs: whether its `LossTerms` are wanted beside the loss; so it is called in training.
        """
        kept, previous = inputs["trajectories"], self.updater.previous_adapter
        terms = compute_loss_terms(self.policy, model, self.environment, previous, kept, self.args)
        return (terms.loss, terms) if return_outputs else terms.loss

    def before_optimizer_step(self) -> None:
        """Refresh the previous adapter, and write down what the update read; called before the Trainer's own step."""
        with self._all_or_nothing(), self.updater.last_step():
            super().before_optimizer_step()
            self.recorder.commit()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the Trainer's numbers together with what the steps since the last log collected."""
        if "loss" in logs:
            logs = self.recorder.log(logs, self.updater.num_updates)
        elif "train_loss" in logs:
            self.recorder.correct_totals(logs)
        super().log(logs, start_time)

    # ---- Evaluation ----

    def evaluate(
        self,
        eval_dataset: Articles | dict[str, Articles] | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Roll out ``eval_episodes`` trajectories on held-out articles, without training on them.

        Two evaluations differ by the policy alone. With ``eval_tables`` the worth of orders and of queries is written
        to ``output_dir/evaluation/<metric_key_prefix>`` as Markdown and JSON, with intervals; that of ``eval_on_start``
        to a folder whose name ends in ``_before_training``.

        Args:
            eval_dataset: articles, or several sets by name; by default those given to the trainer.
            metric_key_prefix: put before each metric's name.

        Returns:
            Reward, its parts, the order gain, what is logged of selector and queries in training, and, with
            ``eval_tables``, the policy's orders and queries against baselines.

        Raises:
            ValueError: there are no articles, with ``eval_tables`` a single one, or a context too short for a memory.
        """
        args = self.args
        articles = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(articles, dict):
            parts = [self.evaluate(part, ignore_keys, f"{metric_key_prefix}_{name}") for name, part in articles.items()]
            return {name: value for part in parts for name, value in part.items()}
        if articles is None:
            raise ValueError("evaluation needs an eval_dataset of articles; give one to the trainer or to evaluate()")
        preflight.expect_fitting_orders(self.layout, self.policy.model, args)
        self.calibrate()
        stream = self.loader.evaluation_stream(articles, num_epochs=args.eval_epochs)
        batches = self.loader.batches(stream, min(args.generation_batch_size, args.eval_episodes))
        is_before = self.is_in_train and self.state.global_step == 0
        name = folder_name(metric_key_prefix) + (BEFORE_TRAINING if is_before else "")
        with self.context.phase("evaluation", args.generation_batch_size):
            memories = (inputs["memories"] for inputs in batches)
            questions = AskedQuestions.of(articles) if args.eval_tables else None
            shown = self.processes.is_main and not args.disable_tqdm
            given = self.sampler, memories, self.encoder, args, questions
            results, tables = evaluate(*given, show_progress=shown)
        # Each process computes the same; one writes.
        if self.processes.is_main and tables is not None:
            self.write_when_own(partial(write_evaluation, tables, self.output_dir, name))
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in results.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(args, self.state, self.control, metrics)
        return metrics
