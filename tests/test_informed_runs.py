"""Whole runs that are paid for information, train every choice, and compare queries: written down, and resumed."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import made_up_entries
from tiny import tiny_config, tiny_gpt2, tiny_llama, tiny_trainer
from tiny_families import build
from transformers import PreTrainedTokenizerFast

from attention_rl_trainer.models.projections import UnsupportedArchitectureError
from attention_rl_trainer.records.ledger import read_ledger
from attention_rl_trainer.records.summary import measure_changes
from attention_rl_trainer.trainer import AttentionGuidedRLTrainer

OPTIONS: dict[str, Any] = {
    "num_episodes": 32,
    "save_episodes": 8,
    "warmup_episodes": 1,
    "filter_threshold": -math.inf,
    "information_coef": 1.0,
    "selector_coef": 1.0,
    "selector_gradient": "expected",
}
GROUPS: dict[str, Any] = {
    "information_coef": 0.0,
    "num_queries": 2,
    "credit": "step",
    "selector_gradient": "distilled",
}

Make = Callable[..., AttentionGuidedRLTrainer]


@pytest.fixture(params=["articles", "entries"])
def make(request: pytest.FixtureRequest, tmp_path: Path, texts: list[str], tokenizer: PreTrainedTokenizerFast) -> Make:
    def build_trainer(name: str = "one", **changes: Any) -> AttentionGuidedRLTrainer:
        if request.param == "articles":
            return tiny_trainer(tmp_path / name, texts, tokenizer, **OPTIONS | changes)
        args = tiny_config(tmp_path / name, **OPTIONS | changes)
        return AttentionGuidedRLTrainer(tiny_llama(), args, made_up_entries(texts[:12]), processing_class=tokenizer)

    return build_trainer


def test_information_is_paid_and_written_down(make: Make) -> None:
    trainer = make(information_coef=3.0)
    trainer.train()

    rows = read_ledger(trainer.recorder.ledger.path)
    assert len(rows) == 32
    for row in rows:
        assert row.information_gains is not None
        parts = zip(row.query_gains, row.model_gains, row.information_gains, strict=True)
        expected = [query + model + 3.0 * information for query, model, information in parts]
        assert row.step_rewards == pytest.approx(expected, abs=1e-5)
    logged = [entry["information_gain"] for entry in trainer.state.log_history if "information_gain" in entry]
    assert len(logged) == 4
    means = [sum(row.information_gains or ()) / len(row.order) for row in rows]
    assert sum(logged) / 4 == pytest.approx(sum(means) / 32, abs=1e-6)
    assert "information gain" in measure_changes(rows)


@pytest.mark.parametrize("changes", [{}, GROUPS], ids=["informed", "groups"])
def test_a_resumed_run_ends_like_the_whole_one(make: Make, changes: dict[str, Any]) -> None:
    whole = make("whole", **changes)
    whole.train()
    resumed = make("resumed", **changes)
    shutil.copytree(whole.output_dir / "checkpoint-2", resumed.output_dir / "checkpoint-2")
    shutil.copy(whole.recorder.ledger.path, resumed.output_dir)
    resumed.train(resume_from_checkpoint=True)

    assert resumed.state.global_step == 4
    for name in ("adapter_model.safetensors", "previous_adapter.safetensors", "optimizer.safetensors"):
        last = Path("checkpoint-4", name)
        assert (resumed.output_dir / last).read_bytes() == (whole.output_dir / last).read_bytes(), name
    assert resumed.recorder.ledger.path.read_bytes() == whole.recorder.ledger.path.read_bytes()


@pytest.mark.parametrize("selector_gradient", ["expected", "distilled"])
def test_micro_batches_and_iterations_take_what_was_scored_once(
    selector_gradient: str, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make(selector_gradient=selector_gradient, num_iterations=2, training_batch_size=3)
    seen: list[torch.Tensor] = []
    compute_loss = trainer.compute_loss

    def note(model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        seen.append(inputs["trajectories"].choice_values)
        return compute_loss(model, inputs, *args, **kwargs)

    monkeypatch.setattr(trainer, "compute_loss", note)
    trainer.train()

    # Batches of 8 in micro-batches of 3, 3 and 2, twice; nothing is trained in the first batch.
    assert [len(values) for values in seen] == [3, 3, 2] * 2 * 3
    first, second = torch.cat(seen[:3]), torch.cat(seen[3:6])
    assert torch.equal(first, second)
    assert first.abs().sum() > 0


def test_an_evaluation_writes_one_query_in_each_context(
    tmp_path: Path, texts: list[str], tokenizer: PreTrainedTokenizerFast
) -> None:
    options = OPTIONS | GROUPS | {"num_queries": 3, "eval_tables": False, "eval_episodes": 4}
    trainer = tiny_trainer(tmp_path, texts, tokenizer, **options)
    results = [trainer.evaluate([{"text": text} for text in texts[:4]])]
    assert trainer.sampler.num_queries == 3
    trainer.sampler.num_queries = 1
    results.append(trainer.evaluate([{"text": text} for text in texts[:4]]))

    assert results[0] == results[1]


def test_groups_need_the_credit_of_a_step(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^num_queries is 2: .* credit must be 'step' .* got 'trajectory'"):
        tiny_config(tmp_path, num_queries=2)
    with pytest.raises(ValueError, match=r"^num_queries is 2, and order_coef or information_coef above 0: .* both"):
        tiny_config(tmp_path, num_queries=2, credit="step", information_coef=0.1)
    with pytest.raises(ValueError, match=r"^num_queries is 2: .* got 'step' and 'reward'$"):
        tiny_config(tmp_path, num_queries=2, credit="step", advantage="reward")


@pytest.mark.parametrize(
    "changes",
    [
        {"information_coef": 1.0},
        {"num_queries": 2, "credit": "step"},
        {"selector_gradient": "distilled", "selector_coef": 1.0},
    ],
)
def test_a_model_that_reads_no_trees_is_refused_before_the_first_episode(
    changes: dict[str, Any], tmp_path: Path, texts: list[str], tokenizer: PreTrainedTokenizerFast
) -> None:
    named = next(iter(name for name in changes if name in ("information_coef", "num_queries", "selector_gradient")))
    with pytest.raises(UnsupportedArchitectureError, match=rf"which {named} needs .* does not read a tree"):
        tiny_trainer(tmp_path, texts, tokenizer, build("jamba"), attention_layer=2, **changes)


def test_the_ledger_of_an_older_run_has_none(
    tmp_path: Path, texts: list[str], tokenizer: PreTrainedTokenizerFast
) -> None:
    trainer = tiny_trainer(tmp_path, texts, tokenizer, tiny_gpt2(), num_episodes=8)
    trainer.train()
    path = trainer.recorder.ledger.path
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert {row.pop("information_gains") for row in rows} == {None}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    assert [row.information_gains for row in read_ledger(path)] == [None] * 8
