"""From the name of a source to a table of articles: the embedded dump, the Hub, or files of this machine (design §3).

A table has a column of text, and a column ``title`` where the source has titles; of a MediaWiki dump and of a damaged
file it also has ``skip_reason``, which says why a row is not an article. What cannot be read of a damaged file is a row
with a reason and is named in a warning; the rest is used.
"""

from __future__ import annotations

import hashlib
import inspect
import logging
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from os import PathLike, fspath
from pathlib import Path

import datasets
import pyarrow as pa

from attention_rl_trainer.hub import HubUnreachableError, expect_writable_cache
from attention_rl_trainer.memories.articles import (
    arguments,
    brackets,
    dumps,
    files,
    languages,
    leftovers,
    literal,
    markup,
    measures,
    sites,
    tags,
    template_names,
    templates,
)
from attention_rl_trainer.memories.articles.formats import (
    DUMP_FORMAT,
    format_of,
    no_known_format,
    unknown_format,
    warn_of_unknown,
)
from attention_rl_trainer.memories.articles.paths import are_taken_otherwise, existing_path, files_by_split
from attention_rl_trainer.memories.articles.wikipedia import (
    OFFLINE,
    SCRIPT_WIKIPEDIA,
    WIKIPEDIA,
    ArticleTable,
    embedded_dump,
    load_dataset,
    load_from_hub,
    script_error,
)

MAX_CACHED_DUMP_BYTES = 256 * 2**20
"""A MediaWiki dump larger than this streams by default: to read all of it first would take hours."""

_DUMP_SPLIT = "train"
_RULES = (
    arguments, brackets, dumps, files, languages, leftovers, literal, markup, measures, sites, tags, template_names,
    templates,
)  # fmt: skip
"""Modules on which the rows of a dump depend."""
_LIBRARY_FILES = frozenset({"README.md", "dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json"})
_HUB_NAME = re.compile(r"[\w-][\w.-]*(?:/[\w-][\w.-]*)?", re.ASCII)
_BREAKS = frozenset({dumps.BROKEN_DUMP, files.BROKEN_ROW, files.BROKEN_FILE})
_NUM_NAMED_BREAKS = 10
_NO_SLICE_OF_A_STREAM = (
    "The split {split!r} is a slice, which a streamed file cannot give; leave streaming out, or take {name!r} and use "
    ".skip() and .take()."
)

_logger = logging.getLogger(__name__)


