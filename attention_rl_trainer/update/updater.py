"""Kept trajectories into optimizer steps, all of an update or none (design §9).

An update takes the trajectories of one rollout batch, or of ``gradient_accumulation_steps`` of them. Its gradient is
accumulated batch by batch; the optimizer steps that ``num_iterations`` > 1 adds come before the Trainer's own. If any of
it fails, weights, optimizer and the states of all parts of the run are as they were before its first batch.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from attention_rl_trainer.durability.states import Stateful
from attention_rl_trainer.errors import RunContext
from attention_rl_trainer.options import Count, option
from attention_rl_trainer.types import ArticleReference
from attention_rl_trainer.update.kept import KeptTrajectories
from attention_rl_trainer.update.losses import LossOptions
from attention_rl_trainer.update.micro_batches import Differentiate, GradientAccumulator, MicroBatchSize
from attention_rl_trainer.update.previous_adapter import AdapterSnapshot
from attention_rl_trainer.update.undo import OptimizerRestorePoint

logger = logging.getLogger(__name__)


@dataclass
class UpdateOptions(LossOptions):
    """How trajectories are trained on."""

    training_batch_size: Count = option(
        16, "Trajectories in a micro-batch of the update; halved up to three times if memory runs out."
    )


@dataclass(eq=False)
class _Window:
    """The rollout batches of the present update."""

    num_trajectories: int
    """Trajectories of all its batches, kept or not."""
    states_before: dict[str, Any]
    """The state of every part of the run before the first batch."""
    kept: list[KeptTrajectories] = field(default_factory=list)
    """What was kept of each batch so far; batches of which nothing was are left out."""
    weights_before: OptimizerRestorePoint | None = None
    """What the optimizer steps before the last one change; ``None`` before the first of several."""

    @property
    def articles(self) -> Sequence[ArticleReference]:
        return [article for batch in self.kept for article in batch.articles]


class Updater:
    """Accumulates the gradient of an update, and undoes the update if it fails.

    Args:
        model: the adapted model; its parameters with ``requires_grad`` are trained.
        options: iterations and sizes.
        context: names the phase where something fails.
        record: called with metrics of each accumulated batch.

    Attributes:
        num_updates: optimizer steps that moved weights.
        previous_adapter: the adapter before the last of them.
    """

    def __init__(
        self,
        model: PeftModel,
        options: UpdateOptions,
        context: RunContext,
        record: Callable[[Mapping[str, float]], None],
    ) -> None:
        self.num_updates = 0
        self.previous_adapter = AdapterSnapshot(model)
        self._model = model
        self._options = options
        self._context = context
        self._record = record
        self._trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        size = MicroBatchSize(options.training_batch_size)
        self._accumulator = GradientAccumulator(self._trainable, size, context.device)
        self._window: _Window | None = None

    @contextmanager
    def all_or_nothing(self, parts: Mapping[str, Stateful], num_trajectories: int) -> Iterator[None]:
        """Open an update unless one is open, and go back to where the run stood before it if it fails.

        Args:
            parts: of the run, by name.
            num_trajectories: of all rollout batches of the update.
        """
        if self._window is None:
            states = {name: copy.deepcopy(part.state_dict()) for name, part in parts.items()}
            self._window = _Window(num_trajectories, states)
        window = self._window
        try:
            yield
        except BaseException:
            for name, part in parts.items():
                part.load_state_dict(window.states_before[name])
            if window.weights_before is not None:
                window.weights_before.restore()
            self._model.zero_grad()
            self._window = None
            raise

    @property
    def _open(self) -> _Window:
        assert self._window is not None, "an update is accumulated within all_or_nothing()"
        return self._window

    @property
    def num_trajectories(self) -> int:
        """B_all, the trajectories of all rollout batches of the present update."""
        return self._open.num_trajectories

    def accumulate(self, kept: KeptTrajectories, differentiate: Differentiate) -> Tensor:
        """Add the gradient of a rollout batch's kept trajectories, and return their loss, detached; 0 if there are none.

        Raises:
            NonFiniteError: a logit, the KL, the loss or the gradient is not finite; names which and where.
        """
        batches = [kept] if len(kept) > 0 else []
        self._open.kept += batches
        return self._accumulate(batches, differentiate)

    def _accumulate(
        self, batches: Sequence[KeptTrajectories], differentiate: Differentiate, iteration: int = 1
    ) -> Tensor:
        accumulated = self._accumulator.accumulate(
            differentiate,
            batches,
            iteration,
            lambda rows, size: self._context.phase("update", rows, micro_batch_size=size),
        )
        for metrics in accumulated.metrics:
            self._record(metrics)
        if accumulated.halved_from is not None:
            logger.warning(
                "Memory ran out in the update of step %d; its micro-batches and those of all further steps have %d "
                "trajectories instead of %d. To begin with that, lower training_batch_size",
                self._context.step,
                self._accumulator.size.size,
                accumulated.halved_from,
            )
        return accumulated.loss

    def take_further_steps(
        self, differentiate: Differentiate, optimizer: torch.optim.Optimizer, clip: Callable[[], None]
    ) -> None:
        """Take the optimizer steps that ``num_iterations`` > 1 adds, before the Trainer's own.

        Args:
            differentiate: adds the gradient of a micro-batch.
            optimizer: the Trainer's.
            clip: clips the gradient.
        """
        window = self._open
        if not window.kept or self._options.num_iterations == 1:
            return
        changing = [*self._trainable.values(), *self.previous_adapter.state_dict().values()]
        window.weights_before = OptimizerRestorePoint(changing, optimizer)
        for iteration in range(2, self._options.num_iterations + 1):
            clip()
            self._refresh_previous_adapter()
            optimizer.step()
            self._model.zero_grad()
            self._accumulate(window.kept, differentiate, iteration)

    @contextmanager
    def last_step(self) -> Iterator[None]:
        """Prepare the Trainer's own optimizer step, which ends the update; what is done inside belongs to it."""
        window = self._open
        with self._context.phase("optimizer step", len(window.articles), window.articles):
            self._refresh_previous_adapter()
            yield
        self._window = None

    def _refresh_previous_adapter(self) -> None:
        """Check the gradient and refresh the previous adapter, unless the step will move nothing."""
        if not self._accumulator.expect_finite():
            return
        self.previous_adapter.refresh()
        self.num_updates += 1

    def state_dict(self) -> dict[str, Any]:
        """Return the state without the previous adapter's tensors."""
        return {"num_updates": self.num_updates, "micro_batches": self._accumulator.size.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go back to what `state_dict` returned."""
        self.num_updates = int(state["num_updates"])
        self._accumulator.size.load_state_dict(state["micro_batches"])
