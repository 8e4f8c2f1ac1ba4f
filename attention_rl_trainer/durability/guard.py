"""What a run is guarded from while it lasts: another run in its folder, and signals in the middle of a step.

The lock is the system's own, on a file in the folder. The first SIGINT or SIGTERM is noted, so that the run can end its
step and write a checkpoint; the second acts at once.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import select
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Self

from filelock import FileLock, Timeout

logger = logging.getLogger(__name__)

# A push to the Hub leaves out what begins with an underscore.
LOCK_NAME = "_run.lock"


class RunLockedError(RuntimeError):
    """Another run writes to the same output folder."""


@contextmanager
def run_lock(output_dir: Path) -> Iterator[None]:
    """Hold an output folder during a run. The system releases it when the process ends, however it ends.

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
            f"another run writes to output_dir {str(output_dir)!r} (it holds {path}). Wait until it ends, or choose "
            "another output_dir"
        ) from error
    try:
        yield
    finally:
        lock.release()


class Interruption:
    """While the context lasts, notes SIGINT and SIGTERM instead of dying of them.

    Where Python allows no handlers (outside of the main thread) signals act as they did.
    """

    _SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        """Take the signals."""
        self.received = None
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in self._SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            # Whatever is being written is staged, so that nothing is broken by stopping in the middle of it.
            self.__exit__()
            for child in multiprocessing.active_children():
                child.terminate()  # a worker that hangs would outlive the run
            if signal.getsignal(number) is signal.SIG_IGN:  # as a shell has it for what it starts in the background
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self.received = signal.Signals(number)
        logger.warning(
            "%s: the run stops after this step, with a checkpoint; a second signal stops it at once",
            self.received.name,
        )

    def mute_closed_outputs(self) -> None:
        """Print into nothing where a signal came and nobody reads any more what is printed.

        Ctrl-C on ``python … | tee log`` ends ``tee`` too; the next line to be printed would end the run before its
        checkpoint.
        """
        if self.received is None or os.name != "posix":
            return
        for descriptor in (1, 2):
            poll = select.poll()
            poll.register(descriptor, 0)  # errors alone, which are always reported
            if any(event & select.POLLERR for _, event in poll.poll(0)):
                nothing = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nothing, descriptor)
                os.close(nothing)

    def raise_received(self) -> None:
        """End as the signal asked for, if one came.

        Raises:
            KeyboardInterrupt: SIGINT came.
            SystemExit: SIGTERM came; the exit code is 143.
        """
        if self.received is signal.SIGINT:
            raise KeyboardInterrupt
        if self.received is not None:
            raise SystemExit(128 + self.received)
