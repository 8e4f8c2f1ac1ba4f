"""A loss of your own: the shipped one, and a pull of the adapter towards the base model.

`compute_loss` is the Trainer's own hook. It is called with a micro-batch of kept trajectories (`KeptTrajectories`) and
returns the loss and its parts, which are logged; a loss from scratch returns ``None`` for the parts.

    python examples/own_loss.py
"""

from typing import Any

import torch

from attention_rl_trainer import AttentionGuidedRLConfig, AttentionGuidedRLTrainer, load_articles


class PulledTrainer(AttentionGuidedRLTrainer):
    """Adds ``pull`` times the sum of squares of LoRA's B, which is 0 for the base model."""

    pull = 1e-2

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Add the pull, in proportion to the trajectories of the micro-batch."""
        loss, terms = super().compute_loss(model, inputs, return_outputs=True)
        widening = [p for name, p in model.named_parameters() if "lora_B" in name]
        share = inputs["trajectories"].weights.sum()
        loss = loss + self.pull * share * torch.stack([p.square().sum() for p in widening]).sum()
        return (loss, terms) if return_outputs else loss


def main(model: Any = "offline", train_dataset: Any = None, processing_class: Any = None, **options: Any) -> Any:
    """Train with the loss."""
    settings = {"output_dir": "out/own_loss", "num_episodes": 64, "generation_batch_size": 16}
    trainer = PulledTrainer(
        model=model,
        args=AttentionGuidedRLConfig(**settings | options),
        train_dataset=train_dataset or load_articles("offline"),
        processing_class=processing_class,
    )
    trainer.train()
    return trainer


if __name__ == "__main__":
    main()
