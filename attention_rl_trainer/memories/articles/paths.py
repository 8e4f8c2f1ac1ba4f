"""An existing path is that path: `datasets` takes some names of files and folders for patterns or for addresses."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path

from datasets.data_files import get_data_patterns, resolve_pattern
from huggingface_hub import metadata_load

_TAKEN_OTHERWISE = re.compile(r"[*?\[\x00-\x1f]|::")
_CARD, _CARD_OF_ITS_OWN = "README.md", ".huggingface.yaml"


def existing_path(name: str) -> Path | None:
    """Find the file or folder of a name, and return its absolute path; None if there is none.

    A leading ``~`` is the home folder where nothing is called so. An absolute path is neither the name of a format,
    such as a folder ``json``, nor an address, such as a file ``file:a.jsonl``.
    """
    for candidate in (name, os.path.expanduser(name)):
        if os.path.exists(candidate):
            return Path(candidate).absolute()
    return None


def are_taken_otherwise(paths: Iterable[Path]) -> bool:
    """Whether `datasets` would take one of these absolute paths for a pattern or a chained address."""
    return any(_TAKEN_OTHERWISE.search(str(path)) for path in paths)


def files_by_split(folder: Path, config_name: str | None) -> dict[str, list[Path]]:
    """Find the files of each split as `datasets` does by their names, in a folder whose own path it cannot take.

    Raises:
        ValueError: the folder has configurations, which `datasets` alone can read.
    """
    if config_name is not None or _declares_configurations(folder):
        raise ValueError(
            f"The folder {str(folder)!r} is to be read by a configuration, which cannot be done because its path looks "
            "like a pattern or an address; rename it, without any of * ? [ and ::."
        )
    with tempfile.TemporaryDirectory() as place:
        link = Path(place, "articles")
        link.symlink_to(folder, target_is_directory=True)
        by_split = get_data_patterns(str(link))
        return {
            str(split): [folder / file.relative_to(link) for pattern in patterns for file in _matching(pattern, link)]
            for split, patterns in by_split.items()
        }


def _matching(pattern: str, folder: Path) -> list[Path]:
    try:
        return [Path(file) for file in resolve_pattern(pattern, str(folder))]
    except FileNotFoundError:
        # A split has several patterns, of which one matches.
        return []


def _declares_configurations(folder: Path) -> bool:
    card = folder / _CARD
    return (folder / _CARD_OF_ITS_OWN).exists() or (card.is_file() and "configs" in (metadata_load(card) or {}))
