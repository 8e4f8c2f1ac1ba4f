"""The previous adapter: what it copies, when it is swapped in, and that nothing else notices."""

from __future__ import annotations

import pytest
import torch
from tiny import adapted
from torch import nn
from transformers import PreTrainedModel

from attention_rl_trainer.update.previous_adapter import AdapterSnapshot


def test_swapping_in_gives_the_old_outputs_and_out_the_new(model: PreTrainedModel) -> None:
    peft_model, ids = adapted(model).eval(), torch.randint(1, 380, (2, 5))
    snapshot = AdapterSnapshot(peft_model)
    with torch.no_grad():
        old = peft_model(input_ids=ids).logits
        for parameter in peft_model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05)
        new = peft_model(input_ids=ids).logits
    with snapshot.swapped_in():
        assert not torch.is_grad_enabled()
        assert torch.equal(peft_model(input_ids=ids).logits, old)
    with torch.no_grad():
        assert torch.equal(peft_model(input_ids=ids).logits, new)
    assert not torch.equal(old, new)
    snapshot.refresh()
    with snapshot.swapped_in():
        assert torch.equal(peft_model(input_ids=ids).logits, new)


def test_only_adapter_tensors_are_copied(llama: PreTrainedModel) -> None:
    state = AdapterSnapshot(adapted(llama)).state_dict()
    assert len(state) == 16  # A and B of q, k, v, o in two layers
    assert all(".lora_" in name for name in state)


def test_the_copy_is_independent_and_comes_back_after_an_error(llama: PreTrainedModel) -> None:
    model = adapted(llama)
    snapshot = AdapterSnapshot(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(KeyboardInterrupt), snapshot.swapped_in():
        raise KeyboardInterrupt
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    pointers = {p.data_ptr() for p in model.parameters()}
    assert not pointers.intersection(copy.data_ptr() for copy in snapshot.state_dict().values())


def test_gradients_reach_the_present_parameters_after_a_swap(llama: PreTrainedModel) -> None:
    model, ids = adapted(llama), torch.randint(1, 380, (1, 5))
    snapshot = AdapterSnapshot(model)
    with snapshot.swapped_in():
        model(input_ids=ids)
    model(input_ids=ids).logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_state_round_trips(llama: PreTrainedModel) -> None:
    model = adapted(llama)
    snapshot, other = AdapterSnapshot(model), AdapterSnapshot(model)
    state = {name: torch.randn_like(tensor) for name, tensor in snapshot.state_dict().items()}
    other.load_state_dict(state)
    assert all(torch.equal(other.state_dict()[name], tensor) for name, tensor in state.items())
    assert not torch.equal(snapshot.state_dict()[name := next(iter(state))], state[name])


def test_unfitting_states_and_frozen_models_are_refused(llama: PreTrainedModel) -> None:
    model = adapted(llama)
    snapshot = AdapterSnapshot(model)
    state = dict(snapshot.state_dict())
    name = next(iter(state))
    with pytest.raises(ValueError, match="does not fit the model"):
        snapshot.load_state_dict({key: value for key, value in state.items() if key != name})
    with pytest.raises(ValueError, match="does not fit the model"):
        snapshot.load_state_dict(state | {name: torch.zeros(3, 3)})
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameter"):
        AdapterSnapshot(model)
    with pytest.raises(ValueError, match="no trainable parameter"):
        AdapterSnapshot(nn.ReLU())
