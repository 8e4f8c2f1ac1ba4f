"""Where a run stands when something fails: phase, shapes, memory, and which option to lower (design §10).

Notes are added to the exception that is raised anyway, so its type stays what callers catch. Knows nothing about what
the phases do.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from attention_rl_trainer.finiteness import NonFiniteError
from attention_rl_trainer.pairs import ArticleReference

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
