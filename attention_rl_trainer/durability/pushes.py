"""What of a run goes to the Hub, and what is said where it does not get there.

Of the run's folder an allow-list goes; of checkpoints, which hold all that a run needs to resume, what ``hub_strategy``
asks for. Nothing is lost where the Hub cannot be reached: what is pushed was saved before.
"""

from __future__ import annotations

import functools
import json
import logging
import shlex
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self

from huggingface_hub import CommitInfo, HfApi, constants
from huggingface_hub.errors import HfHubHTTPError
from transformers import TrainingArguments
from transformers.trainer_utils import HubStrategy

from attention_rl_trainer.hub import forget_hub_answer, hub_obstacle, without_credentials

logger = logging.getLogger(__name__)

_WAYS_OUT = {
    401: "log in with `hf auth login`, or give hub_token",
    403: "use a token that may write there",
    404: "check hub_model_id, hub_revision and HF_ENDPOINT",
    409: "somebody else writes there",
    429: "wait some minutes",
}


class HubPushError(ConnectionError):
    """What was saved did not get to the Hub; says why, and the command that pushes it later."""


@dataclass(frozen=True)
class Destination:
    """A repository of the Hub, and what of a run's folder goes there."""

    repo_id: str
    """``namespace/name``; a name alone belongs to whoever is logged in."""
    folder: Path
    files: Sequence[str]
    """Names and patterns, relative to the folder; nothing else of it is pushed."""
    token: str | None = field(default=None, repr=False)
    revision: str | None = None
    private: bool | None = None

    @property
    def command(self) -> str:
        """The command that pushes what is there now; with the files' names where none is there yet."""
        there = [name for name in self.files if next(self.folder.glob(name), None) is not None]
        parts = ["hf", "upload", self.repo_id, str(self.folder), "."]
        parts += [] if self.revision is None else ["--revision", self.revision]
        parts += ["--private"] if self.private else []
        return shlex.join([*parts, *(part for name in there or self.files for part in ("--include", name))])

    def create(self) -> Self:
        """Make the repository, unless it is there; returns the destination with its full name.

        Raises:
            HubPushError: the Hub cannot be reached, or refuses.
        """
        with self._explained():
            made = _client(constants.ENDPOINT).create_repo(
                self.repo_id, token=self.token, private=self.private, exist_ok=True
            )
        return replace(self, repo_id=made.repo_id)

    def push(self, message: str) -> CommitInfo:
        """Push, and wait for it.

        Raises:
            HubPushError: the Hub cannot be reached, or refuses.
        """
        with self._explained():
            commit = _client(constants.ENDPOINT).upload_folder(
                repo_id=self.repo_id,
                folder_path=self.folder,
                commit_message=message,
                token=self.token,
                revision=self.revision,
                allow_patterns=list(self.files),
            )
        logger.info("Pushed %s to %s", self.folder, self.repo_id)
        return commit

    def begin_push(self, message: str, checkpoint: Path | None = None, place: str | None = None) -> Future[CommitInfo]:
        """Push in the background; what fails is said in a warning.

        Args:
            message: of the commit.
            checkpoint: what is pushed instead, all of it.
            place: its folder in the repository.
        """
        job: Future[CommitInfo] = _client(constants.ENDPOINT).upload_folder(
            repo_id=self.repo_id,
            folder_path=self.folder if checkpoint is None else checkpoint,
            commit_message=message,
            token=self.token,
            run_as_future=True,
            revision=self.revision,
            path_in_repo=place,
            allow_patterns=list(self.files) if checkpoint is None else None,
        )
        job.add_done_callback(functools.partial(self._warn_of_failure, message))
        return job

    def _warn_of_failure(self, message: str, job: Future[CommitInfo]) -> None:
        error = None if job.cancelled() else job.exception()
        if error is not None:
            logger.warning("%r was not pushed to %s: %s. The run is not affected", message, self.repo_id, _why(error))

    @contextmanager
    def _explained(self) -> Iterator[None]:
        # The Hub may have gone, or come, since it was asked last.
        forget_hub_answer()
        obstacle = hub_obstacle()
        if obstacle is not None:
            raise self._failure(f"the Hub cannot be reached: {obstacle}")
        try:
            yield
        # The transports underneath, of requests and of large files, have exceptions of their own, which differ between
        # versions of huggingface_hub. Nothing is hidden: the error is the cause of the one that is raised.
        except Exception as error:
            raise self._failure(_why(error)) from error

    def _failure(self, why: str) -> HubPushError:
        endpoint = without_credentials(constants.ENDPOINT)
        return HubPushError(
            f"{self.folder} was not pushed to {self.repo_id} at {endpoint}: {why}. What was saved is there; push it "
            f"later with: {self.command}"
        )


def start_pushes(
    destination: Destination, args: TrainingArguments, checkpoint: Path, message: str
) -> list[Future[CommitInfo]]:
    """Begin to push a run's folder and, where ``hub_strategy`` says so, a complete checkpoint."""
    pushes = [destination.begin_push(message)]
    if args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
        place = "last-checkpoint" if args.hub_strategy == HubStrategy.CHECKPOINT else checkpoint.name
        pushes.append(destination.begin_push(f"{message}, checkpoint", checkpoint, place))
    return pushes


@functools.cache
def _client(endpoint: str) -> HfApi:
    """One for all pushes: what a client does in the background, it does one after the other."""
    return HfApi(endpoint=endpoint)


def _why(error: BaseException) -> str:
    """Say what went wrong, from the bottom of a chain of errors, and what to do where that is known."""
    chain = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    answered = next((item for item in chain if isinstance(item, HfHubHTTPError)), None)
    if isinstance(chain[-1], json.JSONDecodeError):
        return "what answers there is not a Hub; check HF_ENDPOINT"
    if answered is None:
        return without_credentials(f"{type(chain[-1]).__name__}: {' '.join(str(chain[-1]).split())}")
    # Its own text has the address, of which a signature may be part.
    status, said = answered.response.status_code, answered.server_message
    way_out = _WAYS_OUT.get(status, "the fault is the Hub's" if status >= 500 else None)
    return "".join(
        [f"HTTP status {status}", f" ({' '.join(said.split())})" if said else "", f"; {way_out}" if way_out else ""]
    )
