"""A run that cannot start leaves the finished run in its folder as it was."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import load_dataset
from finished_run import OPTIONS, StopAt, content_of, copy_of
from processes import build_trainer
from tiny import article_texts, byte_level_tokenizer, tiny_trainer
from transformers import PreTrainedTokenizerFast, TrainerCallback

from attention_rl_trainer.records.ledger import read_ledger
from attention_rl_trainer.trainer import AttentionGuidedRLTrainer


class FailAt(TrainerCallback):
    """Raises at an event of the run, as a tracker without a connection does."""

    def __init__(self, event: str) -> None:
        setattr(self, event, self._fail)

    def _fail(self, *_: Any, **__: Any) -> None:
        raise ConnectionError("no tracker here")


def other(folder: Path, texts: list[str], **changes: Any) -> AttentionGuidedRLTrainer:
    return tiny_trainer(folder, texts, tokenizer_of_all(), **OPTIONS | changes)


@functools.cache
def tokenizer_of_all() -> PreTrainedTokenizerFast:
    return byte_level_tokenizer(article_texts(30))


def too_short(folder: Path) -> AttentionGuidedRLTrainer:
    return other(folder, ["a few words"] * 5)


def torn_file(folder: Path) -> AttentionGuidedRLTrainer:
    path = folder / "articles.jsonl"
    path.write_text('{"text": "a b c"}\n{"text": "torn', encoding="utf-8")
    trainer = other(folder, article_texts(3))
    trainer.train_dataset = load_dataset("json", data_files=str(path), split="train", streaming=True)
    return trainer


def no_such_column(folder: Path) -> AttentionGuidedRLTrainer:
    return other(folder, article_texts(30), dataset_text_column="body")


def spoilt_model(folder: Path) -> AttentionGuidedRLTrainer:
    trainer = other(folder, article_texts(30))
    with torch.no_grad():
        trainer.policy.backbone.layers[0].mlp.down_proj.weight[0, 0] = torch.nan
    return trainer


def forgetful_model(folder: Path) -> AttentionGuidedRLTrainer:
    """A model whose decoding from a cache does not go on from what was read before."""
    trainer = other(folder, article_texts(30))
    trainer.policy.backbone.layers[0].register_forward_hook(
        lambda module, arguments, output: output if output.shape[1] > 1 else output * 1.5
    )
    return trainer


def wrong_rewards(folder: Path) -> AttentionGuidedRLTrainer:
    given = {"reward_fn": lambda step: torch.zeros(3)}
    return other(folder, article_texts(30), trainer_options=given)


def wrong_schedule(folder: Path) -> AttentionGuidedRLTrainer:
    trainer = other(folder, article_texts(30))
    trainer.args.lr_scheduler_type = "polynomial"
    trainer.args.lr_scheduler_kwargs = {"power_of": 2}
    return trainer


def no_tracker(folder: Path) -> AttentionGuidedRLTrainer:
    return other(folder, article_texts(30), trainer_options={"callbacks": [FailAt("on_train_begin")]})


def interrupted(folder: Path) -> AttentionGuidedRLTrainer:
    return other(folder, article_texts(30), trainer_options={"callbacks": [StopAt(1)]})


def no_evaluation_articles(folder: Path) -> AttentionGuidedRLTrainer:
    given = {"eval_dataset": [{"text": "a few words"}]}
    options = {"eval_strategy": "steps", "eval_steps": 2, "eval_tables": False}
    return other(folder, article_texts(30), trainer_options=given, **options)


def overfit_too_many(folder: Path) -> AttentionGuidedRLTrainer:
    return other(folder, article_texts(30), overfit_articles=31)


FAILURES: dict[str, tuple[Callable[[Path], AttentionGuidedRLTrainer], str]] = {
    "articles too short": (too_short, "no article is long enough"),
    "a torn file": (torn_file, ""),
    "no such column": (no_such_column, "body"),
    "more articles to overfit than there are": (overfit_too_many, "overfit_articles is 31"),
    "a model that is not finite": (spoilt_model, "not finite|nan"),
    "a model that decodes otherwise": (forgetful_model, "do not compute alike"),
    "rewards of a wrong shape": (wrong_rewards, ""),
    "a schedule without that option": (wrong_schedule, "power_of"),
    "no tracker": (no_tracker, "no tracker here"),
    "Ctrl-C": (interrupted, ""),
    "evaluation articles too short": (no_evaluation_articles, "no article is long enough"),
}


# The others fail at other places of the same first step.
ALWAYS = {"articles too short", "a torn file", "a model that decodes otherwise"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in ALWAYS else [pytest.mark.slow]) for name in FAILURES]
)
def test_a_failed_start_moves_nothing(name: str, finished: Path, tmp_path: Path) -> None:
    make, message = FAILURES[name]
    job = copy_of(finished, tmp_path)
    (job.run / "report").mkdir()
    (job.run / "report" / "summary.md").write_text("of the finished run")
    before = content_of(job.run)
    with pytest.raises(BaseException, match=f"(?s){message}"):
        make(tmp_path).train()
    assert content_of(job.run) == before


def test_after_a_failed_start_an_evaluation_is_one_by_itself(finished: Path, tmp_path: Path) -> None:
    job = copy_of(finished, tmp_path)
    trainer = no_tracker(tmp_path)
    with pytest.raises(ConnectionError):
        trainer.train()
    trainer.args.eval_episodes, trainer.args.eval_order_episodes = 2, 0
    trainer.evaluate(trainer.train_dataset)
    assert [path.name for path in (job.run / "evaluation").iterdir()] == ["eval"]
    assert "## Evaluation: eval" in (job.run / "README.md").read_text()


def test_after_a_failed_start_the_right_command_resumes(finished: Path, tmp_path: Path) -> None:
    job = copy_of(finished, tmp_path)
    with pytest.raises(ValueError, match="no article is long enough"):
        too_short(tmp_path).train()
    longer = build_trainer(replace(job, options=OPTIONS | {"num_episodes": 28}))
    longer.train(resume_from_checkpoint=True)
    assert longer.state.global_step == 7
    assert [row.episode for row in read_ledger(job.run / "trajectories.jsonl")] == list(range(28))
    assert not list(job.run.glob("_earlier-*"))


@pytest.mark.slow
def test_a_failed_resumption_keeps_the_rows_and_the_later_checkpoints(finished: Path, tmp_path: Path) -> None:
    job = copy_of(finished, tmp_path)
    before = content_of(job.run)
    trainer = build_trainer(job)
    trainer.add_callback(StopAt(3))
    with pytest.raises(KeyboardInterrupt):
        trainer.train(resume_from_checkpoint=str(job.run / "checkpoint-2"))
    assert content_of(job.run) == before


@pytest.mark.slow
def test_a_failed_start_from_elsewhere_moves_nothing(finished: Path, tmp_path: Path) -> None:
    job, elsewhere = copy_of(finished, tmp_path), copy_of(finished, tmp_path / "elsewhere")
    before = content_of(job.run)
    trainer = build_trainer(job)
    trainer.add_callback(StopAt(5))
    with pytest.raises(KeyboardInterrupt):
        trainer.train(resume_from_checkpoint=str(elsewhere.run / "checkpoint-4"))
    assert content_of(job.run) == before
