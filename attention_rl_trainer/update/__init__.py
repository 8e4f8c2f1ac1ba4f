"""From trajectories to optimizer steps, all of one or none (design §8, §9).

`filter` judges trajectories, `kept` holds those to train on, `objective` and `losses` turn them into a loss,
`micro_batches` differentiates it in parts that fit, and `undo` restores what was there before an update that failed.
"""

from attention_rl_trainer.update.filter import RewardStatistics

__all__ = ["RewardStatistics"]
