"""Which device, driver and versions there are, as one line of JSON; imports nothing but torch.

python tests/benchmarks/gpu_facts.py
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
from typing import Any

import torch
from harness import commit

_PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes")


def version(package: str) -> str | None:
    """Version of a package, ``None`` where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def driver() -> str | None:
    """Version of the NVIDIA driver, ``None`` where nvidia-smi does not say."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else None


def present_commit() -> str | None:
    """The commit that is checked out; without git, what ATTENTION_RL_COMMIT says."""
    given = os.environ.get("ATTENTION_RL_COMMIT")
    if given:
        return given
    try:
        return commit()
    except (OSError, subprocess.SubprocessError):
        return None


def facts() -> dict[str, Any]:
    """Collect them; ``card`` is ``None`` where there is no CUDA GPU."""
    has_cuda = torch.cuda.is_available()
    properties = torch.cuda.get_device_properties(0) if has_cuda else None
    return {
        "commit": present_commit(),
        "card": properties.name if properties else None,
        "memory_gib": round(properties.total_memory / 2**30, 2) if properties else None,
        "free_gib": round(torch.cuda.mem_get_info(0)[0] / 2**30, 2) if has_cuda else None,
        "driver": driver(),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in _PACKAGES},
    }


if __name__ == "__main__":
    print(json.dumps(facts()))
