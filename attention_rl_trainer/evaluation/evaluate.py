"""A policy on held-out memories, without training: its rewards and, with tables, what they come from (design §11)."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from tqdm.auto import tqdm

from attention_rl_trainer.evaluation.asking import AskedQuestions
from attention_rl_trainer.evaluation.tables import EvaluationTables, TableBuilder
from attention_rl_trainer.memories.loading import MemoryLoader
from attention_rl_trainer.memories.pairs import MemoryBatch
from attention_rl_trainer.memories.stream import Articles
from attention_rl_trainer.memories.tokenization import PlainTextEncoder
from attention_rl_trainer.options import Count, CountOrZero, Options, option
from attention_rl_trainer.records.metrics import trajectory_metrics
from attention_rl_trainer.rollout.sampler import TrajectorySampler
from attention_rl_trainer.types import Trajectory

# Evaluation episodes have streams of their own, far from any training seed.
_SEED_OFFSET = 2**32


@dataclass
class EvaluationOptions(Options):
    """How much is evaluated."""

    eval_episodes: Count = option(64, "Trajectories rolled out by an evaluation.")
    eval_tables: bool = option(
        True,
        "Measure orders and queries against baselines in evaluations too; takes several times as long as the "
        "trajectories alone.",
    )
    eval_order_episodes: CountOrZero | None = option(
        None,
        "With eval_tables, score orders only for this number of an evaluation's trajectories, the first ones; it takes "
        "most of the time. 0 for none. Default: for all.",
    )
    eval_epochs: Count = option(
        1,
        "How often the evaluation articles are read, each time with another memory; above 1 where they are fewer than "
        "eval_episodes.",
    )


def expect_evaluable(
    loader: MemoryLoader, articles: Articles | Mapping[str, Articles] | None, options: EvaluationOptions
) -> None:
    """Read as much of the evaluation articles as shows that an evaluation in the middle of a run will not lack any.

    Raises:
        ValueError: none can be used, or with ``eval_tables`` a single one.
    """
    if articles is None:
        return
    sets = articles if isinstance(articles, Mapping) else {"": articles}
    for name, part in sets.items():
        place = f"eval_dataset[{name!r}]" if name else "eval_dataset"
        rows = loader.rows(loader.evaluation_stream(part, num_epochs=1))
        needed = 2 if options.eval_tables else 1
        try:
            num_read = len(list(itertools.islice(rows, min(needed, options.eval_episodes))))
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
        if num_read < needed:
            raise ValueError(
                f"{place}: eval_tables compares queries with those on another article, but the first "
                f"{options.eval_episodes} episodes are on a single one; use more articles, raise eval_episodes above "
                "1, or set eval_tables to false"
            )


def evaluate(
    sampler: TrajectorySampler,
    batches: Iterable[MemoryBatch],
    encoder: PlainTextEncoder,
    options: EvaluationOptions,
    questions: AskedQuestions | None = None,
    *,
    show_progress: bool = False,
) -> tuple[dict[str, float], EvaluationTables | None]:
    """Evaluate a policy.

    Where the memories are those of a game, ``questions`` measure what was asked. The random numbers are not those of
    training, and the same at every call. ``show_progress`` by a bar.

    Returns:
        Rewards, their parts and the tables' main figures, by name; and with ``eval_tables`` the tables.
    """
    # The trainer's, with streams of its own and all that is measured.
    sampler = copy.copy(sampler)
    sampler.seed += _SEED_OFFSET
    sampler.compute_order_gain = True
    # Further queries are there to be trained on.
    sampler.num_queries = 1
    num_episodes, num_ordered = options.eval_episodes, options.eval_order_episodes
    # A memory whose orders are scored counts once more: that takes most of the time.
    again = 0 if not options.eval_tables else num_episodes if num_ordered is None else min(num_ordered, num_episodes)
    hidden = None if show_progress else True  # None: where standard error is no terminal
    bar = tqdm(desc="Evaluating", total=num_episodes + again, unit="memory", disable=hidden, leave=False)
    with bar:
        if not options.eval_tables:
            return evaluate_policy(sampler, batches, num_episodes, lambda batch, _: bar.update(len(batch))), None
        builder = TableBuilder(
            sampler,
            encoder,
            num_order_episodes=num_ordered,
            questions=questions,
            on_scored=bar.update,
        )

        def observe(batch: MemoryBatch, trajectory: Trajectory) -> None:
            builder.add(batch, trajectory)
            bar.update(len(batch))

        results = evaluate_policy(sampler, batches, num_episodes, observe)
        tables = builder.build()
    # What both know, such as how many queries differ, is the same but for rounding.
    return tables.metrics() | results, tables


def evaluate_policy(
    sampler: TrajectorySampler,
    batches: Iterable[MemoryBatch],
    num_episodes: int,
    observe: Callable[[MemoryBatch, Trajectory], object] | None = None,
) -> dict[str, float]:
    """Roll out at most ``num_episodes`` trajectories, numbered from 0, and summarize them; ``observe`` sees each batch.

    Returns:
        Means over trajectories and steps, by the names under which they are logged, and ``"episodes"``.
    """
    sums: dict[str, tuple[float, int]] = {}
    """By name, with the number of trajectories: not every batch has every number."""
    rewards = []
    done = 0
    for whole in batches:
        batch = whole.select_rows(range(min(len(whole), num_episodes - done)))
        trajectory = sampler.sample(batch, range(done, done + len(batch)))
        if observe is not None:
            observe(batch, trajectory)
        done += len(batch)
        rewards.append(trajectory.avg_reward.cpu())
        for name, value in trajectory_metrics(trajectory).items():
            total, count = sums.get(name, (0.0, 0))
            sums[name] = total + value * len(batch), count + len(batch)
        if done >= num_episodes:
            break
    joined = torch.cat(rewards)
    means = {name: total / count for name, (total, count) in sums.items()}
    spread = {"reward_std": joined.std(correction=0).item(), "reward_max": joined.max().item()}
    return means | spread | {"episodes": float(done)}
