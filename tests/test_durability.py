"""What a run leaves on the disk, and what it makes of what it finds there: damage, other runs, signals, full disks."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from huggingface_hub import HfApi
from huggingface_hub.utils import filter_repo_objects
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig
from processes import Job, build_trainer, run, start, train
from tiny import article_texts, byte_level_tokenizer, tiny_config, tiny_gpt2, tiny_llama, tiny_trainer
from transformers import TrainerCallback

from attention_rl_trainer.durability import CheckpointError, RunLockedError, StagingError, find_checkpoint, staging
from attention_rl_trainer.durability.interruption import Interruption
from attention_rl_trainer.durability.lock import run_lock
from attention_rl_trainer.durability.manifest import MANIFEST_NAME, find_damage, write_manifest
from attention_rl_trainer.durability.random_states import capture_random_states, restore_random_states
from attention_rl_trainer.durability.staging import (
    clear_leftovers,
    list_checkpoints,
    rotate_checkpoints,
    set_aside_run,
    staged_files,
    staged_folder,
)
from attention_rl_trainer.durability.tensor_tree import TreeError, load_tree, save_tree
from attention_rl_trainer.ledger import read_ledger
from attention_rl_trainer.trainer import AttentionGuidedRLTrainer

ALWAYS = float("-inf")
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

    @pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": 1}', '{"format": 2, "files": {}}', "\x00"])
    def test_what_is_no_manifest(self, content: str, tmp_path: Path) -> None:
        (tmp_path / MANIFEST_NAME).write_text(content)
        (damage,) = find_damage(tmp_path)
        assert damage.path == tmp_path / MANIFEST_NAME


def copy_of(finished: Path, folder: Path) -> Job:
    shutil.copytree(finished, folder, dirs_exist_ok=True)
    return Job(folder, OPTIONS)


OPTIONS: dict[str, Any] = {
    "num_episodes": 24,
    "generation_batch_size": 4,
    "save_episodes": 8,
    "warmup_episodes": 1,
    "filter_threshold": ALWAYS,
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished job with checkpoints at steps 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("finished")
    job = Job(folder, OPTIONS)
    trainer = build_trainer(job)
    trainer.train()
    trainer.save_model()
    return folder


def content_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


DAMAGES: dict[str, Callable[[Path], None]] = {
    "missing": Path.unlink,
    "truncated": truncate,
    "one bit flipped": flip_a_bit,
    "empty": empty,
}


class TestCorruption:
    @pytest.mark.parametrize("damage", DAMAGES)
    def test_each_damaged_file_is_named_and_the_checkpoint_before_is_taken(
        self, damage: str, finished: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        names = sorted(path.name for path in (finished / "run" / "checkpoint-6").iterdir())
        assert len(names) >= 13
        for name in names:
            output_dir = copy_of(finished, tmp_path / name).run
            newest = output_dir / "checkpoint-6"
            DAMAGES[damage](newest / name)
            with pytest.raises(CheckpointError, match=f"checkpoint-6/{name} |checkpoint-6/{MANIFEST_NAME} ") as caught:
                find_checkpoint(str(newest), output_dir, "trace")
            # A damaged manifest may accuse the files that it lists; every other file is named itself.
            assert name == MANIFEST_NAME or f"{newest / name} " in str(caught.value)
            caplog.clear()
            assert find_checkpoint(True, output_dir, "trace") == output_dir / "checkpoint-4"
            assert "checkpoint-6 is damaged and passed over" in caplog.text
            assert name == MANIFEST_NAME or f"{newest / name} " in caplog.text

    def test_a_run_goes_on_from_the_checkpoint_before_and_ends_alike(
        self, finished: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        job = copy_of(finished, tmp_path)
        expected = (job.run / "checkpoint-6" / "adapter_model.safetensors").read_bytes()
        flip_a_bit(job.run / "checkpoint-6" / "optimizer.safetensors")
        trainer = build_trainer(job)
        trainer.train(resume_from_checkpoint=True)
        assert trainer.state.global_step == 6
        assert (job.run / "checkpoint-6" / "adapter_model.safetensors").read_bytes() == expected
        # The damaged one is not thrown away.
        assert (job.run / "_earlier-1" / "checkpoint-6" / "optimizer.safetensors").is_file()

    def test_a_run_does_not_go_on_from_a_damaged_one_that_was_named(self, finished: Path, tmp_path: Path) -> None:
        job = copy_of(finished, tmp_path)
        damaged = job.run / "checkpoint-4" / "previous_adapter.safetensors"
        flip_a_bit(damaged)
        before = content_of(job.run)
        with pytest.raises(CheckpointError, match=f"{damaged} "):
            build_trainer(job).train(resume_from_checkpoint=str(damaged.parent))
        assert content_of(job.run) == before

    def test_all_damaged(self, finished: Path, tmp_path: Path) -> None:
        job = copy_of(finished, tmp_path)
        for step in (2, 4, 6):
            flip_a_bit(job.run / f"checkpoint-{step}" / "trainer_state.json")
        with pytest.raises(CheckpointError, match=r"no checkpoint in .* is complete: .*checkpoint-6.*checkpoint-2"):
            build_trainer(job).train(resume_from_checkpoint=True)

    def test_a_ledger_that_lost_rows_is_told(
        self, finished: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        job = copy_of(finished, tmp_path)
        ledger = job.run / "trajectories.jsonl"
        ledger.write_bytes(b"".join(ledger.read_bytes().splitlines(keepends=True)[:5]) + b'{"episode": 5, "tor')
        build_trainer(job).train(resume_from_checkpoint=str(job.run / "checkpoint-2"))
        assert "lacks 3 of the 8 trajectories before the checkpoint; the report lacks them" in caplog.text
        assert [row.episode for row in read_ledger(ledger)] == [0, 1, 2, 3, 4, *range(8, 24)]
        content = ledger.read_bytes().splitlines(keepends=True)
        ledger.write_bytes(b"".join([content[0], b"\x00\n", *content[1:], content[0]]))
        build_trainer(job).train(resume_from_checkpoint=str(job.run / "checkpoint-2"))
        assert "had damaged lines or repeated ones (as it was: " in caplog.text
        assert [row.episode for row in read_ledger(ledger)] == [0, 1, 2, 3, 4, *range(8, 24)]


class TestOtherRuns:
    def test_a_finished_run_is_not_touched(self, tmp_path: Path) -> None:
        job = Job(tmp_path, OPTIONS, resume=None)
        assert run(job) == 0, (job.folder / "log.txt").read_text()
        job = replace(job, resume=True)
        before = content_of(job.run)
        times = {path: path.stat().st_mtime_ns for path in job.run.rglob("*") if path.name != "_run.lock"}
        assert run(job) == 0, (job.folder / "log.txt").read_text()
        assert content_of(job.run) == before
        assert {path: path.stat().st_mtime_ns for path in times if path.is_file()} == {
            path: time_ for path, time_ in times.items() if path.is_file()
        }
        assert "nothing is run" in (job.folder / "log.txt").read_text()

    @pytest.mark.parametrize(
        ("changes", "named"),
        [
            ({"tokens_per_query": 5}, ["tokens_per_query: 4 there, 5 here"]),
            (
                {"tokens_per_key": 5, "tokens_per_value": 7, "num_steps": 2},
                ["tokens_per_key: 6 there, 5 here", "tokens_per_value: 6 there, 7 here", "num_steps: 3 there, 2 here"],
            ),
            ({"seed": 3, "shuffle": False}, ["seed: 42 there, 3 here", "shuffle: True there, False here"]),
        ],
    )
    def test_other_options_are_listed(
        self, changes: dict[str, Any], named: list[str], finished: Path, tmp_path: Path
    ) -> None:
        job = copy_of(finished, tmp_path)
        trainer = build_trainer(replace(job, options=OPTIONS | changes))
        before = content_of(job.run)
        with pytest.raises(CheckpointError, match="belongs to another run; start anew") as caught:
            trainer.train(resume_from_checkpoint=str(job.run / "checkpoint-4"))
        listed = str(caught.value).splitlines()[1:]
        assert sorted(line.strip() for line in listed) == sorted(named)
        assert content_of(job.run) == before

    def test_other_articles_model_adapter_and_tokenizer_are_listed(self, finished: Path, tmp_path: Path) -> None:
        copy_of(finished, tmp_path)

        def refusal(resumed: AttentionGuidedRLTrainer) -> set[str]:
            with pytest.raises(CheckpointError) as caught:
                resumed.train(resume_from_checkpoint=True)
            return {line.partition(":")[0].strip() for line in str(caught.value).splitlines()[1:]}

        texts = article_texts(30)
        tokenizer = byte_level_tokenizer(texts)
        fewer = tiny_trainer(tmp_path, texts[:29], tokenizer, **OPTIONS)
        assert refusal(fewer) == {"articles.count", "articles.sample"}
        wider = {"model": tiny_llama(intermediate_size=96)}
        assert refusal(tiny_trainer(tmp_path, texts, tokenizer, **wider, **OPTIONS)) == {
            "model.parameters",
            "model.weights",
        }
        scaled = tiny_llama()
        scaled.get_input_embeddings().weight.data.mul_(1.01)
        assert refusal(tiny_trainer(tmp_path, texts, tokenizer, model=scaled, **OPTIONS)) == {"model.weights"}
        smaller = {"trainer_options": {"peft_config": LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"])}}
        assert refusal(tiny_trainer(tmp_path, texts, tokenizer, **smaller, **OPTIONS)) >= {
            "adapter.rank",
            "adapter.alpha",
            "adapter.modules",
            "adapter.tensors",
        }
        coarse = tiny_llama().to(torch.bfloat16)
        differing = refusal(tiny_trainer(tmp_path, texts, tokenizer, model=coarse, **OPTIONS))
        assert differing == {"model.precision", "model.weights"}
        other = tiny_trainer(tmp_path, texts, tokenizer, model=tiny_gpt2(), **OPTIONS)
        assert refusal(other) >= {"model.architecture", "model.parameters", "adapter.modules"}
        assert refusal(tiny_trainer(tmp_path, texts, tokenizer, **OPTIONS | {"optim": "sgd"})) == {"optim"}
        tokenizer.add_tokens(["<another>"])
        assert refusal(tiny_trainer(tmp_path, texts, tokenizer, **OPTIONS)) == {"tokenizer"}

    @pytest.mark.parametrize("streaming", [False, True])
    def test_one_other_article_is_another_data_set(self, streaming: bool, tmp_path: Path) -> None:
        job = Job(tmp_path, OPTIONS | {"num_episodes": 8}, streaming=streaming)
        build_trainer(job).train()
        texts = article_texts(30)
        tokenizer = byte_level_tokenizer(texts)
        for changed in (1, 17, 29):
            rows = Dataset.from_list([{"text": f"{text}{'.' * (n == changed)}"} for n, text in enumerate(texts)])
            trainer = AttentionGuidedRLTrainer(
                model=tiny_llama(),
                args=tiny_config(tmp_path, **job.options),
                train_dataset=rows.to_iterable_dataset(num_shards=3) if streaming else rows,
                processing_class=tokenizer,
            )
            with pytest.raises(CheckpointError, match=r"belongs to another run.*\n *articles\.sample: .*\Z"):
                trainer.train(resume_from_checkpoint=True)

    def test_another_world_size_is_listed(self, finished: Path, tmp_path: Path) -> None:
        checkpoint = copy_of(finished, tmp_path).run / "checkpoint-6"
        facts = json.loads((checkpoint / "run_identity.json").read_text())
        (checkpoint / "run_identity.json").write_text(json.dumps(facts | {"world_size": 2}))
        write_manifest_anew(checkpoint)
        with pytest.raises(CheckpointError, match="world_size: 2 there, 1 here"):
            build_trainer(Job(tmp_path, OPTIONS)).train(resume_from_checkpoint=True)

    @pytest.mark.parametrize(
        ("path", "message"),
        [
            ("", "resume_from_checkpoint is empty"),
            ("  ", "resume_from_checkpoint is empty"),
            ("nowhere/checkpoint-3", "there is no checkpoint nowhere/checkpoint-3"),
            (".", r"is no complete checkpoint: .*manifest\.json is missing"),
        ],
    )
    def test_wrong_paths_are_refused(
        self, path: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        trainer = build_trainer(Job(tmp_path / "job", OPTIONS))
        with pytest.raises(CheckpointError, match=message):
            trainer.train(resume_from_checkpoint=path)
        assert not (tmp_path / "job" / "run" / "trajectories.jsonl").exists()

    def test_automatic_resume_needs_a_run(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        job = Job(tmp_path, OPTIONS)
        for _ in range(2):
            with pytest.raises(CheckpointError, match=r"there is no checkpoint in .*; start without"):
                build_trainer(job).train(resume_from_checkpoint=True)
        (job.run / "attention_rl_config.json").write_text("{}")
        trainer = build_trainer(job)
        trainer.train(resume_from_checkpoint=True)
        assert "ended before its first checkpoint; it starts from the beginning" in caplog.text
        assert trainer.run_state.num_episodes == 24

    def test_a_new_run_sets_the_checkpoints_of_an_old_one_aside(self, finished: Path, tmp_path: Path) -> None:
        job = copy_of(finished, tmp_path)
        old = content_of(job.run / "checkpoint-6")
        build_trainer(replace(job, options=OPTIONS | {"num_episodes": 8})).train()
        assert [path.name for path in list_checkpoints(job.run)] == ["checkpoint-2"]
        assert content_of(job.run / "_earlier-1" / "checkpoint-6") == old
        assert len(read_ledger(job.run / "_earlier-1" / "trajectories.jsonl")) == 24
        assert len(read_ledger(job.run / "trajectories.jsonl")) == 8

    def test_going_back_to_an_older_checkpoint_loses_nothing(self, finished: Path, tmp_path: Path) -> None:
        job = copy_of(finished, tmp_path)
        before = content_of(job.run)
        build_trainer(job).train(resume_from_checkpoint=str(job.run / "checkpoint-2"))
        assert content_of(job.run)["trajectories.jsonl"] == before["trajectories.jsonl"]
        for name in ("trajectories.jsonl", "checkpoint-4/optimizer.safetensors", "checkpoint-6/optimizer.safetensors"):
            assert (job.run / "_earlier-1" / name).read_bytes() == before[name]

    def test_a_checkpoint_of_another_folder_becomes_the_runs_own(self, finished: Path, tmp_path: Path) -> None:
        job = Job(tmp_path / "own", OPTIONS)
        other = finished / "run" / "checkpoint-4"
        trainer = build_trainer(job)
        trainer.add_callback(StopAt(5))
        with pytest.raises(KeyboardInterrupt):
            trainer.train(resume_from_checkpoint=str(other))
        assert [path.name for path in list_checkpoints(job.run)] == ["checkpoint-4"]
        assert not find_damage(job.run / "checkpoint-4")
        trainer = build_trainer(job)
        trainer.train(resume_from_checkpoint=True)
        expected = (finished / "run" / "checkpoint-6" / "adapter_model.safetensors").read_bytes()
        assert (job.run / "checkpoint-6" / "adapter_model.safetensors").read_bytes() == expected
        assert [row.episode for row in read_ledger(job.run / "trajectories.jsonl")] == list(range(24))

    def test_links(self, finished: Path, tmp_path: Path) -> None:
        """A checkpoint that was moved to another disk, and a name for the latest one."""
        job = copy_of(finished, tmp_path)
        shutil.move(job.run / "checkpoint-6", tmp_path / "disk")
        shutil.rmtree(job.run / "checkpoint-4")
        (job.run / "checkpoint-4").symlink_to(copy_of(finished, tmp_path / "elsewhere").run / "checkpoint-4")
        (job.run / "latest").symlink_to(job.run / "checkpoint-2")
        trainer = build_trainer(job)
        trainer.train(resume_from_checkpoint=True)
        assert trainer.run_state.num_episodes == 24
        expected = (finished / "run" / "checkpoint-6" / "adapter_model.safetensors").read_bytes()
        assert (job.run / "checkpoint-6" / "adapter_model.safetensors").read_bytes() == expected
        assert not (job.run / "_earlier-1").exists()
        trainer = build_trainer(job)
        trainer.train(resume_from_checkpoint=str(job.run / "latest"))
        assert (job.run / "checkpoint-6" / "adapter_model.safetensors").read_bytes() == expected
        assert (job.run / "_earlier-1" / "checkpoint-4").is_symlink()

    def test_a_report_is_of_the_last_end(self, tmp_path: Path) -> None:
        job = Job(tmp_path, OPTIONS | {"report_at_end": True, "num_episodes": 12})
        build_trainer(job).train()
        summary = job.run / "report" / "summary.md"
        old = summary.read_text()
        longer = replace(job, options=job.options | {"num_episodes": 24})
        trainer = build_trainer(longer)
        trainer.add_callback(StopAt(6))
        with pytest.raises(KeyboardInterrupt):
            trainer.train(resume_from_checkpoint=True)
        assert not summary.exists()
        build_trainer(longer).train(resume_from_checkpoint=True)
        assert summary.read_text() != old

    def test_save_only_model_cannot_be_gone_on_from(self, tmp_path: Path) -> None:
        job = Job(tmp_path, OPTIONS | {"save_only_model": True})
        build_trainer(job).train()
        with pytest.raises(CheckpointError, match=r"optimizer\.safetensors is missing, .*save_only_model"):
            build_trainer(job).train(resume_from_checkpoint=True)


class StopAt(TrainerCallback):
    """Raises what Ctrl-C would raise, in the middle of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 == self.step:
            raise KeyboardInterrupt


