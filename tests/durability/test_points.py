"""Where a run begins, and what it makes of everything else that it finds."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from transformers.trainer_callback import TrainerState

from attention_rl_trainer.durability.discovery import CheckpointError
from attention_rl_trainer.durability.manifest import find_damage
from attention_rl_trainer.durability.resume import ResumePoint, trainer_state
from attention_rl_trainer.durability.staging import list_checkpoints, staged_folder

TRACE = "options.json"


def write_checkpoint(run: Path, step: int, **options: Any) -> Path:
    with staged_folder(run / f"checkpoint-{step}") as folder:
        TrainerState(global_step=step).save_to_json(str(folder / "trainer_state.json"))
        (folder / TRACE).write_text(json.dumps(options))
    return run / f"checkpoint-{step}"


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class TestFind:
    @pytest.mark.parametrize("nothing", [None, False])
    def test_a_run_from_the_start(self, nothing: bool | None, tmp_path: Path) -> None:
        write_checkpoint(tmp_path, 3)
        point = ResumePoint.find(nothing, tmp_path, TRACE)
        assert point == ResumePoint(tmp_path, None)
        assert not point.is_own
        assert point.global_step == 0
        assert point.adopted() is point

    def test_the_newest_of_its_own(self, tmp_path: Path) -> None:
        for step in (3, 12, 7):
            write_checkpoint(tmp_path, step)
        point = ResumePoint.find(True, tmp_path, TRACE)
        assert point == ResumePoint(tmp_path, tmp_path / "checkpoint-12")
        assert point.is_own
        assert point.global_step == 12
        assert point.adopted() is point

    @pytest.mark.parametrize("kind", [str, Path])
    def test_one_of_another_run(self, kind: type, tmp_path: Path) -> None:
        other = write_checkpoint(tmp_path / "other", 4)
        point = ResumePoint.find(kind(other), tmp_path / "run", TRACE)
        assert point.checkpoint == other
        assert not point.is_own
        assert point.global_step == 4

    def test_a_run_that_ended_before_its_first_checkpoint(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="there is no checkpoint in"):
            ResumePoint.find(True, tmp_path, TRACE)
        (tmp_path / TRACE).write_text("{}")
        assert ResumePoint.find(True, tmp_path, TRACE) == ResumePoint(tmp_path, None)

    def test_a_folder_by_another_path_is_the_runs_own(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write_checkpoint(tmp_path / "run", 4)
        (tmp_path / "link").symlink_to(tmp_path / "run")
        monkeypatch.chdir(tmp_path)
        for path in ("run/checkpoint-4", "run/../run/checkpoint-4", "link/checkpoint-4"):
            assert ResumePoint.find(path, tmp_path / "run", TRACE).is_own, path

    def test_a_link_in_the_runs_folder_is_its_own(self, tmp_path: Path) -> None:
        """A checkpoint that was moved to another disk."""
        run = tmp_path / "run"
        run.mkdir()
        (run / "checkpoint-4").symlink_to(write_checkpoint(tmp_path / "disk", 4))
        point = ResumePoint.find(True, run, TRACE)
        assert point.is_own
        assert point.adopted() is point


class TestSetAside:
    def run_with_records(self, folder: Path) -> list[Path]:
        for step in (2, 4, 6):
            write_checkpoint(folder, step)
        (folder / "ledger").write_text("rows")
        return [folder / "ledger"]

    def test_from_the_start_all_is_moved(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        records = self.run_with_records(tmp_path)
        ResumePoint(tmp_path, None).set_aside_others(records)
        assert names_in(tmp_path) == ["_earlier-1"]
        assert names_in(tmp_path / "_earlier-1") == ["checkpoint-2", "checkpoint-4", "checkpoint-6", "ledger"]
        assert f"{tmp_path} held what this run does not resume; it is in {tmp_path / '_earlier-1'} now" in caplog.text

    def test_from_its_own_later_ones_are_moved(self, tmp_path: Path) -> None:
        records = self.run_with_records(tmp_path)
        ResumePoint(tmp_path, tmp_path / "checkpoint-4").set_aside_others(records)
        assert names_in(tmp_path) == ["_earlier-1", "checkpoint-2", "checkpoint-4", "ledger"]
        assert names_in(tmp_path / "_earlier-1") == ["checkpoint-6", "ledger"]

    def test_from_the_newest_of_its_own_nothing_is(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        records = self.run_with_records(tmp_path)
        ResumePoint(tmp_path, tmp_path / "checkpoint-6").set_aside_others(records)
        assert names_in(tmp_path) == ["checkpoint-2", "checkpoint-4", "checkpoint-6", "ledger"]
        assert not caplog.text

    def test_from_another_runs_all_is_moved_and_the_copy_stays(self, tmp_path: Path) -> None:
        other = write_checkpoint(tmp_path / "other", 4)
        run = tmp_path / "run"
        records = self.run_with_records(run)
        point = ResumePoint(run, other)
        point.set_aside_others(records)
        adopted = point.adopted()
        assert adopted == ResumePoint(run, run / "checkpoint-4")
        assert adopted.is_own
        assert adopted.global_step == 4
        assert not find_damage(run / "checkpoint-4")
        assert list_checkpoints(run) == [run / "checkpoint-4"]
        assert names_in(run / "_earlier-1") == ["checkpoint-2", "checkpoint-4", "checkpoint-6", "ledger"]
        assert other.is_dir(), "the other run keeps its own"


BEFORE = {"output_dir": "a", "logging_dir": "a", "run_name": "a", "length": 8, "rate": 0.1, "gone": 1, "same": [1]}
PRESENT = {"output_dir": "b", "logging_dir": "b", "run_name": "b", "length": 9, "rate": 0.2, "new": 1, "same": [1]}


class TestChangedOptions:
    def warnings(self, caplog: pytest.LogCaptureFixture) -> list[str]:
        return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]

    def test_what_differs_is_listed_but_for_places_and_what_is_expected(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        checkpoint = write_checkpoint(tmp_path, 2, **BEFORE)
        point = ResumePoint(tmp_path, checkpoint)
        head = f"Options that differ from those of {checkpoint}: "
        point.warn_of_changed_options(TRACE, PRESENT, ["length"])
        point.warn_of_changed_options(TRACE, PRESENT)
        assert self.warnings(caplog) == [
            f"{head}rate (0.1 there, 0.2 here)",
            f"{head}length (8 there, 9 here), rate (0.1 there, 0.2 here)",
        ]

    def test_where_nothing_differs_nothing_is_said(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        checkpoint = write_checkpoint(tmp_path, 2, **BEFORE)
        ResumePoint(tmp_path, checkpoint).warn_of_changed_options(TRACE, BEFORE)
        ResumePoint(tmp_path, None).warn_of_changed_options(TRACE, PRESENT)
        assert not self.warnings(caplog)


def test_the_trainers_state_is_read(tmp_path: Path) -> None:
    assert trainer_state(write_checkpoint(tmp_path, 5)).global_step == 5
