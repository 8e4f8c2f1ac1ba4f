"""From memories to trajectories: what a query draws, what reading it is worth (design §4 to §7).

`layout` says where each token is, `environment` and `selector` draw pairs, with a `calibration` where one was fitted,
`reward` pays for them, `information` says what each told about the rest, `groups` compares queries of one context (both
by `branch_values`), and `sampler` rolls trajectories out.
"""

from attention_rl_trainer.rollout.calibration import Calibration
from attention_rl_trainer.rollout.environment import KVMemoryEnvironment, MemoryEnvironment
from attention_rl_trainer.rollout.layout import Layout, Separators
from attention_rl_trainer.rollout.reward import RewardFunction
from attention_rl_trainer.rollout.sampler import TrajectorySampler

__all__ = [
    "Calibration",
    "KVMemoryEnvironment",
    "Layout",
    "MemoryEnvironment",
    "RewardFunction",
    "Separators",
    "TrajectorySampler",
]
