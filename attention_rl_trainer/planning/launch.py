"""How a run was launched: its processes, and the threads of each (design §10)."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch

# What accelerate and torchrun leave in an environment; both set OMP_NUM_THREADS to 1 where nobody did.
_LAUNCHERS = ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID")


def available_cores() -> int:
    """Count the CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def local_processes(environment: Mapping[str, str] = os.environ) -> int:
    """Count the processes of the run on this machine."""
    return int(environment.get("LOCAL_WORLD_SIZE", "1"))


def choose_threads(
    asked: int | None, environment: Mapping[str, str] = os.environ, num_cores: int | None = None
) -> int | None:
    """Choose the threads of a process; ``None`` leaves what PyTorch took.

    Args:
        asked: as an option says, if it does.
        num_cores: those that may be used; by default those of this machine.

    Returns:
        What was asked for; else all cores, divided by the processes on this machine, unless ``OMP_NUM_THREADS`` says
        otherwise. A 1 that a launcher set is nobody's choice.
    """
    if asked is not None:
        return asked
    chosen, processes = environment.get("OMP_NUM_THREADS"), local_processes(environment)
    is_launched = any(name in environment for name in _LAUNCHERS)
    if chosen is not None and not (chosen == "1" and is_launched):
        return None
    if chosen is None and processes == 1:
        return None
    return max(1, (available_cores() if num_cores is None else num_cores) // processes)


def set_threads(asked: int | None) -> None:
    """Compute with as many threads as `choose_threads` says."""
    threads = choose_threads(asked)
    if threads is not None:
        torch.set_num_threads(threads)


def expect_processes(asked: int | None, count: int) -> None:
    """Refuse a run that was launched in another number of processes than its options ask for.

    Raises:
        ValueError: names both, and the command that starts them.
    """
    if asked is None or asked == count:
        return
    raise ValueError(
        f"num_processes is {asked}, but the run was launched in {count}; launch with accelerate launch --multi_gpu "
        f"--num_processes {asked} (also without a GPU: examples/accelerate_configs/cpu_2.yaml), or leave num_processes "
        "out. accelerate launch --cpu --num_processes starts a single one, without a word"
        if asked > 1
        else f"num_processes is 1, but the run was launched in {count}; launch with accelerate launch --num_processes 1"
    )


def describe_threads(num_cores: int | None = None) -> str:
    """Say how many threads compute, and how many cores lie idle."""
    cores = available_cores() if num_cores is None else num_cores
    threads, processes = torch.get_num_threads(), local_processes()
    idle = cores - threads * processes
    text = f"{threads} thread{'s' if threads > 1 else ''}"
    return f"{text}; {idle} of {cores} cores lie idle, set num_threads" if idle > 0 else text
