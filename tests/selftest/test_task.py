"""Training solves the planted task where it should, and only there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from attention_rl_trainer.selftest.language import RELATED
from attention_rl_trainer.selftest.task import run_seed
from attention_rl_trainer.update import kept


@pytest.mark.slow
@pytest.mark.timeout(900)
class TestTraining:
    """One seed, as shipped and with the update broken in two ways; ``attention-rl selftest`` runs five."""

    def test_training_closes_the_gap(self, tmp_path: Path) -> None:
        result = run_seed(0, tmp_path)
        assert sorted(result.known.best_plan) == list(RELATED)
        assert abs(result.known.gap_closed(result.untrained)) < 0.15
        assert result.gap_closed >= 0.95

    def test_without_an_update_it_stays_open(self, tmp_path: Path) -> None:
        assert run_seed(0, tmp_path, learning_rate=1e-12).gap_closed < 0.2

    def test_with_the_advantages_sign_flipped_it_stays_open(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        original = kept.step_advantages

        def flipped(*arguments: Any, **options: Any) -> torch.Tensor:
            return -original(*arguments, **options)

        monkeypatch.setattr(kept, "step_advantages", flipped)
        assert run_seed(0, tmp_path).gap_closed < 0.2
