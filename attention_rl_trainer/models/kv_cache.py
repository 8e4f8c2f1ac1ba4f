"""A key-value cache that is allocated ahead for whole trajectories and read through views of its rows (design §6).

transformers' own dynamic cache copies every layer's keys and values for each new token; a static one attends over its
whole length from the first token on. Here new tokens are written in place and the filled part is attended to. Policy
and reference own half of the rows each: read together they are one batch, and one is rolled back without the other.

On a CPU matrix products need contiguous memory, so attention runs over all places that are allocated
(`grouped_attention`). There the memory grows by pieces of some tokens: few places are empty, and few growths copy.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from attention_rl_trainer.models.causal_lm import input_embeddings
from attention_rl_trainer.models.projections import UnsupportedArchitectureError
from attention_rl_trainer.types import is_token

# Tokens by which a cache grows on a CPU: attention runs over the empty places too, and a growth copies the cache.
_PIECE_ON_CPU = 128

# Since transformers 5.24, before it, and before it where a recurrent state was kept too.
_CACHE_ARGUMENTS = ("cache", "past_key_values", "cache_params")


def cache_argument(backbone: nn.Module, model: nn.Module) -> str:
    """The name under which a backbone's forward takes its cache, which differs between releases of transformers.

    Args:
        model: the whole language model, which is asked where the backbone passes on whatever it is given.

    Raises:
        UnsupportedArchitectureError: neither takes a cache.
    """
    for module in (backbone, model):
        parameters = inspect.signature(module.forward).parameters
        for name in _CACHE_ARGUMENTS:
            if name in parameters:
                return name
    raise UnsupportedArchitectureError(
        f"{type(model).__name__} reads without a key-value cache: its forward takes none of "
        f"{', '.join(_CACHE_ARGUMENTS)}; use another base model"
    )


def keeps_every_token(model: PreTrainedModel) -> bool:
    """Whether every layer keeps all tokens' keys and values: none has a sliding window or a recurrent state."""
    layers = DynamicCache(config=model.config).layers
    return bool(layers) and all(type(layer) is DynamicLayer for layer in layers)


def new_cache(model: PreTrainedModel, num_rows: int, capacity: int, *, padded: bool = False) -> Cache:
    """Make an empty cache for ``capacity`` tokens per row, preallocated where every token is kept, as with padding."""
    if padded or keeps_every_token(model):
        return PreallocatedCache.of(model, num_rows, capacity, padded=padded)
    return DynamicCache(config=model.config)


