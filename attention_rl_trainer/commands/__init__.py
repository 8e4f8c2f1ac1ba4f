"""The commands of ``attention-rl``: each a module with a `main`, loaded when it is called."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence


def load_command(name: str) -> Callable[[Sequence[str]], int]:
    """Load the module of a command; returns its `main`, which takes flags and returns an exit code."""
    main: Callable[[Sequence[str]], int] = importlib.import_module(f"{__name__}.{name}").main
    return main