def load_articles(
    name_or_path: str | PathLike[str],
    config_name: str | None = None,
    split: str = "train",
    streaming: bool | None = None,
    text_column: str = "text",
) -> ArticleTable:
    """Open a source of articles.

    Args:
        name_or_path: ``"offline"`` for the articles that come with the ``offline`` extra, a data set of the Hub such as
            ``"wikimedia/wikipedia"``, or a file or folder (Parquet, JSON Lines, text, MediaWiki dump), whatever signs
            are in its name. One that is called like one of these names is written with ``./`` before it.
        config_name: configuration of a data set of the Hub, or of a folder laid out as one; for Wikipedia by default
            ``"20231101.en"``.
        split: a split, or a slice of it such as ``"train[:60]"`` (of rows, those without an article included). A single
            file is the split that is asked for.
        streaming: read while iterating instead of preparing the whole source first; by default yes for Wikipedia on
            the Hub and for a dump of more than `MAX_CACHED_DUMP_BYTES`, else no.

    Returns:
        A table with ``text_column``, and ``title`` where the source has titles; its ``info.dataset_name`` is
        ``name_or_path``. The rows of a MediaWiki dump also have ``skip_reason``: "" for an article, else a reason of
        `dumps.article_row` or "broken_dump", and an empty text; and ``lost_templates``, see `dumps.ArticleRow`. What
        stands for an unreadable part of another file has a ``skip_reason`` too: "broken_row" for each line or row,
        "broken_file" for the rest of a file. Of a damaged file the columns ``title`` and ``text_column`` are read alone
        unless it streams.

    Raises:
        FileNotFoundError: there is no such file or folder, nor a data set of that name on the Hub.
        HubUnreachableError: the source is on the Hub, not in the local cache, and the Hub cannot be reached.
        ImportError: ``"offline"`` is asked for, and gensim's wheel is not installed.
        UnwritableCacheError: the cache folder cannot be written.
        BrokenDumpError: a MediaWiki dump holds no page that can be read.
        ValueError: the name is empty, the format is not known, or the data set is made by a script, or has no such
            column or split, or no row of it can be read.

    Warns:
        UserWarning: a folder holds files of an unknown format, which are passed over and named; or part of a file
            cannot be read: names the file, the place and what is wrong. Where the source streams, the latter is logged
            instead, when the place is reached.
    """
    name = _checked_name(name_or_path, split)
    # What streams has its locks there.
    expect_writable_cache(datasets.config.HF_DATASETS_CACHE, "HF_DATASETS_CACHE")
    if name == OFFLINE:
        _check_no_config(name, config_name)
        table = _load_dumps([embedded_dump()], split, streaming)
    elif name not in (WIKIPEDIA, SCRIPT_WIKIPEDIA) and (path := existing_path(name)) is not None:
        table = _load_path(path, config_name, split, streaming, text_column)
    else:
        _check_hub_name(name)
        table = load_from_hub(name, config_name, split, streaming)
    _check_columns(table, name, text_column)
    # A reader of files calls its data sets after itself ("generator", "json").
    table.info.dataset_name = name
    return table


def _checked_name(name_or_path: object, split: str) -> str:
    name = fspath(name_or_path) if isinstance(name_or_path, PathLike) else name_or_path
    if not isinstance(name, str) or not name.strip():
        raise ValueError(
            f"A source of articles is named by {OFFLINE!r}, a file or folder, or a data set of the Hub such as "
            f"{WIKIPEDIA!r}; got {name!r}. The current folder is '.'."
        )
    if not _split_name(split):
        raise ValueError(f"A split is a name such as 'train', or a slice such as 'train[:60]'; got {split!r}.")
    return name


def _check_no_config(name: str, config_name: str | None) -> None:
    if config_name is not None:
        raise ValueError(f"{name!r} has no configurations; got config_name={config_name!r}, leave it out.")


def _load_path(
    path: Path, config_name: str | None, split: str, streaming: bool | None, text_column: str
) -> ArticleTable:
    if path.suffix == ".py" or (path / f"{path.name}.py").is_file():
        raise script_error(str(path))
    paths, kind = _files_of_folder(path, split) if path.is_dir() else ([path], _format_of_file(path))
    is_data_set = path.is_dir() and kind not in ("text", DUMP_FORMAT)
    if not is_data_set:
        _check_no_config(str(path), config_name)
    if kind == DUMP_FORMAT:
        return _load_dumps(paths, split, streaming)
    if streaming:
        return _stream_files(_files_of_split(path, paths, is_data_set, config_name, split), kind, split)
    reader, options = (str(path), {}) if is_data_set else (kind, _options_of_files(paths, kind, split))
    try:
        if are_taken_otherwise([path, *paths]):
            raise ValueError("its path would be taken for a pattern or an address")
        return load_dataset(reader, config_name, split, False, options)
    except HubUnreachableError:
        raise
    except (ValueError, OSError, EOFError, pa.ArrowException) as error:
        readable = _files_of_split(path, paths, is_data_set, config_name, split)
        return _load_damaged_files(readable, kind, split, text_column, error)


def _options_of_files(paths: Sequence[Path], kind: str, split: str) -> dict[str, object]:
    options: dict[str, object] = {"data_files": {_split_name(split): [str(path) for path in paths]}}
    if kind == "text":
        options["sample_by"] = "document"
    return options


