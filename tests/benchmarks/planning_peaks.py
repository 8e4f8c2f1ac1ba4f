"""Peak memory of a rollout or an update on the CPU, beside what `attention_rl_trainer.planning` says of it.

    python tests/benchmarks/planning_peaks.py            all settings, as a table
    python tests/benchmarks/planning_peaks.py NAME       one setting in this process; its last line is JSON

In each setting another part dominates. What is measured is the peak of resident memory less what was resident before
the model was built; a tiny run comes first, so that nothing is imported or started on the way.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.harness import PeakMemory, run_in_process
from tiny import adapted, made_up_kept, random_batch, tiny_llama

from attention_rl_trainer.models.modes import update_mode
from attention_rl_trainer.models.policy import PolicyModel
from attention_rl_trainer.planning.footprint import ROLLOUT_PHASES, UPDATE_PHASES, Phase, plan_memory
from attention_rl_trainer.planning.sizes import ModelShape, RunShape
from attention_rl_trainer.rollout.environment import KVMemoryEnvironment
from attention_rl_trainer.rollout.layout import Separators
from attention_rl_trainer.rollout.sampler import TrajectorySampler
from attention_rl_trainer.update.kept import KeptTrajectories
from attention_rl_trainer.update.objective import compute_loss_terms
from attention_rl_trainer.update.previous_adapter import AdapterSnapshot

MIB = 2**20
SEPARATORS = Separators((1, 2), (3, 2))


@dataclass(frozen=True)
class Setting:
    """A model, a run, and which half of a step is measured."""

    model: dict[str, Any]
    run: RunShape
    half: str

    @property
    def phases(self) -> tuple[Phase, ...]:
        return ROLLOUT_PHASES if self.half == "rollout" else UPDATE_PHASES


_MODEL = {
    "hidden_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 1408,
    "vocab_size": 32000,
    "max_position_embeddings": 1024,
    "initializer_range": 0.02,
}
_CPU: dict[str, Any] = {"weight_bits": 32, "on_cpu": True, "optimizer_bytes_per_parameter": 8}
_LONG: dict[str, Any] = {
    "num_kv_pairs": 7,
    "subset_fraction": 1.0,
    "num_steps": 6,
    "tokens_per_query": 8,
    "tokens_per_value": 48,
}

SETTINGS = {
    "caches": Setting(
        _MODEL | {"num_key_value_heads": 8},
        RunShape(**_CPU, **_LONG, generation_batch_size=10, logits_chunk_size=128),
        "rollout",
    ),
    "bfloat16": Setting(
        _MODEL,
        RunShape(**_CPU | {"weight_bits": 16}, **_LONG, generation_batch_size=32, logits_chunk_size=128),
        "rollout",
    ),
    "activations": Setting(_MODEL, RunShape(**_CPU, **_LONG, training_batch_size=8, logits_chunk_size=128), "update"),
    "checkpointing": Setting(
        _MODEL,
        RunShape(**_CPU, **_LONG, training_batch_size=10, logits_chunk_size=128, activation_checkpointing=True),
        "update",
    ),
    "vocabulary": Setting(
        _MODEL | {"vocab_size": 96000, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 2},
        RunShape(**_CPU, num_kv_pairs=5, subset_fraction=1.0, training_batch_size=4),
        "update",
    ),
}


def rollout(policy: PolicyModel, run: RunShape) -> None:
    """Roll one batch out."""
    sampler = TrajectorySampler(policy, KVMemoryEnvironment(), SEPARATORS, run, seed=0)
    rows = run.generation_batch_size
    batch = random_batch(rows, run.memory_size, run.tokens_per_key, run.tokens_per_value)
    sampler.sample(batch, range(rows))


def kept_trajectories(run: RunShape) -> KeptTrajectories:
    """Make trajectories up that have a real one's lengths."""
    layout = run.layout
    token_ids = torch.randint(1, 380, (run.micro_batch_size, layout.trajectory_tokens))
    return made_up_kept(
        token_ids, layout.query_starts, layout.value_starts, layout.tokens_per_query, layout.tokens_per_value
    )


def update(policy: PolicyModel, run: RunShape) -> None:
    """Take one optimizer step on a full micro-batch."""
    snapshot = AdapterSnapshot(policy.model)
    policy.model.train()
    if run.activation_checkpointing:
        policy.causal_lm.gradient_checkpointing_enable()
        policy.causal_lm.enable_input_require_grads()
    optimizer = torch.optim.AdamW([p for p in policy.model.parameters() if p.requires_grad])
    with update_mode(policy.model):
        kept, environment = kept_trajectories(run), KVMemoryEnvironment()
        terms = compute_loss_terms(policy, policy.model, environment, snapshot, kept, run)
        terms.loss.backward()
    optimizer.step()


def build_policy(model: dict[str, Any], run: RunShape) -> PolicyModel:
    """Build a model of random weights with the default adapter; every id of its vocabulary is allowed."""
    vocabulary_size = model.get("vocab_size", 420)
    return PolicyModel(
        adapted(tiny_llama(**model).to(torch.float32 if run.weight_bits == 32 else torch.bfloat16)),
        torch.arange(vocabulary_size),
        run,
    )


def measure(setting: Setting) -> dict[str, float]:
    """Measure one setting in this process, in MiB."""
    work: Callable[[PolicyModel, RunShape], None] = rollout if setting.half == "rollout" else update
    small = RunShape(**_CPU, num_kv_pairs=3, subset_fraction=1.0, generation_batch_size=2, training_batch_size=2)
    work(build_policy({}, small), small)
    with PeakMemory() as memory:
        policy = build_policy(setting.model, setting.run)
        work(policy, setting.run)
    plan = plan_memory(ModelShape.from_config(policy.causal_lm.config), setting.run)
    planned = {phase.value: plan.phase_bytes(phase) / MIB for phase in setting.phases}
    return {
        "measured_mib": memory.peak_mib - memory.before_mib,
        "planned_mib": max(planned.values()),
        **planned,
    }


def measure_in_process(name: str) -> dict[str, Any]:
    """Measure one of `SETTINGS` in a process of its own, for a peak of its own."""
    return run_in_process(__file__, name, return_freed_memory=True)


def main() -> None:
    """Measure the setting that the command line names, or all."""
    if len(sys.argv) > 1:
        print(json.dumps(measure(SETTINGS[sys.argv[1]])))
        return
    print("setting          measured MiB   planned MiB   planned / measured")
    for name in SETTINGS:
        figures = measure_in_process(name)
        ratio = figures["planned_mib"] / figures["measured_mib"]
        print(f"{name:16} {figures['measured_mib']:12.0f} {figures['planned_mib']:13.0f} {ratio:20.2f}", flush=True)


if __name__ == "__main__":
    main()
