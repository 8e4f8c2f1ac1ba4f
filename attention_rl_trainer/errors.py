"""What stops a run: numbers that are not finite, a base model that cannot be used; and where the run stood then.

Whoever computes a number knows what it is and at which step of which trajectory; whoever calls adds where that was.
`RunContext` names the phase of the run in every error raised inside, and times the phases.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from attention_rl_trainer.types import ArticleReference


class BaseModelError(RuntimeError):
    """A base model or its tokenizer cannot be used; the message says why, and what to do."""


# ---- Numbers that are not finite ----


class NonFiniteError(ArithmeticError):
    """A logit, vector, reward, statistic, loss or gradient is NaN or infinite; the optimizer step was not taken.

    Args:
        quantity: what is not finite.
        place: where in the trajectory, such as ``"at step 2 of the trajectory"``.
        articles: those of the trajectories concerned, in the order of their ``rows`` in the batch.
    """

    def __init__(
        self, quantity: str, place: str = "", articles: Sequence[ArticleReference] = (), rows: Sequence[int] = ()
    ) -> None:
        super().__init__(quantity, place, articles, rows)
        self.quantity = quantity
        self.articles = tuple(articles)
        self.step: int | None = None
        """The trainer's step, from 1; ``None`` outside of a trainer."""
        self._place = place
        self._rows = tuple(rows)
        self._surroundings: list[str] = []

    def add_place(self, place: str, articles: Sequence[ArticleReference] = (), step: int | None = None) -> None:
        """Say where that was, from the inside out, until the trainer's step is known.

        Args:
            place: what follows "in", such as ``"the update of step 3"``, which names ``step``.
            articles: used only if the error does not know them.
        """
        if self.step is not None:
            return
        self._surroundings.append(place)
        self.articles = self.articles or tuple(articles)
        self.step = step

    def __str__(self) -> str:
        words = [self.quantity, "is not finite"]
        words += [self._place] if self._place else []
        words += [self._named_articles()] if self.articles else []
        where = ", ".join([" ".join(words), *(f"in {place}" for place in self._surroundings)])
        return (
            f"{where}. The optimizer step was not taken, and nothing of this step was recorded. Check the model's "
            "weights and their precision; a lower learning_rate or float32 weights may help."
        )

    def _named_articles(self) -> str:
        names = list(dict.fromkeys(f"{article.title!r} ({article.source})" for article in self.articles))
        text = f"for article{'s' if len(names) > 1 else ''} {', '.join(names)}"
        if self._rows:
            text += f", row{'s' if len(self._rows) > 1 else ''} {', '.join(map(str, self._rows))}"
        return text


@contextmanager
def located(place: str, articles: Sequence[ArticleReference] = ()) -> Iterator[None]:
    """Add a place to a `NonFiniteError` raised inside; see `NonFiniteError.add_place`."""
    try:
        yield
    except NonFiniteError as error:
        error.add_place(place, articles)
        raise


def expect_finite(
    quantities: Mapping[str, Tensor], articles: Sequence[ArticleReference] = (), *, trajectory_step: int | None = None
) -> None:
    """Refuse numbers that are NaN or infinite, with one transfer from the device for all of them.

    Args:
        quantities: ``[B, ...]`` by name, or ``[B, T, ...]`` without ``trajectory_step``. The first that is not finite
            is named, so what the others are computed from comes first.
        trajectory_step: the step that all numbers belong to, from 1; 0 for what comes before the first.

    Raises:
        NonFiniteError: names the quantity, the step of the trajectory and the articles.
    """
    finite = torch.stack([values.isfinite().all() for values in quantities.values()]).tolist()
    if all(finite):
        return
    quantity, values = list(quantities.items())[finite.index(False)]
    bad = ~values.isfinite()
    rows = bad.reshape(len(bad), -1).any(dim=1).nonzero().flatten().tolist()
    step = trajectory_step
    if step is None:
        # The first of any trajectory: what follows it is computed from it.
        step = int(bad.reshape(*bad.shape[:2], -1).any(dim=2).any(dim=0).nonzero()[0]) + 1
    raise NonFiniteError(
        quantity, f"at step {step} of the trajectory", [articles[row] for row in rows] if articles else (), rows
    )


