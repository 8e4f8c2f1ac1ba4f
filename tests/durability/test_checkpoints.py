"""What a run makes of the checkpoints that it finds: damage, and files that others left there."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from finished_run import OPTIONS, content_of, copy_of, write_manifest_anew
from processes import Job, build_trainer
from transformers import TrainerCallback

from attention_rl_trainer.durability.discovery import IDENTITY_NAME, CheckpointError, find_checkpoint
from attention_rl_trainer.durability.manifest import MANIFEST_NAME
from attention_rl_trainer.records.ledger import read_ledger
from attention_rl_trainer.records.progress import STATE_NAME, load_parts
from attention_rl_trainer.trainer import AttentionGuidedRLTrainer


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

    def test_a_run_resumes_from_the_checkpoint_before_and_ends_alike(
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

    def test_a_run_does_not_resume_from_a_damaged_one_that_was_named(self, finished: Path, tmp_path: Path) -> None:
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

    def test_a_ledger_that_lost_rows_is_reported(
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


def test_a_checkpoint_of_an_older_version_is_refused_as_such(finished: Path, tmp_path: Path) -> None:
    """By its format, before it is compared with this run: it lacks facts that are compared now."""
    job = copy_of(finished, tmp_path)
    checkpoint = job.run / "checkpoint-6"
    states = json.loads((checkpoint / STATE_NAME).read_text())
    (checkpoint / STATE_NAME).write_text(json.dumps(states | {"format": 3}))
    facts = json.loads((checkpoint / IDENTITY_NAME).read_text())
    del facts["reward_filter"], facts["reward_fn"]
    (checkpoint / IDENTITY_NAME).write_text(json.dumps(facts))
    write_manifest_anew(checkpoint)
    with pytest.raises(
        CheckpointError, match=r"has format 3, but this version .* reads format 7; resume with the version"
    ):
        build_trainer(job).train(resume_from_checkpoint=True)


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
        with pytest.raises(Exception, match=r"(?i)header|does not hold a state"):
            build_trainer(other).train(resume_from_checkpoint=str(other.run / "checkpoint-4"))
        assert not mark.exists()


class WatchSaves(TrainerCallback):
    """Looks at what a step keeps in memory alone, and at what is on the disk, where a checkpoint is written."""

    def __init__(self, trainer: AttentionGuidedRLTrainer) -> None:
        self.trainer = trainer
        self.open_updates: list[int | None] = []
        self.num_rows: list[int] = []

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        try:
            self.open_updates.append(self.trainer.updater.num_trajectories)
        except AssertionError:  # no update is open
            self.open_updates.append(None)
        self.num_rows.append(len(read_ledger(self.trainer.recorder.ledger.path)))


def test_no_trajectory_outlives_its_step_unsaved(tmp_path: Path) -> None:
    job = Job(tmp_path, OPTIONS | {"gradient_accumulation_steps": 2, "num_iterations": 2})
    trainer = build_trainer(job)
    watch = WatchSaves(trainer)
    trainer.add_callback(watch)
    trainer.train()
    assert watch.open_updates == [None] * 3
    assert watch.num_rows == [8, 16, 24]
    for step, episodes in ((1, 8), (2, 16), (3, 24)):
        assert load_parts(job.run / f"checkpoint-{step}")["progress"]["num_episodes"] == episodes
    assert len(read_ledger(job.run / "trajectories.jsonl")) == 24
