"""From the name of a repository to what can be known about it without waiting: is the Hub there, is the file here.

`huggingface_hub` and `datasets` retry for tens of seconds before they give up on a network that is not there. The
sources of articles (section 3 of the design) and the choice of a base model ask this module first, so that a machine
without a network hears at once what to do. The module knows nothing about articles, models or tokenizers.
"""

from __future__ import annotations

import queue
import re
import threading

from huggingface_hub import constants, get_session, try_to_load_from_cache

_CREDENTIALS = re.compile(r"(?<=://)[^/\s]+(?=@)")

_OBSTACLES: dict[str, str | None] = {}
"""What stood between this process and each endpoint it asked for; None where the endpoint answered."""


class HubUnreachableError(ConnectionError):
    """Something has to come from the Hub, and the Hub cannot be reached."""


def hub_is_reachable(timeout_seconds: float = 3.0) -> bool:
    """Tell whether the Hub answers.

    Args:
        timeout_seconds: Longest time to wait for the answer, name resolution included.

    Returns:
        False at once in offline mode; else whether the one request this process makes for it was answered.

    Raises:
        ValueError: `timeout_seconds` is not positive.
    """
    return hub_obstacle(timeout_seconds) is None


def hub_obstacle(timeout_seconds: float = 3.0) -> str | None:
    """Say what stands between this process and the Hub.

    The network is asked once in a process; the offline mode is read at every call.

    Args:
        timeout_seconds: Longest time to wait for the answer, name resolution included.

    Returns:
        The obstacle in words that fit after "the Hub cannot be reached: ", or None where the Hub answers.

    Raises:
        ValueError: `timeout_seconds` is not positive.
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
    """Mask name and password in the addresses of a text, as proxies and mirrors have them.

    Args:
        text: any text.
    """
    return _CREDENTIALS.sub("<CREDENTIALS>", text)


def forget_hub_answer() -> None:
    """Make the next question about the Hub ask the network again."""
    _OBSTACLES.clear()


def cached_in_hub_cache(repo_id: str, filename: str, repo_type: str = "model") -> bool:
    """Tell whether a file of a Hub repository is in the local cache.

    Args:
        repo_id: `namespace/name`.
        filename: Path of the file inside the repository.
        repo_type: `"model"`, `"dataset"` or `"space"`.

    Returns:
        True where the file of the default revision can be read without the network.

    Raises:
        huggingface_hub.errors.HFValidationError: `repo_id` is not the name of a repository.
    """
    return isinstance(try_to_load_from_cache(repo_id, filename, repo_type=repo_type), str)


def _ask(endpoint: str, timeout_seconds: float) -> str | None:
    """Send one request from a thread of its own, since the resolver of the system takes no time limit."""
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

    threading.Thread(target=ask, name="hub-is-reachable", daemon=True).start()
    try:
        return answers.get(timeout=timeout_seconds)
    except queue.Empty:
        return f"{shown} gave no answer within {timeout_seconds:g} s"