class EndAt(TrainerCallback):
    """Ends a run in order, as early stopping does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = control.should_training_stop or state.global_step == self.step


def write_manifest_anew(checkpoint: Path) -> None:
    (checkpoint / MANIFEST_NAME).unlink()
    write_manifest(checkpoint)


class TestLock:
    def test_two_runs_in_one_folder(self, tmp_path: Path) -> None:
        job = Job(tmp_path, OPTIONS)
        with run_lock(job.run):
            with pytest.raises(RunLockedError, match=r"another run writes to output_dir .*run"):
                build_trainer(job).train()
            assert run(job) == 1
            assert "RunLockedError" in (tmp_path / "log.txt").read_text()
        assert run(job) == 0, (tmp_path / "log.txt").read_text()

    def test_a_killed_run_leaves_no_lock(self, tmp_path: Path) -> None:
        job = Job(tmp_path, OPTIONS, die_at=3)
        assert run(job) == -signal.SIGKILL
        with run_lock(job.run):
            pass


def slow_train(job: Job) -> None:
    """A run whose steps take long enough for a signal to hit one."""
    trainer = build_trainer(job)
    roll_out = trainer.sampler.sample

    def slowly(*arguments: Any, **options: Any) -> Any:
        (job.folder / "step").write_text(str(trainer.state.global_step + 1))
        time.sleep(0.3)
        return roll_out(*arguments, **options)

    trainer.sampler.sample = slowly  # type: ignore[method-assign]
    trainer.train(resume_from_checkpoint=job.resume)
    trainer.save_model()


def slow_train_in_a_group(job: Job) -> None:
    os.setsid()
    slow_train(job)


def train_and_save_slowly(job: Job) -> None:
    write = staging.sync

    def slowly(path: Path) -> None:
        time.sleep(0.05)
        write(path)

    staging.sync = slowly
    train(job)


# The exit code of a forked process; that of a script is 130 after SIGINT.
SECOND_SIGNALS = [(signal.SIGTERM, -signal.SIGTERM), (signal.SIGINT, 1)]


class TestSignals:
    def test_a_run_that_a_callback_ends_leaves_a_checkpoint(self, tmp_path: Path) -> None:
        job = Job(tmp_path, OPTIONS | {"save_episodes": 1000})
        trainer = build_trainer(job)
        trainer.add_callback(EndAt(3))
        trainer.train()
        assert [path.name for path in list_checkpoints(job.run)] == ["checkpoint-3"]

    def test_a_signal_to_the_whole_group_with_a_worker(self, tmp_path: Path) -> None:
        job = Job(tmp_path, OPTIONS | {"dataloader_num_workers": 1})
        process = start(job, slow_train_in_a_group)
        wait_for_step(job, 3)
        assert process.pid is not None
        os.killpg(process.pid, signal.SIGTERM)
        process.join(60)
        assert process.exitcode == 143, (tmp_path / "log.txt").read_text()
        assert not find_damage(list_checkpoints(job.run)[-1])

    @pytest.mark.parametrize(("second", "code"), SECOND_SIGNALS)
    def test_two_signals_while_a_checkpoint_is_written(
        self, second: int, code: int, finished: Path, tmp_path: Path
    ) -> None:
        job = Job(tmp_path, OPTIONS)
        process = start(job, train_and_save_slowly)
        staging = job.run / "_staging-checkpoint-4"
        deadline = time.monotonic() + 120
        while not staging.is_dir() and time.monotonic() < deadline:
            time.sleep(0.002)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGTERM)
        time.sleep(0.1)
        assert staging.is_dir(), "the first signal lets it write on"
        os.kill(process.pid, second)
        process.join(60)
        assert process.exitcode == code
        assert [path.name for path in list_checkpoints(job.run)] == ["checkpoint-2"]
        assert run(replace(job, resume=True)) == 0, (tmp_path / "log.txt").read_text()
        reference = (finished / "run" / "adapter_model.safetensors").read_bytes()
        assert (job.run / "adapter_model.safetensors").read_bytes() == reference

    @pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 1)])
    def test_the_first_leaves_a_checkpoint_within_a_step(
        self, number: int, code: int, finished: Path, tmp_path: Path
    ) -> None:
        job = Job(tmp_path, OPTIONS | {"save_episodes": 1000})
        process = start(job, slow_train)
        step = wait_for_step(job, 3)
        assert process.pid is not None
        os.kill(process.pid, number)
        process.join(60)
        log = (tmp_path / "log.txt").read_text()
        # A KeyboardInterrupt of a forked process ends in 1; that of a script in 130, see test_example.
        assert process.exitcode == code, log
        assert "the run stops after this step, with a checkpoint" in log
        (checkpoint,) = list_checkpoints(job.run)
        assert int(checkpoint.name.rpartition("-")[2]) in (step, step + 1)
        assert not find_damage(checkpoint)
        assert run(replace(job, resume=True)) == 0, (tmp_path / "log.txt").read_text()
        reference = (finished / "run" / "adapter_model.safetensors").read_bytes()
        assert (job.run / "adapter_model.safetensors").read_bytes() == reference

    @pytest.mark.parametrize(("second", "code"), SECOND_SIGNALS)
    def test_the_second_ends_it_at_once_and_breaks_nothing(
        self, second: int, code: int, finished: Path, tmp_path: Path
    ) -> None:
        job = Job(tmp_path, OPTIONS)
        process = start(job, slow_train)
        wait_for_step(job, 4)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGTERM)
        time.sleep(0.05)
        os.kill(process.pid, second)
        process.join(60)
        assert process.exitcode == code
        assert [find_damage(path) for path in list_checkpoints(job.run)] == [[]]
        assert run(replace(job, resume=True)) == 0, (tmp_path / "log.txt").read_text()
        reference = (finished / "run" / "adapter_model.safetensors").read_bytes()
        assert (job.run / "adapter_model.safetensors").read_bytes() == reference

    def test_handlers_are_given_back(self) -> None:
        before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        with Interruption() as interruption:
            assert signal.getsignal(signal.SIGINT) != before[0]
            os.kill(os.getpid(), signal.SIGTERM)
            assert interruption.received is signal.SIGTERM
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
        with pytest.raises(SystemExit) as caught:
            interruption.raise_received()
        assert caught.value.code == 143

    def test_outside_of_the_main_thread_nothing_is_taken(self, tmp_path: Path) -> None:
        failures: list[BaseException] = []

        def work() -> None:
            try:
                build_trainer(Job(tmp_path, OPTIONS | {"num_episodes": 4})).train()
            except BaseException as error:
                failures.append(error)

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert not failures
        assert list_checkpoints(tmp_path / "run")


def wait_for_step(job: Job, step: int) -> int:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if (job.folder / "step").exists():
            written = (job.folder / "step").read_text()
            if written and int(written) >= step:
                return int(written)
        time.sleep(0.01)
    raise AssertionError("the run did not get there")


# Trains, and spoils the run's disk after the first checkpoint.
DISK = """
import hashlib
import os
import subprocess
import sys
from pathlib import Path

