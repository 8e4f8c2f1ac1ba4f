"""From the name of a source to its memories: a game, the fact book, rows of a user's own, or articles.

What is made of articles is cut by the stream that reads them; of the others a row is a memory, `Entries`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from os import PathLike, fspath
from pathlib import Path
from typing import Final, TypeAlias, TypedDict

from attention_rl_trainer.memories.articles.formats import DUMP_FORMAT, format_of
from attention_rl_trainer.memories.articles.paths import existing_path
from attention_rl_trainer.memories.articles.sources import load_articles
from attention_rl_trainer.memories.articles.wikipedia import (
    OFFLINE,
    SCRIPT_WIKIPEDIA,
    WIKIPEDIA,
    ArticleTable,
)
from attention_rl_trainer.memories.games import TWENTY_QUESTIONS, game_entries, load_game
from attention_rl_trainer.memories.loading import ReadingOptions
from attention_rl_trainer.memories.tables import (
    FACTBOOK,
    EntriesTable,
    is_csv,
    load_factbook,
    load_grouped,
    take_split,
)

GAME: Final = "twenty_questions"
"""Name of the package's own game."""

HELD_OUT_SHARE: Final = 0.2
"""Share of the objects of a game, and of the countries of the fact book, that are the split "test"."""

Memories: TypeAlias = ArticleTable | EntriesTable

_TEXT_COLUMN = "text"
_FORMATS_OF_ARTICLES = (DUMP_FORMAT, "text")
_SEED = 0
_MIN_OBJECTS = 3
"""Of two, a fifth is none."""
_BEGINNING_OF_A_GAME = re.compile(rb'(?:\xef\xbb\xbf)?\s*\{\s*"(?:questions|objects)"\s*:\s*[\[{]')
_HEAD_BYTES = 4096


def load_memories(
    name_or_path: str | PathLike[str],
    *,
    key_column: str | None = None,
    value_column: str | None = None,
    group_column: str | None = None,
    config_name: str | None = None,
    split: str = "train",
    streaming: bool | None = None,
    text_column: str = _TEXT_COLUMN,
) -> Memories:
    """Open a source of memories.

    Args:
        name_or_path: `GAME` or ``"factbook"``, which come with the package and with its extra ``factbook``; the
            ``.json`` file of a game; with columns, a table of rows, see `load_grouped`; else articles, see
            `load_articles`. A file that is called like one of the names is written with ``./`` before it.
        key_column: column of the keys, such as questions.
        value_column: column of the values, such as answers.
        group_column: column that says which rows make a memory, such as a topic.
        config_name: configuration of a data set of the Hub.
        split: of a game and of the fact book "train", "test" (a fifth of the objects, of each category its share, or of
            the countries) or "train+test"; else a split of the source. Also a slice, "train[:100]": of memories, or
            of articles.
        streaming: of articles, as in `load_articles`. What is not articles is always read whole.
        text_column: column of the text of articles.

    Raises:
        ValueError: options that do not belong together; and what `load_game`, `load_grouped` and `load_articles` raise.
        ImportError: the fact book is asked for, and its wheel is not installed.
        FileNotFoundError: and what else `load_articles` raises.
    """
    # What is not a name is refused by `load_articles`.
    name = fspath(name_or_path) if isinstance(name_or_path, str | PathLike) else ""
    columns = {"key_column": key_column, "value_column": value_column, "group_column": group_column}
    articles = {"streaming": streaming or None, "text_column": None if text_column == _TEXT_COLUMN else text_column}
    path = existing_path(name)
    if name == FACTBOOK:
        _expect_unset(f"{name!r} has keys and values of its own", {**columns, **articles, "config_name": config_name})
        train, test = load_factbook().split_by_share(HELD_OUT_SHARE, _SEED)
        return take_split({"train": train, "test": test}, split)
    if name == GAME or (path is not None and is_game(path)):
        _expect_unset(
            f"{name!r} is a game, with keys and values of its own", {**columns, **articles, "config_name": config_name}
        )
        return _game(TWENTY_QUESTIONS if name == GAME or path is None else path, name, split)
    if name in (OFFLINE, WIKIPEDIA, SCRIPT_WIKIPEDIA) or (path is not None and format_of(path) in _FORMATS_OF_ARTICLES):
        _expect_unset(f"{name!r} holds articles, which are cut into keys and values", columns)
    elif any(column is not None for column in columns.values()):
        _expect_unset(f"{name!r} is read by key_column, value_column and group_column", articles)
        return load_grouped(name, key_column, value_column, group_column, config_name, split)
    elif path is not None and is_csv(path):
        raise ValueError(f"{name!r} is a table; say with key_column, value_column and group_column how it is read.")
    return load_articles(name_or_path, config_name, split, streaming, text_column)


class Columns(TypedDict):
    """Which columns are read."""

    key_column: str | None
    value_column: str | None
    group_column: str | None
    text_column: str


def columns_of(options: ReadingOptions) -> Columns:
    """Take the columns out of a run's options, as `load_memories` names them."""
    return Columns(
        key_column=options.dataset_key_column,
        value_column=options.dataset_value_column,
        group_column=options.dataset_group_column,
        text_column=options.dataset_text_column,
    )


def _game(path: Path, name: str, split: str) -> EntriesTable:
    game = load_game(path)
    if len(game.objects) < _MIN_OBJECTS:
        return take_split({"train": game_entries(game, name)}, split)
    train, test = game.split(HELD_OUT_SHARE, _SEED)
    return take_split({"train": game_entries(train, name), "test": game_entries(test, name)}, split)


def is_game(path: Path) -> bool:
    """Whether a file is to be read as that of a game: one JSON object that begins with its questions or its objects.

    JSON Lines whose first column is called so are not, since their first line is an object by itself, and not the last.
    """
    if path.suffix.lower() != ".json" or not path.is_file():
        return False
    with path.open("rb") as file:
        if _BEGINNING_OF_A_GAME.match(file.read(_HEAD_BYTES)) is None:
            return False
        file.seek(0)
        lines = (line for line in file if line.strip())
        first, second = next(lines, b""), next(lines, b"")
    try:
        json.loads(first.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return True
    return not second


def _expect_unset(what: str, options: Mapping[str, object]) -> None:
    given = [f"{name}={value!r}" for name, value in options.items() if value is not None]
    if given:
        raise ValueError(f"{what}; leave out {' and '.join(given)}.")
