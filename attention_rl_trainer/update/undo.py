"""What optimizer steps change, as it was before them.

An update of several iterations takes its optimizer steps before it is known whether the next gradient is finite.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class OptimizerRestorePoint:
    """Copies of an optimizer's state and options, and of the tensors that change with a step."""

    def __init__(self, tensors: Iterable[Tensor], optimizer: torch.optim.Optimizer) -> None:
        self._tensors = [(tensor, tensor.detach().clone()) for tensor in tensors]
        self._optimizer = optimizer
        self._state: dict[Any, dict[str, tuple[Any, Any]]] = {
            parameter: {name: (value, _copy(value)) for name, value in state.items()}
            for parameter, state in optimizer.state.items()
        }
        self._options = [
            {name: _copy(value) for name, value in group.items() if name != "params"}
            for group in optimizer.param_groups
        ]

    @torch.no_grad()
    def restore(self) -> None:
        """Go back to the copies, in place."""
        for tensor, saved in self._tensors:
            tensor.copy_(saved)
        state = self._optimizer.state
        for parameter in [item for item in state if item not in self._state]:
            del state[parameter]
        for parameter, values in self._state.items():
            # In place: the 8-bit optimizers share and page tensors of their state.
            state[parameter] = {name: _restored(value, saved) for name, (value, saved) in values.items()}
        for group, options in zip(self._optimizer.param_groups, self._options, strict=True):
            group.update(options)


def _copy(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value)


def _restored(value: Any, saved: Any) -> Any:
    return value.copy_(saved) if isinstance(value, Tensor) else saved
