"""From memories to trajectories: what a query draws, what reading it is worth (design §4 to §7).

`layout` says where each token stands, `environment` and `selector` draw pairs, `reward` pays for them, and `sampler`
rolls trajectories out.
"""

from attention_rl_trainer.rollout.environment import KVMemoryEnvironment
from attention_rl_trainer.rollout.sampler import TrajectorySampler

__all__ = ["KVMemoryEnvironment", "TrajectorySampler"]
