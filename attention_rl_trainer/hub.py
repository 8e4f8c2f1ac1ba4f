"""Whether the Hub is there and a file of it here, known without waiting; and whether what comes can be kept.

`huggingface_hub` and `datasets` retry for tens of seconds before they give up on a network that is not there. Whoever
needs something from the Hub asks here first, so that a machine without a network learns at once what to do.
"""

from __future__ import annotations

import queue
import re
import tempfile
import threading
from pathlib import Path

from huggingface_hub import constants, get_session, try_to_load_from_cache

_CREDENTIALS = re.compile(r"(?<=://)[^/\s]+(?=@)")

# What stood between this process and each endpoint it asked; None where the endpoint answered.
_OBSTACLES: dict[str, str | None] = {}


class HubUnreachableError(ConnectionError):
    """Something has to come from the Hub, and the Hub cannot be reached."""


class UnwritableCacheError(ValueError):
    """Something has to be kept on disk, and the folder for it cannot be written."""


def expect_writable_cache(folder: str | Path, variable: str) -> None:
    """Refuse a cache folder in which nothing can be written, before hours of reading or downloading.

    Args:
        folder: made if it is not there.
        variable: the environment variable that names it; ``HF_HOME`` names the folder of all caches.

    Raises:
        UnwritableCacheError: names the folder, the reason and the way out.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UnwritableCacheError(
            f"The cache folder {str(folder)!r} cannot be written: {error}. Set the environment variable HF_HOME (all "
            f"caches) or {variable} (this one) to a folder that can be written, or make room or change rights there."
        ) from error


def hub_obstacle(timeout_seconds: float = 3.0) -> str | None:
    """Say what stands between this process and the Hub, in words that fit after "the Hub cannot be reached: "; or None.

    The network is asked once per process, and waited for no longer than ``timeout_seconds``, name resolution included;
    the offline mode is read at every call.

    Raises:
        ValueError: ``timeout_seconds`` is not positive.
    """
    if timeout_seconds <= 0:
        raise ValueError(f"timeout_seconds must be positive, got {timeout_seconds}.")
    if constants.HF_HUB_OFFLINE:
        return "the offline mode is on; unset HF_HUB_OFFLINE (and TRANSFORMERS_OFFLINE) to use the network"
    endpoint = constants.ENDPOINT
    if endpoint not in _OBSTACLES:
        _OBSTACLES[endpoint] = _ask(endpoint, timeout_seconds)
    return _OBSTACLES[endpoint]


def without_credentials(text: str) -> str:
    """Mask name and password in the addresses of a text, as proxies and mirrors have them."""
    return _CREDENTIALS.sub("<CREDENTIALS>", text)


def forget_hub_answer() -> None:
    """Make the next question about the Hub ask the network again."""
    _OBSTACLES.clear()


def cached_in_hub_cache(repo_id: str, filename: str, repo_type: str = "model") -> bool:
    """Tell whether a file of a repository's default revision is in the local cache.

    Raises:
        huggingface_hub.errors.HFValidationError: ``repo_id`` is not the name of a repository.
    """
    return isinstance(try_to_load_from_cache(repo_id, filename, repo_type=repo_type), str)


def _ask(endpoint: str, timeout_seconds: float) -> str | None:
    # From a thread of its own, since the resolver of the system takes no time limit.
    answers: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    shown = without_credentials(endpoint)

    def ask() -> None:
        try:
            status = get_session().head(endpoint, timeout=timeout_seconds, follow_redirects=False).status_code
        # The transport underneath, and with it the root of its exceptions, differs between versions of huggingface_hub.
        # Nothing is hidden: the error becomes the obstacle that callers report.
        except Exception as error:
            answers.put(without_credentials(f"{type(error).__name__}: {error}"))
        else:
            answers.put(f"{shown} answers with HTTP status {status}" if status >= 500 else None)

    threading.Thread(target=ask, name="hub-obstacle", daemon=True).start()
    try:
        return answers.get(timeout=timeout_seconds)
    except queue.Empty:
        return f"{shown} gave no answer within {timeout_seconds:g} s"
