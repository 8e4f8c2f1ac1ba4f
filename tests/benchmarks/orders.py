"""What training for orders costs: a step with each option beside a plain one, rollout and update of every trajectory.

python tests/benchmarks/orders.py
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from harness import Report, time_in_turn
from scene import SEED, offline_policy

from attention_rl_trainer.memories.articles.sources import load_articles
from attention_rl_trainer.memories.loading import MemoryLoader, ReadingOptions
from attention_rl_trainer.memories.tokenization import PlainTextEncoder
from attention_rl_trainer.models.modes import update_mode
from attention_rl_trainer.rollout.environment import KVMemoryEnvironment
from attention_rl_trainer.rollout.layout import Separators
from attention_rl_trainer.rollout.sampler import RolloutOptions, TrajectorySampler
from attention_rl_trainer.update.filter import FilterOptions, RewardFilter
from attention_rl_trainer.update.kept import KeptTrajectories, with_choice_values
from attention_rl_trainer.update.losses import LossOptions
from attention_rl_trainer.update.objective import compute_loss_terms
from attention_rl_trainer.update.previous_adapter import AdapterSnapshot

PAIRS, STEPS, TOKENS = 10, 4, 12
CHOICE = {"selector_coef": 1.0}
CONTENDERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "information_coef 1": ({"information_coef": 1.0}, {}),
    "num_queries 4": ({"num_queries": 4}, {}),
    "selector_gradient sampled": ({}, CHOICE),
    "selector_gradient expected": ({}, CHOICE | {"selector_gradient": "expected"}),
    "selector_gradient distilled": ({}, CHOICE | {"selector_gradient": "distilled"}),
}


def measure(rows: int, repeats: int) -> Report:
    """Time all in one run."""
    policy, tokenizer = offline_policy()
    encoder = PlainTextEncoder(tokenizer)
    sizes: dict[str, Any] = {
        "num_kv_pairs": PAIRS + 1,
        "subset_fraction": PAIRS / (PAIRS + 1),
        "tokens_per_key": TOKENS,
        "tokens_per_value": TOKENS,
    }
    loader = MemoryLoader(ReadingOptions(**sizes), encoder, SEED)
    stream = loader.evaluation_stream(load_articles("offline"), num_epochs=1)
    batch = next(iter(loader.batches(stream, rows)))["memories"]
    snapshot = AdapterSnapshot(policy.model)

    def step(rollout: dict[str, Any], loss: dict[str, Any]) -> Callable[[], None]:
        options = RolloutOptions(**sizes, num_steps=STEPS, tokens_per_query=TOKENS, **rollout)
        losses = LossOptions(credit="step", **loss)
        environment = KVMemoryEnvironment()
        sampler = TrajectorySampler(policy, environment, Separators.encode(encoder, options), options, SEED)
        keep_all = FilterOptions(warmup_episodes=1, filter_threshold=None)

        def take() -> None:
            judge = RewardFilter(keep_all)
            trajectories = sampler.sample(batch, range(rows))
            judge.judge(trajectories.avg_reward)
            verdict = judge.judge(trajectories.avg_reward)
            kept = KeptTrajectories.of(trajectories, verdict, losses, rows, batch.articles)
            if losses.needs_choice_values:
                kept = with_choice_values(kept, policy, sampler.layout.for_batch(batch))
            with update_mode(policy.model):
                compute_loss_terms(policy, policy.model, environment, snapshot, kept, losses).loss.backward()
            policy.model.zero_grad()

        return take

    timings = time_in_turn({name: step(*options) for name, options in CONTENDERS.items()}, repeats)
    settings = {"rows": rows, "M": PAIRS, "T": STEPS, "L = K = V": TOKENS, "weights": "bfloat16", "repeats": repeats}
    report = Report("orders", "python tests/benchmarks/orders.py", settings)
    plain = timings["plain"].median
    for name in list(timings)[1:]:
        report.figure(f"orders.{name.replace(' ', '_')}", timings[name].median / plain)
    report.table(["option", "a step"], [[name, timing] for name, timing in timings.items()])
    return report


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    measure(given.rows, given.repeats).write()
