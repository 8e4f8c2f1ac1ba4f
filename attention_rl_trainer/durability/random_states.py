"""The states of the random number generators of a process: Python's, NumPy's, torch's, and the accelerator's."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def capture_random_states(device: torch.device) -> dict[str, Any]:
    """Read all states, as a tree that `save_tree` takes.

    Args:
        device: the accelerator whose generator is read beside the CPU's.
    """
    algorithm, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    states = {
        "python": random.getstate(),
        "numpy": (str(algorithm), torch.from_numpy(np.asarray(keys).copy()), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
    }
    if device.type != "cpu":
        states["accelerator"] = torch.get_device_module(device).get_rng_state()
    return states


def restore_random_states(states: dict[str, Any], device: torch.device) -> None:
    """Go back to states that `capture_random_states` read.

    Args:
        states: the states.
        device: the accelerator; where the states come from a machine without it, its generator stays as it is.
    """
    random.setstate(states["python"])
    algorithm, keys, position, has_gauss, gauss = states["numpy"]
    np.random.set_state((algorithm, keys.numpy(), position, has_gauss, gauss))
    torch.set_rng_state(states["torch"])
    if device.type != "cpu" and "accelerator" in states:
        torch.get_device_module(device).set_rng_state(states["accelerator"])
