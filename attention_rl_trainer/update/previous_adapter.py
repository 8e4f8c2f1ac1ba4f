"""The adapter as it was before the last update, which the KL penalty pulls towards (design §9)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class AdapterSnapshot:
    """A copy of a model's trainable parameters in preallocated tensors.

    A second PEFT adapter would be saved, pushed to the Hub and un-frozen by the trainer.

    Raises:
        ValueError: no parameter is trainable.
    """

    def __init__(self, model: nn.Module) -> None:
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not self._parameters:
            raise ValueError("the model has no trainable parameter; give it a LoRA adapter that is not frozen")
        self._copies = {name: p.detach().clone() for name, p in self._parameters.items()}

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the present parameters."""
        for name, parameter in self._parameters.items():
            self._copies[name].copy_(parameter)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Let the model compute with the copy, without gradients, while the context lasts."""
        current = {name: parameter.data for name, parameter in self._parameters.items()}
        try:
            for name, parameter in self._parameters.items():
                parameter.data = self._copies[name]
            with torch.no_grad():
                yield
        finally:
            for name, parameter in self._parameters.items():
                parameter.data = current[name]

    def state_dict(self) -> dict[str, Tensor]:
        """Return the copied tensors by parameter name."""
        return dict(self._copies)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy what `state_dict` returned.

        Raises:
            ValueError: names or shapes differ from the model's.
        """
        expected = {name: tuple(copy.shape) for name, copy in self._copies.items()}
        got = {name: tuple(tensor.shape) for name, tensor in state.items()}
        if expected != got:
            differing = sorted(name for name in expected | got if expected.get(name) != got.get(name))
            raise ValueError(
                "the previous adapter does not fit the model: these tensors are missing, unknown or of another shape: "
                f"{', '.join(differing[:5])}; use the adapter that it was saved with"
            )
        for name, tensor in state.items():
            self._copies[name].copy_(tensor)
