"""One run at a time in an output folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

# A push to the Hub leaves out what begins with an underscore.
LOCK_NAME = "_run.lock"


class RunLockedError(RuntimeError):
    """Another run writes to the same output folder."""


@contextmanager
def run_lock(output_dir: Path) -> Iterator[None]:
    """Hold an output folder for the time of a run. The system releases it when the process ends, however it ends.

    Args:
        output_dir: the run's folder.

    Raises:
        RunLockedError: another run holds it.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    path = output_dir / LOCK_NAME
    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout as error:
        raise RunLockedError(
            f"another run writes to output_dir {str(output_dir)!r} (it holds {path}). Wait for its end, or choose "
            "another output_dir"
        ) from error
    try:
        yield
    finally:
        lock.release()
