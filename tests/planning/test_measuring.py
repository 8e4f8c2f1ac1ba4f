"""The speed of this machine, measured with a tiny model, and the plan that follows from a speed."""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from by_hand import SHORT, SMALL
from rich.console import Console
from tiny import article_texts, make_policy, save_tiny_llama, tiny_config, tiny_llama
from transformers import GPT2Config, PreTrainedTokenizerFast

from attention_rl_trainer.commands.plan import duration, main
from attention_rl_trainer.hub import HubUnreachableError
from attention_rl_trainer.memories.tokenization import PlainTextEncoder
from attention_rl_trainer.planning.measuring import made_up_memories, measure
from attention_rl_trainer.planning.timing import MeasuredSpeed, plan_time
from attention_rl_trainer.rollout.layout import Layout, Separators


def printed(*arguments: str, width: int = 80) -> str:
    stream = StringIO()
    assert main(arguments, Console(file=stream, width=width)) == 0
    return stream.getvalue()


class TestMeasuring:
    @pytest.mark.parametrize(
        "changes", [{}, {"show_keys": "plain"}, {"selector_coef": 1.0, "joint_reading": False}], ids=str
    )
    def test_speeds_are_tokens_over_seconds(
        self, tmp_path: Path, tokenizer: PreTrainedTokenizerFast, changes: dict[str, Any]
    ) -> None:
        config = tiny_config(tmp_path, generation_batch_size=10, training_batch_size=3, **changes)
        policy = make_policy(tiny_llama(), tokenizer, joint_reading=config.joint_reading)
        separators = Separators.encode(PlainTextEncoder(tokenizer), config)
        before = {name: p.clone() for name, p in policy.model.named_parameters()}
        measured = measure(policy, separators, config)
        layout, speed = Layout.of(config, separators), measured.speed
        assert speed.reading * measured.reading_seconds == pytest.approx(2 * 4 * layout.prompt_tokens)
        assert speed.decoding * measured.decoding_seconds == pytest.approx(4)
        assert speed.update * measured.update_seconds == pytest.approx(3 * layout.trajectory_tokens)
        assert all(torch.equal(before[name], p) for name, p in policy.model.named_parameters())
        assert all(p.grad is None for p in policy.model.parameters())

    def test_memories_have_the_sizes_of_the_run_and_ordinary_tokens(self, tmp_path: Path) -> None:
        config, allowed = tiny_config(tmp_path), torch.tensor([3, 5, 9])
        batch = made_up_memories(config, 2, allowed, torch.Generator().manual_seed(0))
        assert batch.key_tokens.shape == (2, config.memory_size, config.tokens_per_key)
        assert batch.example_values.shape == (2, config.tokens_per_value)
        assert set(batch.value_tokens.unique().tolist()) == {3, 5, 9}


class TestPlan:
    def test_time_at_a_measured_speed(self) -> None:
        speed = MeasuredSpeed(reading=100.0, decoding=8.0, update=50.0)
        time = plan_time(SMALL, SHORT, speed, kept_fraction=0.5)
        # As in test_timing: 45 tokens of keys, 100 of prompts, 40 of queries, 60 + 50 and 40 + 35 read.
        assert time.forward_tokens == (45 + 100 + 40 + 110 + 75) / 5
        # Half of the trajectories, each of 25 tokens.
        # Two queries of two tokens are written for all five at once.
        assert time.decode_seconds == pytest.approx(4 / 8 / 5)
        assert time.rollout_seconds == pytest.approx((45 + 100 + 110 + 75) / 5 / 100 + time.decode_seconds)
        assert time.update_seconds == pytest.approx(0.5 * 25 / 50)
        twice = plan_time(SMALL, replace(SHORT, num_iterations=2), speed, kept_fraction=0.5)
        assert twice.update_seconds == pytest.approx(2 * time.update_seconds)
        again = plan_time(SMALL, replace(SHORT, activation_checkpointing=True), speed, kept_fraction=0.5)
        assert 1.2 < again.update_seconds / time.update_seconds < 1.4

    @pytest.mark.parametrize(
        ("seconds", "text"),
        [(0.5, "0.5 seconds"), (89.0, "89 seconds"), (90.0, "1.5 minutes"), (5400.0, "1.5 hours")],
    )
    def test_durations(self, seconds: float, text: str) -> None:
        assert duration(seconds) == text


