"""What a resumed run takes from its checkpoint's optimizer and schedule, and what from its own options."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from finished_run import OPTIONS
from processes import Job, build_trainer
from tiny import article_texts, byte_level_tokenizer, tiny_trainer

from attention_rl_trainer.trainer import AttentionGuidedRLTrainer


class TestSchedules:
    """The options of a run that resumes act; where they cannot, it says so."""

    def rates(self, trainer: AttentionGuidedRLTrainer) -> list[float]:
        return [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]

    @pytest.mark.parametrize(
        ("before", "after", "expected"),
        [
            ("reduce_lr_on_plateau", "constant", [1e-2] * 3),
            ("reduce_lr_on_plateau", "linear", [1e-2, 1e-2, 1e-2 / 3]),
            ("constant", "reduce_lr_on_plateau", [1e-2] * 3),
        ],
    )
    def test_of_another_kind(self, before: str, after: str, expected: list[float], tmp_path: Path) -> None:
        options = {
            "eval_strategy": "epoch",
            "eval_episodes": 2,
            "eval_tables": False,
            "metric_for_best_model": "reward",
        }
        job = Job(tmp_path, OPTIONS | options | {"lr_scheduler_type": before, "num_episodes": 8, "logging_steps": 1})
        build_trainer(job).train()
        later = replace(job, options=job.options | {"lr_scheduler_type": after, "num_episodes": 12})
        trainer = build_trainer(later)
        trainer.train(resume_from_checkpoint=True)
        assert self.rates(trainer) == pytest.approx(expected)

    def test_one_of_the_users_own(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        """It changes the momentum too."""

        def build(folder: str) -> AttentionGuidedRLTrainer:
            texts = article_texts(30)
            trainer = tiny_trainer(tmp_path / folder, texts, byte_level_tokenizer(texts), **OPTIONS)
            trainable = [p for p in trainer.policy.model.parameters() if p.requires_grad]
            trainer.optimizer = torch.optim.AdamW(trainable, lr=1e-3)
            trainer.lr_scheduler = torch.optim.lr_scheduler.OneCycleLR(trainer.optimizer, 1e-2, total_steps=6)
            return trainer

        build("whole").train()
        assert "resumes with" not in caplog.text
        whole = tmp_path / "whole" / "run"
        shutil.copytree(whole / "checkpoint-2", tmp_path / "part" / "run" / "checkpoint-2")
        build("part").train(resume_from_checkpoint=True)
        assert "OneCycleLR resumes with the learning rate and the other options" in caplog.text
        for name in ("adapter_model.safetensors", "optimizer.safetensors"):
            last = f"checkpoint-6/{name}"
            assert (tmp_path / "part" / "run" / last).read_bytes() == (whole / last).read_bytes(), name
