"""What is sent to the Hub during a run, and when."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from finished_run import OPTIONS, content_of
from huggingface_hub import HfApi
from huggingface_hub.utils import filter_repo_objects
from processes import Job, build_trainer
from transformers import TrainerCallback

from attention_rl_trainer.durability import pushes
from attention_rl_trainer.durability.manifest import find_damage


class Plant(TrainerCallback):
    """Leaves what the stock Trainer writes, in the run's folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        (self.folder / "training_args.bin").write_bytes(b"hf_configsecret")


PUBLISHED = {
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "attention_rl_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
}


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

        def upload(self: HfApi, *, folder_path: Path, allow_patterns: list[str] | None, **options: Any) -> Any:
            names = [str(path.relative_to(folder_path)) for path in Path(folder_path).rglob("*") if path.is_file()]
            sent = set(filter_repo_objects(names, allow_patterns=allow_patterns))
            place = options.get("path_in_repo")
            uploads.append(Upload(sent, place, None if place is None else find_damage(Path(folder_path))))
            done: Future[None] = Future()
            done.set_result(None)
            return done

        monkeypatch.setattr(HfApi, "upload_folder", upload)
        monkeypatch.setattr(pushes, "hub_obstacle", lambda: None)
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
            assert not [name for name in sent.files if name.startswith(("_", "checkpoint-")) or name.endswith(".bin")]
            if sent.place is None:
                assert sent.files == PUBLISHED
            else:
                # What a run needs to resume is what was asked for.
                assert PUBLISHED | {"optimizer.safetensors", "previous_adapter.safetensors"} <= sent.files
        for content in content_of(tmp_path / "run").values():
            assert b"hf_configsecret" not in content

    @pytest.mark.parametrize(("hub_always_push", "steps"), [(False, [2, 6]), (True, [2, 4, 6])])
    def test_while_a_push_is_not_done(
        self, hub_always_push: bool, steps: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The first is done when the last checkpoint is written."""
        messages: list[str] = []
        first: Future[None] = Future()

        class Finish(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                if state.global_step == 6:
                    first.set_result(None)

        def upload(self: HfApi, *, commit_message: str, **options: Any) -> Any:
            messages.append(commit_message)
            if len(messages) == 1:
                return first
            done: Future[None] = Future()
            done.set_result(None)
            return done

        monkeypatch.setattr(HfApi, "upload_folder", upload)
        options = {"hub_strategy": "every_save", "hub_always_push": hub_always_push}
        trainer = build_trainer(Job(tmp_path, OPTIONS | options))
        trainer.args.push_to_hub = True
        trainer.hub_model_id = "someone/adapter"
        trainer.push_in_progress = None
        trainer.add_callback(Finish())
        trainer.train()
        assert messages == [f"Training in progress, step {step}" for step in steps]
