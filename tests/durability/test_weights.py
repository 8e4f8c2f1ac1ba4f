"""An adapter's files: the same bytes from every process, and no other weights than those that were saved."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from finished_run import copy_of
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from processes import build_trainer
from tiny import byte_level_tokenizer, tiny_llama, tiny_trainer

from attention_rl_trainer.durability.discovery import CheckpointError
from attention_rl_trainer.durability.weights import load_adapter, save_adapter


def test_other_weights_in_a_checkpoint_are_not_taken(finished: Path, tmp_path: Path) -> None:
    job = copy_of(finished, tmp_path)
    checkpoint = job.run / "checkpoint-4"
    tiny_llama().save_pretrained(checkpoint)
    shutil.copytree(job.run / "checkpoint-2", checkpoint / "second")
    build_trainer(job).train(resume_from_checkpoint=str(checkpoint))
    expected = (finished / "run" / "checkpoint-6" / "adapter_model.safetensors").read_bytes()
    assert (job.run / "checkpoint-6" / "adapter_model.safetensors").read_bytes() == expected
    assert not (job.run / "checkpoint-6" / "second").exists()


def test_an_adapter_of_another_shape_is_refused_and_nothing_is_loaded(tmp_path: Path) -> None:
    def adapter(rank: int, *modules: str) -> PeftModel:
        return get_peft_model(tiny_llama(), LoraConfig(r=rank, target_modules=list(modules), init_lora_weights=False))

    save_adapter(tmp_path, adapter(4, "q_proj", "k_proj"))
    names = "base_model.model.model.layers.0.self_attn.{}_proj.lora_A.weight".format
    for other, differing in ((adapter(8, "q_proj", "k_proj"), "k"), (adapter(4, "q_proj", "v_proj"), "v")):
        before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
        with pytest.raises(CheckpointError, match="does not fit the adapter; these tensors differ: ") as caught:
            load_adapter(tmp_path, other)
        assert names(differing) in str(caught.value)
        assert all(tensor.equal(before[name]) for name, tensor in other.state_dict().items())
    same, fresh = adapter(4, "q_proj", "k_proj"), adapter(4, "q_proj", "k_proj")
    save_adapter(tmp_path, same)
    load_adapter(tmp_path, fresh)
    assert all(tensor.equal(fresh.state_dict()[name]) for name, tensor in same.state_dict().items())


def test_sets_of_modules_are_written_in_order(texts: list[str], tmp_path: Path) -> None:
    """PEFT keeps them in sets, which each process orders differently."""
    config = LoraConfig(target_modules={"v_proj", "q_proj", "o_proj", "k_proj"}, exclude_modules={"c", "a", "lm_head"})
    trainer = tiny_trainer(tmp_path, texts, byte_level_tokenizer(texts), trainer_options={"peft_config": config})
    trainer.save_model()
    written = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert written["target_modules"] == ["k_proj", "o_proj", "q_proj", "v_proj"]
    assert written["exclude_modules"] == ["a", "c", "lm_head"]


def test_sets_of_other_kinds_too(texts: list[str], tmp_path: Path) -> None:
    config = IA3Config(target_modules={"v_proj", "k_proj", "down_proj"}, feedforward_modules={"down_proj"})
    trainer = tiny_trainer(tmp_path, texts, byte_level_tokenizer(texts), trainer_options={"peft_config": config})
    trainer.save_model()
    written = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert written["target_modules"] == ["down_proj", "k_proj", "v_proj"]
    assert written["feedforward_modules"] == ["down_proj"]
