"""The states that a checkpoint keeps: what a part of a run offers, how it is written, and the random generators'.

A part is `Stateful`. A nested state, such as an optimizer's, becomes one safetensors file: tensors as they are, the
rest as JSON in its header. There is no pickle: reading such a file runs no code, whoever wrote it.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

_HEADER = "tree"
_SCALARS = (str, bool, int, type(None))


@runtime_checkable
class Stateful(Protocol):
    """A part of a run whose state a checkpoint keeps."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state."""

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        """Go back to what `state_dict` returned."""


class TreeError(ValueError):
    """A state that cannot be written without pickle, or a file that holds no state."""


def save_tree(path: Path, tree: Any) -> None:
    """Write a nested state; a tensor that occurs twice is stored once.

    Args:
        path: the file.
        tree: dicts (keys strings or integers), lists, tuples, tensors, numbers, strings, booleans and ``None``, nested
            in any way.

    Raises:
        TreeError: something else is in it; names the place.
    """
    tensors: dict[str, Tensor] = {}
    names: dict[int, str] = {}
    structure = _encode(tree, "", tensors, names)
    # safetensors refuses tensors that are parts of one storage, and those that are not contiguous.
    stored = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    save_file(stored, path, metadata={_HEADER: json.dumps(structure, allow_nan=False)})


def load_tree(path: Path) -> Any:
    """Read what `save_tree` wrote; tensors are on the CPU.

    Raises:
        TreeError: the file does not hold such a state; names it.
    """
    try:
        with safe_open(path, framework="pt") as file:
            structure = json.loads((file.metadata() or {})[_HEADER])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
            return _decode(structure, tensors)
    except (SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise TreeError(f"{path} does not hold a state that this library wrote: {error}") from error


def _encode(value: Any, place: str, tensors: dict[str, Tensor], names: dict[int, str]) -> Any:
    # Scalars stand for themselves; everything else is an object of one key, its kind.
    if isinstance(value, Tensor):
        # Places alone may be the same for different keys: "a.b", and "b" in "a".
        name = names.setdefault(id(value), f"{len(names)}{place}")
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, float) and not isinstance(value, _SCALARS):
        # JSON has no infinities; the shortest decimal of a float gives it back to the last bit.
        return float(value) if math.isfinite(value) else {"float": str(float(value))}
    # Exact types: a subclass, such as an enumeration, would come back as something else.
    if type(value) in _SCALARS:
        return value
    if type(value) in (list, tuple):
        kind = "list" if type(value) is list else "tuple"
        return {kind: [_encode(item, f"{place}.{number}", tensors, names) for number, item in enumerate(value)]}
    if isinstance(value, dict) and all(type(key) in (str, int) for key in value):
        return {"dict": [[key, _encode(item, f"{place}.{key}", tensors, names)] for key, item in value.items()]}
    raise TreeError(
        f"{place or 'the state'} is a {type(value).__name__}, which cannot be saved without pickle; states hold "
        "tensors, numbers, strings, lists, tuples and dicts"
    )


def _decode(structure: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(structure, dict):
        return structure
    ((kind, content),) = structure.items()
    match kind:
        case "tensor":
            return tensors[content]
        case "float":
            return float(content)
        case "list":
            return [_decode(item, tensors) for item in content]
        case "tuple":
            return tuple(_decode(item, tensors) for item in content)
        case "dict":
            return {key: _decode(item, tensors) for key, item in content}
    raise ValueError(f"unknown kind {kind!r}")


def capture_random_states(device: torch.device) -> dict[str, Any]:
    """Read the states of all random generators, the device's among them, as a tree that `save_tree` takes."""
    algorithm, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    states = {
        "python": random.getstate(),
        "numpy": (str(algorithm), torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
    }
    if device.type != "cpu":
        states["accelerator"] = torch.get_device_module(device).get_rng_state()
    return states


def restore_random_states(states: dict[str, Any], device: torch.device) -> None:
    """Go back to what `capture_random_states` read; a device that was not there then keeps its generator as it is."""
    random.setstate(states["python"])
    algorithm, keys, position, has_gauss, gauss = states["numpy"]
    np.random.set_state((algorithm, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(states["torch"])
    if device.type != "cpu" and "accelerator" in states:
        torch.get_device_module(device).set_rng_state(states["accelerator"])
