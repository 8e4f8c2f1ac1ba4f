"""From the name of a Wikipedia, or of another data set of the Hub, to a table of its articles.

The embedded Wikipedia needs no network. What was loaded from the Hub before is read from the cache of `datasets` where
the Hub cannot be reached.
"""

from __future__ import annotations

import glob
import importlib.util
import logging
import warnings
from pathlib import Path
from typing import TypeAlias

import datasets
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from datasets.naming import camelcase_to_snakecase
from datasets.packaged_modules.cache.cache import Cache
from huggingface_hub import constants

from attention_rl_trainer.hub import HubUnreachableError, expect_writable_cache, hub_obstacle

ArticleTable: TypeAlias = datasets.Dataset | datasets.IterableDataset

OFFLINE = "offline"
"""Name of the embedded source: 96 articles of the English Wikipedia, from a dump in the wheel of gensim."""

WIKIPEDIA = "wikimedia/wikipedia"
WIKIPEDIA_CONFIG = "20231101.en"

SCRIPT_WIKIPEDIA = "wikipedia"
"""The old name of Wikipedia on the Hub, a data set that is made by a script; `WIKIPEDIA` is loaded for it."""

_EMBEDDED_DUMP = Path("test", "test_data", "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2")
_NO_SCRIPTS = "Dataset scripts are no longer supported"

_logger = logging.getLogger(__name__)


def embedded_dump() -> Path:
    """Find the dump inside gensim's wheel without importing gensim, whose own dependencies are not needed for it."""
    spec = importlib.util.find_spec("gensim")
    dump = None if spec is None or spec.origin is None else Path(spec.origin).parent / _EMBEDDED_DUMP
    if dump is None or not dump.is_file():
        raise ImportError(
            f"The source {OFFLINE!r} is a file of gensim's wheel ({_EMBEDDED_DUMP.as_posix()}), which is not "
            'installed; run pip install "attention-rl-trainer[offline]".'
        )
    return dump


def load_from_hub(name: str, config_name: str | None, split: str, streaming: bool | None) -> ArticleTable:
    """Load a data set from the Hub, or from the cache where the Hub cannot be reached.

    Wikipedia streams unless told otherwise; other data sets are prepared.

    Raises:
        FileNotFoundError: the Hub has no such data set.
        HubUnreachableError: it is not in the cache either.
        UnwritableCacheError: what the Hub sends cannot be kept.
        ValueError: as in `load_dataset`.
    """
    if name == SCRIPT_WIKIPEDIA:
        warnings.warn(
            f"The data set {name!r} ({config_name or '20220301.en'}) is made by a script, and data set scripts can no "
            f"longer be loaded; {WIKIPEDIA!r}, {WIKIPEDIA_CONFIG!r} is used instead.",
            stacklevel=3,
        )
        name, config_name = WIKIPEDIA, WIKIPEDIA_CONFIG
    if name == WIKIPEDIA:
        config_name = config_name or WIKIPEDIA_CONFIG
        streaming = True if streaming is None else streaming
    obstacle = hub_obstacle()
    if obstacle is None:
        expect_writable_cache(constants.HF_HUB_CACHE, "HF_HUB_CACHE")
        return load_dataset(name, config_name, split, bool(streaming), {})
    if not _is_prepared(name, config_name):
        raise _unreachable(name, obstacle)
    _logger.warning("The Hub cannot be reached (%s); %r is read from the local cache.", obstacle, name)
    dataset_name = name.rpartition("/")[2]
    prepared = Cache(dataset_name=dataset_name, repo_id=name, config_name=config_name, version="auto", hash="auto")
    table: ArticleTable = prepared.as_streaming_dataset(split) if streaming else prepared.as_dataset(split)
    return table


def load_dataset(
    name: str, config_name: str | None, split: str, streaming: bool, options: dict[str, object]
) -> ArticleTable:
    """Call `datasets.load_dataset`, and put its errors into words that name the way out.

    Raises:
        FileNotFoundError: neither this machine nor the Hub has such a data set.
        HubUnreachableError: the connection to the Hub broke.
        ValueError: the data set is made by a script, or its files cannot be read.
    """
    shown = options.get("data_files", name)
    try:
        table: ArticleTable = datasets.load_dataset(name, config_name, split=split, streaming=streaming, **options)
    except DatasetNotFoundError as error:
        raise FileNotFoundError(f"There is no local file or folder {name!r}, and: {error}") from error
    except DatasetGenerationError as error:
        raise ValueError(f"{shown!r} cannot be read: {error.__cause__ or error}") from error
    except ConnectionError as error:
        raise _unreachable(name, str(error)) from error
    except RuntimeError as error:
        if _NO_SCRIPTS not in str(error):
            raise
        raise script_error(name) from error
    return table


def _is_prepared(name: str, config_name: str | None) -> bool:
    """Whether `datasets` has prepared a Hub data set in its cache before."""
    *namespace, last = name.split("/")
    folder = Path(datasets.config.HF_DATASETS_CACHE, "___".join([*namespace, camelcase_to_snakecase(last)]))
    config = "*" if config_name is None else glob.escape(config_name)
    return any(entry.is_dir() for entry in folder.glob(f"{config}/*/*"))


def _unreachable(name: str, obstacle: str) -> HubUnreachableError:
    return HubUnreachableError(
        f"The data set {name!r} is neither a local path nor in the local cache, and the Hub cannot be reached: "
        f"{obstacle}. Use --dataset_name {OFFLINE} or the path of a local file."
    )


def script_error(name: str) -> ValueError:
    """Make the error for a data set that is made by a Python script."""
    return ValueError(
        f"The data set {name!r} is made by a Python script, and data set scripts can no longer be loaded. Use a data "
        f"set of plain files, such as {WIKIPEDIA!r}, or its conversion to Parquet."
    )
