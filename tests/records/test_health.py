"""Warnings: each begins when its condition does, and stays away otherwise."""

from __future__ import annotations

import logging
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import tiny_trainer
from transformers import PreTrainedTokenizerFast

from attention_rl_trainer.records.health import (
    Ailment,
    HealthLimits,
    HealthMonitor,
    expected_kept_fraction,
    max_selector_entropy,
)

LIMITS = HealthLimits(max_selector_entropy=2.0, expected_kept=0.16, has_kl=True, window=5)
HEALTHY = {
    "reward": 0.1,
    "query_gain": 0.05,
    "model_gain": 0.05,
    "selector_entropy": 1.2,
    "query_entropy": 3.0,
    "query_repetition": 0.1,
    "kept_fraction": 0.16,
    "history_mean": 0.1,
    "kl": 0.01,
}


def seen(steps: int, limits: HealthLimits = LIMITS, **series: Any) -> list[tuple[int, Ailment]]:
    """Warnings by the step that raised them; series are numbers or functions of the step."""
    monitor, generator = HealthMonitor(limits), np.random.default_rng(0)
    found = []
    for step in range(steps):
        metrics = {name: value + 1e-3 * generator.normal() for name, value in HEALTHY.items()}
        metrics |= {name: value(step) if callable(value) else value for name, value in series.items()}
        found += [(step, warning.ailment) for warning in monitor.observe(metrics)]
    return found


def test_a_healthy_run_is_left_alone() -> None:
    assert seen(200) == []


@pytest.mark.parametrize(
    ("series", "ailment", "step"),
    [
        ({"selector_entropy": 1.95}, Ailment.SELECTOR_UNIFORM, 4),
        ({"selector_entropy": 0.02}, Ailment.SELECTOR_COLLAPSED, 4),
        ({"query_entropy": 0.05}, Ailment.QUERIES_CERTAIN, 4),
        ({"query_repetition": 0.7}, Ailment.QUERIES_REPEAT, 4),
        ({"kept_fraction": 0.4}, Ailment.KEPT_TOO_MANY, 4),
        ({"kept_fraction": 0.02}, Ailment.KEPT_TOO_FEW, 4),
        ({"kl": 0.0}, Ailment.KL_ZERO, 3),
        ({"model_gain": lambda step: -0.02 * step}, Ailment.READER_DRIFTS, 9),
        ({"reward": lambda step: 0.1 * step, "query_gain": lambda step: -0.1 * step}, Ailment.QUERIES_LOSE, 9),
    ],
)
def test_each_ailment_is_named_once_when_it_begins(series: dict[str, Any], ailment: Ailment, step: int) -> None:
    assert seen(40, **series) == [(step, ailment)]


@pytest.mark.parametrize(
    "series",
    [
        {"selector_entropy": 1.9},
        {"query_entropy": 0.2},
        {"query_repetition": 0.5},
        {"kept_fraction": 0.3},
        {"kept_fraction": 0.04},
        {"kl": lambda step: 0.0 if step == 0 else 1e-9},
        # A reader that improves, and one that falls from above without getting worse than the base model.
        {"model_gain": lambda step: 0.02 * step},
        {"model_gain": lambda step: 5 - 0.02 * step},
        {"reward": lambda step: 0.1 * step, "query_gain": lambda step: 0.1 * step},
        {"reward": lambda step: -0.1 * step, "query_gain": lambda step: -0.1 * step},
    ],
)
def test_near_misses_are_left_alone(series: dict[str, Any]) -> None:
    assert seen(40, **series) == []


def test_a_warning_comes_back_after_it_had_ceased() -> None:
    uniform = {"selector_entropy": lambda step: 1.99 if step < 10 or step >= 20 else 1.0}
    found = seen(40, **uniform)
    assert [ailment for _, ailment in found] == [Ailment.SELECTOR_UNIFORM] * 2
    assert found[0][0] == 4
    assert 20 <= found[1][0] <= 24


def test_limits_that_do_not_apply() -> None:
    alone = HealthLimits(max_selector_entropy=0.0, expected_kept=None, has_kl=False, window=5)
    assert seen(40, alone, selector_entropy=0.0, kept_fraction=1.0, kl=0.0) == []
    with pytest.raises(ValueError, match="window must be at least 2"):
        HealthLimits(1.0, None, has_kl=True, window=1)


def test_a_stale_threshold_is_called_so() -> None:
    monitor = HealthMonitor(LIMITS)
    warnings = [
        warning for _ in range(5) for warning in monitor.observe(HEALTHY | {"kept_fraction": 0.5, "reward": 0.4})
    ]
    (warning,) = warnings
    assert str(warning).startswith("[kept-too-many] 50% of the trajectories are kept where about 16%")
    assert "the threshold is stale, the history's mean is 0.100 while rewards are about 0.400" in warning.message


def test_uniform_entropy_and_kept_share() -> None:
    assert max_selector_entropy(8, 1) == pytest.approx(math.log(8))
    assert max_selector_entropy(3, 3) == pytest.approx((math.log(3) + math.log(2)) / 3)
    assert expected_kept_fraction(1.0) == pytest.approx(0.158655, abs=1e-6)
    assert expected_kept_fraction(None) is None
    assert expected_kept_fraction(-math.inf) is None


def test_every_ailment_has_its_paragraph() -> None:
    page = (Path(__file__).parents[2] / "docs" / "health.md").read_text(encoding="utf-8")
    assert re.findall(r"^### (.+)$", page, flags=re.MULTILINE) == [ailment.value for ailment in Ailment]


def test_a_run_warns(
    tmp_path: Path, texts: list[str], tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = tiny_trainer(tmp_path, texts, tokenizer, num_episodes=160, selection_temperature=1e4)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    said = [record.getMessage() for record in caplog.records if "[selector-uniform]" in record.getMessage()]
    assert len(said) == 1
    assert said[0].startswith("Step 20: [selector-uniform] the selector draws almost uniformly")
