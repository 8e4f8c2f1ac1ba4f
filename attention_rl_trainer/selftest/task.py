"""One run of the self-test: a base model is taught, the shipped trainer trains on it, and the gap is measured.

    attention-rl selftest

Everything between the base model and the gap is what users get: `AttentionGuidedRLTrainer` with its rollout, attention
selector, filter of 1 SD, warm-up and LoRA of rank 8.
"""

from __future__ import annotations

import copy
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from attention_rl_trainer.config import AttentionGuidedRLConfig
from attention_rl_trainer.memories.loading import iter_article_pairs
from attention_rl_trainer.memories.pairs import MemoryBatch, collate_memories
from attention_rl_trainer.memories.stream import ArticleStream
from attention_rl_trainer.probing.calibrated import CALIBRATED
from attention_rl_trainer.selftest.gap import BaseReader, KnownPolicies, Plan, enumerate_policies, trajectory_gains
from attention_rl_trainer.selftest.language import (
    NAME_LENGTH,
    NUM_STEPS,
    NUM_TOPICS,
    VALUE_LENGTH,
    article_values,
    build_tokenizer,
    topic_names,
    write_articles,
)
from attention_rl_trainer.selftest.teaching import lesson_learned, teach
from attention_rl_trainer.trainer import AttentionGuidedRLTrainer

_NUM_ARTICLES = 1024
_NUM_FRESH, _READINGS = 128, 4
_FRESH_SEED_OFFSET = 10**6


@dataclass(frozen=True)
class SelfTestResult:
    """What one seed gave; gains in nats per token."""

    seed: int
    known: KnownPolicies
    untrained: float
    """Mean gain of the policy before training."""
    trained: float
    """The same after it."""
    model_gain: float
    """What the adapted reader itself gained, which does not count."""
    plans: dict[Plan, float]
    """Shares of the trajectories that followed each plan after training, most frequent first."""
    lesson: dict[str, float]
    """What the base model had learned (`lesson_learned`)."""
    seconds: float
    """Time of teaching, training and measuring."""
    curve: tuple[tuple[int, float], ...] = ()
    """Episodes trained on, and the mean gain of the policy then."""

    @property
    def gap_closed(self) -> float:
        """Share of the gap between the random and the best policy that training closed."""
        return self.known.gap_closed(self.trained)

    def episodes_needed(self, share: float) -> int | None:
        """The first measured number of episodes after which a share of the gap was closed; ``None`` if it never was."""
        reached = (episodes for episodes, gain in self.curve if self.known.gap_closed(gain) >= share)
        return next(reached, None)


CALIBRATED_RUN: dict[str, Any] = CALIBRATED | {"probe_heads": 4}
"""The options of a run whose selector is calibrated; the tiny model has eight heads."""


def selftest_config(folder: Path, seed: int, **changes: Any) -> AttentionGuidedRLConfig:
    """Make the options of a run: the defaults, but for sizes, learning rate, optimizer, output and ``changes``."""
    options: dict[str, Any] = {
        "output_dir": str(folder),
        "seed": seed,
        "num_kv_pairs": NUM_TOPICS + 1,
        "subset_fraction": 1.0,
        "num_steps": NUM_STEPS,
        "tokens_per_query": NAME_LENGTH,
        "tokens_per_key": NAME_LENGTH,
        "tokens_per_value": VALUE_LENGTH,
        "generation_batch_size": 128,
        "training_batch_size": 128,
        "num_episodes": 128 * 150,
        "save_episodes": 128 * 150,
        # Held constant, it keeps moving a policy that is nearly certain, and some seeds fall back in the end.
        "learning_rate": 1.5e-3,
        "lr_scheduler_type": "linear",
        # Training queries alone wears the reader down, which takes away what the right queries earn.
        "reward_gradient_coef": 1.0,
        "optim": "adamw_torch",
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "log_trajectory_steps": 0,
        "report_at_end": False,
    }
    return AttentionGuidedRLConfig(**options | changes)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute in one thread while the context lasts: matrices of 64 rows are too small for two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@_one_thread()
