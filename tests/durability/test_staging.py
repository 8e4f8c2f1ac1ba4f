"""What is staged appears as a whole or not at all, and what is moved, rotated or adopted is never lost."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from attention_rl_trainer.durability import staging
from attention_rl_trainer.durability.manifest import MANIFEST_NAME, find_damage, write_manifest
from attention_rl_trainer.durability.staging import (
    StagingError,
    adopt_checkpoint,
    clear_leftovers,
    copy_file,
    list_checkpoints,
    rotate_checkpoints,
    set_aside_run,
    staged_files,
    staged_folder,
)


class TestStaging:
    def test_a_folder_appears_as_a_whole(self, tmp_path: Path) -> None:
        target = tmp_path / "checkpoint-1"
        with staged_folder(target) as folder:
            (folder / "a").write_text("a")
            assert not target.exists()
        assert {path.name for path in target.iterdir()} == {"a", MANIFEST_NAME}
        assert not find_damage(target)
        with staged_folder(target) as folder:
            (folder / "b").write_text("b")
        assert {path.name for path in target.iterdir()} == {"b", MANIFEST_NAME}
        assert list(tmp_path.iterdir()) == [target]

    def test_the_name_of_checkpoints_is_the_trainers(self) -> None:
        assert staging.CHECKPOINT_PREFIX == PREFIX_CHECKPOINT_DIR

    @pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
    def test_an_exception_leaves_what_was_there(self, error: type[BaseException], tmp_path: Path) -> None:
        target = tmp_path / "checkpoint-1"
        with staged_folder(target) as folder:
            (folder / "a").write_text("a")
        staging = staged_folder(target)
        folder = staging.__enter__()
        (folder / "a").write_text("b")
        assert not staging.__exit__(error, error(), None), "the exception is not swallowed"
        assert (target / "a").read_text() == "a"
        assert list(tmp_path.iterdir()) == [target]

    def test_files_that_are_the_same_are_not_touched(self, tmp_path: Path) -> None:
        (tmp_path / "mine").write_text("mine")
        for content in ("same", "same", "other"):
            before = (tmp_path / "a").stat().st_mtime_ns if (tmp_path / "a").exists() else None
            with staged_files(tmp_path) as folder:
                (folder / "a").write_text(content)
            after = (tmp_path / "a").stat().st_mtime_ns
            assert (after == before) == (content == "same" and before is not None)
        assert (tmp_path / "a").read_text() == "other"
        assert {path.name for path in tmp_path.iterdir()} == {"a", "mine"}

    def test_leftovers_go_and_what_was_complete_stays(self, tmp_path: Path) -> None:
        for name in ("_staging-checkpoint-3", "_staging-checkpoint-4", "_trash-checkpoint-1"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "a").write_text("a")
        write_manifest(tmp_path / "_staging-checkpoint-4")
        (tmp_path / "_staging-trajectories.jsonl").write_text("{}")
        assert clear_leftovers(tmp_path) == [tmp_path / "checkpoint-4"]
        assert list(tmp_path.iterdir()) == [tmp_path / "checkpoint-4"]

    @pytest.mark.parametrize(("limit", "left"), [(None, [2, 9, 10, 100]), (1, [100]), (3, [9, 10, 100])])
    def test_rotation(self, limit: int | None, left: list[int], tmp_path: Path) -> None:
        for step in (100, 9, 2, 10):
            (tmp_path / f"checkpoint-{step}").mkdir()
        for name in ("checkpoint-7-mine", "checkpoint-x"):
            (tmp_path / name).mkdir()
        rotate_checkpoints(tmp_path, limit)
        assert [path.name for path in list_checkpoints(tmp_path)] == [f"checkpoint-{step}" for step in left]
        assert (tmp_path / "checkpoint-7-mine").is_dir()

    def test_rotation_of_a_link_leaves_what_it_leads_to(self, tmp_path: Path) -> None:
        (tmp_path / "disk").mkdir()
        (tmp_path / "disk" / "a").write_text("a")
        (tmp_path / "run" / "checkpoint-2").mkdir(parents=True)
        (tmp_path / "run" / "checkpoint-1").symlink_to(tmp_path / "disk")
        rotate_checkpoints(tmp_path / "run", 1)
        assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoint-2"]
        assert (tmp_path / "disk" / "a").read_text() == "a"

    def earlier_run(self, folder: Path) -> Path:
        for step in (2, 4, 6):
            (folder / f"checkpoint-{step}").mkdir()
        (folder / "report").mkdir()
        (folder / "ledger").write_text("rows")
        return folder / "ledger"

    def test_another_run_is_set_aside(self, tmp_path: Path) -> None:
        records = [self.earlier_run(tmp_path), tmp_path / "report", tmp_path / "nothing"]
        assert set_aside_run(tmp_path, records, after_step=2) == tmp_path / "_earlier-1"
        assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-2"]
        assert records[0].read_text() == (tmp_path / "_earlier-1" / "ledger").read_text() == "rows"
        assert set_aside_run(tmp_path, records, after_step=2) is None
        assert set_aside_run(tmp_path, records) == tmp_path / "_earlier-2"
        assert set_aside_run(tmp_path, records) is None
        assert [path.name for path in list_checkpoints(tmp_path / "_earlier-1")] == ["checkpoint-4", "checkpoint-6"]
        assert {path.name for path in (tmp_path / "_earlier-2").iterdir()} == {"checkpoint-2", "report", "ledger"}

    @pytest.mark.parametrize("renames", range(1, 5))
    def test_a_move_that_was_cut_off_is_finished(
        self, renames: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        records = [self.earlier_run(tmp_path), tmp_path / "report"]
        rename, done = os.rename, 0

        def fail(*arguments: Any) -> None:
            nonlocal done
            done += 1
            if done > renames:
                raise KeyboardInterrupt
            rename(*arguments)

        monkeypatch.setattr(os, "rename", fail)
        with pytest.raises(KeyboardInterrupt):
            set_aside_run(tmp_path, records)
        monkeypatch.setattr(os, "rename", rename)
        clear_leftovers(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["_earlier-1"]
        assert len(list((tmp_path / "_earlier-1").iterdir())) == 5

    @pytest.mark.parametrize(
        "names",
        [*(["checkpoint-1", name] for name in ("../../victim", "..", "/etc/passwd", "a/b", ".", "", 7)), "a", {"b": 1}],
    )
    def test_a_move_leads_nowhere_else(self, names: object, tmp_path: Path) -> None:
        (tmp_path / "home" / "run" / "checkpoint-1").mkdir(parents=True)
        (tmp_path / "victim").write_text("mine")
        aside = tmp_path / "home" / "run" / "_earlier-1"
        aside.mkdir(parents=True)
        (aside / "moving.json").write_text(json.dumps(names))
        with pytest.raises(StagingError, match=rf"moving\.json holds {re.escape(repr(names))}, expected a list of"):
            clear_leftovers(aside.parent)
        assert (tmp_path / "victim").read_text() == "mine"
        left = {path.name for path in tmp_path.rglob("*")}
        assert left == {"victim", "home", "run", "checkpoint-1", "_earlier-1", "moving.json"}
        assert (aside.parent / "checkpoint-1").is_dir()

    def test_a_file_where_a_checkpoint_goes_stays(self, tmp_path: Path) -> None:
        (tmp_path / "checkpoint-3").write_text("somebody's")
        message = "there is a file where a folder is to be"
        with pytest.raises(StagingError, match=message), staged_folder(tmp_path / "checkpoint-3") as folder:
            (folder / "a").write_text("a")
        assert (tmp_path / "checkpoint-3").read_text() == "somebody's"

    def test_a_protected_checkpoint_is_adopted_as_the_manifest_lists_it(self, tmp_path: Path) -> None:
        checkpoint = tmp_path / "other" / "checkpoint-3"
        with staged_folder(checkpoint) as folder:
            (folder / "inner").mkdir()
            (folder / "inner" / "a").write_text("a")
        (checkpoint / "unlisted").write_text("b")
        for path in (checkpoint / "inner" / "a", checkpoint / "inner", checkpoint):
            path.chmod(0o555 if path.is_dir() else 0o444)
        (tmp_path / "run").mkdir()
        copy = adopt_checkpoint(checkpoint, tmp_path / "run")
        assert not find_damage(copy)
        assert {str(path.relative_to(copy)) for path in copy.rglob("*")} == {MANIFEST_NAME, "inner", "inner/a"}
        assert all(path.stat().st_mode & 0o200 for path in copy.rglob("*"))

    def test_between_the_old_folder_and_the_new_name_nothing_is_lost(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        target = tmp_path / "checkpoint-1"
        with staged_folder(target) as folder:
            (folder / "a").write_text("old")
        rename = os.rename

        def fail(source: Path, destination: Path) -> None:
            if destination == target:
                raise KeyboardInterrupt
            rename(source, destination)

        staging = staged_folder(target)
        (staging.__enter__() / "a").write_text("new")
        monkeypatch.setattr(os, "rename", fail)
        with pytest.raises(KeyboardInterrupt):
            staging.__exit__(None, None, None)
        monkeypatch.setattr(os, "rename", rename)
        assert clear_leftovers(tmp_path) == [target]
        assert (target / "a").read_text() == "new"

    def test_all_is_on_the_disk_before_the_name_is(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        events: list[tuple[str, str]] = []
        fsync, rename = os.fsync, os.rename

        def record_sync(descriptor: int) -> None:
            path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
            events.append(("sync", str(path.relative_to(tmp_path.resolve()))))
            fsync(descriptor)

        def record_rename(source: Path, target: Path) -> None:
            events.append(("rename", Path(source).name))
            rename(source, target)

        monkeypatch.setattr(os, "fsync", record_sync)
        monkeypatch.setattr(os, "rename", record_rename)
        with staged_folder(tmp_path / "checkpoint-1") as folder:
            (folder / "inner").mkdir()
            for name in ("a", "inner/b"):
                (folder / name).write_text(name)
        place = "_staging-checkpoint-1"
        number = events.index(("rename", place))
        synced = {name for _, name in events[:number]}
        assert synced == {place, *(f"{place}/{name}" for name in ("a", "inner", "inner/b", MANIFEST_NAME))}
        assert events[number + 1 :] == [("sync", ".")]
        events.clear()
        with staged_files(tmp_path / "model") as folder:
            (folder / "weights").write_text("w")
        assert ("sync", "model/_staging-files/weights") in events

    def test_a_copied_file_appears_in_one_step(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The ledger of another run, from whose checkpoint this one resumes."""
        source, target = tmp_path / "other" / "rows.jsonl", tmp_path / "rows.jsonl"
        copy_file(source, target)
        assert not target.exists()
        source.parent.mkdir()
        source.write_text("other rows")
        target.write_text("own rows")
        seen: list[tuple[str, str]] = []
        replace = os.replace

        def record_replace(staged: Path, place: Path) -> None:
            seen.append((staged.read_text(), place.read_text()))
            replace(staged, place)

        monkeypatch.setattr(os, "replace", record_replace)
        copy_file(source, target)
        assert seen == [("other rows", "own rows")]
        assert target.read_text() == source.read_text() == "other rows"
        assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["rows.jsonl"]
