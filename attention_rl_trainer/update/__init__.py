"""From trajectories to optimizer steps, all of an update or none (design §8, §9).

`filter` judges trajectories, `kept` holds those to train on, `objective` and `losses` turn them into a loss, and
`updater` differentiates it in `micro_batches` that fit and takes the steps; `undo` restores what a failed one moved.
"""

from attention_rl_trainer.update.filter import RewardFilter, RewardStatistics, TrajectoryFilter, Verdict
from attention_rl_trainer.update.kept import KeptTrajectories
from attention_rl_trainer.update.objective import LossTerms, compute_loss_terms
from attention_rl_trainer.update.updater import Updater

__all__ = [
    "KeptTrajectories",
    "LossTerms",
    "RewardFilter",
    "RewardStatistics",
    "TrajectoryFilter",
    "Updater",
    "Verdict",
    "compute_loss_terms",
]
