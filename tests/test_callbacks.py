"""When the callbacks act."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny import tiny_trainer
from transformers import PreTrainedTokenizerFast, TrainerControl, TrainerState, TrainingArguments

from attention_rl_trainer.callbacks import (
    BeforeOptimizerStepCallback,
    EpisodeSaveCallback,
    ShareOfRunCallback,
    TrainEndCallback,
)


@pytest.fixture
def args(tmp_path: Path) -> TrainingArguments:
    return TrainingArguments(output_dir=str(tmp_path), use_cpu=True)


def saved_steps(args: TrainingArguments, per_step: list[int], save_episodes: int, *, before: int = 0) -> list[int]:
    """Play the Trainer: the episodes after which a checkpoint is asked for."""
    done = before
    callback = EpisodeSaveCallback(save_episodes, lambda: done)
    state = TrainerState(global_step=0, max_steps=len(per_step))
    callback.on_train_begin(args, state, TrainerControl())
    saved = []
    for episodes in per_step:
        done += episodes
        state.global_step += 1
        control = TrainerControl()
        callback.on_step_end(args, state, control)
        if control.should_save:
            saved.append(done)
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
        self, args: TrainingArguments, per_step: list[int], save_episodes: int, expected: list[int]
    ) -> None:
        assert saved_steps(args, per_step, save_episodes) == expected

    @pytest.mark.parametrize(("before", "expected"), [(16, [32, 40]), (24, [32, 48]), (8, [16, 32]), (15, [23, 39])])
    def test_a_resumed_run_saves_at_the_next_multiple(
        self, args: TrainingArguments, before: int, expected: list[int]
    ) -> None:
        assert saved_steps(args, [8] * 3, 16, before=before) == expected

    def test_checkpoints_of_a_run_and_of_its_continuation(
        self, tmp_path: Path, texts: list[str], tokenizer: PreTrainedTokenizerFast
    ) -> None:
        def episodes_saved() -> dict[str, int]:
            return {
                path.parent.name: json.loads(path.read_text())["num_episodes"]
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
    def test_counts_the_steps_of_the_whole_run(self, args: TrainingArguments) -> None:
        # As after a resume: the Trainer counted 3 batches of this process, the run is at step 30 of 40.
        state = TrainerState(global_step=30, max_steps=40, epoch=0.075)
        ShareOfRunCallback().on_step_end(args, state, TrainerControl())
        assert state.epoch == 0.75


class TestBeforeOptimizerStep:
    def test_is_called_before_the_weights_move(
        self, tmp_path: Path, texts: list[str], tokenizer: PreTrainedTokenizerFast
    ) -> None:
        seen: list[tuple[torch.Tensor, bool]] = []
        trainer = tiny_trainer(
            tmp_path, texts, tokenizer, num_episodes=24, warmup_episodes=8, filter_threshold=None, learning_rate=1e-2
        )
        weight = next(p for name, p in trainer.model.named_parameters() if "lora_B" in name)
        trainer.add_callback(
            BeforeOptimizerStepCallback(lambda: seen.append((weight.detach().clone(), weight.grad is not None)))
        )
        trainer.train()
        # The first step is warm-up: the hook runs, but there is no gradient and nothing moves.
        assert [has_gradient for _, has_gradient in seen] == [False, True, True]
        assert torch.equal(seen[0][0], seen[1][0])
        assert not torch.equal(seen[1][0], seen[2][0])
        assert not torch.equal(seen[2][0], weight)


class TestTrainEnd:
    @pytest.mark.parametrize(("is_main", "expected"), [(True, ["begin", "end"]), (False, [])])
    def test_calls_on_the_main_process_alone(self, args: TrainingArguments, is_main: bool, expected: list[str]) -> None:
        calls: list[str] = []
        callback = TrainEndCallback(lambda: calls.append("begin"), lambda: calls.append("end"))
        state = TrainerState(is_world_process_zero=is_main)
        callback.on_train_begin(args, state, TrainerControl())
        assert calls == expected[:1]
        callback.on_train_end(args, state, TrainerControl())
        assert calls == expected
