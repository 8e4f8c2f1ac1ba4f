"""The fenced blocks of README.md and of the pages, and the commands in them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
PAGES = (REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").glob("*.md")))


@dataclass(frozen=True)
class Block:
    """What stands between two fences."""

    page: str
    number: int
    """Of those of one language on its page, from 0."""
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.number}"


def blocks(language: str) -> list[Block]:
    """Every block of a language, by page and number."""
    found = []
    for page in PAGES:
        fenced = re.findall(r"^```([^\n]*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
        texts = [text for named, text in fenced if named == language]
        found += [Block(page.relative_to(REPOSITORY).as_posix(), number, text) for number, text in enumerate(texts)]
    return found


def commands() -> Iterator[tuple[str, list[str]]]:
    """Every command of the ``bash`` blocks, in words, with where it stands."""
    for block in blocks("bash"):
        for number, line in enumerate(block.text.replace("\\\n", " ").splitlines()):
            if words := shlex.split(line, comments=True):
                yield f"{block}.{number}", words