sys.path[:0] = {path!r}
from processes import Job, build_trainer
from test_durability import OPTIONS
from transformers import TrainerCallback

from attention_rl_trainer.durability.manifest import find_damage
from attention_rl_trainer.durability.staging import list_checkpoints

folder = Path({folder!r})


def fill(left=0):
    with (folder / "filler").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            file.truncate(file.tell() - left)


def fill_nearly():
    fill(left=49152)


def protect():
    (folder / "run" / "trajectories.jsonl").chmod(0o666)  # it is the checkpoint that cannot be written
    (folder / "run").chmod(0o555)
    if os.geteuid() == 0:
        os.seteuid(65534)  # whom permissions bind


class Spoil(TrainerCallback):
    def on_save(self, args, state, control, **kwargs):
        if state.global_step == 2:
            {spoil}()


if {spoil!r} != "protect":
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], check=True)
trainer = build_trainer(Job(folder, OPTIONS))
trainer.add_callback(Spoil())
try:
    trainer.train()
except OSError as error:
    results = [f"{{type(error).__name__}} {{error}}"]
if os.getuid() == 0:
    os.seteuid(0)
results.append(str([(path.name, find_damage(path)) for path in list_checkpoints(folder / "run")]))
(folder / "filler").unlink(missing_ok=True)
(folder / "run").chmod(0o755)
again = build_trainer(Job(folder, OPTIONS))
again.train(resume_from_checkpoint=True)
weights = (folder / "run" / "checkpoint-6" / "adapter_model.safetensors").read_bytes()
print(*results, hashlib.sha256(weights).hexdigest(), sep="\\n")
"""


def train_on_a_disk(folder: Path, spoil: str, *before: str) -> list[str]:
    """Return the error of the run, what checkpoints there are, and the adapter's hash once it could go on."""
    script = DISK.format(path=sys.path, folder=str(folder), spoil=spoil)
    done = subprocess.run(
        [*before, sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-3:]


def adapter_hash(finished: Path) -> str:
    return hashlib.sha256((finished / "run" / "adapter_model.safetensors").read_bytes()).hexdigest()


def can_mount() -> bool:
    probe = ["unshare", "--map-root-user", "--mount", "sh", "-c", "mount -t tmpfs tmpfs /mnt"]
    return sys.platform == "linux" and subprocess.run(probe, capture_output=True, check=False).returncode == 0


class TestDisks:
    @pytest.mark.skipif(not can_mount(), reason="needs a namespace in which a small disk can be mounted")
    @pytest.mark.parametrize(("spoil", "path"), [("fill", "trajectories.jsonl"), ("fill_nearly", "checkpoint-4")])
    def test_a_full_disk(self, spoil: str, path: str, finished: Path, tmp_path: Path) -> None:
        error, checkpoints, learned = train_on_a_disk(tmp_path, spoil, "unshare", "--map-root-user", "--mount")
        assert learned == adapter_hash(finished)
        assert "No space left on device" in error
        assert str(tmp_path / "run" / path) in error
        assert checkpoints == "[('checkpoint-2', [])]"

    def test_no_permission(self, finished: Path) -> None:
        # pytest's own folders cannot be entered by others than their owner.
        with TemporaryDirectory() as name:
            folder = Path(name)
            folder.chmod(0o755)
            error, checkpoints, learned = train_on_a_disk(folder, "protect")
        assert learned == adapter_hash(finished)
        assert "Permission denied" in error
        assert str(folder / "run" / "checkpoint-4") in error
        assert checkpoints == "[('checkpoint-2', [])]"

    def test_a_refused_write_names_path_and_reason(self, tmp_path: Path) -> None:
        message = r"checkpoint-3 could not be written: .*Is a directory.*Nothing that was"
        with pytest.raises(StagingError, match=message), staged_folder(tmp_path / "checkpoint-3") as folder:
            folder.write_text("not a file")
        assert not list(tmp_path.iterdir())
        (tmp_path / "taken").mkdir()
        (tmp_path / "taken" / "a").write_text("a")
        with pytest.raises(StagingError, match=f"{tmp_path} could not be written"), staged_files(tmp_path) as folder:
            (folder / "taken").write_text("a file where there is a folder")


class Plant(TrainerCallback):
    """Leaves what the stock Trainer writes, in the run's folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        (self.folder / "training_args.bin").write_bytes(b"hf_configsecret")


@dataclass
class Upload:
    """What a push to the Hub would have sent."""

    files: set[str]
    place: str | None
    damage: list[Any] | None


class TestPushes:
    @pytest.mark.parametrize(
        ("strategy", "places"),
        [
            ("end", []),
            ("every_save", [None] * 3),
            ("checkpoint", [None, "last-checkpoint"] * 3),
            ("all_checkpoints", [None, "checkpoint-2", None, "checkpoint-4", None, "checkpoint-6"]),
        ],
    )
    def test_what_is_sent_and_when(
        self, strategy: str, places: list[str | None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The network is all that is left out."""
        uploads: list[Upload] = []

        def upload(self: HfApi, *, folder_path: Path, ignore_patterns: list[str] | None, **options: Any) -> Any:
            names = [str(path.relative_to(folder_path)) for path in Path(folder_path).rglob("*") if path.is_file()]
            sent = set(filter_repo_objects(names, ignore_patterns=ignore_patterns))
            place = options.get("path_in_repo")
            uploads.append(Upload(sent, place, None if place is None else find_damage(Path(folder_path))))
            done: Future[None] = Future()
            done.set_result(None)
            return done

        monkeypatch.setattr(HfApi, "upload_folder", upload)
        trainer = build_trainer(Job(tmp_path, OPTIONS | {"hub_strategy": strategy, "hub_token": "hf_configsecret"}))
        trainer.args.push_to_hub = True
        trainer.hub_model_id = "someone/adapter"
        trainer.push_in_progress = None
        (tmp_path / "run" / "_earlier-1" / "checkpoint-1").mkdir(parents=True)
        (tmp_path / "run" / "_earlier-1" / "checkpoint-1" / "old").write_text("old")
        trainer.add_callback(Plant(tmp_path / "run"))
        trainer.train()
        assert [upload.place for upload in uploads] == places
        trainer.push_to_hub()
        assert [upload.place for upload in uploads] == [*places, None]
        for sent in uploads:
            assert sent.damage in (None, [])
            assert {"adapter_model.safetensors", "adapter_config.json", "README.md"} <= sent.files
            assert not [name for name in sent.files if name.startswith(("_", "checkpoint-")) or name.endswith(".bin")]
        for content in content_of(tmp_path / "run").values():
            assert b"hf_configsecret" not in content


class Payload:
    """Leaves a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


PLANTED = (
    *("optimizer.pt", "scheduler.pt", "rng_state.pth", "scaler.pt", "training_args.bin"),
    *("adapter_model.bin", "pytorch_model.bin", "model.safetensors", "pytorch_model.bin.index.json"),
)


def test_other_weights_in_a_checkpoint_are_not_taken(finished: Path, tmp_path: Path) -> None:
    job = copy_of(finished, tmp_path)
    checkpoint = job.run / "checkpoint-4"
    tiny_llama().save_pretrained(checkpoint)
    shutil.copytree(job.run / "checkpoint-2", checkpoint / "second")
    build_trainer(job).train(resume_from_checkpoint=str(checkpoint))
    expected = (finished / "run" / "checkpoint-6" / "adapter_model.safetensors").read_bytes()
    assert (job.run / "checkpoint-6" / "adapter_model.safetensors").read_bytes() == expected
    assert not (job.run / "checkpoint-6" / "second").exists()


def test_planted_payloads_do_not_run(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = copy_of(finished, tmp_path)
    checkpoint = job.run / "checkpoint-4"
    mark = tmp_path / "it ran"
    payload = pickle.dumps(Payload(mark))
    pickle.loads(payload)
    assert mark.exists(), "the payload must work"
    mark.unlink()
    for name in PLANTED:
        (checkpoint / name).write_bytes(payload)
    monkeypatch.setattr(torch, "load", None)
    trainer = build_trainer(job)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert trainer.state.global_step == 6
    assert not mark.exists()
    # In place of a file that is read, it is refused.
    for name in ("optimizer.safetensors", "adapter_model.safetensors", "random_states.safetensors"):
        other = copy_of(finished, tmp_path / name)
        (other.run / "checkpoint-4" / name).write_bytes(payload)
        write_manifest_anew(other.run / "checkpoint-4")
        with pytest.raises(Exception, match=r"(?i)header|no state"):
            build_trainer(other).train(resume_from_checkpoint=str(other.run / "checkpoint-4"))
        assert not mark.exists()
