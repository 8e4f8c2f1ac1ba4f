"""From the name of a file to its format."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Final

DUMP_FORMAT: Final = "MediaWiki dump"

_ENDINGS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r".\.(?:json|jsonl|ndjson)(?:\.gz)?$", re.IGNORECASE), "json"),
    (re.compile(r".\.parquet$", re.IGNORECASE), "parquet"),
    (re.compile(r".\.txt$", re.IGNORECASE), "text"),
    # Wikimedia cuts its large dumps into parts called after their first and last page: .xml-p1p41242.bz2.
    (re.compile(r".\.xml(?:-p\d+p\d+)?(?:\.bz2|\.gz)?$", re.IGNORECASE), DUMP_FORMAT),
)
_LISTS_OF_A_DUMP = re.compile(r"-(?:multistream-index\d*|md5sums|sha1sums)[^/]*\.txt(?:-p\d+p\d+)?", re.IGNORECASE)
KNOWN_FORMATS = (
    "Parquet (.parquet), JSON Lines (.jsonl, .json, .ndjson, each also with .gz), text (.txt, one article per file) "
    "and MediaWiki dumps (.xml, also with .bz2 or .gz, and their parts, .xml-p1p41242.bz2)"
)
_UNPACKED = ".7z, .zip and other archives are not read: unpack them first"
_NUM_NAMED_FILES = 5


def format_of(path: Path) -> str | None:
    """Recognize the format of a file by its name, or return None.

    The index and the checksums that Wikimedia puts beside a dump are texts, but no articles: None too.
    """
    if _LISTS_OF_A_DUMP.search(path.name):
        return None
    return next((kind for ending, kind in _ENDINGS if ending.search(path.name)), None)


def unknown_format(path: Path) -> ValueError:
    """Make the error for a file of another format."""
    return ValueError(f"{str(path)!r} is not of a known format; known are {KNOWN_FORMATS}. {_UNPACKED}.")


def no_known_format(folder: Path, unknown: Sequence[Path]) -> ValueError:
    """Make the error for a folder without any file of a known format, which names those that are there."""
    there = f"there are {_listed(folder, unknown)}" if unknown else "it is empty"
    return ValueError(
        f"The folder {str(folder)!r} holds no file of a known format, {there}; known are {KNOWN_FORMATS}. {_UNPACKED}."
    )


def warn_of_unknown(folder: Path, unknown: Sequence[Path]) -> None:
    """Name the files of a folder that are passed over because their format is not known."""
    if unknown:
        warnings.warn(
            f"{len(unknown)} files of the folder {str(folder)!r} are passed over, because their format is not known: "
            f"{_listed(folder, unknown)}. Known are {KNOWN_FORMATS}. {_UNPACKED}.",
            stacklevel=5,
        )


def _listed(folder: Path, files: Sequence[Path]) -> str:
    named = ", ".join(str(file.relative_to(folder)) for file in files[:_NUM_NAMED_FILES])
    return named + (f" and {len(files) - _NUM_NAMED_FILES} others" if len(files) > _NUM_NAMED_FILES else "")
