"""The gradient of kept trajectories, in micro-batches that fit into memory: halved when it runs out (design §9)."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor, nn

from attention_rl_trainer.errors import NonFiniteError, RunContext, located
from attention_rl_trainer.update.kept import KeptTrajectories
from attention_rl_trainer.update.objective import LossTerms

logger = logging.getLogger(__name__)

T = TypeVar("T")
_MAX_HALVINGS = 3


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory ran out, on a device or in main memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    # By its text alone: accelerate takes it for granted that an error's argument is a string.
    return isinstance(error, RuntimeError) and bool(should_reduce_batch_size(RuntimeError(str(error))))


class MicroBatchSize:
    """Trajectories per micro-batch, and how often that was halved so far."""

    def __init__(self, size: int) -> None:
        self._configured = size
        self.size = size
        self.num_halvings = 0

    def state_dict(self) -> dict[str, int]:
        """Return the state as a JSON-able mapping."""
        return {"configured": self._configured, "size": self.size, "num_halvings": self.num_halvings}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Take over what was found to fit, unless another size was configured since."""
        if state["configured"] == self._configured:
            self.size, self.num_halvings = state["size"], state["num_halvings"]

    @property
    def can_be_halved(self) -> bool:
        """Whether it is more than 1 and was halved less than three times."""
        return self.size > 1 and self.num_halvings < _MAX_HALVINGS

    def halve(self, num_rows: int) -> None:
        """Halve it; where there were fewer trajectories than the size, half of them is what may fit."""
        self.size = max(1, min(self.size, num_rows) // 2)
        self.num_halvings += 1


def halve_until_it_fits(
    attempt: Callable[[int], T], size: MicroBatchSize, num_rows: int, undo: Callable[[], None]
) -> T:
    """Do something in micro-batches, and again in smaller ones when memory runs out.

    Args:
        attempt: does it in micro-batches of the given size, of at most ``num_rows`` trajectories.
        size: what is tried; keeps what was found to fit.
        undo: takes back what a failed attempt has changed.

    Raises:
        Exception: what ``attempt`` raised, if memory did not run out, or ran out after the last halving too.
    """
    while True:
        try:
            return attempt(size.size)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or not size.can_be_halved or num_rows < 2:
                raise
        # Only after the clause is the error gone, and with its traceback the tensors of the attempt.
        size.halve(num_rows)
        undo()


class AccumulationStart:
    """The gradients and the random state before an accumulation."""

    def __init__(self, parameters: Iterable[nn.Parameter], device: torch.device) -> None:
        self._device = device
        self._gradients: list[tuple[nn.Parameter, Tensor | None]] = [
            (parameter, None if parameter.grad is None else parameter.grad.clone()) for parameter in parameters
        ]
        self._random_state = torch.get_rng_state()
        self._device_random_state = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def restore(self) -> None:
        """Go back to them, and hand unused memory back to the device."""
        for parameter, gradient in self._gradients:
            # The next attempt adds to it in place.
            parameter.grad = None if gradient is None else gradient.clone()
        torch.set_rng_state(self._random_state)
        if self._device_random_state is not None:
            torch.cuda.set_rng_state(self._device_random_state, self._device)
            torch.cuda.empty_cache()


Differentiate: TypeAlias = Callable[[KeptTrajectories], tuple[Tensor, LossTerms | None]]
"""Adds a micro-batch's gradient to what is there; returns the loss, detached, and its parts if they are known."""


@dataclass(frozen=True)
class LossSums:
    """The loss of kept trajectories, and the parts of it that are known, summed over them."""

    loss: Tensor
    """Weighted by 1 / B_all, like ``policy``; a scalar, detached."""
    policy: float | None = None
    kl: float | None = None
    """Not weighted: nats, over ``num_query_tokens``."""
    num_query_tokens: int = 0

    def __add__(self, other: LossSums) -> LossSums:
        """Add what other trajectories, or another pass over the same ones, gave."""
        return LossSums(
            self.loss + other.loss,
            _sum_of_known(self.policy, other.policy),
            _sum_of_known(self.kl, other.kl),
            self.num_query_tokens + other.num_query_tokens,
        )


def _sum_of_known(first: float | None, second: float | None) -> float | None:
    known = [value for value in (first, second) if value is not None]
    return sum(known) if known else None


class GradientAccumulator:
    """Sums the gradients of micro-batches, whose size it halves where memory runs out."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], size: MicroBatchSize, context: RunContext) -> None:
        self.size = size
        self._parameters = dict(parameters)
        self._context = context

    def accumulate(self, differentiate: Differentiate, batches: Sequence[KeptTrajectories], iteration: int) -> LossSums:
        """Add the gradient of kept trajectories to what is there, and check it; returns their loss.

        Raises:
            NonFiniteError: the gradient is not finite; names the parameter, the micro-batch and the iteration.
        """
        largest = max((len(batch) for batch in batches), default=0)
        size_before = self.size.size
        start = AccumulationStart(self._parameters.values(), self._context.device)

        def try_size(size: int) -> LossSums:
            with self._context.phase("update", largest, micro_batch_size=size):
                return self._accumulate_in(size, differentiate, batches, iteration)

        result = halve_until_it_fits(try_size, self.size, largest, start.restore)
        if self.size.size < size_before:
            logger.warning(
                "Memory ran out in the update of step %d; micro-batches of this and all further steps have %d "
                "trajectories instead of %d. To start with fewer, lower training_batch_size",
                self._context.step,
                self.size.size,
                size_before,
            )
        return result

    def _accumulate_in(
        self, size: int, differentiate: Differentiate, batches: Sequence[KeptTrajectories], iteration: int
    ) -> LossSums:
        total = LossSums(torch.zeros((), device=self._context.device))
        numbers = itertools.count(1)
        for batch in batches:
            for micro_batch in batch.split(size):
                with located(f"micro-batch {next(numbers)} of iteration {iteration}", micro_batch.articles):
                    loss, terms = differentiate(micro_batch)
                    self.expect_finite()
                total += LossSums(loss) if terms is None else _sums_of(micro_batch, loss, terms)
        return total

    @property
    def has_gradient(self) -> bool:
        """Whether there is any gradient."""
        return any(parameter.grad is not None for parameter in self._parameters.values())

    def expect_finite(self) -> None:
        """Refuse a gradient that is not finite, or whose norm is not: clipping would turn the latter into zeros."""
        gradients = {name: p.grad for name, p in self._parameters.items() if p.grad is not None}
        if not bool(torch.nn.utils.get_total_norm(list(gradients.values())).isfinite()):
            bad = [name for name, gradient in gradients.items() if not bool(gradient.isfinite().all())]
            raise NonFiniteError(f"the gradient of {bad[0]}" if bad else "the norm of the gradient")


def _sums_of(batch: KeptTrajectories, loss: Tensor, terms: LossTerms) -> LossSums:
    if terms.kl is None:
        return LossSums(loss, terms.policy.item())
    # All trajectories of an update weigh the same.
    kl = terms.kl.item() / batch.weights.mean().item()
    return LossSums(loss, terms.policy.item(), kl, len(batch) * len(batch.query_starts) * batch.query_length)
