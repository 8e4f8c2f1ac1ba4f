"""Which code, device, driver and versions there are, as one line of JSON; imports nothing but torch.

python tests/benchmarks/gpu_facts.py
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
# What is measured, and what measures it.
_FOLDERS = ("attention_rl_trainer", "tests/benchmarks", "tests/gpu")
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


def _object_id(kind: bytes, content: bytes) -> str:
    return hashlib.sha1(b"%b %d\0%b" % (kind, len(content), content), usedforsecurity=False).hexdigest()


_EMPTY = _object_id(b"tree", b"")


def tree(folder: Path) -> str:
    """The id that git gives a folder's content, so that any clone finds its commit: ``git rev-parse COMMIT:FOLDER``."""
    entries = []
    for path in folder.iterdir():
        if path.is_dir() and path.name != "__pycache__":
            inside = tree(path)
            # Git knows no empty folders.
            entries += [(path.name + "/", b"40000", path.name, inside)] if inside != _EMPTY else []
        elif path.is_file():
            mode = b"100755" if path.stat().st_mode & 0o100 else b"100644"
            entries.append((path.name, mode, path.name, _object_id(b"blob", path.read_bytes())))
    # Git sorts a folder as if its name ended with a slash.
    listed = [b"%b %b\0%b" % (mode, name.encode(), bytes.fromhex(found)) for _, mode, name, found in sorted(entries)]
    return _object_id(b"tree", b"".join(listed))


def present_commit(root: Path = ROOT) -> str | None:
    """The commit that the code is at, with "+changes" where it differs from it.

    ATTENTION_RL_COMMIT comes before what git has checked out, and is all there is without git. Neither is believed
    where git can tell: a copy may hold newer code than its git knows of.
    """
    named = os.environ.get("ATTENTION_RL_COMMIT") or _ask_git(root, "HEAD")
    if named is None:
        return None
    differs = False
    for folder in _FOLDERS:
        expected = _ask_git(root, f"{named}:{folder}")
        differs |= expected is not None and expected != tree(root / folder)
    return named + ("+changes" if differs else "")


def _ask_git(root: Path, name: str) -> str | None:
    """What git calls an object, ``None`` where it does not know it."""
    command = ["git", "rev-parse", "--verify", "--quiet", name]
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def facts() -> dict[str, Any]:
    """Collect them; ``card`` is ``None`` where there is no CUDA GPU."""
    has_cuda = torch.cuda.is_available()
    properties = torch.cuda.get_device_properties(0) if has_cuda else None
    return {
        "commit": present_commit(),
        "trees": {folder: tree(ROOT / folder) for folder in _FOLDERS},
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
