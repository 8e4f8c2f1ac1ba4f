"""What a run asks of a model is tried before the first episode, and refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import VOCABULARY_SIZE, adapted, checkpoint_activations, make_policy, tiny_llama
from tiny_families import build
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from attention_rl_trainer.memories.tokenization import allowed_token_ids
from attention_rl_trainer.models.policy import PolicyModel, PolicyOptions
from attention_rl_trainer.models.projections import UnsupportedArchitectureError
from attention_rl_trainer.models.trial import expect_trainable

ALLOWED = torch.arange(3, 300)


def policy_of(model: PreTrainedModel, config: LoraConfig | None = None, **options: Any) -> PolicyModel:
    peft_model = adapted(model) if config is None else get_peft_model(model, config)
    return PolicyModel(peft_model, ALLOWED, PolicyOptions(**options))


def test_what_is_tried_leaves_no_trace(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    policy = make_policy(model, tokenizer)
    policy.model.train()
    trained = [parameter for parameter in policy.model.parameters() if parameter.requires_grad]
    trained[0].grad = torch.ones_like(trained[0])
    before = {name: value.clone() for name, value in policy.model.state_dict().items()}
    random_state, modes = torch.get_rng_state(), [module.training for module in policy.model.modules()]
    expect_trainable(policy, through_choice=True)
    assert all(torch.equal(value, before[name]) for name, value in policy.model.state_dict().items())
    assert torch.equal(trained[0].grad, torch.ones_like(trained[0]))
    assert all(parameter.grad is None for parameter in trained[1:])
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [module.training for module in policy.model.modules()] == modes


@pytest.mark.parametrize("name", ["opt", "bart", "xglm", "biogpt", "trocr", "llama4_text", "nanochat", "afmoe", "beam"])
def test_wrappers_that_call_their_decoder_otherwise_work(name: str) -> None:
    expect_trainable(policy_of(build(name)), through_choice=True)


@pytest.mark.parametrize(
    ("name", "layer", "message"),
    [
        ("minimax+attention_last", -1, r"MiniMaxForCausalLM.*cannot be trained here: a step of a rollout fails: Value"),
        ("mllama", -1, r"MllamaForCausalLM.*cannot be trained here: a step of a rollout fails: AttributeError"),
        ("qwen4_exp", -1, r"Qwen4Exp.*cannot be trained here: embedding keys fails: IndexError"),
        ("moss_transcribe_diarize", -1, r"Moss.*cannot be trained here: embedding keys fails: the attention layer has"),
        ("gemma4_text+shared_kv", 3, r"layer 3 of Gemma4ForCausalLM.*set attention_layer to one that has: 0, 1"),
        ("gemma3n_text", 2, r"layer 2 of Gemma3nForCausalLM.*set attention_layer to one that has: 0, 1"),
        ("jamba", -1, r"layer -1 of JambaForCausalLM.*set attention_layer to one that has: 2"),
        ("granitemoehybrid", 0, r"layer 0 of GraniteMoeHybrid.*set attention_layer to one that has: 1"),
    ],
)
def test_what_does_not_work_is_refused_by_name(name: str, layer: int, message: str) -> None:
    with pytest.raises(UnsupportedArchitectureError, match=message):
        expect_trainable(policy_of(build(name), attention_layer=layer), through_choice=False)


# Upstream: torch says that no input of a checkpointed layer has a gradient.
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "opt", "gemma", "phi3", "gpt_neox"])
def test_a_choice_whose_gradient_checkpointing_drops_is_refused(name: str) -> None:
    policy = policy_of(build(name))
    checkpoint_activations(policy.model, reentrant=False)
    expect_trainable(policy, through_choice=True)
    checkpoint_activations(policy.model, reentrant=True)
    policy.causal_lm.enable_input_require_grads()
    expect_trainable(policy, through_choice=False)
    with pytest.raises(UnsupportedArchitectureError, match=r"query vectors carry no gradient.*'use_reentrant': False"):
        expect_trainable(policy, through_choice=True)


def test_an_update_without_any_gradient_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny_llama()
    model.model.unused = nn.Linear(32, 32)
    peft_model = get_peft_model(model, LoraConfig(target_modules=["unused"]))
    policy = PolicyModel(peft_model, allowed_token_ids(tokenizer, VOCABULARY_SIZE))
    with pytest.raises(UnsupportedArchitectureError, match=r"LlamaForCausalLM.*no trained weight has a gradient"):
        expect_trainable(policy, through_choice=False)


def test_a_choice_that_the_adapter_cannot_move_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    config = LoraConfig(target_modules=["o_proj"], layers_to_transform=[1])
    model = get_peft_model(tiny_llama(), config)
    policy = PolicyModel(model, allowed_token_ids(tokenizer, VOCABULARY_SIZE), PolicyOptions(attention_layer=1))
    expect_trainable(policy, through_choice=False)
    with pytest.raises(UnsupportedArchitectureError, match="the adapter changes nothing up to the attention_layer"):
        expect_trainable(policy, through_choice=True)


def test_a_lack_of_memory_is_not_taken_for_a_fault_of_the_model(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    policy = make_policy(llama, tokenizer)

    def fail(*arguments: Any) -> None:
        raise torch.OutOfMemoryError("out of memory")

    policy.causal_lm.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(torch.OutOfMemoryError):
        expect_trainable(policy, through_choice=False)
