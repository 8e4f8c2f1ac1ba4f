"""``attention-rl report``."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from made_up_run import PNG_SIGNATURE
from run_folder import make_rows, write_run

from attention_rl_trainer.commands.report import main

PLOTS = ["rewards.png", "gains.png", "kl.png", "selection.png"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", make_rows(16))


def test_page_and_plots_are_written_beside_the_summary(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = (folder / "report" / "summary.md").read_bytes()
    assert main([str(folder)]) == 0
    report = folder / "report"
    assert capsys.readouterr().out.splitlines() == [str(report / name) for name in ("index.html", *PLOTS)]
    assert all((report / name).read_bytes().startswith(PNG_SIGNATURE) for name in PLOTS)
    assert (report / "summary.md").read_bytes() == summary


def test_a_folder_of_its_own_and_no_plots(folder: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert main([str(folder), "--output_dir", str(tmp_path / "page"), "--no_plots"]) == 0
    assert [path.name for path in (tmp_path / "page").iterdir()] == ["index.html"]
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_two_runs_of_one_name_are_distinguished(folder: Path, tmp_path: Path) -> None:
    other = write_run(tmp_path / "elsewhere" / "run", make_rows(16, seed=1))
    assert main([str(folder), "--compare", str(other), "--no_plots"]) == 0
    html = (folder / "report" / "index.html").read_text(encoding="utf-8")
    assert "<title>run (A) and run (B) · attention-rl report</title>" in html


def test_a_run_under_way_has_a_page(folder: Path) -> None:
    ledger = folder / "trajectories.jsonl"
    ledger.write_bytes(ledger.read_bytes()[:-30])
    (folder / "checkpoint-2" / "trainer_state.json").unlink()
    assert main([str(folder), "--no_plots"]) == 0
    html = (folder / "report" / "index.html").read_text(encoding="utf-8")
    assert "Under way, or stopped early: 15 of 16 episodes." in html
    assert "The last line of trajectories.jsonl is unfinished" in html


def test_without_matplotlib_there_is_the_page(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main([str(folder)]) == 0
    assert 'pip install "attention-rl-trainer[report]"' in capsys.readouterr().err
    assert not (folder / "report" / "rewards.png").exists()


def test_a_folder_that_is_not_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="give the output_dir of a run"):
        main([str(tmp_path)])


def test_the_plots_need_no_page(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ImportError, match="jinja2"):
        main([str(folder)])
