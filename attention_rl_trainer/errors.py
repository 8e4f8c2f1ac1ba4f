"""Numbers that must be finite, and the error that says which of them is not, where, and on which article (design §8).

Whoever computes a number knows what it is and at which step of which trajectory; whoever calls adds where that was.
Knows nothing about how a number came about.
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


class NonFiniteError(ArithmeticError):
    """A logit, vector, reward, statistic, loss or gradient is NaN or infinite; the optimizer step was not taken.

    Args:
        quantity: what is not finite.
        place: where in the trajectory, for instance ``"at step 2 of the trajectory"``.
        articles: the articles of the trajectories concerned.
        rows: their rows in the batch.

    Attributes:
        quantity: what is not finite.
        articles: the articles of the trajectories concerned, in the order of their rows.
        step: the trainer's step, from 1; ``None`` outside of a trainer.
    """

    def __init__(
        self, quantity: str, place: str = "", articles: Sequence[ArticleReference] = (), rows: Sequence[int] = ()
    ) -> None:
        super().__init__(quantity, place, articles, rows)
        self.quantity = quantity
        self.articles = tuple(articles)
        self.step: int | None = None
        self._place = place
        self._rows = tuple(rows)
        self._surroundings: list[str] = []

    def add_place(self, place: str, articles: Sequence[ArticleReference] = (), step: int | None = None) -> None:
        """Say where that was, from the inside out; nothing is added once the trainer's step is known.

        Args:
            place: what follows "in", for instance ``"the update of step 3"``.
            articles: the articles concerned, unless they are known.
            step: the trainer's step, where ``place`` names it.
        """
        if self.step is not None:
            return
        self._surroundings.append(place)
        self.articles = self.articles or tuple(articles)
        self.step = step

    def __str__(self) -> str:
        """Name quantity, place, articles and the way out."""
        words = [self.quantity, "is not finite"]
        words += [self._place] if self._place else []
        words += [self._named_articles()] if self.articles else []
        where = ", ".join([" ".join(words), *(f"in {place}" for place in self._surroundings)])
        return (
            f"{where}. The optimizer step was not taken, and nothing of it was recorded. Check the model's weights and "
            "precision; a lower learning_rate or float32 weights may help"
        )

    def _named_articles(self) -> str:
        names = list(dict.fromkeys(f"{article.title!r} ({article.source})" for article in self.articles))
        text = f"on article{'s' if len(names) > 1 else ''} {', '.join(names)}"
        if self._rows:
            text += f", row{'s' if len(self._rows) > 1 else ''} {', '.join(map(str, self._rows))}"
        return text


@contextmanager
def located(place: str, articles: Sequence[ArticleReference] = ()) -> Iterator[None]:
    """Add a place to a `NonFiniteError` raised inside.

    Args:
        place: what follows "in", for instance ``"micro-batch 2"``.
        articles: the articles concerned, unless the error knows them.
    """
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
        quantities: numbers by name, ``[B, ...]``, or ``[B, T, ...]`` where ``trajectory_step`` is not given. The first
            that is not finite is named, so what the others are computed from goes first.
        articles: of the B trajectories; may be empty.
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
    """Sum logits: finite where every one of them is, at a tenth of the cost of looking at each.

    Args:
        logits: ``[..., A]`` in float32. A sum beyond float32's range needs logits of 1e33 and more.

    Returns:
        ``[...]``, without graph.
    """
    return logits.detach().sum(dim=-1)


_GIB = 2**30


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory of the process so far: allocated on a CUDA device, else resident in main memory.

    Args:
        device: where the model lies.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / _GIB
    # Linux reports KiB, macOS bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / _GIB


def used_memory_gib(device: torch.device) -> float:
    """Memory in use now: allocated on a CUDA device, else resident in main memory where the system tells.

    Args:
        device: where the model lies.
    """
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / _GIB
    status = Path("/proc/self/statm")
    if not status.exists():
        return peak_memory_gib(device)
    return int(status.read_text().split()[1]) * resource.getpagesize() / _GIB


def free_memory_gib(device: torch.device) -> float | None:
    """Memory that is free for the model's device, or ``None`` where the system does not tell.

    Args:
        device: where the model lies.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / _GIB
    table = Path("/proc/meminfo")
    if not table.exists():
        return None
    lines = dict(line.split(":", 1) for line in table.read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024 / _GIB


_OPTIONS_TO_LOWER = {
    "rollout": "generation_batch_size, num_steps, tokens_per_query or tokens_per_value",
    "filter": "generation_batch_size",
    "update": "training_batch_size or logits_chunk_size",
    "optimizer step": "training_batch_size or logits_chunk_size",
    "evaluation": "generation_batch_size",
    "run": "generation_batch_size",
}
"""What takes less memory in each phase of a run."""


class RunContext:
    """Where a run stands: for the errors of its phases, and for their times.

    Args:
        device: where the model is.
        sizes: what matters for memory, by name.
        step: returns the trainer's present step, from 1.

    Attributes:
        seconds: how long each phase took the last time it ended.
    """

    def __init__(self, device: torch.device, sizes: Mapping[str, int], step: Callable[[], int]) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}
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
        """Name a phase in the errors raised inside, and time it.

        Args:
            name: one of those whose options to lower are known.
            rows: trajectories.
            articles: what is read, for an error that does not know it.
            micro_batch_size: trajectories of a micro-batch.
        """
        sizes = {} if micro_batch_size is None else {"trajectories per micro-batch": micro_batch_size}
        sizes |= {"trajectories": rows} | self._sizes
        started = time.perf_counter()
        with phase(name, self.step, self.device, sizes, _OPTIONS_TO_LOWER[name], articles):
            yield
        self.seconds[name] = time.perf_counter() - started


@contextmanager
def phase(
    name: str,
    step: int,
    device: torch.device,
    shapes: Mapping[str, int],
    options: str,
    articles: Sequence[ArticleReference] = (),
) -> Iterator[None]:
    """Add the state of the run to a runtime or memory error raised inside, and the step to a `NonFiniteError`.

    Args:
        name: what is being done.
        step: the trainer's step, from 1.
        device: where the model lies.
        shapes: sizes that matter for memory, by name.
        options: which options to lower when memory runs out.
        articles: what is read, for an error that does not know it.
    """
    try:
        yield
    except NonFiniteError as error:
        error.add_place(f"the {name} of step {step}", articles, step)
        raise
    except (RuntimeError, MemoryError) as error:
        # An inner phase knows better.
        if hasattr(error, "__notes__"):
            raise
        sizes = ", ".join(f"{key} {value}" for key, value in shapes.items())
        error.add_note(
            f"In the {name} of step {step} ({sizes}); memory in use {used_memory_gib(device):.2f} GiB, "
            f"peak {peak_memory_gib(device):.2f} GiB on {device}. If memory ran out, lower {options}."
        )
        raise


class BaseModelError(RuntimeError):
    """A base model or its tokenizer cannot be used; the message names the way out."""
