"""Runs whose selector is calibrated: fitted once, kept with adapter and checkpoint, used by whoever goes on."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tiny import tiny_gpt2, tiny_llama, tiny_trainer
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from attention_rl_trainer import AttentionGuidedRLTrainer, Calibration, Selection
from attention_rl_trainer.durability.discovery import CheckpointError
from attention_rl_trainer.probing import calibrated
from attention_rl_trainer.rollout.calibration import CALIBRATION_NAME
from attention_rl_trainer.types import KeyValuePairs

CALIBRATED: dict[str, Any] = calibrated.CALIBRATED | {
    "probe_heads": 3,
    "calibration_memories": 6,
    "num_episodes": 16,
    "save_episodes": 8,
    "warmup_episodes": 1,
    "filter_threshold": None,
}


class OwnEnvironment:
    """A user's environment, which takes no calibration."""

    def reset(self, pairs: KeyValuePairs) -> None:
        self.pairs, self.next = pairs, 0

    def step(self, query_vectors: Tensor, noise: Tensor) -> Selection:
        rows, num_pairs = self.pairs.pair_numbers.shape
        index = torch.full((rows,), self.next)
        self.next += 1
        probabilities = torch.nn.functional.one_hot(index, num_pairs).float()
        return Selection(self.pairs.gather(index), index, probabilities)


def same_tensors(left: Path, right: Path, name: str) -> bool:
    one, other = load_file(left / name), load_file(right / name)
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_a_run_fits_its_selector_and_keeps_it(
    tmp_path: Path, texts: list[str], tokenizer: PreTrainedTokenizerFast, make: Any
) -> None:
    trainer = tiny_trainer(tmp_path, texts, tokenizer, make(), selector_coef=1.0, **CALIBRATED)
    trainer.train()
    trainer.save_model()
    fitted = trainer.selector.calibration
    assert fitted is not None
    assert fitted.heads is not None
    assert trainer.policy.attention.heads.num_query_heads == 3
    assert fitted.query_means is not None
    for folder in (trainer.output_dir, trainer.output_dir / "checkpoint-1", trainer.output_dir / "checkpoint-2"):
        kept = Calibration.read(folder)
        assert kept.digest == fitted.digest
        assert kept.figures == fitted.figures
    assert 0 < fitted.figures["p_right"] <= 1
    assert trainer.state.global_step == 2


def test_a_resumed_run_selects_as_the_whole_one(
    tmp_path: Path, texts: list[str], tokenizer: PreTrainedTokenizerFast
) -> None:
    whole = tiny_trainer(tmp_path / "whole", texts, tokenizer, **CALIBRATED)
    whole.train()
    first = tiny_trainer(tmp_path / "first", texts, tokenizer, **CALIBRATED | {"num_episodes": 8})
    first.train()
    resumed = tiny_trainer(tmp_path / "first", texts, tokenizer, **CALIBRATED)
    resumed.train(resume_from_checkpoint=True)
    left, right = tmp_path / "whole/run/checkpoint-2", tmp_path / "first/run/checkpoint-2"
    assert (left / CALIBRATION_NAME).read_bytes() == (right / CALIBRATION_NAME).read_bytes()
    assert same_tensors(left, right, "adapter_model.safetensors")
    assert whole.recorder.ledger.path.read_bytes() == resumed.recorder.ledger.path.read_bytes()


