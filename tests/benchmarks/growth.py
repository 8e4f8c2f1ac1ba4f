"""How time, forward tokens and memory of a rollout grow with the number of steps T.

Each token of the context passes through either model once, so forward tokens grow linearly; attention to a longer
context makes time grow a little faster. Every T is rolled out in the first round, shortest first, so that the peak
of the process is that of the longest so far; T = 8 and T = 32, whose ratio is the figure, in all further rounds.

    python tests/benchmarks/growth.py
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from harness import PeakMemory, Report, time_in_turn
from rollout import TOKENS, sample
from scene import new_sampler, offline_batch, offline_policy

STEPS = (2, 4, 8, 16, 32)


def measure(rows: int, repeats: int) -> Report:
    """Time every number of steps in one run."""
    policy, tokenizer = offline_policy()
    tokens: dict[int, int] = {}
    peaks: dict[int, float] = {}

    def contender(steps: int) -> Callable[[], None]:
        sampler, batch = new_sampler(policy, tokenizer, steps, TOKENS), offline_batch(tokenizer, rows, steps, TOKENS)

        def run() -> None:
            with PeakMemory() as memory:
                tokens[steps] = sample(sampler, batch).forward_tokens
            peaks.setdefault(steps, memory.peak_mib)

        return run

    contender(1)()
    timings = time_in_turn(
        {str(steps): contender(steps) for steps in STEPS}, repeats, warm_up=False, once={"2", "4", "16"}
    )
    settings = {"rows": rows, "L = K = V": TOKENS, "weights": "bfloat16", "repeats": repeats}
    report = Report("growth", "python tests/benchmarks/growth.py", settings)
    report.figure("growth.tokens_t8_to_t32", tokens[32] / tokens[8])
    report.figure("growth.time_t8_to_t32", timings["32"].median / timings["8"].median)
    table = [
        [
            steps,
            timings[str(steps)],
            f"{timings[str(steps)].median / timings['8'].median:.2f}",
            tokens[steps],
            f"{tokens[steps] / tokens[8]:.2f}",
            f"{peaks[steps]:.0f}",
        ]
        for steps in STEPS
    ]
    report.table(["T", "time", "of T = 8", "forward tokens", "of T = 8", "peak of the process, MiB"], table)
    return report


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description="Growth of a rollout with its number of steps.")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    measure(arguments.rows, arguments.repeats).write()


if __name__ == "__main__":
    sys.exit(main())
