"""What the benchmarks compare gives the same numbers, and their report ends in the figures' lines."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "benchmarks"
sys.path.insert(0, str(FOLDER))

import harness  # noqa: E402  # is beside the benchmarks, which run as scripts


def run(script: str, *arguments: str) -> str:
    command = [sys.executable, "-W", "ignore", str(FOLDER / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=280).stdout


@pytest.mark.slow
def test_a_rollout_equals_the_naive_one_on_the_embedded_model() -> None:
    assert "check: 3 trajectories of 3 steps; the largest difference" in run("rollout.py", "--check")


@pytest.mark.slow
def test_greedy_queries_equal_those_of_trl() -> None:
    arguments = ["--check", "--model", "tiny", "--rows", "4", "--steps", "3", "--tokens", "6"]
    assert "check: 12 greedy queries of 6 tokens are equal" in run("peer.py", *arguments)


@pytest.mark.slow
def test_contenders_take_turns_and_the_first_round_does_not_count() -> None:
    calls: list[str] = []
    contenders = {name: partial(calls.append, name) for name in ("a", "b", "c")}
    timings = harness.time_in_turn(contenders, 3, once={"b"})
    assert calls == ["a", "c", "a", "b", "c", "a", "c", "a", "c"]
    assert {name: len(timing.seconds) for name, timing in timings.items()} == {"a": 3, "b": 1, "c": 3}
    assert harness.Timing((3.0, 1.0, 2.0)).median == 2.0


def test_a_report_rewrites_its_own_section_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "benchmarks.md"
    marks = "# Page\n\n<!-- one: begin -->\nold\n<!-- one: end -->\n\n<!-- two: begin -->\nkept\n<!-- two: end -->\n"
    page.write_text(marks, encoding="utf-8")
    monkeypatch.setattr(harness, "PAGE", page)
    monkeypatch.setattr(harness, "RESULTS", tmp_path / "results")
    report = harness.Report("one", "python one.py", {"rows": 3})
    report.figure("one.ratio", 1.25)
    report.table(["what", "time"], [["ours", harness.Timing((1.0,))]])
    report.write()
    text = page.read_text(encoding="utf-8")
    assert "old" not in text
    assert "- `one.ratio`: **1.25**" in text
    assert "| ours | 1 s (once) |" in text
    assert text.endswith("<!-- two: begin -->\nkept\n<!-- two: end -->\n")
    stored = json.loads((tmp_path / "results" / "one.json").read_text(encoding="utf-8"))
    assert stored["figures"] == {"one.ratio": 1.25}
    assert {"commit", "machine", "versions", "settings"} <= stored.keys()
    assert capsys.readouterr().out.splitlines()[-1] == "one.ratio: 1.25"
    with pytest.raises(ValueError, match="three: begin"):
        harness.write_section("three", "text")


def test_every_benchmark_has_its_place_on_the_page() -> None:
    page = harness.PAGE.read_text(encoding="utf-8")
    scripts = {path.stem for path in FOLDER.glob("*.py")} - {"harness", "scene", "naive", "planning_peaks"}
    # Their figures have a page of their own, docs/gpu.md.
    scripts -= {"gpu", "gpu_facts", "gpu_parts"}
    assert scripts == {"calibrated", "rollout", "growth", "update", "selection", "peer", "processes", "orders"}
    for name in scripts:
        assert page.count(f"<!-- {name}: begin -->") == page.count(f"<!-- {name}: end -->") == 1
