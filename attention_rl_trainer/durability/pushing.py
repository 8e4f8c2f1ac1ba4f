"""A `transformers.Trainer` that pushes to the Hub what is named, and loses nothing where the Hub fails.

The stock Trainer uploads its whole folder, optimizer and options included, and what fails on the way is an error of
the training.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME as ADAPTER_CONFIG_NAME
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from transformers import Trainer
from transformers.trainer_utils import HubStrategy
from transformers.utils.hub import PushInProgress

from attention_rl_trainer.durability.pushes import Destination, HubPushError, start_pushes
from attention_rl_trainer.processes import Processes

logger = logging.getLogger(__name__)


class PushingTrainer(Trainer):
    """A Trainer of an adapter whose pushes are an allow-list; of several processes the first one pushes.

    What a save writes, and how, a subclass says (`DurableTrainer`).
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.processes = Processes(self.args.process_index, self.args.world_size)

    @property
    def output_dir(self) -> Path:
        """The run's folder."""
        return Path(str(self.args.output_dir))

    @property
    def published_files(self) -> Sequence[str]:
        """Names and patterns of what is pushed of the run's folder, and nothing else of it."""
        return (ADAPTER_CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME)

    def _destination(
        self, token: str | None = None, revision: str | None = None, private: bool | None = None
    ) -> Destination:
        return Destination(
            repo_id=self.hub_model_id or self.args.hub_model_id or self.output_dir.absolute().name,
            folder=self.output_dir,
            files=self.published_files,
            token=token or self.args.hub_token,
            revision=revision or self.args.hub_revision,
            private=self.args.hub_private_repo if private is None else private,
        )

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Make the repository that is pushed to, unless it is there.

        Raises:
            HubPushError: the Hub cannot be reached, or refuses; says why, and the command that pushes later.
        """
        # The Trainer's constructor calls this before there are `processes`.
        if self.is_world_process_zero():
            # The Trainer annotates ``None`` alone.
            made: Any = self._destination(token, private=private).create().repo_id
            self.hub_model_id = made
            self.push_in_progress = None

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write adapter, tokenizer, options and card; with ``push_to_hub`` push them, which a warning says if it fails.

        Raises:
            StagingError: the system refused a write.
        """
        super().save_model(output_dir, _internal_call=True)
        if self.args.push_to_hub and not _internal_call:
            try:
                self.push_to_hub(commit_message="Model save")
            except HubPushError as error:
                logger.warning("%s", error)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Save the model, and upload what `published_files` names.

        Args:
            blocking: whether it is waited for; else what fails is said in a warning.
            kwargs: of `create_model_card`.

        Returns:
            The commit, or its future; ``None`` where another process pushes.

        Raises:
            StagingError: the system refused a write.
            HubPushError: the Hub cannot be reached, or refuses; the model is saved, and the command that pushes it
                later is said.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        # What a push reads must not change under it.
        self._finish_current_push()
        self.save_model(_internal_call=True)
        if kwargs:
            self.create_model_card(**kwargs)
        if not self.processes.is_main:
            return None
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        message, destination = commit_message or "End of training", self._destination(token, revision, private)
        return destination.push(message) if blocking else destination.begin_push(message)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self.processes.is_main or self.args.hub_strategy == HubStrategy.END:
            return
        # The Trainer annotates ``None`` alone.
        progress: Any = self.push_in_progress
        busy = progress is not None and not progress.is_done()
        if busy and not self.args.hub_always_push:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.save_model(_internal_call=True)
        message = f"Training in progress, step {self.state.global_step}"
        uploads: Any = start_pushes(self._destination(), self.args, Path(checkpoint_folder), message)
        if busy:
            progress.jobs.extend(uploads)
        else:
            progress = PushInProgress(uploads)
            self.push_in_progress = progress
