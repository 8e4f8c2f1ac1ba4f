"""Evaluations within a run: they do not end it, and what they would lack is said before the first episode."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny import article_texts, tiny_trainer
from transformers import PreTrainedTokenizerFast

from attention_rl_trainer.trainer import AttentionGuidedRLTrainer

HELD_OUT = [{"text": text} for text in article_texts(4, seed=9)]


def trainer_of(
    folder: Path, texts: list[str], tokenizer: PreTrainedTokenizerFast, held_out: Any = HELD_OUT, **changes: Any
) -> AttentionGuidedRLTrainer:
    options = {"num_episodes": 6, "generation_batch_size": 3, "eval_strategy": "steps", "eval_steps": 1}
    options |= {"eval_episodes": 2, "eval_order_episodes": 2}
    return tiny_trainer(folder, texts, tokenizer, trainer_options={"eval_dataset": held_out}, **options | changes)


@pytest.mark.parametrize(
    "options",
    [
        {"num_kv_pairs": 2, "subset_fraction": 1.0, "num_steps": 1},
        pytest.param({"subset_fraction": 0.01, "num_steps": None}, marks=pytest.mark.slow),
        pytest.param({"generation_batch_size": 1, "num_episodes": 2}, marks=pytest.mark.slow),
    ],
    ids=["two pairs", "a subset of one pair", "one trajectory at a time"],
)
def test_a_run_evaluates_to_its_end(
    options: dict[str, Any], tmp_path: Path, texts: list[str], tokenizer: PreTrainedTokenizerFast
) -> None:
    trainer = trainer_of(tmp_path, texts, tokenizer, **options)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "eval_reward" in entry]
    assert [entry["step"] for entry in logged] == [1, 2]
    has_choice = "generation_batch_size" in options
    for entry in logged:
        assert ("eval_order_share_closed" in entry) == has_choice
        # What needs another pair, and what needs another trajectory.
        assert ("eval_query_over_form" in entry) == ("eval_names_its_pair" in entry) == has_choice
        assert ("eval_query_bound" in entry) != has_choice
        assert {"eval_order_over_random", "eval_query_over_empty", "eval_query_over_control"} <= entry.keys()


@pytest.mark.parametrize(
    ("held_out", "options", "message"),
    [
        (HELD_OUT[:1], {}, "eval_dataset: eval_tables compares queries with those on another article"),
        pytest.param(
            HELD_OUT, {"eval_episodes": 1}, "the first 1 episodes are on a single one", marks=pytest.mark.slow
        ),
        ([{"text": "a few words"}], {"eval_tables": False}, "eval_dataset: no article is long enough"),
        ({"near": HELD_OUT, "far": HELD_OUT[:1]}, {}, r"eval_dataset\['far'\]: eval_tables compares"),
    ],
    ids=["one article", "one episode", "too short", "one of two sets"],
)
def test_what_an_evaluation_would_lack_is_said_before_the_first_episode(
    held_out: Any,
    options: dict[str, Any],
    message: str,
    tmp_path: Path,
    texts: list[str],
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    trainer = trainer_of(tmp_path, texts, tokenizer, held_out, **options)
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert trainer.progress.num_episodes == 0


@pytest.mark.slow
def test_one_article_is_enough_without_tables(
    tmp_path: Path, texts: list[str], tokenizer: PreTrainedTokenizerFast
) -> None:
    trainer = trainer_of(tmp_path, texts, tokenizer, HELD_OUT[:1], eval_tables=False)
    trainer.train()
    assert trainer.state.log_history[-2]["eval_episodes"] == 1
