"""Trajectories into the trackers of ``report_to``, as a table and a picture.

TensorBoard, trackio and Weights & Biases can hold both; the Trainer itself gives each tracker the numbers. None of them
is needed by this package, and each is imported only where it is used.
"""

from __future__ import annotations

import importlib.util
import logging
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import TensorBoardCallback

from attention_rl_trainer.records.heat_maps import plot_selection
from attention_rl_trainer.records.ledger import LedgerRow
from attention_rl_trainer.records.summary import escape_control_characters

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

logger = logging.getLogger(__name__)

TABLE, PICTURE = "trajectories", "choices"
"""Under which names a tracker has them."""

HOLDERS = ("tensorboard", "trackio", "wandb")
"""Trackers that can hold tables and pictures, by their names in ``report_to``, which are those of their packages."""

_COLUMNS = (
    *("step", "episode", "article", "number", "query", "key", "value", "probability"),
    *("reward", "query_gain", "model_gain", "verdict"),
)
_ROWS_OF_TEXT = 64
"""Of a table that is a text to its tracker, and read as a whole."""


def expect_trackers(report_to: str | Sequence[str] | None) -> None:
    """Refuse a tracker whose package is missing, before anything is loaded.

    Raises:
        ValueError: names it, and the command that installs it.
    """
    for name in HOLDERS:
        # TensorBoard's writer has two packages.
        packages = ("tensorboard", "tensorboardX") if name == "tensorboard" else (name,)
        if name in (report_to or ()) and not any(importlib.util.find_spec(package) for package in packages):
            raise ValueError(
                f"report_to names {name}, which is not installed; install it with: pip install {name}, or leave it out"
            )


def trajectory_records(rows: Sequence[LedgerRow]) -> list[dict[str, Any]]:
    """Lay trajectories out, a record for each query: where it stands, what was read, and what came of it."""
    records = []
    for row in rows:
        parts = (row.queries, row.keys, row.values, row.chosen_probabilities)
        gains = (row.step_rewards, row.query_gains, row.model_gains)
        for number, told in enumerate(zip(*parts, *gains, strict=True), start=1):
            figures = (row.step, row.episode, row.title, number, *told, row.verdict)
            records.append(dict(zip(_COLUMNS, figures, strict=True)))
    return records


def to_markdown(records: Sequence[Mapping[str, Any]], limit: int = _ROWS_OF_TEXT) -> str:
    """Write records as a table in Markdown, the first ``limit`` of them; texts are shown literally."""
    lines = ["| " + " | ".join(_COLUMNS) + " |", "| " + " | ".join("---" for _ in _COLUMNS) + " |"]
    lines += ["| " + " | ".join(_cell(value) for value in record.values()) + " |" for record in records[:limit]]
    if len(records) > limit:
        lines += ["", f"{len(records) - limit} more are in the ledger."]
    return "\n".join(lines)


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4f}"
    text = escape_control_characters(str(value)).strip().replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([\\`*_{}\[\]()#+!|])", r"\\\1", text)


class TrajectoryTrackingCallback(TrainerCallback):
    """Gives trackers the trajectories of a rollout batch as a table, and a picture of which pairs the best one chose.

    Only the main process does. It must come after the Trainer's own callbacks of the trackers, which open their runs;
    so it does where it is added to a trainer.

    Args:
        latest_rows: returns the rows of the last rollout batch, none if there is none yet.
        callbacks: returns those of the trainer, among which is TensorBoard's, whose writer is used.
        every: give them whenever this many more steps of the Trainer are done.

    Raises:
        ValueError: ``every`` is below 1.
    """

    def __init__(
        self,
        latest_rows: Callable[[], Sequence[LedgerRow]],
        callbacks: Callable[[], Iterable[TrainerCallback]],
        every: int,
    ) -> None:
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}")
        self.every = every
        self._latest_rows = latest_rows
        self._callbacks = callbacks
        self._given_at = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Count from the step at which the run begins or is resumed."""
        self._given_at = state.global_step
        if state.is_world_process_zero and not _holders(args):
            logger.warning(
                "log_trajectories has no effect: report_to is %s, which holds no tables; those that do are %s",
                ", ".join(args.report_to or ["none"]),
                ", ".join(HOLDERS),
            )

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        """Give the trackers the last rollout batch where it is due; a log without episodes is not one of a step."""
        is_due = state.global_step // self.every > self._given_at // self.every
        rows, holders = self._latest_rows(), _holders(args)
        if not (state.is_world_process_zero and is_due and rows and holders) or "episodes" not in (logs or {}):
            return
        self._given_at = state.global_step
        records, picture = trajectory_records(rows), _picture_of(max(rows, key=lambda row: row.reward))
        for callback in self._callbacks():
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                _write(callback.tb_writer, records, picture, state.global_step)
        if "trackio" in holders:
            import trackio

            _log(trackio, records, picture, state.global_step)
        if "wandb" in holders:
            import wandb

            _log(wandb, records, picture, state.global_step)


def _holders(args: TrainingArguments) -> set[str]:
    return set(HOLDERS) & set(args.report_to or [])


def _write(writer: SummaryWriter, records: list[dict[str, Any]], picture: NDArray[np.uint8] | None, step: int) -> None:
    """Give them to TensorBoard, to which a table is a text."""
    writer.add_text(TABLE, to_markdown(records), step)
    if picture is not None:
        writer.add_image(PICTURE, picture, step, dataformats="HWC")
    writer.flush()


def _log(module: Any, records: list[dict[str, Any]], picture: NDArray[np.uint8] | None, step: int) -> None:
    """Give them to trackio or wandb, which have one interface."""
    # By a data frame, as TRL's trainers do, because earlier versions of trackio take nothing else.
    import pandas  # type: ignore[import-untyped]  # it ships no types

    logged: dict[str, Any] = {TABLE: module.Table(dataframe=pandas.DataFrame(records))}
    if picture is not None:
        logged[PICTURE] = module.Image(picture)
    # The axis on which the Trainer's callbacks put their numbers.
    module.log({**logged, "train/global_step": step})


def _picture_of(row: LedgerRow) -> NDArray[np.uint8] | None:
    """Draw the choices of a trajectory, ``[height, width, 3]``; ``None`` where matplotlib is missing."""
    if importlib.util.find_spec("matplotlib") is None:
        return None
    from matplotlib.image import imread

    with tempfile.TemporaryDirectory() as folder:
        pixels = imread(plot_selection([row], Path(folder) / f"{PICTURE}.png", 1))
    return np.asarray(pixels[..., :3] * 255).round().astype(np.uint8)