def test_a_resumed_run_takes_the_calibration_of_its_checkpoint(
    tmp_path: Path, texts: list[str], tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = tiny_trainer(tmp_path, texts, tokenizer, **CALIBRATED | {"num_episodes": 8})
    first.train()
    resumed = tiny_trainer(tmp_path, texts, tokenizer, **CALIBRATED)

    def must_not_fit(*args: object, **kwargs: object) -> None:
        raise AssertionError("a resumed run fits nothing")

    monkeypatch.setattr("attention_rl_trainer.probing.calibrate.Probe.fit", must_not_fit)
    resumed.train(resume_from_checkpoint=True)
    assert first.selector.calibration is not None
    assert resumed.selector.digest == first.selector.calibration.digest


def test_another_calibration_is_another_run(
    tmp_path: Path, texts: list[str], tokenizer: PreTrainedTokenizerFast
) -> None:
    first = tiny_trainer(tmp_path, texts, tokenizer, **CALIBRATED | {"num_episodes": 8})
    first.train()
    other = tiny_trainer(
        tmp_path / "other", texts, tokenizer, **CALIBRATED | {"num_episodes": 8, "calibration_memories": 4}
    )
    other.train()
    given = {"calibration": other.output_dir / "checkpoint-1"}
    resumed = tiny_trainer(tmp_path, texts, tokenizer, None, given, **CALIBRATED)
    with pytest.raises(CheckpointError, match=r"selector: '\w{16}' there, '\w{16}' here"):
        resumed.train(resume_from_checkpoint=True)


def test_a_checkpoint_without_its_calibration_is_refused(
    tmp_path: Path, texts: list[str], tokenizer: PreTrainedTokenizerFast
) -> None:
    tiny_trainer(tmp_path, texts, tokenizer, num_episodes=8, save_episodes=8).train()
    resumed = tiny_trainer(tmp_path, texts, tokenizer, **CALIBRATED)
    with pytest.raises(CheckpointError, match=f"has no {CALIBRATION_NAME}"):
        resumed.train(resume_from_checkpoint=True)


def test_a_reloaded_adapter_selects_with_its_calibration(
    tmp_path: Path, texts: list[str], tokenizer: PreTrainedTokenizerFast
) -> None:
    changes = CALIBRATED | {"eval_tables": False, "eval_episodes": 8}
    trainer = tiny_trainer(tmp_path, texts, tokenizer, **changes)
    trainer.train()
    trainer.save_model()
    rows = trainer.train_dataset
    expected = trainer.evaluate(rows)
    assert not (trainer.output_dir / "evaluation").exists()
    model = PeftModel.from_pretrained(tiny_llama(), str(trainer.output_dir), is_trainable=True)

    def reloaded(**given: Any) -> AttentionGuidedRLTrainer:
        args = trainer.args
        return AttentionGuidedRLTrainer(model=model, args=args, processing_class=tokenizer, **given)

    again = reloaded(calibration=trainer.output_dir)
    results = again.evaluate(rows)
    expected["epoch"] = 0  # nothing was trained here
    assert results == expected
    with pytest.raises(ValueError, match="give the folder of the adapter"):
        reloaded().evaluate(rows)


def test_a_calibration_serves_the_same_weights_in_another_precision(
    tmp_path: Path, texts: list[str], tokenizer: PreTrainedTokenizerFast
) -> None:
    """As where a run in bfloat16 is evaluated on a machine that computes in float32."""
    coarse, fine = tiny_llama().to(torch.bfloat16), tiny_llama().to(torch.bfloat16).float()
    trainer = tiny_trainer(tmp_path, texts, tokenizer, coarse, **CALIBRATED | {"num_episodes": 8})
    trainer.train()
    given = {"calibration": trainer.output_dir / "checkpoint-1"}
    other = tiny_trainer(tmp_path / "fine", texts, tokenizer, fine, given, **CALIBRATED | {"num_episodes": 8})
    other.train()
    assert other.selector.digest == trainer.selector.digest


def test_a_calibration_of_another_base_or_of_other_options_is_refused(
    tmp_path: Path, texts: list[str], tokenizer: PreTrainedTokenizerFast
) -> None:
    trainer = tiny_trainer(tmp_path, texts, tokenizer, **CALIBRATED)
    trainer.train()
    given = {"calibration": trainer.output_dir / "checkpoint-2"}
    base = tiny_llama()
    with torch.no_grad():
        next(base.parameters()).mul_(1.5)
    other = tiny_trainer(tmp_path / "base", texts, tokenizer, base, given, **CALIBRATED)
    with pytest.raises(ValueError, match=r"another base model.*\n  model\.weights: "):
        other.train()
    changed = CALIBRATED | {"head_similarity": "dot"}
    other = tiny_trainer(tmp_path / "options", texts, tokenizer, None, given, **changed)
    with pytest.raises(ValueError, match="head_similarity: 'cosine' there, 'dot' here"):
        other.train()
    changed = CALIBRATED | {"attention_heads": "0.0,1.1"}
    other = tiny_trainer(tmp_path / "heads", texts, tokenizer, None, given, **changed)
    with pytest.raises(ValueError, match=r"attention_heads is 0\.0,1\.1"):
        other.train()


def test_a_calibration_of_other_articles_is_used_and_said(
    tmp_path: Path, texts: list[str], tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = tiny_trainer(tmp_path, texts, tokenizer, **CALIBRATED)
    trainer.train()
    given = {"calibration": trainer.output_dir / "checkpoint-2"}
    other = tiny_trainer(tmp_path / "other", texts[::-1], tokenizer, None, given, **CALIBRATED)
    with caplog.at_level(logging.WARNING):
        other.train()
    assert "fitted to other articles" in caplog.text
    assert other.selector.digest == trainer.selector.digest


def test_an_unused_or_missing_calibration_is_refused(
    tmp_path: Path, texts: list[str], tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(ValueError, match="nothing of it is used"):
        tiny_trainer(tmp_path, texts, tokenizer, None, {"calibration": Calibration(0.5)})
    with pytest.raises(ValueError, match=f"has no {CALIBRATION_NAME}"):
        tiny_trainer(tmp_path, texts, tokenizer, None, {"calibration": tmp_path}, **CALIBRATED)


def test_an_environment_that_takes_no_calibration_is_refused_where_it_needs_one(
    tmp_path: Path, texts: list[str], tokenizer: PreTrainedTokenizerFast
) -> None:
    environment = {"environment": OwnEnvironment()}
    with pytest.raises(ValueError, match=r"OwnEnvironment has no calibrate\(calibration\)"):
        tiny_trainer(tmp_path, texts, tokenizer, None, environment, center_vectors=True)
    trainer = tiny_trainer(
        tmp_path, texts, tokenizer, None, environment, attention_heads="probe", probe_heads=2, num_episodes=8
    )
    trainer.train()
    assert trainer.policy.attention.heads.num_query_heads == 2


def test_fitting_takes_no_random_number_of_the_run(
    tmp_path: Path, texts: list[str], tokenizer: PreTrainedTokenizerFast
) -> None:
    trainer = tiny_trainer(tmp_path / "first", texts, tokenizer, **CALIBRATED)
    trainer.train()
    given = {"calibration": trainer.selector.calibration}
    other = tiny_trainer(tmp_path / "second", texts, tokenizer, None, given, **CALIBRATED)
    other.train()
    left, right = trainer.recorder.ledger.path, other.recorder.ledger.path
    assert left.read_bytes() == right.read_bytes()
