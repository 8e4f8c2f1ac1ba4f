"""A run resumes as itself or not at all, and what it does not resume from stays."""

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
from tokenizers import Tokenizer
from transformers import EarlyStoppingCallback, PreTrainedTokenizerFast

from attention_rl_trainer.durability.discovery import CheckpointError
from attention_rl_trainer.durability.manifest import find_damage
from attention_rl_trainer.durability.staging import list_checkpoints
from attention_rl_trainer.models.adapters import default_lora_config
from attention_rl_trainer.records.ledger import read_ledger
from attention_rl_trainer.rollout.environment import KVMemoryEnvironment, SelectionOptions
from attention_rl_trainer.trainer import AttentionGuidedRLTrainer


class OtherEnvironment(KVMemoryEnvironment):
    """An environment of the user's own."""


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

    def test_what_only_the_objects_say_is_listed(self, tmp_path: Path) -> None:
        """No option of the run names these."""
        texts = article_texts(30)
        tokenizer = byte_level_tokenizer(texts)
        short = OPTIONS | {"num_episodes": 8}

        def build(tokenizer: PreTrainedTokenizerFast = tokenizer, **given: Any) -> AttentionGuidedRLTrainer:
            return tiny_trainer(tmp_path, texts, tokenizer, trainer_options=given, **short)

        def refusal(trainer: AttentionGuidedRLTrainer) -> list[str]:
            with pytest.raises(CheckpointError, match="belongs to another run") as caught:
                trainer.train(resume_from_checkpoint=True)
            return [line.strip() for line in str(caught.value).splitlines()[1:]]

        build().train()
        specification = json.loads(tokenizer.backend_tokenizer.to_str())
        specification["model"]["merges"] = specification["model"]["merges"][:-20]
        merged_less = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(json.dumps(specification)), eos_token=tokenizer.eos_token
        )
        assert merged_less.get_vocab() == tokenizer.get_vocab()
        assert [line.partition(":")[0] for line in refusal(build(merged_less))] == ["tokenizer"]
        # Cutting and filling up are not part of how text is read.
        tokenizer.backend_tokenizer.enable_truncation(8)
        tokenizer.backend_tokenizer.enable_padding()
        build().train(resume_from_checkpoint=True)
        for options in ({"use_rslora": True}, {"lora_dropout": 0.5}, {"alpha_pattern": {"q_proj": 4}}):
            config = default_lora_config(tiny_llama())
            for name, value in options.items():
                setattr(config, name, value)
            (line,) = refusal(build(peft_config=config))
            assert line.startswith("adapter.options: ")
            ((name, value),) = options.items()
            assert f"{name}={value}" in line.partition(" there, ")[2]
        assert refusal(build(environment=OtherEnvironment(SelectionOptions()))) == [
            "environment: 'KVMemoryEnvironment' there, 'OtherEnvironment' here"
        ]
        optimizer = torch.optim.RAdam([torch.nn.Parameter(torch.zeros(1))])
        assert refusal(build(optimizers=(optimizer, None))) == ["optim: 'adamw_torch' there, 'RAdam' here"]

    def test_a_worker_shuffles_a_stream_differently(self, tmp_path: Path) -> None:
        job = Job(tmp_path, OPTIONS | {"num_episodes": 8}, streaming=True)
        build_trainer(job).train()
        other = replace(job, options=job.options | {"dataloader_num_workers": 1})
        with pytest.raises(CheckpointError, match="dataloader_num_workers: 0 there, 1 here"):
            build_trainer(other).train(resume_from_checkpoint=True)

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

    def test_another_number_of_processes_is_listed_where_dropout_is_drawn(self, finished: Path, tmp_path: Path) -> None:
        checkpoint = copy_of(finished, tmp_path).run / "checkpoint-6"
        facts = json.loads((checkpoint / "run_identity.json").read_text())
        (checkpoint / "run_identity.json").write_text(json.dumps(facts | {"processes": 2}))
        write_manifest_anew(checkpoint)
        with pytest.raises(CheckpointError, match="processes: 2 there, None here"):
            build_trainer(Job(tmp_path, OPTIONS)).train(resume_from_checkpoint=True)

    @pytest.mark.parametrize(
        ("path", "message"),
        [
            ("", "resume_from_checkpoint is empty"),
            ("  ", "resume_from_checkpoint is empty"),
            ("nowhere/checkpoint-3", "there is no checkpoint nowhere/checkpoint-3"),
            (".", r"is not a complete checkpoint: .*manifest\.json is missing"),
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
        assert trainer.progress.num_episodes == 24

    def test_a_new_run_sets_the_checkpoints_of_an_old_one_aside(self, finished: Path, tmp_path: Path) -> None:
        job = copy_of(finished, tmp_path)
        old = content_of(job.run / "checkpoint-6")
        build_trainer(replace(job, options=OPTIONS | {"num_episodes": 8})).train()
        assert [path.name for path in list_checkpoints(job.run)] == ["checkpoint-2"]
        assert content_of(job.run / "_earlier-1" / "checkpoint-6") == old
        assert len(read_ledger(job.run / "_earlier-1" / "trajectories.jsonl")) == 24
        assert len(read_ledger(job.run / "trajectories.jsonl")) == 8

    def test_evaluations_and_adapter_go_with_the_run_that_they_are_of(self, finished: Path, tmp_path: Path) -> None:
        """Also where the new run evaluates before its first step, which the old one makes room for."""
        job = copy_of(finished, tmp_path)
        options = OPTIONS | {"num_episodes": 8, "eval_episodes": 2, "eval_order_episodes": 0}
        old = build_trainer(replace(job, options=options))
        held_out = old.train_dataset
        old.evaluate(held_out)
        before = content_of(job.run)
        assert "## Evaluation: eval" in (job.run / "README.md").read_text()
        new = build_trainer(replace(job, options=options))
        new.eval_dataset, new.args.eval_on_start = held_out, True
        new.train()
        assert [path.name for path in (job.run / "evaluation").iterdir()] == ["eval_before_training"]
        aside = content_of(job.run / "_earlier-1")
        for name in ("adapter_model.safetensors", "adapter_config.json", "README.md", "attention_rl_config.json"):
            assert aside[name] == before[name]
        assert aside["evaluation/eval/evaluation.json"] == before["evaluation/eval/evaluation.json"]
        assert not any(name.startswith("evaluation/eval_before") for name in aside)
        assert not (job.run / "adapter_model.safetensors").exists()

    def test_what_was_measured_before_the_first_run_stays(self, tmp_path: Path) -> None:
        trainer = build_trainer(
            Job(tmp_path, OPTIONS | {"num_episodes": 8, "eval_episodes": 2, "eval_order_episodes": 0})
        )
        trainer.evaluate(trainer.train_dataset)
        trainer.train()
        assert (trainer.output_dir / "evaluation" / "eval" / "evaluation.json").is_file()
        assert not (trainer.output_dir / "_earlier-1").exists()

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
        assert trainer.progress.num_episodes == 24
        expected = (finished / "run" / "checkpoint-6" / "adapter_model.safetensors").read_bytes()
        assert (job.run / "checkpoint-6" / "adapter_model.safetensors").read_bytes() == expected
        assert not (job.run / "_earlier-1").exists()
        trainer = build_trainer(job)
        trainer.train(resume_from_checkpoint=str(job.run / "latest"))
        assert (job.run / "checkpoint-6" / "adapter_model.safetensors").read_bytes() == expected
        assert (job.run / "_earlier-1" / "checkpoint-4").is_symlink()

    @pytest.mark.slow
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

    @pytest.mark.parametrize("ledger", ["gone", "torn", "of another run"])
    def test_a_report_that_is_missing_does_not_stop_a_finished_run(
        self, ledger: str, finished: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        job = replace(copy_of(finished, tmp_path), options=OPTIONS | {"report_at_end": True})
        path = job.run / "trajectories.jsonl"
        checkpoint: str | bool = True
        if ledger == "gone":
            path.unlink()
        elif ledger == "torn":
            with path.open("ab") as file:
                file.write(b'{"episode": 24, "tor')
        else:
            checkpoint = str(copy_of(finished, tmp_path / "other").run / "checkpoint-6")
        trainer = build_trainer(job)
        trainer.train(resume_from_checkpoint=checkpoint)
        assert trainer.state.global_step == 6
        assert (job.run / "report" / "summary.md").is_file() == (ledger == "torn")
        assert (f"No report: {path} is missing" in caplog.text) == (ledger == "gone")

    def test_a_path_may_be_an_object(self, finished: Path, tmp_path: Path) -> None:
        trainer = build_trainer(copy_of(finished, tmp_path))
        trainer.train(resume_from_checkpoint=tmp_path / "run" / "checkpoint-6")
        assert trainer.state.global_step == 6

    def test_save_only_model_cannot_be_resumed_from(self, tmp_path: Path) -> None:
        job = Job(tmp_path, OPTIONS | {"save_only_model": True})
        build_trainer(job).train()
        with pytest.raises(CheckpointError, match=r"optimizer\.safetensors is missing, .*save_only_model"):
            build_trainer(job).train(resume_from_checkpoint=True)


def test_two_callbacks_of_one_kind_keep_what_they_counted(tmp_path: Path) -> None:
    options = {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "eval_episodes": 2,
        "eval_tables": False,
        "metric_for_best_model": "reward",
        "restore_callback_states_from_checkpoint": True,
        "learning_rate": 1e-8,
    }

    def build(folder: str) -> AttentionGuidedRLTrainer:
        trainer = build_trainer(Job(tmp_path / folder, OPTIONS | options))
        # Nothing is ever an improvement, so that the first would end the run at its fifth evaluation, the second never.
        for patience in (4, 90):
            trainer.add_callback(EarlyStoppingCallback(patience, early_stopping_threshold=100.0))
        return trainer

    build("whole").train()
    whole = tmp_path / "whole" / "run"
    assert [path.name for path in list_checkpoints(whole)][-1] == "checkpoint-5"
    shutil.copytree(whole / "checkpoint-4", tmp_path / "part" / "run" / "checkpoint-4")
    resumed = build("part")
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 5
