"""What one process does where there are no others, and how rows are shared; the rest is in `distributed`."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from attention_rl_trainer.processes import ALONE, Processes


@pytest.mark.parametrize(("rows", "count"), [(8, 2), (7, 2), (1, 2), (0, 3), (10, 4), (3, 4)])
def test_rows_are_shared_in_order_and_evenly(rows: int, count: int) -> None:
    shares = [Processes(index, count).share(rows) for index in range(count)]
    assert [row for share in shares for row in share] == list(range(rows))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    values = torch.arange(rows)
    assert torch.equal(torch.cat([Processes(index, count).own(values) for index in range(count)]), values)


def test_alone_everything_is_ones_own() -> None:
    parameter, without = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))
    parameter.grad = gradient = torch.tensor([1.0, 2.0])
    ALONE.sum_gradients([parameter, without])
    assert parameter.grad is gradient
    assert without.grad is None
    values = torch.tensor([3.0])
    assert ALONE.join_rows(values) is values
    assert ALONE.sum(values) is values
    assert ALONE.gather("a") == ["a"]
    assert ALONE.is_main


def test_alone_an_error_is_as_it_was() -> None:
    def fail() -> None:
        raise KeyError("a")

    with pytest.raises(KeyError, match="a"):
        ALONE.on_main(fail)
    assert ALONE.on_main(lambda: 3) == 3