def logit_sums(logits: Tensor) -> Tensor:
    """Sum over the last axis: finite where all logits are and none reaches 1e33; costs a tenth of looking at each."""
    return logits.detach().sum(dim=-1)


# ---- Memory ----

_GIB = 2**30


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory of the process so far: allocated on a CUDA device, else resident in main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / _GIB
    # Linux reports KiB, macOS bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / _GIB


def used_memory_gib(device: torch.device) -> float:
    """Memory in use now: allocated on a CUDA device, else resident in main memory; the peak where there is no /proc."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / _GIB
    status = Path("/proc/self/statm")
    if not status.exists():
        return peak_memory_gib(device)
    return int(status.read_text().split()[1]) * resource.getpagesize() / _GIB


def free_memory_gib(device: torch.device) -> float | None:
    """Memory that is free for a model on the device; ``None`` where the system does not say."""
    if device.type == "cuda":
        # What PyTorch keeps for the next allocation is not free to the system.
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return (torch.cuda.mem_get_info(device)[0] + kept) / _GIB
    table = Path("/proc/meminfo")
    if not table.exists():
        return None
    lines = dict(line.split(":", 1) for line in table.read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024 / _GIB


# ---- Where a run stands ----

_OPTIONS_TO_LOWER = {
    "rollout": "generation_batch_size, num_steps, tokens_per_query or tokens_per_value",
    "filter": "generation_batch_size",
    "update": "training_batch_size or logits_chunk_size",
    "optimizer step": "training_batch_size or logits_chunk_size",
    "evaluation": "generation_batch_size",
    "run": "generation_batch_size",
}
"""The phases of a run, and what takes less memory in each."""


class RunContext:
    """Where a run stands, for the errors of its phases, and how long each phase takes.

    ``sizes`` are those that matter for memory, by name; ``step`` returns the trainer's present step, from 1.
    """

    def __init__(self, device: torch.device, sizes: Mapping[str, int], step: Callable[[], int]) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}
        """How long each phase took the last time."""
        self._sizes = dict(sizes)
        self._step = step

    @property
    def step(self) -> int:
        """The trainer's present step, from 1."""
        return self._step()

    @contextmanager
    def phase(
        self, name: str, rows: int, articles: Sequence[ArticleReference] = (), micro_batch_size: int | None = None
    ) -> Iterator[None]:
        """Time a phase; add where the run stands to a `NonFiniteError`, a runtime or a memory error raised inside.

        ``rows`` is the number of trajectories; ``articles`` are named if a `NonFiniteError` does not know its own.
        """
        started = time.perf_counter()
        try:
            yield
        except NonFiniteError as error:
            error.add_place(f"the {name} of step {self.step}", articles, self.step)
            raise
        except (RuntimeError, MemoryError) as error:
            # An inner phase knows better.
            if not hasattr(error, "__notes__"):
                sizes = {} if micro_batch_size is None else {"trajectories per micro-batch": micro_batch_size}
                error.add_note(self._note(name, sizes | {"trajectories": rows} | self._sizes))
            raise
        self.seconds[name] = time.perf_counter() - started

    def _note(self, phase: str, sizes: Mapping[str, int]) -> str:
        named = ", ".join(f"{key} {value}" for key, value in sizes.items())
        return (
            f"In the {phase} of step {self.step} ({named}); memory in use {used_memory_gib(self.device):.2f} GiB, "
            f"peak {peak_memory_gib(self.device):.2f} GiB on {self.device}. "
            f"If memory ran out, lower {_OPTIONS_TO_LOWER[phase]}."
        )