class _Storage:
    """The memory of one layer: keys and values, ``[rows, G, places, D]`` each."""

    def __init__(self, num_rows: int, capacity: int, piece: int) -> None:
        self.num_rows = num_rows
        self.capacity = capacity
        self.piece = piece
        self.tensors: tuple[Tensor, Tensor] | None = None

    def with_places(self, length: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return the memory with places for ``length`` tokens; G, D, precision and device are those of the tokens."""
        if length > self.capacity:
            raise ValueError(f"the cache was made for {self.capacity} tokens, got {length}")
        if self.tensors is None or length > self.tensors[0].shape[2]:
            places = min(self.capacity, -(-length // self.piece) * self.piece)
            old_keys, old_values = self.tensors or (None, None)
            # One after the other: beside the new memory, the old one of one layer's keys or values.
            self.tensors = None
            new_keys = self._allocate(keys, places, old_keys)
            del old_keys
            self.tensors = new_keys, self._allocate(values, places, old_values)
        return self.tensors

    def _allocate(self, like: Tensor, places: int, old: Tensor | None) -> Tensor:
        # Zeros, because empty places are multiplied by 0, and what is left in memory may be infinite.
        new = like.new_zeros((self.num_rows, like.shape[1], places, like.shape[3]))
        if old is not None:
            new[:, :, : old.shape[2]] = old
        return new


class PreallocatedLayer(DynamicLayer):  # type: ignore[no-untyped-call]  # transformers' __init_subclass__ has no types
    """One layer of a `PreallocatedCache`."""

    def __init__(self, storage: _Storage, rows: slice, length: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # not annotated upstream
        self.storage = storage
        self.rows = rows
        self.length = length

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Note precision and device; the memory is the storage's, which all views share."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write new tokens, ``[rows, G, S, D]``, and return views of all, ``[rows, G, length, D]``."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.length + key_states.shape[2]
        keys, values = self.storage.with_places(end, key_states, value_states)
        keys[self.rows, :, self.length : end] = key_states
        values[self.rows, :, self.length : end] = value_states
        self.length = end
        return keys[self.rows, :, :end], values[self.rows, :, :end]

    def get_seq_length(self) -> int:
        """Return the number of tokens in the cache."""
        return self.length

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens; their number is negative, as transformers has it."""
        self.length -= abs(tokens_to_remove)

    def view(self, rows: slice) -> PreallocatedLayer:
        """Read the same memory at some of the rows, from the present length on."""
        return PreallocatedLayer(self.storage, rows, self.length)


class FixedLayer(PreallocatedLayer):  # type: ignore[no-untyped-call]  # as above
    """One layer read at a fixed number of places, its length on the device: as transformers' static cache is read.

    New tokens go to the place after ``device_length``, which the caller advances.
    """

    is_compileable = True

    def __init__(self, storage: _Storage, rows: slice, places: int, device_length: Tensor) -> None:
        super().__init__(storage, rows, places)
        self.device_length = device_length

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write one new token, ``[rows, G, 1, D]``, and return views of all places, ``[rows, G, places, D]``."""
        keys, values = self.storage.with_places(self.length, key_states, value_states)
        place = self.device_length.view(1)
        keys[self.rows].index_copy_(2, place, key_states)
        values[self.rows].index_copy_(2, place, value_states)
        return keys[self.rows, :, : self.length], values[self.rows, :, : self.length]

    def get_seq_length(self) -> Any:
        """Return the number of tokens in the cache, a number on the device."""
        return self.device_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the places that the mask is made for, and where they begin."""
        return self.length, 0


class PreallocatedCache(Cache):
    """Keys and values of at most ``capacity`` tokens in each of ``num_rows`` rows, one buffer of each for every layer.

    The memory grows by ``piece`` tokens; by default all of it is allocated at once.
    """

    def __init__(self, num_layers: int, num_rows: int, capacity: int, piece: int | None = None) -> None:
        storages = [_Storage(num_rows, capacity, piece or capacity) for _ in range(num_layers)]
        super().__init__(layers=[PreallocatedLayer(storage, slice(0, num_rows), 0) for storage in storages])
        self.are_tokens: Tensor | None = None
        """Which places hold a token and not padding, ``[num_rows, capacity]`` bool; ``None`` where all do."""

    @classmethod
    def of(cls, model: PreTrainedModel, num_rows: int, capacity: int, *, padded: bool = False) -> PreallocatedCache:
        """Make an empty cache for a model that keeps every token, or, with padding, whatever it keeps."""
        num_layers: int = model.config.get_text_config().num_hidden_layers
        device = input_embeddings(model).weight.device
        cache = cls(num_layers, num_rows, capacity, _PIECE_ON_CPU if device.type == "cpu" else None)
        if padded:
            cache.are_tokens = torch.zeros(num_rows, capacity, dtype=torch.bool, device=device)
        return cache

    def note(self, token_ids: Tensor) -> Tensor | None:
        """Note which of the tokens that come next are padding, ``[rows, S]``.

        Returns which places hold a token, these included, ``[rows, places]``; ``None`` where there is no padding.
        """
        if self.are_tokens is None:
            return None
        end = self.length + token_ids.shape[1]
        own = self.are_tokens[self._own_layers[0].rows]
        own[:, self.length : end] = is_token(token_ids)
        return own[:, :end]

    @property
    def _own_layers(self) -> list[PreallocatedLayer]:
        return cast(list[PreallocatedLayer], self.layers)

    @property
    def buffers(self) -> list[Tensor]:
        """The memory itself: keys and values of each layer that was written to, ``[num_rows, G, places, D]``."""
        return [tensor for layer in self._own_layers for tensor in layer.storage.tensors or ()]

    def view(self, rows: slice) -> PreallocatedCache:
        """Make a cache of some of the rows, over the same memory, with a length of its own."""
        cache = copy.copy(self)
        cache.layers = [layer.view(rows) for layer in self._own_layers]
        return cache

    def places(self, length: int, multiple: int) -> int:
        """Round a number of tokens up to a multiple, as far as there are places."""
        return min(self._own_layers[0].storage.capacity, -(-length // multiple) * multiple)

    def at_fixed_places(self, places: int, length: Tensor) -> PreallocatedCache:
        """Make a cache over the same memory that writes at a length on the device, and is read at all of some places.

        Tokens, positions and masks then have the same shapes whatever the length.
        """
        cache = copy.copy(self)
        cache.layers = [FixedLayer(layer.storage, layer.rows, places, length) for layer in self._own_layers]
        return cache

    @property
    def length(self) -> int:
        """Tokens in the cache. Setting it forgets those after it, or takes in those that another view wrote."""
        return self._own_layers[0].get_seq_length()

    @length.setter
    def length(self, length: int) -> None:
        for layer in self._own_layers:
            layer.length = length


def memory_bytes(cache: PreallocatedCache) -> int:
    """Bytes that a cache has allocated."""
    return sum(buffer.numel() * buffer.element_size() for buffer in cache.buffers)
