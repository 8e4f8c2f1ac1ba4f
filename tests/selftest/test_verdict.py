"""The verdict over several seeds, with runs that only pretend."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from attention_rl_trainer.selftest import verdict
from attention_rl_trainer.selftest.gap import KnownPolicies
from attention_rl_trainer.selftest.task import SelfTestResult
from attention_rl_trainer.selftest.verdict import ABLATIONS, describe, judge


def result(seed: int, share: float) -> SelfTestResult:
    known = KnownPolicies((2, 0, 1), best=1.5, random=0.5)
    plans = {(2, 0, 1): 0.75, (1, 0, 2): 0.25}
    curve = ((1280, 0.5), (2560, 1.46))
    return SelfTestResult(seed, known, 0.4, 0.5 + share, 0.125, plans, {"copied": 0.5}, 12.3, curve)


def pretend(shares: list[float], monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Replace runs by results; returns the options of each run."""
    seen: list[dict[str, Any]] = []

    def run_seed(seed: int, folder: Path, **options: Any) -> SelfTestResult:
        seen.append({"seed": seed, "folder": folder.name} | options)
        return result(seed, shares[seed])

    monkeypatch.setattr(verdict, "run_seed", run_seed)
    monkeypatch.setattr(verdict, "teach", lambda seed: f"model {seed}")
    return seen


@pytest.mark.parametrize(("shares", "passes"), [([0.97, 0.95, 1.0], True), ([0.97, 0.949, 1.0], False)])
def test_every_seed_must_close_the_gap(
    shares: list[float], passes: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    seen = pretend(shares, monkeypatch)
    assert judge(3, tmp_path) == passes
    expected = {"base": None, "measure_every": 10}
    assert seen == [{"seed": seed, "folder": f"seed_{seed}"} | expected for seed in range(3)]
    lines = capsys.readouterr().out.splitlines()
    each = [f"gap_closed: {share:.3f}" for share in shares]
    assert [line for line in lines if line.startswith("gap_closed")] == [*each, f"gap_closed: {min(shares):.3f}"]
    assert lines[-2] == "Lowest of 3 seeds; 0.95 is required:"


def test_ablations_change_one_option_and_share_the_taught_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    seen = pretend([1.0], monkeypatch)
    assert judge(1, tmp_path, ablate=True)
    shared = ("seed", "folder", "base", "measure_every")
    changes = [{name: value for name, value in run.items() if name not in shared} for run in seen]
    assert changes == [{}, *ABLATIONS]
    assert {run["base"] for run in seen} == {"model 0"}
    assert len({run["folder"] for run in seen}) == len(seen)
    out = capsys.readouterr().out
    assert "Gap closed, mean over 1 seeds:" in out
    for change in ABLATIONS:
        assert f"  with {', '.join(f'{option}={value}' for option, value in change.items())}: " in out


def test_calibrated_runs_fit_their_selector(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    seen = pretend([1.0], monkeypatch)
    assert judge(1, tmp_path, ablate=True, calibrated=True)
    assert all(run["attention_heads"] == "probe" and run["selection_temperature"] == "auto" for run in seen)


def test_a_run_in_words() -> None:
    assert describe(result(3, 0.9)) == (
        "seed 3: query gain +0.400 before training, +1.400 after it; random +0.500, best +1.500 nats per token "
        "(topics 2-0-1). Read after training: 2-0-1 75%, 1-0-2 25%. Model gain +0.125. 95% of the gap first closed "
        "after 2560 episodes. 12 s"
    )
    assert "first closed never" in describe(replace(result(3, 0.9), curve=((1280, 1.44),)))


def test_no_seed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--seeds must be at least 1, got 0"):
        judge(0, tmp_path)
