"""What the processes of a run tell one another: every collective operation is here (design §10).

Each is called by all processes in the same order, whatever a process has rolled out or kept; with one process each
costs nothing. What the first process cannot do for all is raised in all, so that none waits for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist

T = TypeVar("T")


class LostProcessError(RuntimeError):
    """Another process of the run failed, or has ended."""


@dataclass(frozen=True)
class Processes:
    """The processes that train one model together, of which this one is number ``index`` of ``count``."""

    index: int = 0
    count: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process reads the articles and writes the files."""
        return self.index == 0

    def share(self, num_rows: int) -> range:
        """Rows of a batch that are this process's: as many for each as possible, in order."""
        return range(self.index * num_rows // self.count, (self.index + 1) * num_rows // self.count)

    def own(self, values: Tensor) -> Tensor:
        """Take this process's rows, see `share`."""
        rows = self.share(len(values))
        return values[rows.start : rows.stop]

    def gather(self, value: T) -> list[T]:
        """Return the values of all processes, in their order, to all of them."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        with _named_loss():
            dist.all_gather_object(values, value)
        return values

    def join_rows(self, values: Tensor) -> Tensor:
        """Return the rows of all processes, of which one may have none, in their order."""
        return values if self.count == 1 else torch.cat(self.gather(values.cpu())).to(values.device)

    def sum(self, value: Tensor) -> Tensor:
        """Return the sum over the processes."""
        return value if self.count == 1 else torch.stack(self.gather(value.cpu())).sum().to(value.device)

    def on_main(self, action: Callable[[], T]) -> T:
        """Return to all processes what the first one's action returns.

        Raises:
            Exception: on the first process, what the action raised.
            LostProcessError: on the others, where it raised something.
        """
        if self.count == 1:
            return action()
        outcome: list[Any] = [None, None]
        failed: BaseException | None = None
        if self.is_main:
            try:
                outcome[0] = action()
            except BaseException as error:  # told to the others, and raised again
                failed = error
                outcome[1] = f"{type(error).__name__}: {error}"
        with _named_loss():
            dist.broadcast_object_list(outcome, src=0)
        if failed is not None:
            raise failed
        if outcome[1] is not None:
            raise LostProcessError(f"the first process failed: {outcome[1]}")
        result: T = outcome[0]
        return result

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Add up the gradients of all processes, in place; a parameter that has none in any of them keeps none."""
        if self.count == 1:
            return
        parameters = list(parameters)
        dtype = torch.promote_types(torch.float32, parameters[0].dtype)
        present = torch.tensor([p.grad is not None for p in parameters], dtype=dtype, device=parameters[0].device)
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = torch.cat([present, *(gradient.to(dtype).flatten() for gradient in gradients)])
        with _named_loss():
            dist.all_reduce(flat)
        present, *totals = torch.split(flat, [len(parameters), *(p.numel() for p in parameters)])
        for parameter, has_any, total in zip(parameters, present.tolist(), totals, strict=True):
            if has_any:
                parameter.grad = total.view_as(parameter).to(parameter.dtype)


ALONE: Final = Processes()
"""A run of one process."""


class SharedBatches(Generic[T]):
    """Batches that the first process reads, given to all: what others use, they do not read.

    Args:
        batches: endless; iterated on the first process alone.
    """

    def __init__(self, batches: Iterable[T], processes: Processes) -> None:
        self._batches = batches
        self._processes = processes

    def __iter__(self) -> Iterator[T]:
        """Yield the batches."""
        iterator = iter(self._batches if self._processes.is_main else ())
        while True:
            yield self._processes.on_main(lambda: next(iterator))


@contextmanager
def _named_loss() -> Iterator[None]:
    """Say what it means that the others cannot be reached."""
    try:
        yield
    except RuntimeError as error:
        raise LostProcessError(
            "another process of the run has failed or has ended; its own message says why. What was written is whole: "
            "the run resumes from its newest checkpoint"
        ) from error
