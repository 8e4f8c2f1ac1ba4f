"""The size of micro-batches, halved when memory runs out.

What is done with a micro-batch, and how an attempt is undone, is passed in. Knows nothing about models or losses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor, nn

T = TypeVar("T")
_MAX_HALVINGS = 3


def is_out_of_memory(error: Exception) -> bool:
    """Tell whether an error says that memory ran out, on a device or in main memory.

    Args:
        error: any error.
    """
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    # By its text alone: accelerate takes it for granted that an error's argument is a string.
    return isinstance(error, RuntimeError) and bool(should_reduce_batch_size(RuntimeError(str(error))))


class MicroBatchSize:
    """Trajectories in a micro-batch.

    Args:
        size: to begin with.

    Attributes:
        size: what is tried next.
        num_halvings: how often it was halved so far.
    """

    def __init__(self, size: int) -> None:
        self._configured = size
        self.size = size
        self.num_halvings = 0

    def state_dict(self) -> dict[str, int]:
        """Return the state as a JSON-able mapping."""
        return {"configured": self._configured, "size": self.size, "num_halvings": self.num_halvings}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on with what was found to fit, unless another size was configured since.

        Args:
            state: what `state_dict` returned.
        """
        if state["configured"] == self._configured:
            self.size, self.num_halvings = state["size"], state["num_halvings"]

    @property
    def can_be_halved(self) -> bool:
        """Whether less than the most halvings were done, and there is more than one trajectory."""
        return self.size > 1 and self.num_halvings < _MAX_HALVINGS

    def halve(self, num_rows: int) -> None:
        """Halve the size.

        Args:
            num_rows: trajectories that there were; where they were fewer than the size, they are what was too many.
        """
        self.size = max(1, min(self.size, num_rows) // 2)
        self.num_halvings += 1


def halve_until_it_fits(
    attempt: Callable[[int], T], size: MicroBatchSize, num_rows: int, undo: Callable[[], None]
) -> T:
    """Do something in micro-batches, and again in smaller ones when memory runs out.

    Args:
        attempt: does it in micro-batches of the given size.
        size: what is tried; keeps what was found to fit.
        num_rows: trajectories of the largest micro-batch that ``attempt`` could make.
        undo: takes back what a failed attempt has changed.

    Returns:
        What ``attempt`` returned.

    Raises:
        Exception: what ``attempt`` raised, if memory did not run out, or ran out after the last halving too.
    """
    while True:
        try:
            return attempt(size.size)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or not size.can_be_halved or num_rows < 2:
                raise
        # Only behind the clause is the error gone, and with its traceback the tensors of the attempt.
        size.halve(num_rows)
        undo()


class AccumulationStart:
    """The gradients and the random state before an accumulation.

    Args:
        parameters: what is trained.
        device: where the model lies.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], device: torch.device) -> None:
        self._device = device
        self._gradients: list[tuple[nn.Parameter, Tensor | None]] = [
            (parameter, None if parameter.grad is None else parameter.grad.clone()) for parameter in parameters
        ]
        self._random_state = torch.get_rng_state()
        self._device_random_state = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def restore(self) -> None:
        """Go back to them, and hand unused memory back to the device."""
        for parameter, gradient in self._gradients:
            # The next attempt adds to it in place.
            parameter.grad = None if gradient is None else gradient.clone()
        torch.set_rng_state(self._random_state)
        if self._device_random_state is not None:
            torch.cuda.set_rng_state(self._device_random_state, self._device)
            torch.cuda.empty_cache()
