"""One update over 16 kept trajectories beside the bare passes that it needs, and its memory as the vocabulary grows.

The bare passes: a forward under the previous adapter without gradient, a forward and a backward, all over the same
whole trajectories in the same micro-batches, with logits at the query positions. Ours besides: both distributions, the
REINFORCE and KL terms and their gradient, in chunks.

    python tests/benchmarks/update.py
    python tests/benchmarks/update.py --vocabulary 131072    # peak of one update with a tiny trunk, as JSON
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import bitsandbytes
import torch
from harness import PeakMemory, Report, run_in_process, time_in_turn
from rollout import TOKENS
from scene import new_sampler, offline_batch, offline_policy
from tiny import adapted, made_up_kept, tiny_llama
from torch import nn

from attention_rl_trainer.models.modes import update_mode
from attention_rl_trainer.models.policy import PolicyModel
from attention_rl_trainer.rollout.environment import KVMemoryEnvironment
from attention_rl_trainer.update.kept import KeptTrajectories
from attention_rl_trainer.update.losses import LossOptions
from attention_rl_trainer.update.objective import compute_loss_terms
from attention_rl_trainer.update.previous_adapter import AdapterSnapshot

STEPS, KEPT = 8, 16
VOCABULARIES = (49152, 131072, 262144)


def make_kept(token_ids: torch.Tensor, query_starts: Sequence[int]) -> KeptTrajectories:
    """Kept trajectories over given tokens."""
    value_starts = [start + TOKENS + 2 for start in query_starts]
    return made_up_kept(token_ids, query_starts, value_starts, TOKENS, TOKENS)


class Update:
    """The gradient of one update, ours and bare.

    Args:
        policy: the model.
        kept: what is trained on.
        micro_batch_size: trajectories in a pass.
    """

    def __init__(self, policy: PolicyModel, kept: KeptTrajectories, micro_batch_size: int) -> None:
        self.policy = policy
        self.kept = kept
        self.micro_batch_size = micro_batch_size
        self.previous_adapter = AdapterSnapshot(policy.model)
        self.environment = KVMemoryEnvironment()
        self.options = LossOptions()
        starts = torch.tensor(kept.query_starts)[:, None]
        self.positions = (starts + torch.arange(kept.query_length)).flatten() - 1
        policy.model.train()

    def ours(self) -> None:
        """Differentiate the loss as the trainer does."""
        model = self.policy.model
        for batch in self.kept.split(self.micro_batch_size):
            with update_mode(model):
                terms = compute_loss_terms(
                    self.policy, model, self.environment, self.previous_adapter, batch, self.options
                )
                terms.loss.backward()
        model.zero_grad()

    def bare(self, head: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Forward, forward and backward, with logits at the query positions, in as many chunks as ours."""
        policy, model = self.policy, self.policy.model
        for batch in self.kept.split(self.micro_batch_size):
            with update_mode(model):
                with self.previous_adapter.swapped_in():
                    for states in self.chunks(policy.forward(batch.token_ids)):
                        head(states)
                hidden = policy.forward(batch.token_ids)[:, self.positions].flatten(0, 1)
                leaf = hidden.detach().requires_grad_()
                for states in torch.split(leaf, policy.logits_chunk_size):
                    logits = head(states)
                    logits.backward(torch.ones_like(logits))
                hidden.backward(leaf.grad)
        model.zero_grad()

    def chunks(self, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Cut the states of the query positions."""
        return torch.split(hidden[:, self.positions].flatten(0, 1), self.policy.logits_chunk_size)


def rolled_out_update(micro_batch_size: int) -> Update:
    """An update on the embedded model's own trajectories."""
    policy, tokenizer = offline_policy()
    trajectory = new_sampler(policy, tokenizer, STEPS, TOKENS).sample(
        offline_batch(tokenizer, KEPT, STEPS, TOKENS), range(KEPT)
    )
    return Update(policy, make_kept(trajectory.token_ids, trajectory.query_starts), micro_batch_size)


def tiny_trunk_update(vocabulary: int, micro_batch_size: int = KEPT) -> Update:
    """An update on a trunk of 2 layers of 128 with a vocabulary of any size."""
    sizes = {"hidden_size": 128, "intermediate_size": 256, "vocab_size": vocabulary, "tie_word_embeddings": True}
    model = adapted(tiny_llama(**sizes))
    starts = tuple(46 + 44 * step for step in range(STEPS))
    token_ids = torch.randint(1, 40000, (KEPT, starts[-1] + 42))
    return Update(PolicyModel(model, torch.arange(17, vocabulary)), make_kept(token_ids, starts), micro_batch_size)


def measure_memory(vocabulary: int) -> dict[str, float]:
    """Peak of one update beyond the loaded process, in MiB."""
    update = tiny_trunk_update(vocabulary)
    with torch.no_grad():
        # Weights are resident once they were read.
        update.policy.head(update.policy.forward(torch.arange(2)[None])[0])
    with PeakMemory() as memory:
        update.ours()
    weights = sum(p.numel() * p.element_size() for p in update.policy.model.parameters()) / 2**20
    return {"weights": weights, "loaded": memory.before_mib, "update": memory.peak_mib - memory.before_mib}


def optimizer_step(make: Callable[[list[nn.Parameter]], torch.optim.Optimizer], sizes: list[torch.Size]) -> Any:
    """One step over tensors of the adapter's sizes."""
    parameters = [nn.Parameter(torch.randn(size)) for size in sizes]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    return make(parameters).step


def measure(micro_batch_size: int, repeats: int) -> Report:
    """Time the update, its bare passes and optimizers; measure memory in processes of their own."""
    update = rolled_out_update(micro_batch_size)
    # One trajectory warms up. The states that reach the head are contiguous.
    Update(update.policy, update.kept.select_rows(torch.arange(1)), 1).ours()
    linear = update.policy.head.linear
    timings = time_in_turn(
        {
            "ours": update.ours,
            "bare": partial(update.bare, linear),
        },
        repeats,
        warm_up=False,
    )
    sizes = [p.shape for p in update.policy.model.parameters() if p.requires_grad]
    optimizers = time_in_turn(
        {
            "AdamW, 8-bit (bitsandbytes)": optimizer_step(partial(bitsandbytes.optim.AdamW8bit, lr=1e-4), sizes),
            "AdamW (torch)": optimizer_step(partial(torch.optim.AdamW, lr=1e-4), sizes),
            "AdamW, fused (torch)": optimizer_step(partial(torch.optim.AdamW, lr=1e-4, fused=True), sizes),
        },
        max(repeats, 15),
    )
    settings = {"trajectories": KEPT, "T": STEPS, "tokens each": update.kept.token_ids.shape[1]}
    settings |= {"micro-batch": micro_batch_size, "weights": "bfloat16", "repeats": repeats}
    report = Report("update", "python tests/benchmarks/update.py", settings)
    report.figure("update.floor_ratio", timings["ours"].median / timings["bare"].median)
    bare = timings["bare"].median
    report.table(["update", "time", "of bare"], [[n, t, f"{t.median / bare:.2f}"] for n, t in timings.items()])
    add_memory(report)
    steps = [[name, f"{timing.median * 1e3:.2f} ms"] for name, timing in optimizers.items()]
    report.table([f"optimizer step, {sum(size.numel() for size in sizes):,} parameters", "time"], steps)
    return report


def add_memory(report: Report) -> None:
    """Add the update's memory for each vocabulary."""
    memory = {size: run_in_process(__file__, "--vocabulary", str(size)) for size in VOCABULARIES}
    alive = {
        size: run_in_process(__file__, "--vocabulary", str(size), return_freed_memory=True) for size in VOCABULARIES
    }
    # What the allocator keeps varies from run to run; what the update needs does not.
    report.figure("update.vocab_growth", alive[262144]["update"] / alive[49152]["update"] - 1)
    header = ["vocabulary, trunk of 2 layers of 128, float32", "weights, MiB", "process with the model, MiB"]
    rows = []
    for size in VOCABULARIES:
        numbers = [memory[size]["weights"], memory[size]["loaded"], alive[size]["update"], memory[size]["update"]]
        rows.append([size, *(f"{number:.0f}" for number in numbers)])
    report.table([*header, "peak of the update beyond it, MiB", "the same, with what the allocator keeps, MiB"], rows)


def main() -> None:
    """Measure memory, or time and report."""
    parser = argparse.ArgumentParser(description="An update beside its bare passes.")
    parser.add_argument("--micro_batch", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--vocabulary", type=int)
    arguments = parser.parse_args()
    if arguments.vocabulary is not None:
        print(json.dumps(measure_memory(arguments.vocabulary)))
    else:
        measure(arguments.micro_batch, arguments.repeats).write()


if __name__ == "__main__":
    sys.exit(main())
