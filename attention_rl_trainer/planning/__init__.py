"""What a run will need, before it starts: memory by part, the largest batch that fits, tokens, FLOPs and time.

`sizes` holds what is known beforehand (the model's and the run's), `footprint` and `timing` count from them without
loading weights; ``attention-rl plan`` prints both, and `preflight` refuses what cannot work when a run starts.
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
