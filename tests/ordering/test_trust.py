"""What an adapter's folder says of its orders, in words."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from attention_rl_trainer.evaluation.estimates import Estimate
from attention_rl_trainer.ordering import OrderTrust
from attention_rl_trainer.rollout import Calibration

RULES = {
    "greedy oracle": asdict(Estimate(0.2, 0.1, 0.3, 64, 40)),
    "article order": asdict(Estimate(0.07, 0.04, 0.1, 64, 40)),
    "BM25": asdict(Estimate(-0.01, -0.02, 0.01, 64, 40)),
}


def evaluated(folder: Path, **gains: Estimate) -> Path:
    for name, gain in gains.items():
        (folder / "evaluation" / name).mkdir(parents=True)
        content = {"order_gains": {"learned": asdict(gain), **RULES}}
        (folder / "evaluation" / name / "evaluation.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def test_the_gain_over_random_orders_is_said_with_its_interval(tmp_path: Path) -> None:
    better, unclear = Estimate(0.05, 0.02, 0.08, 64, 40), Estimate(0.01, -0.02, 0.04, 32, 32)
    folder = evaluated(tmp_path, near=better, far=unclear, one=Estimate(0.03, None, None, 4, 1))
    trust = OrderTrust.read(folder, Calibration(0.1, figures={"p_right": 0.91, "chance": 0.125}))
    assert trust.order_gains["near"]["learned"] == better
    rule = "; the best fixed rule there (article order) +0.070 [+0.040, +0.100]"
    far, near, one, fitted = trust.describe().split(". ")
    assert near == (
        "Evaluation 'near', 64 held-out memories of 40 articles: learned orders, drawn as in training, less random "
        f"ones +0.050 [+0.020, +0.080] nats per token{rule}"
    )
    assert far.endswith(f"+0.010 [-0.020, +0.040] nats per token, which cannot be told from 0{rule}")
    assert one.endswith(f"+0.030 nats per token, from a single article{rule}")
    assert fitted == "Half of a key drew its pair 0.91 of the time."
    found = json.loads(json.dumps(trust.to_dict()))
    assert found["order_gains"]["far"]["learned"]["low"] == -0.02
    assert found["calibration"]["p_right"] == 0.91


def test_where_nothing_was_measured_it_says_so(tmp_path: Path) -> None:
    trust = OrderTrust.read(tmp_path, None)
    assert trust.describe().startswith("How good these orders are was not measured; `attention-rl evaluate`")


@pytest.mark.parametrize("content", ["{", "[]", '{"order_gains": []}', '{"order_gains": {"learned": {"mean": 1}}}'])
def test_a_damaged_evaluation_is_named_and_left_out(
    content: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good = Estimate(0.05, 0.02, 0.08, 64, 40)
    evaluated(tmp_path, good=good, bad=good)
    (tmp_path / "evaluation" / "bad" / "evaluation.json").write_text(content, encoding="utf-8")
    assert list(OrderTrust.read(tmp_path, None).order_gains) == ["good"]
    assert "bad/evaluation.json is not an evaluation that can be read" in caplog.text


def test_an_evaluation_without_orders_counts_as_none(tmp_path: Path) -> None:
    (tmp_path / "evaluation" / "eval").mkdir(parents=True)
    (tmp_path / "evaluation" / "eval" / "evaluation.json").write_text('{"order_gains": {}}', encoding="utf-8")
    assert OrderTrust.read(tmp_path, None) == OrderTrust()
