"""What bitsandbytes adds, where it is installed: 8-bit Adam, and a base model of 4 bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_update_on_device import Resumption, expect_trained, trainer_on
from tiny import random_batch, tiny_llama
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import BitsAndBytesConfig, PreTrainedTokenizerFast

from attention_rl_trainer.models.adapters import add_adapter
from attention_rl_trainer.models.base import load_base_model
from attention_rl_trainer.models.projections import UnsupportedArchitectureError
from attention_rl_trainer.trainer import AttentionGuidedRLTrainer

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")


def test_adam_in_8_bits_trains(
    device: torch.device, dtype: torch.dtype, tmp_path: Path, texts: list[str], tokenizer: PreTrainedTokenizerFast
) -> None:
    # Tensors of fewer than 4096 numbers keep a state of 32 bits.
    model = tiny_llama(hidden_size=512, num_hidden_layers=1).to(dtype)
    trainer = trainer_on(device, tmp_path, texts, tokenizer, model=model, optim="adamw_bnb_8bit", learning_rate=1e-3)
    expect_trained(trainer)
    assert trainer.optimizer is not None
    kinds = {state["state1"].dtype for state in trainer.optimizer.state.values()}
    assert torch.uint8 in kinds


def test_a_run_with_adam_in_8_bits_resumes_exactly(
    device: torch.device, tmp_path: Path, texts: list[str], tokenizer: PreTrainedTokenizerFast
) -> None:
    def make_trainer(folder: Path, **options: Any) -> AttentionGuidedRLTrainer:
        model = tiny_llama(hidden_size=512, num_hidden_layers=1)
        return trainer_on(device, folder, texts, tokenizer, model=model, optim="adamw_bnb_8bit", **options)

    with sdpa_kernel(SDPBackend.MATH):
        Resumption(tmp_path, make_trainer).expect_exact()


def test_a_base_of_4_bits_trains_or_is_refused_on_a_cpu(
    device: torch.device, tmp_path: Path, texts: list[str], tokenizer: PreTrainedTokenizerFast
) -> None:
    folder = tmp_path / "model"
    # Scales stand for blocks of 64 weights of a row.
    tiny_llama(hidden_size=128, intermediate_size=128).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
    base = load_base_model(str(folder), dtype=torch.bfloat16, device=device, quantization_config=quantization)
    model = add_adapter(base, None)
    if device.type == "cpu":
        with pytest.raises(UnsupportedArchitectureError, match=r"in 4 bits on a CPU.*no gradient"):
            trainer_on(device, tmp_path, texts, tokenizer, model=model)
        return
    trainer = trainer_on(device, tmp_path, texts, tokenizer, model=model)
    expect_trained(trainer)
    assert trainer.policy.can_read_jointly
    trajectories = trainer.sampler.sample(random_batch(2, 4, 6, 6), range(2))
    assert trajectories.avg_reward.isfinite().all()
