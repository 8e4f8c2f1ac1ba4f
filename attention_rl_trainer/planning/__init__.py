"""What a run will need, before it starts: memory by part, the largest batch that fits, tokens, FLOPs and time.

`shapes` holds what is known beforehand (the model's and the run's sizes), `memory` and `timing` count from them, and
``attention-rl plan`` prints both. Nothing here loads weights or runs a model.
"""

from attention_rl_trainer.planning.footprint import (
    MemoryPart,
    MemoryPlan,
    Phase,
    largest_batch,
    largest_num_steps,
    memory_warning,
    plan_memory,
)
from attention_rl_trainer.planning.sizes import LLAMA_3_2_3B, ModelShape, RunShape
from attention_rl_trainer.planning.timing import Accelerator, TimePlan, plan_time

__all__ = [
    "LLAMA_3_2_3B",
    "Accelerator",
    "MemoryPart",
    "MemoryPlan",
    "ModelShape",
    "Phase",
    "RunShape",
    "TimePlan",
    "largest_batch",
    "largest_num_steps",
    "memory_warning",
    "plan_memory",
    "plan_time",
]