def _split_name(split: str) -> str:
    return re.split(r"\W", split, maxsplit=1)[0]


def _files_of_split(path: Path, paths: list[Path], is_data_set: bool, config_name: str | None, split: str) -> list[str]:
    """Find the files of a split of local files, or of a folder laid out as a data set."""
    if not is_data_set:
        return [str(file) for file in paths]
    if are_taken_otherwise([path, *paths]):
        by_split = files_by_split(path, config_name)
    else:
        by_split = datasets.load_dataset_builder(str(path), config_name).config.data_files
    if _split_name(split) not in by_split:
        raise ValueError(f"Unknown split {split!r}; there are {', '.join(repr(str(name)) for name in by_split)}.")
    return [str(file) for file in by_split[_split_name(split)]]


def _stream_files(paths: list[str], kind: str, split: str) -> datasets.IterableDataset:
    if split != _split_name(split):
        raise ValueError(_NO_SLICE_OF_A_STREAM.format(split=split, name=_split_name(split)))
    return datasets.IterableDataset.from_generator(files.file_rows, gen_kwargs={"paths": paths, "kind": kind})


def _load_damaged_files(
    paths: list[str], kind: str, split: str, text_column: str, error: Exception
) -> datasets.Dataset:
    """Read what can be read of files that `datasets` refuses, or whose names it cannot take."""
    _logger.warning("%s is read row by row, because it cannot be read at once: %s", ", ".join(paths), error)
    _check_columns(_stream_files(paths, kind, _split_name(split)), ", ".join(paths), text_column)
    arguments = {"paths": tuple(paths), "kind": kind, "text_column": text_column}
    columns = dict.fromkeys(("title", text_column, "skip_reason"), datasets.Value("string"))
    return _generate(files.article_rows, columns, arguments, [Path(path) for path in paths], split)


def _format_of_file(path: Path) -> str:
    kind = format_of(path)
    if kind is None:
        raise unknown_format(path)
    return kind


def _files_of_folder(folder: Path, split: str) -> tuple[list[Path], str]:
    """Find the files of the one format a folder holds; of its sub-folder called like the split, if there is one."""
    part = folder / _split_name(split)
    root = part if part.is_dir() else folder
    by_format: dict[str, list[Path]] = {}
    unknown: list[Path] = []
    for file in sorted(root.rglob("*")):
        hidden = any(part.startswith((".", "_")) for part in file.relative_to(root).parts)
        if not file.is_file() or hidden or file.name in _LIBRARY_FILES:
            continue
        if (kind := format_of(file)) is None:
            unknown.append(file)
        else:
            by_format.setdefault(kind, []).append(file)
    if not by_format:
        raise no_known_format(folder, unknown)
    if len(by_format) > 1:
        counts = ", ".join(f"{len(files)} of {kind}" for kind, files in sorted(by_format.items()))
        raise ValueError(f"The folder {str(folder)!r} mixes formats ({counts}); give a folder or file of one format.")
    warn_of_unknown(folder, unknown)
    kind, files = by_format.popitem()
    return files, kind


def _load_dumps(paths: Sequence[Path], split: str, streaming: bool | None) -> ArticleTable:
    if _split_name(split) != _DUMP_SPLIT or "+" in split:
        raise ValueError(f"A MediaWiki dump has one split, 'train', of which a slice can be taken; got {split!r}.")
    _parse_slice(split)
    dumps.check_wiki_dumps(paths)
    arguments = {"paths": tuple(str(path.resolve()) for path in paths)}
    columns = {name: datasets.Value("string") for name in dumps.ArticleRow.__annotations__}
    if streaming is None:
        streaming = sum(path.stat().st_size for path in paths) > MAX_CACHED_DUMP_BYTES
    if streaming:
        if split != _DUMP_SPLIT:
            raise ValueError(_NO_SLICE_OF_A_STREAM.format(split=split, name=_DUMP_SPLIT))
        return datasets.IterableDataset.from_generator(
            dumps.streamed_article_rows, datasets.Features(columns), arguments
        )
    return _generate(dumps.article_rows, columns, arguments, paths, split)


