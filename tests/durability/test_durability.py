"""What checkpoints are made of: nested states, random states, staging and manifests."""

from __future__ import annotations

import json
import os
import pickle
import random
import re
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from attention_rl_trainer.durability import staging
from attention_rl_trainer.durability.manifest import MANIFEST_NAME, find_damage, write_manifest
from attention_rl_trainer.durability.staging import (
    StagingError,
    adopt_checkpoint,
    clear_leftovers,
    list_checkpoints,
    rotate_checkpoints,
    set_aside_run,
    staged_files,
    staged_folder,
)
from attention_rl_trainer.durability.states import (
    TreeError,
    capture_random_states,
    load_tree,
    restore_random_states,
    save_tree,
)

CPU = torch.device("cpu")


def equal_trees(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and one.equal(other)
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return list(one) == list(other) and all(equal_trees(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal_trees, one, other))
    return repr(one) == repr(other)


trees = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text() | st.integers(), inner),
    max_leaves=12,
)


class TestTensorTree:
    @given(trees)
    def test_gives_back_what_it_was_given(self, tmp_path_factory: pytest.TempPathFactory, tree: Any) -> None:
        path = tmp_path_factory.getbasetemp() / "tree.safetensors"
        save_tree(path, tree)
        assert equal_trees(load_tree(path), tree)

    def test_tensors_come_back_to_the_last_bit(self, tmp_path: Path) -> None:
        shared = torch.arange(256, dtype=torch.uint8)
        weights = torch.tensor([0.1, -0.0, float("inf"), float("nan")])
        tree = {
            "state": {0: {"exp_avg": weights, "map": shared}, 1: {"map": shared, "part": weights[1:3]}},
            "transposed": torch.arange(6.0, dtype=torch.bfloat16).reshape(2, 3).T,
            "empty": torch.empty(0, 4),
            "scalar": torch.tensor(7),
        }
        save_tree(tmp_path / "tree.safetensors", tree)
        found = load_tree(tmp_path / "tree.safetensors")
        assert found["state"][0]["exp_avg"].numpy().tobytes() == weights.numpy().tobytes()
        for name in ("transposed", "empty", "scalar"):
            assert equal_trees(found[name], tree[name]), name
        assert found["state"][1]["part"].equal(weights[1:3])
        # The quantization map that all 8-bit states share is stored once.
        assert found["state"][0]["map"].data_ptr() == found["state"][1]["map"].data_ptr()

    @pytest.mark.parametrize("thing", [{1, 2}, np.float32(1), signal.SIGINT, object(), {(1, 2): 3}, b"bytes"])
    def test_what_needs_pickle_is_refused_by_name(self, thing: Any, tmp_path: Path) -> None:
        with pytest.raises(TreeError, match=r"\.outer\.0 is a .*, which cannot be saved without pickle"):
            save_tree(tmp_path / "tree.safetensors", {"outer": [thing]})

    def test_places_that_are_spelled_alike_stay_apart(self, tmp_path: Path) -> None:
        tree = {"a.b": torch.zeros(1), "a": {"b": torch.ones(1)}, 1: torch.full((1,), 2.0), "1": torch.full((1,), 3.0)}
        save_tree(tmp_path / "tree.safetensors", tree)
        assert equal_trees(load_tree(tmp_path / "tree.safetensors"), tree)

    @pytest.mark.parametrize("content", [b"", b"\x00" * 100, pickle.dumps({"a": 1})], ids=["empty", "zeros", "pickle"])
    def test_other_files_are_refused(self, content: bytes, tmp_path: Path) -> None:
        (tmp_path / "tree.safetensors").write_bytes(content)
        with pytest.raises(TreeError, match=r"tree\.safetensors holds no state"):
            load_tree(tmp_path / "tree.safetensors")


def test_random_states_come_back_from_a_file(tmp_path: Path) -> None:
    def draw() -> list[float]:
        return [random.random(), random.gauss(0, 1), float(np.random.normal()), torch.rand(1).item()]

    random.gauss(0, 1)  # leaves a second value behind, which is state too
    np.random.normal()
    save_tree(tmp_path / "states", capture_random_states(CPU))
    expected = [draw() for _ in range(3)]
    restore_random_states(load_tree(tmp_path / "states"), CPU)
    assert [draw() for _ in range(3)] == expected


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
        assert not staging.__exit__(error, error(), None), "the exception goes on"
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
    def test_a_move_that_was_cut_off_is_ended(
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
        message = "there is a file where a folder goes"
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


class TestManifest:
    def test_names_a_file_outside_of_the_checkpoint(self, tmp_path: Path) -> None:
        (tmp_path / "secret").write_text("x")
        folder = tmp_path / "checkpoint-1"
        folder.mkdir()
        write_manifest(folder)
        manifest = json.loads((folder / MANIFEST_NAME).read_text())
        manifest["files"]["../secret"] = {"bytes": 1, "sha256": "0" * 64}
        (folder / MANIFEST_NAME).write_text(json.dumps(manifest))
        assert "lies outside of the checkpoint" in str(find_damage(folder)[0])

    @pytest.mark.parametrize("name", ["x" * 300, "a\x00b"])
    def test_names_that_no_system_takes(self, name: str, tmp_path: Path) -> None:
        manifest = {"format": 1, "files": {name: {"bytes": 1, "sha256": "0" * 64}}}
        (tmp_path / MANIFEST_NAME).write_text(json.dumps(manifest))
        (damage,) = find_damage(tmp_path)
        assert damage.path.name == name

    @pytest.mark.parametrize(
        "content",
        [
            *("", "[]", "{}", '{"format": 1}', '{"format": 2, "files": {}}', "\x00", "[" * 100_000),
            '{"format": 1, "files": {"a": {"bytes": Infinity, "sha256": ""}}}',
            '{"format": 1, "files": {"a": {"bytes": "", "sha256": ""}}}',
        ],
        ids=lambda content: ascii(content[:40]),
    )
    def test_what_is_no_manifest(self, content: str, tmp_path: Path) -> None:
        (tmp_path / MANIFEST_NAME).write_text(content)
        (damage,) = find_damage(tmp_path)
        assert damage.path == tmp_path / MANIFEST_NAME
