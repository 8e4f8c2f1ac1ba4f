"""Verdicts held against whole runs: what is honoured changes something, what is said to do nothing does nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_inherited_checks import IDLE
from tiny import article_texts, byte_level_tokenizer, tiny_trainer

OPTIONS: dict[str, Any] = {
    "num_episodes": 24,
    "warmup_episodes": 4,
    "filter_threshold": None,
    "save_episodes": 8,
    "eval_episodes": 2,
    "eval_tables": False,
}
# Under what another option has to be set for them to act.
EVALUATED = {"eval_strategy": "steps", "eval_steps": 1}
ACTING: dict[str, dict[str, Any]] = {
    "seed": {"seed": 5},
    "learning_rate": {"learning_rate": 1e-3},
    "lr_scheduler_type": {"lr_scheduler_type": "linear"},
    "lr_scheduler_kwargs": {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": 3.0}},
    "warmup_steps": {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 3},
    "optim": {"optim": "sgd"},
    "optim_args": {"optim": "sgd", "optim_args": "momentum=0.9"},
    "weight_decay": {"weight_decay": 0.5},
    "adam_beta1": {"adam_beta1": 0.1},
    "adam_beta2": {"adam_beta2": 0.1},
    "adam_epsilon": {"adam_epsilon": 0.1},
    "max_grad_norm": {"max_grad_norm": 1e-9},
    "gradient_accumulation_steps": {"gradient_accumulation_steps": 2},
    "logging_strategy": {"logging_strategy": "no"},
    "logging_steps": {"logging_steps": 2},
    "logging_first_step": {"logging_steps": 3, "logging_first_step": True},
    "eval_strategy": {"eval_strategy": "epoch"},
    "eval_steps": EVALUATED | {"eval_steps": 2},
    "eval_delay": EVALUATED | {"eval_delay": 2},
    "eval_on_start": {"eval_on_start": True},
    "save_only_model": {"save_only_model": True},
    "save_total_limit": {"save_total_limit": 1},
    "skip_memory_metrics": {"skip_memory_metrics": False},
}
# What those differ from that need another option.
BESIDE: dict[str, dict[str, Any]] = {
    "lr_scheduler_kwargs": {"lr_scheduler_type": "polynomial"},
    "warmup_steps": {"lr_scheduler_type": "constant_with_warmup"},
    "optim_args": {"optim": "sgd"},
    "logging_first_step": {"logging_steps": 3},
    "eval_steps": EVALUATED,
    "eval_delay": EVALUATED,
}
_MEASURED = ("second", "runtime", "time", "memory_gib")


def trace(folder: Path, **options: Any) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]], list[str]]:
    """Train, and return the weights, what was logged apart from times and memory, and the files."""
    texts = article_texts(12)
    held_out = {"eval_dataset": [{"text": text} for text in article_texts(3, seed=9)]}
    trainer = tiny_trainer(folder, texts, byte_level_tokenizer(texts), None, held_out, **OPTIONS | options)
    trainer.train()
    weights = {name: p.detach().clone() for name, p in trainer.policy.model.named_parameters() if p.requires_grad}
    logged = [
        {name: value for name, value in entry.items() if not any(part in name for part in _MEASURED)}
        for entry in trainer.state.log_history
    ]
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return weights, logged, files


def same(first: Any, second: Any) -> bool:
    return first[1:] == second[1:] and all(torch.equal(first[0][name], second[0][name]) for name in first[0])


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return trace(tmp_path_factory.mktemp("plain"))


@pytest.mark.slow
@pytest.mark.parametrize("name", IDLE)
def test_without_effect(name: str, plain: Any, tmp_path: Path) -> None:
    workers = {"dataloader_num_workers": 1} if name == "dataloader_prefetch_factor" else {}
    assert same(trace(tmp_path, **{name: IDLE[name]}, **workers), plain)


@pytest.mark.slow
@pytest.mark.parametrize("name", ACTING)
def test_honoured(name: str, plain: Any, tmp_path: Path) -> None:
    beside = trace(tmp_path / "beside", **BESIDE[name]) if name in BESIDE else plain
    assert not same(trace(tmp_path / "acting", **ACTING[name]), beside)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{"full_determinism": True}, {"debug": "underflow_overflow"}, {"activation_checkpointing": True}, {"tf32": False}],
    ids=lambda options: "-".join(options),
)
def test_what_changes_how_it_is_computed_and_not_what(options: dict[str, Any], plain: Any, tmp_path: Path) -> None:
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    try:
        assert same(trace(tmp_path, **options), plain)
    finally:
        torch.use_deterministic_algorithms(was_deterministic)
