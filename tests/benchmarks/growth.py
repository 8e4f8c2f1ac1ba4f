"""How time, forward tokens and memory of a rollout grow with the number of steps T.

Each token of the context passes through either model once, so forward tokens grow linearly; attention to a longer
context makes time grow a little faster.

    python tests/benchmarks/growth.py
    python tests/benchmarks/growth.py --memory 8    # peak of one rollout of 8 steps, as JSON
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial

from harness import Report, run_in_process, time_in_turn
from rollout import TOKENS, measure_memory, sample
from scene import new_sampler, offline_batch, offline_policy

STEPS = (2, 4, 8, 16, 32)


def measure(rows: int, repeats: int) -> Report:
    """Time every number of steps in one run."""
    policy, tokenizer = offline_policy()
    batches = {steps: offline_batch(tokenizer, rows, steps, TOKENS) for steps in STEPS}
    samplers = {steps: new_sampler(policy, tokenizer, steps, TOKENS) for steps in STEPS}
    tokens: dict[int, int] = {}

    def run(steps: int) -> None:
        tokens[steps] = sample(samplers[steps], batches[steps]).forward_tokens

    run(2)
    timings = time_in_turn({str(steps): partial(run, steps) for steps in STEPS}, repeats, warm_up=False)
    settings = {"rows": rows, "L = K = V": TOKENS, "weights": "bfloat16", "repeats": repeats}
    report = Report("growth", "python tests/benchmarks/growth.py", settings)
    report.figure("growth.tokens_t8_to_t32", tokens[32] / tokens[8])
    report.figure("growth.time_t8_to_t32", timings["32"].median / timings["8"].median)
    table = []
    for steps in STEPS:
        memory = run_in_process(__file__, "--memory", str(steps), "--rows", str(rows))
        table.append(
            [
                steps,
                timings[str(steps)],
                f"{timings[str(steps)].median / timings['8'].median:.2f}",
                tokens[steps],
                f"{tokens[steps] / tokens[8]:.2f}",
                f"{memory['caches']:.0f}",
                f"{memory['peak']:.0f}",
            ]
        )
    report.table(
        ["T", "time", "of T = 8", "forward tokens", "of T = 8", "caches, MiB", "peak of the process, MiB"], table
    )
    return report


def main() -> None:
    """Measure memory, or time and report."""
    parser = argparse.ArgumentParser(description="Growth of a rollout with its number of steps.")
    parser.add_argument("--rows", type=int, default=4, help="a batch of 16 takes four times as long")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--memory", type=int, metavar="STEPS")
    arguments = parser.parse_args()
    if arguments.memory is not None:
        print(json.dumps(measure_memory(arguments.rows, arguments.memory)))
    else:
        measure(arguments.rows, arguments.repeats).write()


if __name__ == "__main__":
    sys.exit(main())