def _generate(
    rows: Callable[..., Iterator[object]],
    columns: dict[str, datasets.Value],
    arguments: Mapping[str, object],
    paths: Sequence[Path],
    split: str,
) -> datasets.Dataset:
    """Read rows into the cache, or find them there; then warn of what is missing, and take the slice."""
    part = _parse_slice(split)
    table = datasets.Dataset.from_generator(
        rows, datasets.Features(columns), gen_kwargs=dict(arguments), fingerprint=_state_of_files(paths, arguments)
    )
    _warn_of_breaks(table)
    if "lost_templates" in table.column_names:
        dumps.report_lost_templates(table["lost_templates"])
    if part is None:
        return table
    (chosen,) = part.to_absolute({_split_name(split): len(table)})
    numbers = range(len(table))[chosen.from_ : chosen.to]
    if not numbers:
        raise ValueError(f"The split {split!r} is empty: the source has {len(table)} rows.")
    return table.select(numbers)


def _parse_slice(split: str) -> datasets.ReadInstruction | None:
    """Read a slice such as "train[:60]"; None stands for the whole split."""
    try:
        part = datasets.ReadInstruction.from_spec(split)
        part.to_absolute({_split_name(split): 1})
    except (AssertionError, ValueError) as error:
        raise ValueError(f"The split {split!r} cannot be read: {error}") from error
    return None if split == _split_name(split) else part


def _state_of_files(paths: Sequence[Path], arguments: Mapping[str, object]) -> str:
    """Name cached rows by the files, the options and the code they come from, so that a change of each counts."""
    state = hashlib.sha256(repr(sorted(arguments.items())).encode())
    for path in paths:
        status = path.stat()
        state.update(f"{path.resolve()}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
    for module in _RULES:
        state.update(inspect.getsource(module).encode())
    return state.hexdigest()[:32]


def _warn_of_breaks(table: datasets.Dataset) -> None:
    """Name the breaks of files in every run, not only in the one that read them into the cache."""
    if not _BREAKS.intersection(table.unique("skip_reason")):
        return
    rows = table.select_columns(["title", "skip_reason"])
    places = Counter(row["title"] for row in rows if row["skip_reason"] in _BREAKS)
    for place in list(places)[:_NUM_NAMED_BREAKS]:
        warnings.warn(f"Articles are missing: {place}", stacklevel=6)
    if len(places) > _NUM_NAMED_BREAKS:
        warnings.warn(f"Articles are missing: {places.total()} rows in all cannot be read.", stacklevel=6)


def _check_hub_name(name: str) -> None:
    """Refuse a mistyped path, which cannot be the name of a data set."""
    if _HUB_NAME.fullmatch(name) is None or format_of(Path(name)) is not None:
        raise FileNotFoundError(
            f"There is no file or folder {name!r}. A source is {OFFLINE!r}, an existing file or folder, or a data set "
            f"of the Hub such as {WIKIPEDIA!r}."
        )


def _check_columns(table: ArticleTable, name: str, text_column: str) -> None:
    columns = table.column_names
    if columns is None:
        columns = _columns_of_rows(table, name)
    if text_column not in columns:
        raise ValueError(
            f"{name!r} has no column {text_column!r}; its columns are {', '.join(map(repr, columns)) or 'none'}. "
            "Choose the one that holds the text with the option dataset_text_column."
        )


def _columns_of_rows(table: datasets.IterableDataset, name: str) -> list[str]:
    breaks: list[str] = []
    for row in table:
        if not files.is_break(row):
            return list(row)
        breaks.append(row["title"])
    if breaks:
        raise ValueError(f"{name!r} cannot be read: {breaks[0]}")
    return []
