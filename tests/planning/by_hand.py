"""The model and the run whose plans are worked by hand."""

from __future__ import annotations

from attention_rl_trainer.planning.footprint import MemoryPlan
from attention_rl_trainer.planning.sizes import ModelShape, RunShape

# C = 4, I = 6, H = 2, G = 1, D = 2, so Q = 4 and G · D = 2.
SMALL = ModelShape(
    num_layers=3,
    hidden_size=4,
    intermediate_size=6,
    num_query_heads=2,
    num_key_value_heads=1,
    head_dim=2,
    vocabulary_size=10,
)
# Prompt 1+3+1+4+1 = 10 tokens, a step 2+1+4+1 = 8; a trajectory 9 + 2 · 8 = 25.
SHORT = RunShape(
    num_steps=2,
    num_kv_pairs=4,
    subset_fraction=1.0,
    tokens_per_query=2,
    tokens_per_key=3,
    tokens_per_value=4,
    generation_batch_size=5,
    training_batch_size=2,
    weight_bits=32,
    lora_rank=1,
    embedding_batch_size=15,
    on_cpu=True,
    query_separator_tokens=1,
    response_separator_tokens=1,
)


def part_bytes(plan: MemoryPlan, name: str) -> int:
    (part,) = [part for part in plan.parts if part.name == name]
    return part.num_bytes
