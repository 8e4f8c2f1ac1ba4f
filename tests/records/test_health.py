"""Warnings: each begins when its condition does, and stays away otherwise."""

from __future__ import annotations

import ast
import json
import logging
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import tiny_config, tiny_trainer
from transformers import PreTrainedTokenizerFast

from attention_rl_trainer.records.health import (
    Ailment,
    HealthLimits,
    HealthMonitor,
    expected_kept_fraction,
    max_selector_entropy,
)
from attention_rl_trainer.rollout.layout import LayoutOptions
from attention_rl_trainer.update.filter import FilterOptions
from attention_rl_trainer.update.losses import LossOptions

LIMITS = HealthLimits(max_selector_entropy=2.0, expected_kept=0.16, has_kl=True, window=5, num_steps=6)
HEALTHY = {
    "reward": 0.1,
    "query_gain": 0.05,
    "model_gain": 0.05,
    "selector_entropy": 1.2,
    "selection_information": 0.6,
    "query_entropy": 3.0,
    "query_repetition": 0.1,
    "query_diversity": 3.5,
    "distinct_queries": 5.0,
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
        ({"selector_entropy": 0.02, "selection_information": 1.5}, Ailment.SELECTOR_COLLAPSED, 4),
        ({"selection_information": 0.38}, Ailment.SELECTOR_DEAF, 4),
        # Sharp by a little more than 0.3 nats, which none of the queries explain.
        ({"selector_entropy": 1.69, "selection_information": 0.0}, Ailment.SELECTOR_DEAF, 4),
        ({"selector_entropy": 0.78, "selection_information": 0.47}, Ailment.SELECTOR_DEAF, 4),
        ({"query_entropy": 0.05}, Ailment.QUERIES_CERTAIN, 4),
        ({"query_repetition": 0.7}, Ailment.QUERIES_REPEAT, 4),
        ({"distinct_queries": 3.0}, Ailment.QUERIES_SAME, 4),
        ({"kept_fraction": 0.4}, Ailment.KEPT_TOO_MANY, 4),
        ({"kept_fraction": 0.02}, Ailment.KEPT_TOO_FEW, 4),
        ({"kl": 0.0}, Ailment.KL_ZERO, 3),
        ({"model_gain": lambda step: -0.02 * step}, Ailment.READER_DRIFTS, 9),
        (
            {"reward": lambda step: 0.1 * step, "model_gain": lambda step: 0.2 * step}
            | {"query_gain": lambda step: -0.1 * step},
            Ailment.QUERIES_LOSE,
            9,
        ),
    ],
)
def test_each_ailment_is_named_once_when_it_begins(series: dict[str, Any], ailment: Ailment, step: int) -> None:
    assert seen(40, **series) == [(step, ailment)]


