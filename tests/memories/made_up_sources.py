"""Sources of articles, made up and written to files."""

from __future__ import annotations

import bz2
import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from xml.sax.saxutils import escape

import datasets


def numbered_rows(num_rows: int) -> list[dict[str, str]]:
    return [{"title": f"T{number}", "text": f"The text of page {number}."} for number in range(num_rows)]


ROWS = numbered_rows(30)


def page(title: str, text: str, namespace: int = 0, extra: str = "", model: str = "") -> str:
    return (
        f"<page><title>{escape(title)}</title><ns>{namespace}</ns><id>1</id>{extra}<revision><id>2</id>{model}"
        f'<text xml:space="preserve">{escape(text)}</text></revision></page>'
    )


def dump(*pages: str) -> str:
    head = '<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.11/"><siteinfo><sitename>T</sitename></siteinfo>'
    return f"{head}{''.join(pages)}</mediawiki>"


def dump_of_wiki(language: str, name: str, namespaces: dict[int, str], *pages: str) -> str:
    """A dump as a wiki in a language writes it, with the names of its namespaces."""
    names = "".join(f'<namespace key="{key}" case="first-letter">{n}</namespace>' for key, n in namespaces.items())
    return (
        f'<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.11/" xml:lang="{language}"><siteinfo><sitename>{name}'
        f"</sitename><namespaces>{names}</namespaces></siteinfo>{''.join(pages)}</mediawiki>"
    )


def numbered_dump(num_pages: int) -> str:
    """A dump of the same titles and texts as `numbered_rows`."""
    return dump(*(page(row["title"], row["text"]) for row in numbered_rows(num_pages)))


def write(path: Path, content: str | bytes) -> Path:
    """Write a text, compressed as the name says, or bytes as they are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
        return path
    opener = {".bz2": bz2.open, ".gz": gzip.open}.get(path.suffix, open)
    with opener(path, "wt", encoding="utf-8") as file:
        file.write(content)
    return path


def as_json_lines(path: Path, rows: Sequence[dict[str, str]] = ROWS) -> Path:
    return write(path, "".join(json.dumps(row) + "\n" for row in rows))


def as_parquet(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_list(ROWS).to_parquet(path)
    return path
