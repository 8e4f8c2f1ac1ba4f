"""A key-value cache that is allocated once for whole trajectories and read through views of its rows (design §6).

transformers' own dynamic cache copies every layer's keys and values for each new token; a static one attends over its
whole length from the first token on. Here new tokens are written in place and the filled part is attended to. Policy
and reference own half of the rows each: read together they are one batch, and one can be rolled back without the other.

Knows nothing about models beyond what transformers asks of a cache.
"""

from __future__ import annotations

import copy
from typing import Any, cast

from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer


def keeps_every_token(model: PreTrainedModel) -> bool:
    """Tell whether every layer of a model keeps all tokens' keys and values, so that its cache can be preallocated.

    Args:
        model: a causal language model; layers with sliding windows or recurrent states keep something else.
    """
    layers = DynamicCache(config=model.config).layers
    return bool(layers) and all(type(layer) is DynamicLayer for layer in layers)


class _Storage:
    """The memory of one layer: keys and values, ``[rows, G, capacity, D]`` each."""

    def __init__(self, num_rows: int, capacity: int) -> None:
        self.num_rows = num_rows
        self.capacity = capacity
        self._tensors: tuple[Tensor, Tensor] | None = None

    def tensors_like(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return the memory, allocated at the first call, when the shapes are known."""
        if self._tensors is None:
            key_shape, value_shape = list(keys.shape), list(values.shape)
            key_shape[0] = value_shape[0] = self.num_rows
            key_shape[2] = value_shape[2] = self.capacity
            self._tensors = keys.new_empty(key_shape), values.new_empty(value_shape)
        return self._tensors


class PreallocatedLayer(DynamicLayer):  # type: ignore[no-untyped-call]  # transformers' __init_subclass__ has no types
    """One layer of a `PreallocatedCache`."""

    def __init__(self, storage: _Storage, rows: slice, length: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # not annotated upstream
        self._storage = storage
        self._rows = rows
        self._length = length

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate the memory that all views share."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = self._storage.tensors_like(key_states, value_states)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write new tokens behind the present ones.

        Args:
            key_states: ``[rows, G, S, D]``.
            value_states: ``[rows, G, S, D]``.
            args: unused.
            kwargs: unused.

        Returns:
            Keys and values of all tokens so far, views of ``[rows, G, length, D]``.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys, values = self._storage.tensors_like(key_states, value_states)
        end = self._length + key_states.shape[2]
        if end > self._storage.capacity:
            raise ValueError(f"the cache was made for {self._storage.capacity} tokens, got {end}")
        keys[self._rows, :, self._length : end] = key_states
        values[self._rows, :, self._length : end] = value_states
        self._length = end
        return keys[self._rows, :, :end], values[self._rows, :, :end]

    def get_seq_length(self) -> int:
        """Return the number of tokens in the cache."""
        return self._length

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens.

        Args:
            tokens_to_remove: their number, negative as transformers has it.
        """
        self._length -= abs(tokens_to_remove)

    def view(self, rows: slice) -> PreallocatedLayer:
        """Read the same memory at some of the rows, from the present length on."""
        return PreallocatedLayer(self._storage, rows, self._length)


class PreallocatedCache(Cache):
    """Keys and values of at most ``capacity`` tokens in ``num_rows`` rows, in one piece of memory for each layer.

    Args:
        num_layers: layers of the model.
        num_rows: rows.
        capacity: tokens in a row.
    """

    def __init__(self, num_layers: int, num_rows: int, capacity: int) -> None:
        storages = [_Storage(num_rows, capacity) for _ in range(num_layers)]
        super().__init__(layers=[PreallocatedLayer(storage, slice(0, num_rows), 0) for storage in storages])

    @property
    def _own_layers(self) -> list[PreallocatedLayer]:
        return cast(list[PreallocatedLayer], self.layers)

    def view(self, rows: slice) -> PreallocatedCache:
        """Make a cache of some of the rows, over the same memory, with a length of its own.

        Args:
            rows: which.
        """
        cache = copy.copy(self)
        cache.layers = [layer.view(rows) for layer in self._own_layers]
        return cache

    @property
    def length(self) -> int:
        """Tokens in the cache. Setting it forgets those behind, or takes in those that another view wrote."""
        return self._own_layers[0].get_seq_length()

    @length.setter
    def length(self, length: int) -> None:
        for layer in self._own_layers:
            layer._length = length


def memory_bytes(cache: PreallocatedCache) -> int:
    """Bytes that a cache has allocated.

    Args:
        cache: a cache that was written to.
    """
    tensors = [tensor for layer in cache._own_layers for tensor in layer._storage._tensors or ()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
