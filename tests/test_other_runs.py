"""A run goes on as itself or not at all, and what it does not go on from stays."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from finished_run import OPTIONS, StopAt, content_of, copy_of, write_manifest_anew
from peft import LoraConfig
from processes import Job, build_trainer, run
from tiny import article_texts, byte_level_tokenizer, tiny_config, tiny_gpt2, tiny_llama, tiny_trainer

from attention_rl_trainer.durability import CheckpointError
from attention_rl_trainer.durability.manifest import find_damage
from attention_rl_trainer.durability.staging import (
    list_checkpoints,
)
from attention_rl_trainer.ledger import read_ledger
from attention_rl_trainer.trainer import AttentionGuidedRLTrainer


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
