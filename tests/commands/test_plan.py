"""``attention-rl plan``."""

from __future__ import annotations

import re
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from tiny import VOCABULARY_SIZE
from transformers import GPT2Config

from attention_rl_trainer.commands.plan import main
from attention_rl_trainer.planning.footprint import GIBIBYTE, largest_batch
from attention_rl_trainer.planning.sizes import LLAMA_3_2_3B, ModelShape, RunShape


def printed(*arguments: str) -> str:
    stream = StringIO()
    assert main(arguments, Console(file=stream, width=160)) == 0
    return stream.getvalue()


class TestCommand:
    def test_the_recipe_fits_into_16_gb(self) -> None:
        text = printed("--config", "llama3.2_3b", "--gpu_memory_gib", "16")
        assert "3,212,749,824" in text
        assert "10,000 episodes" in text
        assert "fits: " in text
        run = RunShape(generation_batch_size=32, training_batch_size=4, activation_checkpointing=True)
        assert f"{largest_batch(LLAMA_3_2_3B, run, 15 * GIBIBYTE)}" in text

    def test_warns_where_it_does_not_fit(self) -> None:
        text = printed("--config", "llama3.2_3b", "--gpu_memory_gib", "8", "--price_per_hour", "0.5")
        assert "this run will probably not fit: its reading needs" in text
        assert re.search(r"│ price +│ \d+\.\d\d ", text)
        assert "fits: " in printed("--config", "llama3.2_3b", "--gpu_memory_gib", "8", "--load_in_4bit")

    def test_a_local_model(self, tmp_path: Path) -> None:
        GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=VOCABULARY_SIZE).save_pretrained(tmp_path)
        text = printed("--model_name_or_path", str(tmp_path), "--dtype", "float32")
        expected = ModelShape.from_config(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=VOCABULARY_SIZE))
        assert f"{expected.parameters:,}" in text

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--load_in_8bit"], "no plan for load_in_8bit; take load_in_4bit"),
            (["--dtype", "float8"], "dtype must be one of float32, float16, bfloat16, auto, got 'float8'"),
            (
                ["--model_name_or_path", "auto", "--gpu_memory_gib", "16"],
                "model_name_or_path is 'auto', which depends",
            ),
            (["--tflops", "0"], "tflops must be above 0 and finite, got 0.0"),
            (["--attained", "2"], r"attained must be in \(0, 1\], got 2.0"),
            (["--kept_fraction", "1.5"], r"kept_fraction must be in \[0, 1\], got 1.5"),
            (["--config", "no_such"], "--config no_such: there is no such file"),
        ],
    )
    def test_refuses(self, arguments: list[str], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            printed(*arguments)