@pytest.mark.parametrize(
    "series",
    [
        {"selector_entropy": 1.9},
        {"selection_information": 0.42},
        {"selector_entropy": 1.71, "selection_information": 0.0},
        {"distinct_queries": 3.1},
        {"query_entropy": 0.2},
        {"query_repetition": 0.5},
        {"kept_fraction": 0.3},
        {"kept_fraction": 0.04},
        {"kl": lambda step: 0.0 if step == 0 else 1e-9},
        # A reader that improves, and one that falls from above without getting worse than the base model.
        {"model_gain": lambda step: 0.02 * step},
        {"model_gain": lambda step: 5 - 0.02 * step},
        {"reward": lambda step: 0.1 * step, "query_gain": lambda step: 0.1 * step},
        # Something else than the reader makes the reward rise.
        {"reward": lambda step: 0.1 * step, "query_gain": lambda step: -0.1 * step},
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


def test_a_selector_is_deaf_only_if_it_is_sharp_by_a_tenth_of_what_it_could_be() -> None:
    """Of many pairs, 0.3 nats are little."""
    many = HealthLimits(max_selector_entropy=5.0, expected_kept=0.16, has_kl=True, window=5)
    assert seen(20, many, selector_entropy=4.52, selection_information=0.0) == []
    assert seen(20, many, selector_entropy=4.48, selection_information=0.0) == [(4, Ailment.SELECTOR_DEAF)]


def test_no_more_can_be_heard_than_the_queries_differ() -> None:
    """Two queries that draw two different pairs show log 2, however sharp the draws are."""
    pairs = {"selector_entropy": 0.1, "selection_information": math.log(2)}
    assert seen(20, **pairs) == [(4, Ailment.SELECTOR_DEAF)]
    pairs["query_diversity"] = math.log(2)
    assert seen(20, **pairs) == []
    assert seen(20, **pairs | {"selection_information": 0.3}) == [(4, Ailment.SELECTOR_DEAF)]
    # All ask alike, as after a task is solved.
    assert seen(20, selector_entropy=0.1, selection_information=0.0, query_diversity=0.0) == []


def test_a_selector_of_which_nothing_is_known_is_not_called_deaf() -> None:
    """As with batches of one trajectory, or a user's environment."""
    for unknown in ("selection_information", "query_diversity"):
        monitor, bad = HealthMonitor(LIMITS), HEALTHY | {"selector_entropy": 0.5}
        del bad[unknown]
        assert [warning for _ in range(20) for warning in monitor.observe(bad)] == []


def test_one_query_has_no_other_to_repeat() -> None:
    assert seen(20, replace(LIMITS, num_steps=1), distinct_queries=1.0) == []
    assert seen(20, replace(LIMITS, num_steps=2), distinct_queries=1.0) == [(4, Ailment.QUERIES_SAME)]
    assert seen(20, replace(LIMITS, num_steps=2), distinct_queries=1.1) == []


def test_what_the_messages_say_of_a_deaf_selector_and_of_the_same_queries() -> None:
    monitor, bad = HealthMonitor(LIMITS), {"selector_entropy": 0.78, "selection_information": 0.47}
    bad |= {"distinct_queries": 1.5}
    deaf, same = [warning.message for _ in range(5) for warning in monitor.observe(HEALTHY | bad)]
    assert "1.22 nats from uniform ones, of which 0.47 depend on what is asked" in deaf
    assert "attention_heads='probe'" in deaf
    assert "1.5 of 6 are different" in same
    assert "show_keys" in same


def test_the_selector_that_is_advised_can_be_asked_for(tmp_path: Path) -> None:
    monitor = HealthMonitor(LIMITS)
    bad = HEALTHY | {"selector_entropy": 1.99}
    (warning,) = [warning for _ in range(5) for warning in monitor.observe(bad)]
    advised = {name: ast.literal_eval(value) for name, value in re.findall(r"(\w+)=('\w+'|True)", warning.message)}
    assert len(advised) == 5
    assert tiny_config(tmp_path, **advised).is_fitted


def test_limits_of_options() -> None:
    layout = LayoutOptions(num_kv_pairs=9, subset_fraction=1.0, num_steps=3)
    limits = HealthLimits.of(layout, FilterOptions(), LossOptions())
    assert limits.num_steps == 3
    assert limits.max_selector_entropy == pytest.approx(math.log(8 * 7 * 6) / 3)
    assert HealthLimits.of(replace(layout, num_steps=None), FilterOptions(), LossOptions()).num_steps == 8


def test_an_older_checkpoint_is_continued() -> None:
    """One that knows nothing of what is watched since."""
    newer = {"selection_information", "query_diversity", "distinct_queries"}
    old = {name: [value] * 4 for name, value in HEALTHY.items() if name not in newer}
    monitor = HealthMonitor(LIMITS)
    monitor.load_state_dict({"values": old, "present": ["queries-repeat"]})
    bad = HEALTHY | {"selection_information": 0.1, "distinct_queries": 1.0}
    found = [[warning.ailment for warning in monitor.observe(bad)] for _ in range(6)]
    assert found == [[], [], [], [], [Ailment.SELECTOR_DEAF, Ailment.QUERIES_SAME], []]
    again = HealthMonitor(LIMITS)
    again.load_state_dict(json.loads(json.dumps(monitor.state_dict())))
    assert again.state_dict() == monitor.state_dict()
    assert again.observe(bad) == []


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
