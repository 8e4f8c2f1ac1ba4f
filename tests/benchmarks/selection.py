"""The selector alone, on 10² to 10⁶ keys of 3 groups × 64 in float32.

A query's probabilities over all keys, and 16 draws without replacement, beside one `copy_` of the keys' memory on the
same threads: both have to read every key once. Bandwidth is bytes of the keys divided by time, for either.

    python tests/benchmarks/selection.py
"""

from __future__ import annotations

import argparse
import sys

import torch
from harness import Report, time_in_turn
from torch import Tensor

from attention_rl_trainer.rollout.key_index import KeyIndex
from attention_rl_trainer.rollout.selector import compute_similarity, sample_key_value, selection_log_probabilities

GROUPS, HEADS, HEAD_DIM, DRAWS = 3, 9, 64, 16


def select(index: KeyIndex, queries: Tensor, noise: Tensor) -> Tensor:
    """Probabilities over every key, and draws without replacement."""
    distribution = index.score(queries)
    probabilities = distribution.probabilities()
    assert probabilities.shape == (len(queries), index.num_keys)
    return distribution.draw(noise)


def select_step_by_step(keys: Tensor, queries: Tensor, noise: Tensor) -> Tensor:
    """The same by the selector of a trajectory, which scores every key again for each draw."""
    available = torch.ones(len(queries), len(keys), dtype=torch.bool)
    drawn = []
    for step in range(noise.shape[1]):
        similarity = compute_similarity(queries, keys.expand(len(queries), *keys.shape))
        drawn.append(sample_key_value(selection_log_probabilities(similarity, available).exp(), noise[:, step]))
        available = available.scatter(1, drawn[-1][:, None], False)
    return torch.stack(drawn, dim=1)


def measure(repeats: int) -> Report:
    """Time every size in one run."""
    generator = torch.Generator().manual_seed(0)
    settings = {"groups": GROUPS, "query heads": HEADS, "head dimension": HEAD_DIM, "draws": DRAWS, "repeats": repeats}
    report = Report("selection", "python tests/benchmarks/selection.py", settings)
    rows = []
    for exponent in (2, 3, 4, 5, 6):
        keys = torch.randn(10**exponent, GROUPS, HEAD_DIM, generator=generator)
        queries = torch.randn(16, HEADS, HEAD_DIM, generator=generator)
        noise = torch.rand(16, DRAWS, generator=generator, dtype=torch.float64)
        index, target = KeyIndex(keys), torch.empty_like(keys)
        contenders = {
            "copy": lambda keys=keys, target=target: target.copy_(keys),
            "one": lambda index=index, queries=queries, noise=noise: select(index, queries[:1], noise[:1]),
            "sixteen": lambda index=index, queries=queries, noise=noise: select(index, queries, noise),
        }
        if exponent < 6:
            contenders["step by step"] = lambda keys=keys, queries=queries, noise=noise: select_step_by_step(
                keys, queries[:1], noise[:1]
            )
        timings = time_in_turn(contenders, repeats)
        gigabytes = keys.numel() * keys.element_size() / 1e9
        fraction = timings["copy"].median / timings["one"].median
        rows.append(
            [
                f"10^{exponent}",
                timings["copy"],
                timings["one"],
                f"{gigabytes / timings['one'].median:.3g}",
                f"{fraction:.0%}",
                timings["sixteen"],
                timings.get("step by step", ""),
            ]
        )
        if exponent == 6:
            report.figure("selection.bandwidth_fraction", fraction)
    header = ["keys", "copy_", "1 query", "GB/s", "of copy_", "16 queries at once", "1 query, `selector` for each draw"]
    report.table(header, rows)
    return report


def main() -> None:
    """Time and report."""
    parser = argparse.ArgumentParser(description="Selection from large memories.")
    parser.add_argument("--repeats", type=int, default=15)
    measure(parser.parse_args().repeats).write()


if __name__ == "__main__":
    sys.exit(main())
