"""A filter of your own: the best quarter of every batch is trained on, whatever the history says.

A filter judges the rewards of a batch (`TrajectoryFilter`). The default one keeps the history and the warm-up; a
subclass only says which trajectories are kept.

    python examples/own_filter.py
"""

from typing import Any

import torch
from torch import Tensor

from attention_rl_trainer import AttentionGuidedRLConfig, AttentionGuidedRLTrainer, RewardFilter, load_articles


class BestOfBatch(RewardFilter):
    """Keeps a share of each batch, at least one trajectory."""

    share = 0.25

    def keep(self, rewards: Tensor, threshold: float | None) -> Tensor:
        """Keep the highest rewards, ``[B]`` bool."""
        count = max(1, int(self.share * len(rewards)))
        keep = torch.zeros_like(rewards, dtype=torch.bool)
        keep[rewards.topk(count).indices] = True
        return keep


def main(model: Any = "offline", train_dataset: Any = None, processing_class: Any = None, **options: Any) -> Any:
    """Train with the filter."""
    settings = {"output_dir": "out/own_filter", "num_episodes": 64, "generation_batch_size": 16}
    args = AttentionGuidedRLConfig(**settings | options)
    trainer = AttentionGuidedRLTrainer(
        model=model,
        args=args,
        train_dataset=train_dataset or load_articles("offline"),
        processing_class=processing_class,
        reward_filter=BestOfBatch(args),
    )
    trainer.train()
    return trainer


if __name__ == "__main__":
    main()
