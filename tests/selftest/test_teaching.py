"""The base model of the self-test learns what it is taught."""

from __future__ import annotations

import torch

from attention_rl_trainer.selftest.teaching import lesson_learned, teach


def test_a_few_steps_teach_names_and_draws() -> None:
    before, after = (lesson_learned(teach(0, num_steps=count), 0) for count in (2, 30))
    assert before["drawn"] < 0.7 < 0.9 < after["drawn"] <= 1
    assert before["named"] < 0.3 < 0.7 < after["named"] <= 1
    # To look a value up takes many more steps; one of 64 symbols is guessed.
    assert before["copied"] < after["copied"] < 0.1


def test_teaching_is_seeded_and_leaves_the_global_stream_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = teach(1, num_steps=2)
    assert torch.equal(torch.rand(3), expected)
    again, other = teach(1, num_steps=2), teach(2, num_steps=2)
    weight = "model.embed_tokens.weight"
    assert torch.equal(first.state_dict()[weight], again.state_dict()[weight])
    assert not torch.equal(first.state_dict()[weight], other.state_dict()[weight])
    assert not first.training
