"""A policy's rewards and their parts on held-out articles, without training (design §7).

Knows nothing about the trainer; a sampler and batches of articles come in, numbers come out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from attention_rl_trainer.pairs import ArticleBatch
from attention_rl_trainer.records import trajectory_metrics
from attention_rl_trainer.rollout import TrajectorySampler
from attention_rl_trainer.types import Trajectory


def evaluate_policy(
    sampler: TrajectorySampler,
    batches: Iterable[ArticleBatch],
    num_episodes: int,
    observe: Callable[[ArticleBatch, Trajectory], None] | None = None,
) -> dict[str, float]:
    """Roll out one trajectory for each article and summarize them.

    Args:
        sampler: rolls the trajectories out; its episodes are numbered from 0.
        batches: the articles.
        num_episodes: trajectories at most.
        observe: sees each batch and its trajectories.

    Returns:
        Means over trajectories and steps, by the names under which they are logged, and ``"episodes"``.
    """
    sums: dict[str, float] = {}
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
            sums[name] = sums.get(name, 0.0) + value * len(batch)
        if done >= num_episodes:
            break
    joined = torch.cat(rewards)
    means = {name: value / done for name, value in sums.items()}
    spread = {"reward_std": joined.std(correction=0).item(), "reward_max": joined.max().item()}
    return means | spread | {"episodes": float(done)}
