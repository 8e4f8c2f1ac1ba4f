"""What rounding alone explains: two ways to the same states, by another kernel or in other shapes."""

from __future__ import annotations

import torch
from torch import Tensor

# Of the states' norm.
_TOLERANCE = {torch.float32: 1e-4}
_TOLERANCE_IF_NARROW = 0.03


def are_equal_states(found: Tensor, expected: Tensor) -> bool:
    """Whether states of one shape, in the precision of their model, differ by no more than rounding; not if NaN."""
    tolerance = _TOLERANCE.get(found.dtype, _TOLERANCE_IF_NARROW)
    difference = (found.float() - expected.float()).norm()
    return bool(difference <= tolerance * expected.float().norm())
