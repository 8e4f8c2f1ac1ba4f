"""What the calibrated selector costs: one rollout with it, beside the same with the seed document's.

The heads are those that the recipe's calibration chooses of this model. Keys are unseen each time, so that embedding
them as far as their last layer counts, as do the hooks on several layers and the queries that each memory is asked.

    python tests/benchmarks/calibrated.py
"""

from __future__ import annotations

import argparse

import torch
from harness import Report, time_in_turn
from rollout import TOKENS, sample
from scene import SEED, new_sampler, offline_batch, offline_policy

from attention_rl_trainer.models.heads import HeadNumber
from attention_rl_trainer.rollout.calibration import Calibration
from attention_rl_trainer.rollout.environment import KVMemoryEnvironment, SelectionOptions

HEADS = ("18.6", "18.7", "5.6", "8.1", "8.0", "2.4", "17.5", "17.4")


def measure(rows: int, repeats: int) -> Report:
    """Time both in one run."""
    steps = 8
    policy, tokenizer = offline_policy()
    batch = offline_batch(tokenizer, rows, steps, TOKENS)
    literal = new_sampler(policy, tokenizer, steps, TOKENS)
    chosen, _ = offline_policy()
    chosen.choose_heads([HeadNumber.parse(head) for head in HEADS])
    heads = chosen.attention.heads
    generator = torch.Generator().manual_seed(SEED)
    # Any means take as long.
    means = (torch.randn(len(HEADS), heads.head_dim, generator=generator) for _ in range(2))
    options = SelectionOptions("auto", "scores", "cosine", center_vectors=True)
    calibrated = new_sampler(chosen, tokenizer, steps, TOKENS)
    calibrated.environment = KVMemoryEnvironment(options, Calibration(0.03, None, *means))
    timings = time_in_turn(
        {"literal": lambda: sample(literal, batch), "calibrated": lambda: sample(calibrated, batch)}, repeats
    )
    settings = {"rows": rows, "T": steps, "L = K = V": TOKENS, "weights": "bfloat16", "repeats": repeats}
    report = Report("calibrated", "python tests/benchmarks/calibrated.py", settings)
    report.figure("calibrated.rollout_ratio", timings["calibrated"].median / timings["literal"].median)
    report.table(["selector", "a rollout"], [[name, timing] for name, timing in timings.items()])
    return report


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    measure(given.rows, given.repeats).write()
