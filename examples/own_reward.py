"""A reward of your own: what the query is worth to the frozen reader, less a price for words that repeat.

A `RewardFunction` is called with each step of B trajectories and returns their rewards, ``[B]``. The step has all that
the rollout knows: tokens, probabilities, the values' log-probabilities, and in `reward` the default reward.

    python examples/own_reward.py
"""

from typing import Any

from torch import Tensor

from attention_rl_trainer import AttentionGuidedRLConfig, AttentionGuidedRLTrainer, TrajectoryStep, load_articles

PRICE = 0.05  # nats per token, of a query in which every token repeats


def query_gain_without_repetition(step: TrajectoryStep) -> Tensor:
    """Pay for the query alone, not for a better reader, and charge for tokens that occurred earlier in it."""
    tokens = step.query_tokens  # [B, L]
    is_same = tokens[:, :, None] == tokens[:, None, :]
    repeats = is_same.tril(diagonal=-1).any(dim=-1).float().mean(dim=-1)
    return step.query_gain - PRICE * repeats


def main(model: Any = "offline", train_dataset: Any = None, processing_class: Any = None, **options: Any) -> Any:
    """Train with the reward."""
    settings = {"output_dir": "out/own_reward", "num_episodes": 64, "generation_batch_size": 16}
    trainer = AttentionGuidedRLTrainer(
        model=model,
        args=AttentionGuidedRLConfig(**settings | options),
        train_dataset=train_dataset or load_articles("offline"),
        processing_class=processing_class,
        reward_fn=query_gain_without_repetition,
    )
    trainer.train()
    return trainer


if __name__ == "__main__":
    main()
