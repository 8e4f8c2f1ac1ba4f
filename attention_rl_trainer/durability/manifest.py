"""The manifest of a checkpoint: size and SHA-256 of each of its files, written last.

A folder with a manifest was written to its end; a folder whose files agree with it is as it was written.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

MANIFEST_NAME = "manifest.json"
_FORMAT = 1


@dataclass(frozen=True, slots=True)
class Damage:
    """What is wrong with one file; as a string, a clause of a message."""

    path: Path
    fault: str

    def __str__(self) -> str:
        return f"{self.path} {self.fault}"


def write_manifest(folder: Path) -> None:
    """List all files of a folder, which are complete."""
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": _digest(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    text = json.dumps({"format": _FORMAT, "files": files}, indent=2) + "\n"
    (folder / MANIFEST_NAME).write_text(text, encoding="utf-8")


def find_damage(folder: Path) -> list[Damage]:
    """Compare a folder's files with its manifest; files that it does not list are not looked at: nothing reads them.

    Returns:
        What is wrong, in the order of the manifest; nothing if all is as it was written.
    """
    manifest = folder / MANIFEST_NAME
    if not manifest.is_file():
        return [Damage(manifest, "is missing")]
    try:
        content = json.loads(manifest.read_text(encoding="utf-8"))
        if content["format"] != _FORMAT:
            return [Damage(manifest, f"has format {content['format']!r}, this version reads {_FORMAT}")]
        expected = {
            folder / name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in content["files"].items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return [Damage(manifest, "is not a manifest")]
    # The folder's own path may have a ".." in it.
    outside = [path for path in expected if folder not in path.parents or ".." in path.relative_to(folder).parts]
    found = [Damage(path, "is outside of the checkpoint") for path in outside]
    for path, (size, digest) in expected.items():
        fault = None if path in outside else _fault_of(path, size, digest)
        if fault is not None:
            found.append(Damage(path, fault))
    return found


def _fault_of(path: Path, size: int, digest: str) -> str | None:
    try:
        if not path.is_file():
            return "is missing"
        actual = path.stat().st_size
        if actual != size:
            return f"has {actual} bytes, the manifest says {size}"
        return None if _digest(path) == digest else "does not have the content that the manifest says (SHA-256)"
    except OSError as error:
        return f"cannot be read: {error.strerror}"


def listed_files(folder: Path) -> list[str]:
    """Name the files, relative to a folder, that its manifest lists; `find_damage` found none in it."""
    return list(json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))["files"])


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
