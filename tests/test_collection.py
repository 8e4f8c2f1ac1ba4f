"""The names of tests: two workers that collect at different times must see the same ones."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest


def collect(hash_seed: str) -> list[str]:
    """List the tests of the whole suite, slow ones included, as a process of its own sees them."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "--quiet", "-m", "slow or not slow"]
    environment = os.environ | {"PYTHONHASHSEED": hash_seed, "PYTEST_ADDOPTS": ""}
    root = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=True)
    return [line for line in done.stdout.splitlines() if "::" in line]


@pytest.mark.slow
def test_names_depend_neither_on_the_time_nor_on_the_hash_seed() -> None:
    first, second = collect("1"), time.time() // 1
    while time.time() // 1 == second:
        time.sleep(0.05)
    assert len(first) > 1000
    assert collect("2") == first