class TestCommand:
    OPTIONS = (
        *("--use_cpu", "true", "--num_kv_pairs", "6", "--num_steps", "2", "--tokens_per_query", "3"),
        *("--generation_batch_size", "4", "--num_episodes", "80", "--warm_start_episodes", "40"),
    )

    def test_a_cpu_is_measured_and_the_tables_fit(
        self, tmp_path: Path, texts: list[str], caplog: pytest.LogCaptureFixture
    ) -> None:
        save_tiny_llama(tmp_path / "model", article_texts(3))
        with caplog.at_level(logging.INFO):
            text = printed("--model_name_or_path", str(tmp_path / "model"), *self.OPTIONS)
        assert "Measuring a rollout and an update on this CPU" in caplog.text
        tables, _, last = text.partition("measured on this CPU (")
        assert re.search(r"beside whatever else runs: \d+ tokens per second read, \d+\.\d of each query", last)
        assert max(map(len, tables.splitlines())) <= 80
        assert "…" not in text
        assert re.search(r"80 episodes after 40 of a warm start +│ \d[\d.]* (seconds|minutes) ", text)
        assert "caches of policy and reference" in text
        assert "fits: " in text

    @pytest.mark.parametrize(
        "flags",
        [
            ["--selector_coef", "1", "--selector_gradient", "distilled", "--distillation_temperature", "0.1"],
            ["--num_queries", "3", "--credit", "step"],
            ["--information_coef", "1", "--warm_start_temperature", "0.1"],
        ],
    )
    def test_a_run_for_orders_is_measured_too(self, tmp_path: Path, flags: list[str]) -> None:
        save_tiny_llama(tmp_path / "model", article_texts(3))
        text = printed("--model_name_or_path", str(tmp_path / "model"), *self.OPTIONS, *flags)
        assert "tree of values in a layer" in text
        assert "fits: " in text

    def test_a_gpu_that_is_described_is_planned_for(self, tmp_path: Path) -> None:
        GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=420).save_pretrained(tmp_path)
        text = printed("--model_name_or_path", str(tmp_path), "--gpu_memory_gib", "12", "--dtype", "float32")
        assert " of 11.00 GiB" in text
        assert max(map(len, text.splitlines())) <= 80

    def test_weights_that_are_not_here(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=420).save_pretrained(tmp_path)
        with caplog.at_level(logging.INFO):
            assert " of 15.00 GiB" in printed("--model_name_or_path", str(tmp_path))
        assert "so nothing is measured; planned for is a GPU" in caplog.text
        with pytest.raises(ValueError, match="are not on this machine, so its CPU cannot be measured"):
            printed("--model_name_or_path", str(tmp_path), "--use_cpu", "true")

    def test_without_a_hub_it_says_what_is_missing(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        monkeypatch.setattr("attention_rl_trainer.commands.plan.cached_in_hub_cache", lambda *names: False)
        with pytest.raises(
            HubUnreachableError, match=r"^the plan needs the config.json of openai-community/"
        ) as caught:
            printed("--config", "gpt2")
        assert "\n" not in str(caught.value)
        assert "--model_name_or_path offline" in str(caught.value)
        assert not caplog.records

    def test_quantized_weights_are_not_measured(self, tmp_path: Path) -> None:
        save_tiny_llama(tmp_path, article_texts(3))
        with pytest.raises(ValueError, match="leave load_in_4bit and load_in_8bit out"):
            printed("--model_name_or_path", str(tmp_path), "--load_in_4bit", "--use_cpu", "true")
