"""One rollout batch, phase by phase, beside the bare forwards that it needs and beside the document taken literally.

- ours: `TrajectorySampler.sample`, every key unseen.
- floor: the forwards that the algorithm needs and nothing around them, on fixed tokens: each unseen key as far as its
  vector; the prompt under both models; per step L one-token forwards, one of the response, one of the query and the
  response under the reference. Caches, attention and batches are the fastest that we know, our own; logits are
  computed where they are needed, and not looked at. The same with transformers' own cache and attention, policy
  and reference one after the other, stand beside.
- naive: `naive.NaiveRollout`. A step of it knows nothing of the steps before but the context's length, so three lengths
  are timed and a parabola through their medians (linear layers and attention: exact in form) gives the others; another
  step tells how well.

    python tests/benchmarks/rollout.py            # figures and page
    python tests/benchmarks/rollout.py --check    # float32: naive and ours give the same log-probabilities
    python tests/benchmarks/rollout.py --memory   # peak of one rollout, as JSON
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import torch
from harness import PeakMemory, Report, Timing, run_in_process, time_in_turn
from naive import NaiveRollout, NaiveStep, StepMemory
from scene import contiguous_head, lay_out_prompt, new_sampler, offline_batch, offline_policy
from torch import Tensor
from transformers import DynamicCache

from attention_rl_trainer.memories.pairs import MemoryBatch
from attention_rl_trainer.memories.tokenization import PlainTextEncoder
from attention_rl_trainer.models import grouped_attention
from attention_rl_trainer.models.causal_lm import deterministic_inference
from attention_rl_trainer.models.key_vectors import KeyVectorCache
from attention_rl_trainer.models.kv_cache import PreallocatedCache, memory_bytes
from attention_rl_trainer.models.policy import PolicyModel
from attention_rl_trainer.models.readers import JointReaders
from attention_rl_trainer.rollout.layout import Separators
from attention_rl_trainer.rollout.sampler import TrajectorySampler
from attention_rl_trainer.types import Trajectory

TOKENS = 20


# --- ours -----------------------------------------------------------------------------------------------------------


def sample(sampler: TrajectorySampler, batch: MemoryBatch) -> Any:
    """Roll a batch of unseen articles out."""
    sampler.policy.key_cache = KeyVectorCache(sampler.policy.key_cache.max_bytes)
    return sampler.sample(batch, range(len(batch)))


@contextmanager
def phases() -> Iterator[dict[str, float]]:
    """Collect the seconds that a rollout spends in each phase."""
    places: list[tuple[type, str, str]] = [
        (PolicyModel, "embed_keys", "key embedding"),
        (JointReaders, "__init__", "prefill"),
        (JointReaders, "write_queries", "decoding of both queries"),
        (JointReaders, "read_response", "append and counterfactual (forward)"),
        (JointReaders, "follow", "roll-back and catching up of the reference (forward)"),
        (TrajectorySampler, "score", "log-probabilities of the values (head)"),
    ]
    seconds: dict[str, float] = defaultdict(float)

    def timed(function: Callable[..., Any], label: str) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                seconds[label] += time.perf_counter() - started

        return run

    originals = [getattr(owner, name) for owner, name, _ in places]
    for (owner, name, label), original in zip(places, originals, strict=True):
        setattr(owner, name, timed(original, label))
    try:
        yield seconds
    finally:
        for (owner, name, _), original in zip(places, originals, strict=True):
            setattr(owner, name, original)


# --- the floor ------------------------------------------------------------------------------------------------------


class Floor:
    """Bare forwards, counted from the algorithm.

    Args:
        policy: the model.
        batch: articles; which tokens are read does not matter for the time.
        separators: the separators.
        steps: T.
    """

    def __init__(self, policy: PolicyModel, batch: MemoryBatch, separators: Separators, steps: int) -> None:
        self.policy = policy
        self.steps = steps
        self.rows = len(batch)
        self.keys = batch.key_tokens.flatten(0, 1)
        self.prompt = lay_out_prompt(batch, separators)
        self.response = len(separators.response) + TOKENS
        self.block = self.response + len(separators.query)
        length = self.prompt.shape[1] + steps * (TOKENS + self.block)
        self.token_ids = torch.randint(100, 40000, (2 * self.rows, length))

    def score(self, hidden: Tensor) -> None:
        """Logits of a value's tokens."""
        self.policy.head(hidden[:, 1 : 1 + TOKENS].flatten(0, 1))

    def with_our_kernels(self) -> None:
        """Preallocated caches, attention by groups, policy and reference in one batch."""
        policy, rows = self.policy, self.rows
        with policy.inference():
            with policy.reference():
                for chunk in torch.split(self.keys, policy.embedding_batch_size):
                    policy.attention.run_to_keys(policy.backbone, chunk)
            cache = PreallocatedCache.of(policy.causal_lm, 2 * rows, self.token_ids.shape[1])
            with policy.jointly(rows):
                policy.forward(self.prompt.repeat(2, 1), cache)
            reference_cache = cache.view(slice(rows, 2 * rows))
            for _ in range(self.steps):
                with policy.jointly(rows):
                    for position in range(TOKENS):
                        policy.head(policy.forward(self.token_ids[:, position : position + 1], cache)[:, -1])
                    self.score(policy.forward(self.token_ids[:, : self.block], cache))
                reference_cache.length = cache.length - TOKENS - self.block
                with policy.reference():
                    self.score(policy.forward(self.token_ids[:rows, : TOKENS + self.block], reference_cache))

    def with_transformers_own(self) -> None:
        """Dynamic caches and the attention that the model comes with; policy and reference one after the other."""
        policy, rows, ids = self.policy, self.rows, self.token_ids
        with deterministic_inference(policy.model):
            with policy.reference():
                for chunk in torch.split(self.keys, policy.embedding_batch_size):
                    policy.forward(chunk)
            cache, reference_cache = (DynamicCache(config=policy.causal_lm.config) for _ in range(2))
            policy.forward(self.prompt, cache)
            with policy.reference():
                policy.forward(self.prompt, reference_cache)
            for _ in range(self.steps):
                for position in range(TOKENS):
                    policy.head(policy.forward(ids[:rows, position : position + 1], cache)[:, -1])
                self.score(policy.forward(ids[:rows, : self.block], cache))
                with policy.reference():
                    for position in range(TOKENS - 1):
                        policy.head(policy.forward(ids[:rows, position : position + 1], reference_cache)[:, -1])
                    self.score(policy.forward(ids[:rows, : 1 + self.response], reference_cache))
                    reference_cache.crop(-(TOKENS + self.response))
                    self.score(policy.forward(ids[:rows, : TOKENS + self.block], reference_cache))


