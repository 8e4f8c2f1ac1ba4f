"""Runs of several processes over gloo, each forked from a server that holds the imports; see `processes`."""

from __future__ import annotations

import functools
import json
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import processes
import torch
from processes import Job, build_trainer
from torch import Tensor
from torch import distributed as dist
from transformers import TrainerCallback

from attention_rl_trainer.durability.weights import adapter_digest
from attention_rl_trainer.trainer import AttentionGuidedRLTrainer
from attention_rl_trainer.update.filter import RewardFilter, Verdict

COLLECTIVES = ("all_gather_object", "broadcast_object_list", "all_reduce")


def start_ranks(job: Job, count: int, function: Callable[[Job], None]) -> list[ForkServerProcess]:
    """Start the processes of a run without waiting for them; what each prints goes to ``<folder>/log.txt``."""
    # A file, in which they find one another, needs no port that somebody else may take.
    meeting = Path(tempfile.mkdtemp()) / "meeting"
    return [processes.start(job, functools.partial(_as_rank, rank, count, meeting, function)) for rank in range(count)]


def wait_for(ranks: list[ForkServerProcess], seconds: float) -> list[int | None]:
    """Wait for processes at most so long; returns their exit codes, ``None`` for one that hangs, which is ended."""
    end = time.monotonic() + seconds
    for rank in ranks:
        rank.join(timeout=max(0.1, end - time.monotonic()))
    codes = [rank.exitcode for rank in ranks]
    for rank in ranks:
        rank.kill()
    return codes


def run_ranks(job: Job, count: int, function: Callable[[Job], None] | None = None, seconds: float = 60) -> None:
    """Run the processes of a run to their end.

    Raises:
        AssertionError: one failed or did not end.
    """
    codes = wait_for(start_ranks(job, count, function or train_and_note), seconds)
    assert codes == [0] * count, (codes, (job.folder / "log.txt").read_text()[-3000:])


def _as_rank(rank: int, count: int, meeting: Path, function: Callable[[Job], None], job: Job) -> None:
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    os.environ.update({name: str(value) for name, value in places.items()}, GLOO_SOCKET_IFNAME="lo")
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=count)
    # As the launchers set it; the tests may run on a machine with other busy processes.
    torch.set_num_threads(1)
    function(job)


class Notes(TrainerCallback):
    """Notes the adapter's hash after every step, and what the parts of the run held."""

    def __init__(self, trainer: AttentionGuidedRLTrainer) -> None:
        self.trainer = trainer
        self.adapters: list[str] = []
        self.statistics: list[Any] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.adapters.append(adapter_digest(self.trainer.policy.model))
        self.statistics.append(self.trainer.filter.state_dict())


def train_and_note(job: Job, kept: Sequence[int] | None = None) -> None:
    """Train and save; each process leaves ``<folder>/rank-<number>.json``.

    Args:
        kept: how many trajectories of each process are kept in every batch; by default the options say which.
    """
    job.folder.mkdir(exist_ok=True)
    trainer = build_trainer(job)
    if kept is not None:
        trainer.filter = Pattern(kept)
    notes, counts = Notes(trainer), _count_collectives()
    trainer.add_callback(notes)
    trainer.train(resume_from_checkpoint=job.resume)
    trainer.save_model()
    found = {
        "world_size": trainer.args.world_size,
        "adapters": notes.adapters,
        "statistics": notes.statistics,
        "collectives": counts,
        "logs": trainer.state.log_history,
        "random": torch.get_rng_state().tolist()[:64],
    }
    (job.folder / f"rank-{trainer.args.process_index}.json").write_text(json.dumps(found))


def notes_of(folder: Path, count: int) -> list[dict[str, Any]]:
    """Read what `train_and_note` left."""
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(count)]


def train_variants(job: Job, variants: Mapping[str, tuple[Job, Sequence[int] | None]]) -> None:
    """Train several runs one after the other, each in a folder of its name; see `train_and_note`."""
    for name, (variant, kept) in variants.items():
        train_and_note(replace(variant, folder=job.folder / name), kept)


_COUNTS: Counter[str] = Counter()


def _count_collectives() -> Counter[str]:
    """Count what this process calls from now on."""
    is_first = not _COUNTS
    _COUNTS.clear()
    _COUNTS.update(dict.fromkeys(COLLECTIVES, 0))
    if not is_first:
        return _COUNTS

    def counted(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def count(*args: Any, **kwargs: Any) -> Any:
            _COUNTS[name] += 1
            return call(*args, **kwargs)

        return count

    for name in COLLECTIVES:
        setattr(dist, name, counted(name, getattr(dist, name)))
    return _COUNTS


class Pattern(RewardFilter):
    """Keeps a given number of each process's trajectories, the first ones."""

    def __init__(self, kept: Sequence[int]) -> None:
        super().__init__()
        self.kept = kept

    def judge(self, rewards: Tensor) -> Verdict:
        each = len(rewards) // len(self.kept)
        keep = torch.cat([torch.arange(each) < number for number in self.kept])
        history = replace(self.statistics)
        self.statistics.update(rewards)
        return Verdict(keep, history, replace(self.statistics))


def ledger_of(folder: Path) -> list[dict[str, Any]]:
    """Read the rows of a run's ledger."""
    lines = (folder / "trajectories.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]