def run_seed(
    seed: int,
    folder: Path,
    *,
    base: PreTrainedModel | None = None,
    trainer_class: type[AttentionGuidedRLTrainer] = AttentionGuidedRLTrainer,
    measure_every: int | None = None,
    **changes: Any,
) -> SelfTestResult:
    """Teach, train and measure, all from one seed.

    Args:
        folder: where the run writes; what it would print goes into ``run.log`` there.
        base: a model that was taught with the same seed, which stays as it is; by default one is taught.
        measure_every: steps between two measurements of the curve; by default there is none.
        changes: options of the run that differ from `selftest_config`.
    """
    started = time.perf_counter()
    base = teach(seed) if base is None else copy.deepcopy(base)
    lesson = lesson_learned(base, seed)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "run.log").open("w", encoding="utf-8") as log, redirect_stdout(log):
        trainer = trainer_class(
            model=base,
            args=selftest_config(folder, seed, **changes),
            train_dataset=write_articles(_NUM_ARTICLES, seed),
            processing_class=build_tokenizer(),
        )
        reader = BaseReader(trainer.policy)
        known = enumerate_policies(reader, article_values(_NUM_FRESH, seed + _FRESH_SEED_OFFSET))
        trainer.calibrate()
        untrained, _, _ = measure(trainer, reader, seed)
        curve: list[tuple[int, float]] = []
        if measure_every is not None:
            trainer.add_callback(_Curve(trainer, lambda: measure(trainer, reader, seed)[0], measure_every, curve))
        trainer.train()
        trained, model_gain, plans = measure(trainer, reader, seed)
    seconds = time.perf_counter() - started
    return SelfTestResult(seed, known, untrained, trained, model_gain, plans, lesson, seconds, tuple(curve))


class _Curve(TrainerCallback):
    """Adds the policy's gain to a curve every so many steps."""

    def __init__(
        self,
        trainer: AttentionGuidedRLTrainer,
        gain: Callable[[], float],
        every: int,
        curve: list[tuple[int, float]],
    ) -> None:
        self._trainer = trainer
        self._gain = gain
        self._every = every
        self._curve = curve

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step % self._every == 0:
            self._curve.append((self._trainer.progress.num_episodes, self._gain()))


def measure(trainer: AttentionGuidedRLTrainer, reader: BaseReader, seed: int) -> tuple[float, float, dict[Plan, float]]:
    """Let a policy read fresh articles, those on which the best and the random policy are known, a few times each.

    Returns:
        Mean gain of the queries, mean model gain, nats per token, and the share of the trajectories that followed
        each plan.
    """
    gains, model_gains, plans = [], [], Counter[Plan]()
    for first, batch in _fresh_batches(trainer, seed + _FRESH_SEED_OFFSET):
        trajectory = trainer.sampler.sample(batch, range(first, first + len(batch)))
        gains.append(trajectory_gains(reader, trajectory))
        model_gains.append(trajectory.stack("model_gain").mean(dim=1))
        keys = torch.stack([step.selected_pair.key_tokens[:, 0] for step in trajectory.steps], dim=1)
        plans.update(tuple(row) for row in torch.searchsorted(topic_names()[:, 0].contiguous(), keys).tolist())
    shares = {plan: count / plans.total() for plan, count in plans.most_common(5)}
    return torch.cat(gains).mean().item(), torch.cat(model_gains).mean().item(), shares


def _fresh_batches(trainer: AttentionGuidedRLTrainer, seed: int) -> Iterator[tuple[int, MemoryBatch]]:
    stream = ArticleStream(write_articles(_NUM_FRESH, seed), source="fresh articles", seed=seed, num_epochs=_READINGS)
    pairs = iter_article_pairs(stream, trainer.encoder, trainer.args, seed, Counter())
    rows = list(pairs)
    for first in range(0, len(rows), 256):
        # Numbers that no episode of the training has.
        yield _FRESH_SEED_OFFSET + first, collate_memories(rows[first : first + 256], NAME_LENGTH)
