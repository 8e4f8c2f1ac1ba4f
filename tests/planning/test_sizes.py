"""The sizes of models and runs, against real models and hand-worked cases."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from by_hand import SHORT, SMALL
from tiny import adapted, tiny_config, tiny_gpt2, tiny_llama
from tokenizer_families import gpt2
from transformers import (
    BertConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from attention_rl_trainer.config import AttentionGuidedRLConfig
from attention_rl_trainer.memories.tokenization import PlainTextEncoder
from attention_rl_trainer.planning.sizes import LLAMA_3_2_3B, ModelShape, RunShape
from attention_rl_trainer.rollout.layout import Layout, Separators


def count_parameters(model: PreTrainedModel) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


class TestModelShape:
    @pytest.mark.parametrize(
        "model",
        [
            pytest.param(tiny_llama(), id="llama"),
            pytest.param(tiny_llama(tie_word_embeddings=True), id="llama-tied"),
            pytest.param(tiny_llama(head_dim=6), id="llama-head-dim"),
            pytest.param(tiny_gpt2(), id="gpt2"),
            pytest.param(tiny_gpt2(n_inner=48), id="gpt2-n-inner"),
        ],
    )
    def test_counts_the_parameters_of_a_real_model_and_its_adapter(self, model: PreTrainedModel) -> None:
        shape = ModelShape.from_config(model.config)
        assert shape.parameters == count_parameters(model)
        trainable = sum(p.numel() for p in adapted(model).parameters() if p.requires_grad)
        assert shape.adapter_parameters(8) == trainable

    def test_llama_3_2_3b(self) -> None:
        config = LlamaConfig(
            vocab_size=128256,
            hidden_size=3072,
            intermediate_size=8192,
            num_hidden_layers=28,
            num_attention_heads=24,
            num_key_value_heads=8,
            head_dim=128,
            max_position_embeddings=131072,
            tie_word_embeddings=True,
        )
        assert ModelShape.from_config(config) == LLAMA_3_2_3B
        with torch.device("meta"):
            model = LlamaForCausalLM(config)
        assert LLAMA_3_2_3B.parameters == count_parameters(model) == 3_212_749_824

    def test_weight_bytes(self) -> None:
        # A layer: 4·4 + 2 · 4·2 + 4·4 of attention and 3 · 4·6 of MLP, 120; besides 10·4 embeddings and 7 norms of 4.
        assert SMALL.linear_parameters == 360
        assert SMALL.parameters == 360 + 40 + 28
        assert SMALL.weight_bytes(32) == 4 * 428
        assert SMALL.weight_bytes(16) == 2 * 428
        # Four bits, and a float32 scale for 64 weights.
        assert SMALL.weight_bytes(4) == int(360 * 4.5 / 8) + 2 * 68

    def test_unknown_architecture(self) -> None:
        with pytest.raises(ValueError, match=r"^no plan for the architecture 'bert'; known are llama, mistral"):
            ModelShape.from_config(BertConfig())

    def test_config_without_a_name(self) -> None:
        class Nameless(PreTrainedConfig):
            model_type = "llama"
            hidden_size = 4

        wanted = r"^the config of 'llama' has no num_hidden_layers, num_attention_heads, vocab_size, from which"
        with pytest.raises(ValueError, match=wanted):
            ModelShape.from_config(Nameless())

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"num_layers": 0}, "num_layers must be at least 1, got 0"),
            ({"num_query_heads": 3, "num_key_value_heads": 2}, "multiple of num_key_value_heads, got 3 and 2"),
            ({"mlp": "round"}, "mlp must be one of gated, plain, got 'round'"),
            ({"norm": "batch"}, "norm must be one of rms, layer, got 'batch'"),
        ],
    )
    def test_refuses(self, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            replace(SMALL, **changes)


class TestRunShape:
    def test_lengths_by_hand(self) -> None:
        layout = SHORT.layout
        assert SHORT.memory_size == 3
        assert layout.prompt_tokens == 10
        assert layout.trajectory_tokens == 25
        assert layout.cached_tokens == 26
        assert [layout.context_tokens(step) for step in range(2)] == [10, 18]
        assert [layout.block_tokens(step) for step in range(2)] == [6, 5]
        assert replace(SHORT, include_key_in_context=True).layout.trajectory_tokens == 25 + 2 * 3

    def test_reads_the_options(self, tmp_path: Path) -> None:
        config = tiny_config(tmp_path, activation_checkpointing=True, order_coef=0.5, beta=0.0, tokens_per_query=9)
        run = RunShape.from_config(config, weight_bits=32, lora_rank=4, on_cpu=True)
        assert (run.num_steps, run.memory_size, run.tokens_per_query) == (3, 4, 9)
        assert (run.generation_batch_size, run.training_batch_size, run.lora_rank) == (8, 4, 4)
        assert (run.activation_checkpointing, run.compute_order_gain, run.has_kl) == (True, True, False)
        assert run.optimizer_bytes_per_parameter == 8
        eight_bits = RunShape.from_config(tiny_config(tmp_path, optim="adamw_bnb_8bit"), weight_bits=4)
        assert eight_bits.optimizer_bytes_per_parameter == 2

    def test_separators_are_two_tokens_each_unless_given(self, tmp_path: Path) -> None:
        usual = RunShape.from_config(tiny_config(tmp_path), weight_bits=16)
        assert (usual.query_separator_tokens, usual.response_separator_tokens) == (2, 2)
        given = RunShape.from_config(tiny_config(tmp_path), weight_bits=16, separators=Separators((1, 2, 3), (4,)))
        assert (given.query_separator_tokens, given.response_separator_tokens) == (3, 1)
        assert given.layout.frame_tokens == 4

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"tokens_per_query": 0}, "tokens_per_query must be at least 1, got 0"),
            ({"logits_chunk_size": 0}, "logits_chunk_size must be at least 1, got 0"),
            ({"num_steps": 4}, r"num_steps must be in 1\.\.3, the pairs of a memory .*num_kv_pairs 4\), got 4"),
            ({"weight_bits": 8}, "weight_bits must be one of 4, 16, 32, got 8"),
        ],
    )
    def test_refuses(self, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            replace(SHORT, **changes)


@pytest.mark.parametrize("include_key", [False, True])
@pytest.mark.parametrize("num_kv_pairs", [2, 8, 13])
class TestShownKeys:
    def real(self, config: AttentionGuidedRLConfig, tokenizer: PreTrainedTokenizerFast) -> tuple[Layout, Separators]:
        separators = Separators.encode(PlainTextEncoder(tokenizer), config)
        return Layout.of(config, separators), separators

    @pytest.mark.parametrize("show_keys", ["none", "plain", "numbered", "[{number}]{key}\n", "{key}"])
    def test_a_plan_from_the_run_has_room_for_them(
        self, show_keys: str, num_kv_pairs: int, include_key: bool, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        sizes = {"num_kv_pairs": num_kv_pairs, "subset_fraction": 1.0, "num_steps": 1}
        config = tiny_config(tmp_path, show_keys=show_keys, include_key_in_context=include_key, **sizes)
        layout, separators = self.real(config, tokenizer)
        planned = RunShape.from_config(config, weight_bits=32, separators=separators).layout
        memory_size = num_kv_pairs - 1
        if show_keys in ("none", "plain"):
            assert planned.trajectory_tokens == layout.trajectory_tokens
        assert 0 <= planned.trajectory_tokens - layout.trajectory_tokens <= memory_size
        assert planned.cached_tokens - planned.trajectory_tokens == layout.cached_tokens - layout.trajectory_tokens
        without = RunShape.from_config(
            tiny_config(tmp_path, include_key_in_context=include_key, **sizes), weight_bits=32, separators=separators
        ).layout
        listed = 0 if show_keys == "none" else memory_size * config.tokens_per_key
        assert planned.trajectory_tokens - without.trajectory_tokens >= listed


@pytest.fixture(scope="module")
def gpt2_encoder() -> PlainTextEncoder:
    return PlainTextEncoder(gpt2())


@pytest.mark.parametrize("show_keys", ["none", "plain", "numbered"])
def test_a_plan_without_a_tokenizer_has_room_for_shown_keys(
    show_keys: str, tmp_path: Path, gpt2_encoder: PlainTextEncoder
) -> None:
    """As ``attention-rl plan`` makes it: from the options alone."""
    config = tiny_config(tmp_path, show_keys=show_keys, num_kv_pairs=13, subset_fraction=1.0)
    separators = Separators.encode(gpt2_encoder, config)
    assert (len(separators.query), len(separators.response)) == (2, 2)
    planned = RunShape.from_config(config, weight_bits=32).layout
    assert planned.trajectory_tokens >= Layout.of(config, separators).trajectory_tokens
