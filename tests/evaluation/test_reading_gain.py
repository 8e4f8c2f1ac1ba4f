"""The gain as an `evaluate.Metric`, loaded as a user loads it."""

from __future__ import annotations

from pathlib import Path

import pytest

from attention_rl_trainer.evaluation import METRIC_PATH
from attention_rl_trainer.evaluation.estimates import clustered_mean


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_the_metric_loads_from_the_installed_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import evaluate

    monkeypatch.setattr(evaluate.config, "HF_MODULES_CACHE", tmp_path / "modules")
    metric = evaluate.load(METRIC_PATH, cache_dir=str(tmp_path / "cache"))
    predictions, references = [-3.0, -2.5, -4.0, -1.0], [-3.5, -2.0, -5.0, -1.5]
    articles = ["a", "a", "b", "c"]
    metric.add_batch(predictions=predictions[:2], references=references[:2], articles=articles[:2])
    metric.add_batch(predictions=predictions[2:], references=references[2:], articles=articles[2:])
    gains = [0.5, -0.5, 1.0, 0.5]
    expected = clustered_mean(gains, articles)
    assert metric.compute() == {"gain": expected.mean, "low": expected.low, "high": expected.high}
    alone = metric.compute(predictions=[1.0], references=[0.5], articles=["a"])
    assert alone == {"gain": 0.5, "low": None, "high": None}
