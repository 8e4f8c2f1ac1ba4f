"""An environment of your own: pairs are drawn by the cosine between the mean query head and the mean key group.

An environment draws pairs from a memory. It has `reset` and `step` (`MemoryEnvironment`); with a pure `log_prob` its
draws can be trained too (`DifferentiableEnvironment`, `selector_coef` > 0).

    python examples/own_environment.py
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from attention_rl_trainer import (
    AttentionGuidedRLConfig,
    AttentionGuidedRLTrainer,
    KeyValuePairs,
    Selection,
    load_articles,
    sample_key_value,
)


class CosineEnvironment:
    """Draws a pair by softmax(cosine / temperature) over the pairs that are left."""

    def __init__(self, temperature: float = 0.05) -> None:
        self.temperature = temperature

    def reset(self, pairs: KeyValuePairs) -> None:
        """Start new episodes, one per row, with every pair available."""
        self.pairs = pairs
        self.available = torch.ones_like(pairs.pair_numbers, dtype=torch.bool)

    def step(self, query_vectors: Tensor, noise: Tensor) -> Selection:
        """Draw one pair per row; query_vectors ``[B, H, D]``, noise ``[B]`` in [0, 1)."""
        probabilities = self._log_probabilities(self.pairs, query_vectors, self.available).exp()
        index = sample_key_value(probabilities, noise)
        self.available = self.available.scatter(1, index[:, None], False)
        return Selection(self.pairs.gather(index), index, probabilities)

    def log_prob(self, memory: KeyValuePairs, query_vectors: Tensor, index: Tensor) -> Tensor:
        """Log-probability ``[B, T]`` of the draws index ``[B, T]``; query_vectors ``[B, T, H, D]``, with gradient."""
        available = torch.ones_like(memory.pair_numbers, dtype=torch.bool)
        steps = []
        for step in range(index.shape[1]):
            column = index[:, step, None]
            steps.append(self._log_probabilities(memory, query_vectors[:, step], available).gather(1, column))
            available = available.scatter(1, column, False)
        return torch.cat(steps, dim=1)

    def _log_probabilities(self, memory: KeyValuePairs, query_vectors: Tensor, available: Tensor) -> Tensor:
        queries = normalize(query_vectors.mean(dim=1), dim=-1)  # [B, D]
        keys = normalize(memory.key_vectors.mean(dim=2), dim=-1)  # [B, M, D]
        scores = torch.einsum("bd,bmd->bm", queries, keys) / self.temperature
        return torch.log_softmax(scores.masked_fill(~available, -torch.inf), dim=-1)


def main(model: Any = "offline", train_dataset: Any = None, processing_class: Any = None, **options: Any) -> Any:
    """Train with the environment, its draws included."""
    settings = {"output_dir": "out/own_environment", "num_episodes": 64, "selector_coef": 1.0}
    trainer = AttentionGuidedRLTrainer(
        model=model,
        args=AttentionGuidedRLConfig(**settings | options),
        train_dataset=train_dataset or load_articles("offline"),
        processing_class=processing_class,
        environment=CosineEnvironment(),
    )
    trainer.train()
    return trainer


if __name__ == "__main__":
    main()