# --- naive ----------------------------------------------------------------------------------------------------------


class NaiveCost:
    """The time of a naive rollout from the times of a few of its steps.

    Args:
        naive: the rollout.
        batch: articles with as many pairs as there are steps.
        steps: T of the longest rollout.
    """

    def __init__(self, naive: NaiveRollout, batch: MemoryBatch, steps: int) -> None:
        self.naive = naive
        self.batch = batch
        self.anchors = [1, (3 + steps) // 3, 1 + 2 * steps // 3]
        self.checked = (self.anchors[0] + self.anchors[1]) // 2
        self.start = lay_out_prompt(batch, naive.separators).shape[1]
        frame = naive.response_separator.shape[1] + naive.query_separator.shape[1]
        self.growth = 2 * TOKENS + frame

    def length(self, step: int) -> int:
        """Tokens of the context at a step, counted from 1."""
        return self.start + (step - 1) * self.growth

    def contenders(self) -> dict[str, Callable[[], object]]:
        """What has to be timed."""
        rows = len(self.batch)
        memory = StepMemory(torch.randn(rows, 8, 3, 64), torch.ones(rows, 8, dtype=torch.bool), None)
        select = partial(memory.select, self.batch.value_tokens)
        runs: dict[str, Callable[[], object]] = {}
        for step in (*self.anchors, self.checked):
            context = torch.randint(100, 40000, (rows, self.length(step)))
            runs[f"naive step {step}"] = partial(self.naive.read, context, select)
        for pairs in (8, 16):
            runs[f"naive embedding of {pairs} keys a row"] = partial(self.embed, self.batch.key_tokens[:, :pairs])
        return runs

    def embed(self, keys: Tensor) -> None:
        """Embed the keys of a memory as the naive rollout does."""
        with contiguous_head(self.naive.policy):
            self.naive.embed_keys(keys)

    def seconds(self, timings: dict[str, Timing], steps: int) -> float:
        """Time of a whole rollout of T steps over T pairs."""
        reading = sum(self.step_seconds(timings, step) for step in range(1, steps + 1))
        return reading + steps * timings[f"naive embedding of {steps} keys a row"].median

    def step_seconds(self, timings: dict[str, Timing], step: int) -> float:
        """Time of one step by the parabola."""
        lengths = [self.length(anchor) for anchor in self.anchors]
        parabola = np.polyfit(lengths, [timings[f"naive step {anchor}"].median for anchor in self.anchors], 2)
        return float(np.polyval(parabola, self.length(step)))


def check(rows: int = 3, steps: int = 3) -> None:
    """Compare ours with naive in float32, on the same queries and choices, by either way of attending.

    Raises:
        RuntimeError: a number differs by more than 2e-4.
    """
    policy, tokenizer = offline_policy(torch.float32)
    batch = offline_batch(tokenizer, rows, steps, TOKENS)
    naive = NaiveRollout(policy, Separators.encode(PlainTextEncoder(tokenizer)), TOKENS)
    worst = 0.0
    for dtypes in ((), (torch.float32,)):
        with mock.patch.object(grouped_attention, "DTYPES_OF_PRODUCTS", dtypes):
            trajectory = new_sampler(policy, tokenizer, steps, TOKENS).sample(batch, range(rows))
        worst = max(worst, largest_difference(trajectory, naive.sample(batch, steps, trajectory)))
    print(f"check: {rows} trajectories of {steps} steps; the largest difference of a log-probability is {worst:.1g}")


def largest_difference(trajectory: Trajectory, naive_steps: list[NaiveStep]) -> float:
    """Compare every number that both compute.

    Raises:
        RuntimeError: a number differs by more than 2e-4.
    """
    worst = 0.0
    for number, (ours, theirs) in enumerate(zip(trajectory.steps, naive_steps, strict=True)):
        assert theirs.query_logprobs is not None
        pairs = {
            "query_logprobs": (ours.query_logprobs, theirs.query_logprobs),
            "probabilities": (ours.selection_probabilities, theirs.probabilities),
            "policy_value_logprob": (ours.policy_value_logprob, theirs.policy_value_logprob),
            "counterfactual_value_logprob": (ours.counterfactual_value_logprob, theirs.counterfactual_value_logprob),
        }
        for name, (got, expected) in pairs.items():
            difference = (got - expected).abs().max().item()
            worst = max(worst, difference)
            if not difference <= 2e-4:
                raise RuntimeError(f"step {number}: {name} differs by {difference:.2g}")
    return worst


def measure_memory(rows: int, steps: int) -> dict[str, float]:
    """Peak of one rollout in this process, in MiB, beside the loaded process and its caches."""
    policy, tokenizer = offline_policy()
    batch = offline_batch(tokenizer, rows, steps, TOKENS)
    sampler = new_sampler(policy, tokenizer, steps, TOKENS)
    with policy.inference():
        policy.head(policy.forward(batch.example_keys[:1, :2]))
    # All of it at once, as long as the trajectories will be.
    capacity = sampler.layout.for_batch(batch).cached_tokens
    cache = PreallocatedCache(policy.causal_lm.config.num_hidden_layers, 2 * rows, capacity)
    with policy.inference():
        policy.forward(batch.example_keys[:, :1].repeat(2, 1), cache)
    caches = memory_bytes(cache) / 2**20
    del cache
    with PeakMemory() as memory:
        sampler.sample(batch, range(rows))
    return {"loaded": memory.before_mib, "caches": caches, "peak": memory.peak_mib}


# --- report ---------------------------------------------------------------------------------------------------------


def measure(rows: int, repeats: int) -> Report:
    """Time everything in one run."""
    policy, tokenizer = offline_policy()
    separators = Separators.encode(PlainTextEncoder(tokenizer))
    batches = {steps: offline_batch(tokenizer, rows, steps, TOKENS) for steps in (8, 16)}
    samplers = {steps: new_sampler(policy, tokenizer, steps, TOKENS) for steps in (8, 16)}
    floor = Floor(policy, batches[8], separators, 8)
    naive = NaiveRollout(policy, separators, TOKENS)
    cost = NaiveCost(naive, batches[16], 16)
    # A short rollout and a short generation warm up; a whole round would take as long as one that counts.
    sample(new_sampler(policy, tokenizer, 2, TOKENS), offline_batch(tokenizer, rows, 2, TOKENS))
    naive.sample(offline_batch(tokenizer, rows, 1, TOKENS), 1)
    timings = time_in_turn(
        {
            "ours": lambda: sample(samplers[8], batches[8]),
            "floor": floor.with_our_kernels,
            "ours, T = 16": lambda: sample(samplers[16], batches[16]),
            **cost.contenders(),
            "bare forwards of transformers": floor.with_transformers_own,
        },
        repeats,
        warm_up=False,
        once={"bare forwards of transformers", f"naive step {cost.checked}"},
    )
    with phases() as seconds:
        started = time.perf_counter()
        sample(samplers[8], batches[8])
        total = time.perf_counter() - started
    settings = {"rows": rows, "T": 8, "L = K = V": TOKENS, "weights": "bfloat16", "repeats": repeats}
    report = Report("rollout", "python tests/benchmarks/rollout.py", settings)
    add_times(report, timings, cost)
    add_phases(report, seconds, total)
    add_memory(report, run_in_process(__file__, "--memory", "--rows", str(rows)))
    return report


def add_times(report: Report, timings: dict[str, Timing], cost: NaiveCost) -> None:
    """Add the ratios to the floor and to naive."""
    ours, ours_16 = timings["ours"], timings["ours, T = 16"]
    naive_8, naive_16 = cost.seconds(timings, 8), cost.seconds(timings, 16)
    report.figure("rollout.floor_ratio", ours.median / timings["floor"].median)
    report.figure("rollout.naive_speedup_t8", naive_8 / ours.median)
    report.figure("rollout.naive_speedup_t16", naive_16 / ours_16.median)
    stock = timings["bare forwards of transformers"]
    rows: list[list[object]] = [
        ["ours, T = 8", ours, "1"],
        ["floor: bare forwards, our caches, attention and batches", timings["floor"], _ratio(timings["floor"], ours)],
        ["bare forwards, transformers' own cache and attention", stock, _ratio(stock, ours)],
        ["naive, T = 8, from its steps", f"{naive_8:.4g} s", f"{naive_8 / ours.median:.2f}"],
        ["ours, T = 16", ours_16, "1"],
        ["naive, T = 16, from its steps", f"{naive_16:.4g} s", f"{naive_16 / ours_16.median:.2f}"],
    ]
    report.table(["rollout of 16 trajectories", "time", "of ours"], rows)
    parts: list[list[object]] = [[name, timing] for name, timing in timings.items() if name.startswith("naive")]
    by_parabola = cost.step_seconds(timings, cost.checked)
    parts.append([f"naive step {cost.checked}, by the parabola through the other three", f"{by_parabola:.3g} s"])
    report.table(["part of naive", "time"], parts)


def _ratio(timing: Timing, ours: Timing) -> str:
    return f"{timing.median / ours.median:.2f}"


def add_phases(report: Report, seconds: dict[str, float], total: float) -> None:
    """Add where the time of one rollout goes."""
    rest = {"everything else (selection, draws of pairs, checks, records)": total - sum(seconds.values())}
    rows = [[name, f"{value:.3f} s", f"{value / total:.1%}"] for name, value in {**seconds, **rest}.items()]
    report.table(["phase of one rollout, T = 8", "time", "share"], rows)


def add_memory(report: Report, memory: dict[str, float]) -> None:
    """Add the peak beside what must be there."""
    needed = memory["loaded"] + memory["caches"]
    report.figure("rollout.memory_overhead", memory["peak"] / needed - 1)
    report.table(
        ["memory of a process that rolls out once, T = 8", "MiB"],
        [
            ["process with the model loaded", f"{memory['loaded']:.0f}"],
            ["both caches", f"{memory['caches']:.0f}"],
            ["peak of the rollout", f"{memory['peak']:.0f}"],
        ],
    )


def main() -> None:
    """Check, measure memory, or time and report."""
    parser = argparse.ArgumentParser(description="A rollout beside its floor and beside the naive one.")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--memory", action="store_true")
    arguments = parser.parse_args()
    if arguments.check:
        check()
    elif arguments.memory:
        print(json.dumps(measure_memory(arguments.rows, 8)))
    else:
        measure(arguments.rows, arguments.repeats).write()


if __name__ == "__main__":
    sys.exit(main())
