"""Optimizer steps taken back: what follows is as if they had never been."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from attention_rl_trainer.update.undo import OptimizerRestorePoint

Build = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


def adam(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.1)


def adam_8bit(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(parameters, lr=0.1)


def momentum(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def step(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, seed: int) -> None:
    parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
    optimizer.step()


@pytest.mark.parametrize("build", [adam, adam_8bit, momentum])
@pytest.mark.parametrize("num_before", [0, 2])
def test_a_step_is_taken_back(build: Build, num_before: int) -> None:
    def run(*, with_detour: bool) -> tuple[torch.Tensor, object]:
        parameter = nn.Parameter(torch.linspace(-1, 1, 8192).view(64, 128))
        optimizer = build([parameter])
        for seed in range(num_before):
            step(optimizer, parameter, seed)
        if with_detour:
            before = parameter.detach().clone()
            state_before = copy.deepcopy(optimizer.state_dict())
            point = OptimizerRestorePoint([parameter], optimizer)
            optimizer.param_groups[0]["lr"] = 0.7
            for seed in (10, 11):
                step(optimizer, parameter, seed)
            assert not torch.equal(parameter, before)
            point.restore()
            assert torch.equal(parameter, before)
            assert repr(optimizer.state_dict()) == repr(state_before)
        step(optimizer, parameter, 20)
        return parameter.detach(), optimizer.state_dict()

    (expected, expected_state), (got, state) = run(with_detour=False), run(with_detour=True)
    assert torch.equal(got, expected)
    assert repr(state) == repr(expected_state)
