"""The modes of a model: reading without gradients, and the update without randomness."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import adapted, checkpoint_activations
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from attention_rl_trainer.models.attention import find_decoder_layers
from attention_rl_trainer.models.modes import deterministic_inference, update_mode

SIZES: dict[str, Any] = {"vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
EXPERTS: dict[str, Any] = SIZES | {"num_key_value_heads": 2, "intermediate_size": 32, "num_local_experts": 4}


def test_inference_mode_is_restored(llama: PreTrainedModel) -> None:
    model = adapted(llama).train()
    with deterministic_inference(model):
        assert not model.training
        assert not torch.is_grad_enabled()
    assert model.training
    assert torch.is_grad_enabled()


def test_dropout_is_zero_inside_and_restored_after(model: PreTrainedModel) -> None:
    peft_model = adapted(model).train()
    ids = torch.randint(1, 380, (2, 8))

    def forward() -> Tensor:
        return peft_model(input_ids=ids).logits

    with torch.no_grad():
        assert not torch.equal(forward(), forward())
        with update_mode(peft_model):
            inside = forward()
            assert torch.equal(inside, forward())
        assert not torch.equal(forward(), forward())
        peft_model.eval()
        torch.testing.assert_close(inside, forward())
    assert any(isinstance(m, nn.Dropout) and m.p == 0.05 for m in peft_model.modules())


# What makes the forward of a family random in train mode, beside `nn.Dropout`.
RANDOM_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "attention dropout": ("llama", SIZES | {"num_key_value_heads": 2, "attention_dropout": 0.5}),
    "dropout of hidden states": ("opt", SIZES | {"ffn_dim": 32, "word_embed_proj_dim": 32, "dropout": 0.5}),
    "layers left out": ("opt", SIZES | {"ffn_dim": 32, "word_embed_proj_dim": 32, "dropout": 0.0, "layerdrop": 0.5}),
    "layers left out, biogpt": ("biogpt", SIZES | {"intermediate_size": 32, "layerdrop": 0.5}),
    "router jitter": ("mixtral", EXPERTS | {"router_jitter_noise": 0.3}),
    "router jitter, minimax": ("minimax", EXPERTS | {"router_jitter_noise": 0.3, "head_dim": 8}),
    "experts drawn": ("phimoe", EXPERTS | {"router_jitter_noise": 0.3, "input_jitter_noise": 0.3}),
}


def build_random(name: str) -> PreTrainedModel:
    family, options = RANDOM_FAMILIES[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **options))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2)
    return adapted(model).train()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", RANDOM_FAMILIES)
def test_the_update_computes_as_in_evaluation_mode(name: str, checkpointing: bool) -> None:
    model, ids = build_random(name), torch.randint(3, 380, (2, 12))
    if checkpointing:
        checkpoint_activations(model)
    modes = [module.training for module in model.modules()]
    calls: list[nn.Module] = []
    for layer in find_decoder_layers(model.get_base_model()):
        projection = next(module for module in layer.modules() if isinstance(module, nn.Linear))
        projection.register_forward_hook(lambda module, arguments, output: calls.append(module))
    with torch.no_grad():
        assert not torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)
        model.eval()
        expected = model(input_ids=ids).logits
        model.train()
    calls.clear()
    with update_mode(model):
        logits = model(input_ids=ids, use_cache=False).logits
        logits.sum().backward()
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-4)
    assert len(calls) == (4 if checkpointing else 2)  # layers, run again in the backward
    assert [module.training for module in model.modules()] == modes


def test_the_adapters_own_dropout_is_the_only_one_that_can_act() -> None:
    model, ids = build_random("dropout of hidden states"), torch.randint(3, 380, (2, 12))
    dropouts = {name: module for name, module in model.named_modules() if isinstance(module, nn.Dropout)}
    with update_mode(model, adapter_dropout=True), torch.no_grad():
        assert {name for name, module in dropouts.items() if module.training} == {
            name for name in dropouts if "lora_dropout" in name
        }
        assert not torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)
        for module in dropouts.values():
            module.p = 0.0
        assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)
