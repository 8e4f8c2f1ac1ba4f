"""What the rollout batches of one update leave until its optimizer step is taken, and the way back if it fails.

A window is the rollout batches of one update. Knows nothing about how a gradient comes about.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from attention_rl_trainer.checkpointing import RunState
from attention_rl_trainer.ledger import LedgerRow
from attention_rl_trainer.pairs import ArticleReference
from attention_rl_trainer.rollback import OptimizerRestorePoint
from attention_rl_trainer.update import KeptTrajectories


@dataclass(eq=False)
class UpdateWindow:
    """The present update.

    Attributes:
        num_trajectories: trajectories of all its rollout batches, kept or not.
        run_state_before: where the run stood before its first batch.
        kept: what was kept of each batch so far, for further iterations; batches of which nothing was are left out.
        rows: of the ledger, written when the optimizer step is sure to be taken.
        weights_before: what the optimizer steps before the last one change; ``None`` before the first of several.
    """

    num_trajectories: int
    run_state_before: RunState
    kept: list[KeptTrajectories] = field(default_factory=list)
    rows: list[LedgerRow] = field(default_factory=list)
    weights_before: OptimizerRestorePoint | None = None

    @property
    def articles(self) -> Sequence[ArticleReference]:
        """What was read by the kept trajectories."""
        return [article for batch in self.kept for article in batch.articles]
