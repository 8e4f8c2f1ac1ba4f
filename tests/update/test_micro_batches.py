"""Halving micro-batches: how often, to what, and what is undone in between."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from attention_rl_trainer.update.micro_batches import (
    AccumulationStart,
    MicroBatchSize,
    halve_until_it_fits,
    is_out_of_memory,
)


class Attempts:
    """Runs out of memory for more rows than fit."""

    def __init__(self, max_rows: int, error: Exception | None = None) -> None:
        self.max_rows = max_rows
        self.error = error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        self.events: list[int | str] = []

    def __call__(self, size: int) -> int:
        self.events.append(size)
        if size > self.max_rows:
            raise self.error
        return 10 * size

    def undo(self) -> None:
        self.events.append("undo")


def test_halves_until_it_fits_and_keeps_the_size() -> None:
    size, attempts = MicroBatchSize(16), Attempts(5)
    assert halve_until_it_fits(attempts, size, 64, attempts.undo) == 40
    assert attempts.events == [16, "undo", 8, "undo", 4]
    assert (size.size, size.num_halvings) == (4, 2)
    assert halve_until_it_fits(attempts, size, 64, attempts.undo) == 40
    assert attempts.events[5:] == [4]


def test_what_was_too_many_is_halved() -> None:
    size, attempts = MicroBatchSize(64), Attempts(5)
    halve_until_it_fits(attempts, size, 7, attempts.undo)
    assert attempts.events == [64, "undo", 3]


@pytest.mark.parametrize(
    ("first", "num_rows", "tried"), [(64, 64, [64, 32, 16, 8]), (3, 3, [3, 1]), (1, 9, [1]), (8, 1, [8])]
)
def test_gives_up(first: int, num_rows: int, tried: list[int]) -> None:
    size, attempts = MicroBatchSize(first), Attempts(0)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        halve_until_it_fits(attempts, size, num_rows, attempts.undo)
    assert caught.value is attempts.error
    assert [event for event in attempts.events if event != "undo"] == tried


def test_three_halvings_of_a_run_in_all() -> None:
    size = MicroBatchSize(64)
    for max_rows in (32, 16, 8):
        halve_until_it_fits(Attempts(max_rows), size, 64, lambda: None)
    with pytest.raises(torch.OutOfMemoryError):
        halve_until_it_fits(Attempts(4), size, 64, lambda: None)
    assert size.size == 8


def test_other_errors_pass() -> None:
    error = RuntimeError("shapes cannot be multiplied")
    attempts = Attempts(0, error)
    with pytest.raises(RuntimeError) as caught:
        halve_until_it_fits(attempts, MicroBatchSize(8), 8, attempts.undo)
    assert caught.value is error
    assert attempts.events == [8]


def allocation_error() -> Exception:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50, dtype=torch.uint8)
    return caught.value


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("whatever it says"), True),
        (MemoryError(), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"), True),
        (RuntimeError("CUDA error: device-side assert triggered"), False),
        (RuntimeError(7), False),
        (RuntimeError(), False),
        (ValueError("CUDA out of memory. Tried to allocate"), False),
    ],
)
def test_is_out_of_memory(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


def test_the_allocator_of_main_memory_is_known() -> None:
    assert is_out_of_memory(allocation_error())


def test_gradients_and_random_state_are_restored_more_than_once() -> None:
    with_gradient, without = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2))
    with_gradient.grad = torch.tensor([1.0, 2.0, 3.0])
    start = AccumulationStart([with_gradient, without], torch.device("cpu"))
    drawn = torch.rand(4)
    for _ in range(2):
        with_gradient.grad.add_(5)
        without.grad = torch.ones(2)
        start.restore()
        assert with_gradient.grad.tolist() == [1.0, 2.0, 3.0]
        assert without.grad is None
        assert torch.equal(torch.rand(4), drawn)
