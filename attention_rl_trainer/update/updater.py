"""Kept trajectories into optimizer steps, all of an update or none (design §9).

An update takes the trajectories of one rollout batch, or of ``gradient_accumulation_steps`` of them. Its gradient is
accumulated batch by batch, by each process for its own trajectories, and added up over processes before a step; the
optimizer steps that ``num_iterations`` > 1 adds come before the Trainer's own. If any of it fails, weights, optimizer
and the states of all parts of the run are as they were before its first batch.
"""

from __future__ import annotations

import copy
import functools
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from attention_rl_trainer.durability.states import Stateful
from attention_rl_trainer.errors import RunContext
from attention_rl_trainer.options import Count, option
from attention_rl_trainer.processes import ALONE, Processes
from attention_rl_trainer.types import ArticleReference
from attention_rl_trainer.update.kept import KeptTrajectories
from attention_rl_trainer.update.losses import LossOptions
from attention_rl_trainer.update.micro_batches import Differentiate, GradientAccumulator, LossSums, MicroBatchSize
from attention_rl_trainer.update.previous_adapter import AdapterSnapshot
from attention_rl_trainer.update.undo import OptimizerRestorePoint
from attention_rl_trainer.update.warm_start import WarmStartOptions


@dataclass
class UpdateOptions(LossOptions, WarmStartOptions):
    """How trajectories are trained on."""

    training_batch_size: Count = option(
        16, "Trajectories in a micro-batch of the update; halved up to three times if memory runs out."
    )


@dataclass(eq=False)
class _OpenUpdate:
    num_trajectories: int
    """Of all its rollout batches and processes, kept or not."""
    states_before: dict[str, Any]
    sums: LossSums
    """Of all batches and optimizer steps of this process so far."""
    kept: list[KeptTrajectories] = field(default_factory=list)
    """Of each batch so far; batches of which nothing was kept are left out."""
    weights_before: OptimizerRestorePoint | None = None
    """``None`` before the first optimizer step of several."""

    @property
    def articles(self) -> Sequence[ArticleReference]:
        return [article for batch in self.kept for article in batch.articles]


class Updater:
    """Accumulates the gradient of an update, and undoes the update if it fails.

    Args:
        model: its parameters with ``requires_grad`` are trained.
        record: called at the end of each update with its loss and the parts of it, over all processes: loss and policy
            loss are means over its optimizer steps, the KL and its query tokens sums over them.
        processes: among which the trajectories of an update are shared.

    Attributes:
        num_updates: optimizer steps that moved weights.
        previous_adapter: the adapter before the last of them.
    """

    def __init__(
        self,
        model: PeftModel,
        options: UpdateOptions,
        context: RunContext,
        record: Callable[[LossSums], None],
        processes: Processes = ALONE,
    ) -> None:
        self.num_updates = 0
        self.previous_adapter = AdapterSnapshot(model)
        self._model = model
        self._options = options
        self._context = context
        self._record = record
        self._processes = processes
        self._trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._accumulator = GradientAccumulator(self._trainable, MicroBatchSize(options.training_batch_size), context)
        self._update: _OpenUpdate | None = None

    @contextmanager
    def all_or_nothing(self, parts: Mapping[str, Stateful], num_trajectories: int) -> Iterator[None]:
        """Open an update unless one is open, and go back to where the run stood before it if it fails.

        Args:
            parts: all those of the run whose state an update changes, this one included.
            num_trajectories: B_all, of all rollout batches and processes of the update.
        """
        if self._update is None:
            states = {name: copy.deepcopy(part.state_dict()) for name, part in parts.items()}
            nothing = LossSums(torch.zeros((), device=self._context.device))
            self._update = _OpenUpdate(num_trajectories, states, nothing)
        update = self._update
        try:
            yield
        except BaseException:
            for name, part in parts.items():
                part.load_state_dict(update.states_before[name])
            if update.weights_before is not None:
                update.weights_before.restore()
            self._model.zero_grad()
            self._update = None
            raise

    @property
    def _open(self) -> _OpenUpdate:
        assert self._update is not None, "an update is accumulated within all_or_nothing()"
        return self._update

    @property
    def num_trajectories(self) -> int:
        """B_all of the present update."""
        return self._open.num_trajectories

    def accumulate(self, kept: KeptTrajectories, differentiate: Differentiate) -> Tensor:
        """Add the gradient of a rollout batch's kept trajectories of this process, of which there may be none.

        Returns:
            Their share of the update's loss, which is a mean over its optimizer steps; a scalar, detached.

        Raises:
            NonFiniteError: a logit, the KL, the loss or the gradient is not finite; names which and where.
        """
        batches = [kept] if len(kept) > 0 else []
        self._open.kept += batches
        return self._accumulate(batches, differentiate, iteration=1)

    def _accumulate(self, batches: Sequence[KeptTrajectories], differentiate: Differentiate, iteration: int) -> Tensor:
        sums = self._accumulator.accumulate(differentiate, batches, iteration)
        self._open.sums += sums
        return sums.loss / self._options.num_iterations

    def join(self) -> None:
        """Add up the gradients of all processes, after the last rollout batch of an update."""
        self._processes.sum_gradients(self._trainable.values())

    def take_further_steps(
        self, differentiate: Differentiate, optimizer: torch.optim.Optimizer, clip: Callable[[], None]
    ) -> Tensor:
        """Take the optimizer steps, clipped, that ``num_iterations`` > 1 adds before the Trainer's own.

        Returns:
            Their share of the update's loss, as of `accumulate`.
        """
        update = self._open
        loss = torch.zeros((), device=self._context.device)
        if not self._accumulator.has_gradient or self._options.num_iterations == 1:
            return loss
        changing = [*self._trainable.values(), *self.previous_adapter.state_dict().values()]
        update.weights_before = OptimizerRestorePoint(changing, optimizer)
        for iteration in range(2, self._options.num_iterations + 1):
            clip()
            self._accumulator.expect_finite()
            self._refresh_previous_adapter()
            optimizer.step()
            self._model.zero_grad()
            loss += self._accumulate(update.kept, differentiate, iteration)
            self.join()
        return loss

    @contextmanager
    def last_step(self) -> Iterator[None]:
        """Prepare the Trainer's own optimizer step, which ends the update; what is done inside belongs to it."""
        update = self._open
        with self._context.phase("optimizer step", len(update.articles), update.articles):
            self._accumulator.expect_finite()
            yield
            # Only now: nothing takes it back.
            self._refresh_previous_adapter()
            self._record(self._mean_over_steps(self._over_processes(update.sums)))
        self._update = None

    def _over_processes(self, sums: LossSums) -> LossSums:
        on_cpu = replace(sums, loss=sums.loss.cpu())
        return functools.reduce(operator.add, self._processes.gather(on_cpu))

    def _mean_over_steps(self, sums: LossSums) -> LossSums:
        steps = self._options.num_iterations
        policy = None if sums.policy is None else sums.policy / steps
        return replace(sums, loss=sums.loss / steps, policy=policy)

    def _refresh_previous_adapter(self) -> None:
        """Copy the present adapter, unless the step that follows will move nothing."""
        if self._accumulator.has_gradient:
            self.previous_adapter.refresh()
            self.num_updates += 1

    def state_dict(self) -> dict[str, Any]:
        """Return the state without the previous adapter's tensors."""
        return {"num_updates": self.num_updates, "micro_batches": self._accumulator.size.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go back to what `state_dict` returned."""
        self.num_updates = int(state["num_updates"])
        self._accumulator.size.load_state_dict(state["micro_batches"])
