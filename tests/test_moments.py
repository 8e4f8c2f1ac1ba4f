"""When what happens between the Trainer's steps happens."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import tiny_trainer
from transformers import PreTrainedTokenizerFast, TrainerControl, TrainerState

from attention_rl_trainer.trainer import AttentionGuidedRLTrainer


def saved_steps(per_step: list[int], save_episodes: int, *, before: int = 0) -> list[int]:
    """Play a run: the episodes after which a checkpoint is asked for."""
    run = SimpleNamespace(
        args=SimpleNamespace(save_episodes=save_episodes, episodes_per_step=per_step[0]),
        progress=SimpleNamespace(num_trajectories=before),
        state=TrainerState(global_step=0, max_steps=len(per_step)),
    )
    saved = []
    for episodes in per_step:
        run.progress.num_trajectories += episodes
        run.state.global_step += 1
        if AttentionGuidedRLTrainer.checkpoint_is_due(run):
            saved.append(run.progress.num_trajectories)
    return saved


class TestEpisodeSave:
    @pytest.mark.parametrize(
        ("per_step", "save_episodes", "expected"),
        [
            ([8] * 6, 16, [16, 32, 48]),
            ([8] * 6, 20, [24, 40, 48]),
            ([8] * 6, 8, [8, 16, 24, 32, 40, 48]),
            # A step may pass several multiples at once.
            ([64] * 3, 10, [64, 128, 192]),
            # The last batch is cut to the run's number of episodes.
            ([8, 8, 2], 100, [18]),
            ([8, 8, 2], 16, [16, 18]),
        ],
    )
    def test_saves_where_a_multiple_is_reached_and_at_the_end(
        self, per_step: list[int], save_episodes: int, expected: list[int]
    ) -> None:
        assert saved_steps(per_step, save_episodes) == expected

    @pytest.mark.parametrize(("before", "expected"), [(16, [32, 40]), (24, [32, 48]), (8, [16, 32]), (15, [23, 39])])
    def test_a_resumed_run_saves_at_the_next_multiple(self, before: int, expected: list[int]) -> None:
        assert saved_steps([8] * 3, 16, before=before) == expected

    def test_checkpoints_of_a_run_and_of_its_continuation(
        self, tmp_path: Path, texts: list[str], tokenizer: PreTrainedTokenizerFast
    ) -> None:
        def episodes_saved() -> dict[str, int]:
            return {
                path.parent.name: json.loads(path.read_text())["progress"]["num_episodes"]
                for path in (tmp_path / "run").glob("checkpoint-*/attention_rl_state.json")
            }

        tiny_trainer(tmp_path, texts, tokenizer, num_episodes=36, save_episodes=20).train()
        assert episodes_saved() == {"checkpoint-3": 24, "checkpoint-5": 36}
        longer = tiny_trainer(tmp_path, texts, tokenizer, num_episodes=60, save_episodes=20)
        longer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
        assert episodes_saved() == {
            "checkpoint-3": 24,
            "checkpoint-5": 40,
            "checkpoint-8": 60,
        }


class TestShareOfRun:
    def test_counts_the_steps_of_the_whole_run(
        self, tmp_path: Path, texts: list[str], tokenizer: PreTrainedTokenizerFast
    ) -> None:
        tiny_trainer(tmp_path, texts, tokenizer, num_episodes=32, save_episodes=16).train()
        resumed = tiny_trainer(tmp_path, texts, tokenizer, num_episodes=40, save_episodes=16)
        resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
        # As after a resume: the process counted 3 batches, the run is at steps 3 to 5 of 5.
        shares = {entry["step"]: entry["epoch"] for entry in resumed.state.log_history if "reward" in entry}
        assert {step: shares[step] for step in (3, 4, 5)} == {3: 0.6, 4: 0.8, 5: 1.0}


class TestBeforeOptimizerStep:
    def test_is_called_before_the_weights_move(
        self, tmp_path: Path, texts: list[str], tokenizer: PreTrainedTokenizerFast
    ) -> None:
        seen: list[tuple[torch.Tensor, bool]] = []
        trainer = tiny_trainer(
            tmp_path, texts, tokenizer, num_episodes=24, warmup_episodes=8, filter_threshold=None, learning_rate=1e-2
        )
        weight = next(p for name, p in trainer.model.named_parameters() if "lora_B" in name)
        before = trainer.before_optimizer_step

        def look() -> None:
            seen.append((weight.detach().clone(), weight.grad is not None))
            before()

        trainer.before_optimizer_step = look
        trainer.train()
        # The first step is warm-up: the hook runs, but there is no gradient and nothing moves.
        assert [has_gradient for _, has_gradient in seen] == [False, True, True]
        assert torch.equal(seen[0][0], seen[1][0])
        assert not torch.equal(seen[1][0], seen[2][0])
        assert not torch.equal(seen[2][0], weight)


class TestBegin:
    @pytest.mark.parametrize("is_main", [True, False])
    def test_is_called_in_every_process(
        self, is_main: bool, tmp_path: Path, texts: list[str], tokenizer: PreTrainedTokenizerFast
    ) -> None:
        """The first one fits for all, and the others wait for it."""
        trainer = tiny_trainer(tmp_path, texts, tokenizer)
        calls: list[str] = []
        trainer.begin_run = lambda: calls.append("begin")
        state = TrainerState(is_world_process_zero=is_main, max_steps=1)
        trainer.callback_handler.on_train_begin(trainer.args, state, TrainerControl())
        assert calls == ["begin"]
