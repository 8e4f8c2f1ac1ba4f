"""What chance says of a name: who is held out depends on a seed and on names, and on nothing else."""

from __future__ import annotations

import random


def draw(seed: int, name: str) -> float:
    """A number in [0, 1) for a name, on every machine the same, whatever else is drawn."""
    return random.Random(f"{seed} {name}").random()
