"""The speed of this machine, measured with a tiny model, and the plan that follows from a speed."""

from __future__ import annotations

import logging
import re
from io import StringIO
from pathlib import Path

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
from attention_rl_trainer.rollout.layout import Separators


def printed(*arguments: str, width: int = 80) -> str:
    stream = StringIO()
    assert main(arguments, Console(file=stream, width=width)) == 0
    return stream.getvalue()


class TestMeasuring:
    def test_as_many_as_there_is_time_for(self, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
        policy = make_policy(tiny_llama(), tokenizer)
        config = tiny_config(tmp_path, generation_batch_size=10, training_batch_size=3)
        separators = Separators.encode(PlainTextEncoder(tokenizer), config)
        before = {name: p.clone() for name, p in policy.model.named_parameters()}
        measured = measure(policy, separators, config, target_seconds=60.0)
        assert (measured.num_rolled_out, measured.num_trained_on) == (10, 3)
        assert measured.speed.update * measured.update_seconds == pytest.approx(3 * 62)
        assert measured.speed.rollout * measured.rollout_seconds > 10 * 62
        assert measure(policy, separators, config, target_seconds=0.0).num_rolled_out == 1
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
        time = plan_time(SMALL, SHORT, MeasuredSpeed(rollout=100.0, update=50.0), kept_fraction=0.5)
        # Forwards as in test_timing: 45 tokens of keys, 100 of prompts, 2 · 10 · 2 of queries, 60 + 50 and 40 + 35 read.
        assert time.forward_tokens == (45 + 100 + 40 + 110 + 75) / 5
        # Half of the trajectories, each of 25 tokens.
        assert time.rollout_seconds == pytest.approx(time.forward_tokens / 100)
        assert time.update_seconds == pytest.approx(0.5 * 25 / 50)
        assert time.decode_seconds is None

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
        assert "a rollout of B = 4 in " in last
        assert max(map(len, tables.splitlines())) <= 80
        assert "…" not in text
        assert re.search(r"80 episodes after 40 of a warm start +│ \d[\d.]* (seconds|minutes) ", text)
        assert "caches of policy and reference" in text
        assert "decoding)" not in text
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

    def test_without_a_hub_it_says_what_is_missing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        monkeypatch.setattr("attention_rl_trainer.commands.plan.cached_in_hub_cache", lambda *names: False)
        with pytest.raises(
            HubUnreachableError, match=r"^the plan needs the config.json of openai-community/"
        ) as caught:
            printed("--config", "gpt2")
        assert "\n" not in str(caught.value)
        assert "--model_name_or_path offline" in str(caught.value)

    def test_quantized_weights_are_not_measured(self, tmp_path: Path) -> None:
        save_tiny_llama(tmp_path, article_texts(3))
        with pytest.raises(ValueError, match="leave load_in_4bit and load_in_8bit out"):
            printed("--model_name_or_path", str(tmp_path), "--load_in_4bit", "--use_cpu", "true")
