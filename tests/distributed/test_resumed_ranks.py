"""Runs of several processes that stop, are stopped, or are killed, and go on in as many or in another number."""

from __future__ import annotations

import functools
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import processes
import pytest
from processes import Job
from ranks import ledger_of, notes_of, run_ranks, start_ranks, train_and_note, wait_for
from safetensors.torch import load_file

from attention_rl_trainer.durability.states import load_tree

pytestmark = pytest.mark.distributed

OPTIONS: dict[str, Any] = {
    "num_episodes": 32,
    "generation_batch_size": 4,
    "save_episodes": 8,
    "warmup_episodes": 1,
    "filter_threshold": 0.0,
    "learning_rate": 2e-4,
    "disable_dropout": False,
}
NO_DROPOUT = OPTIONS | {"disable_dropout": True}
ALONE = NO_DROPOUT | {"generation_batch_size": 8}


def started(folder: Path, run: Path, checkpoint: str, options: dict[str, Any]) -> Job:
    """A job that resumes from a copy of another run as it was at a checkpoint."""
    shutil.copytree(run, folder / "run")
    steps = int(checkpoint.rpartition("-")[2])
    for path in (folder / "run").glob("checkpoint-*"):
        if int(path.name.rpartition("-")[2]) > steps:
            shutil.rmtree(path)
    return Job(folder, options, resume=True)


def run_alone(job: Job, function: Callable[[Job], None] = train_and_note) -> Job:
    assert processes.run(job, function) == 0, (job.folder / "log.txt").read_text()[-3000:]
    return job


def log_of(job: Job) -> str:
    return (job.folder / "log.txt").read_text()


def bytes_of(job: Job) -> dict[str, bytes]:
    names = ("adapter_model.safetensors", "trajectories.jsonl")
    return {name: (job.run / name).read_bytes() for name in names}


def expect_same(found: Job, expected: Job) -> None:
    tensors, others = (load_file(job.run / "adapter_model.safetensors") for job in (found, expected))
    for name, tensor in tensors.items():
        assert (tensor - others[name]).abs().max() <= 1e-5
    exact = ("episode", "title", "order", "queries", "verdict")
    rows, expected_rows = ledger_of(found.run), ledger_of(expected.run)
    assert [[row[name] for name in exact] for row in rows] == [[row[name] for name in exact] for row in expected_rows]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A run of two processes, which draw dropout."""
    job = Job(tmp_path_factory.mktemp("two"), OPTIONS)
    run_ranks(job, 2)
    return job


@pytest.fixture(scope="module")
def two_plain(tmp_path_factory: pytest.TempPathFactory) -> Job:
    job = Job(tmp_path_factory.mktemp("plain"), NO_DROPOUT)
    run_ranks(job, 2)
    return job


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return run_alone(Job(tmp_path_factory.mktemp("one"), ALONE))


def test_two_processes_resume_exactly(two: Job, tmp_path: Path) -> None:
    job = started(tmp_path / "again", two.run, "checkpoint-2", OPTIONS)
    run_ranks(job, 2)
    assert bytes_of(job) == bytes_of(two)
    for found, expected in zip(notes_of(job.folder, 2), notes_of(two.folder, 2), strict=True):
        assert found["random"] == expected["random"]
        assert found["statistics"] == expected["statistics"][2:]
        assert found["adapters"] == expected["adapters"][2:]


def test_each_process_has_random_numbers_of_its_own(two: Job) -> None:
    states = load_tree(two.run / "checkpoint-2" / "random_states.safetensors")
    assert len(states) == 2
    first, second = notes_of(two.folder, 2)
    assert first["random"] != second["random"]


def test_what_two_began_one_ends(two_plain: Job, one: Job, tmp_path: Path) -> None:
    job = run_alone(started(tmp_path / "again", two_plain.run, "checkpoint-2", ALONE))
    expect_same(job, two_plain)
    expect_same(job, one)


def test_what_one_began_two_end(two_plain: Job, one: Job, tmp_path: Path) -> None:
    job = started(tmp_path / "again", one.run, "checkpoint-1", NO_DROPOUT)
    run_ranks(job, 2)
    expect_same(job, one)
    expect_same(job, two_plain)


def test_where_dropout_is_drawn_another_number_of_processes_is_refused(two: Job, tmp_path: Path) -> None:
    options = OPTIONS | {"generation_batch_size": 8}
    job = started(tmp_path / "again", two.run, "checkpoint-2", options)
    assert processes.run(job) == 1
    assert "processes: 2 there, 1 here" in log_of(job)


def _signalled(job: Job, rank: int, number: signal.Signals) -> None:
    """Train; one of the processes gets a signal in its third step."""
    from attention_rl_trainer.rollout.sampler import TrajectorySampler

    sample, calls = TrajectorySampler.sample, [0]

    def sample_after_signal(self: TrajectorySampler, *args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if int(os.environ["RANK"]) == rank and calls[0] == 3:
            os.kill(os.getpid(), number)
        return sample(self, *args, **kwargs)

    TrajectorySampler.sample = sample_after_signal  # type: ignore[method-assign]
    train_and_note(job)


@pytest.mark.parametrize("rank", [0, 1])
def test_where_one_is_killed_the_others_end_and_the_run_resumes(rank: int, two: Job, tmp_path: Path) -> None:
    job = Job(tmp_path / "killed", OPTIONS)
    begun = time.monotonic()
    codes = wait_for(start_ranks(job, 2, functools.partial(_signalled, rank=rank, number=signal.SIGKILL)), 60)
    assert codes[rank] == -signal.SIGKILL
    assert codes[1 - rank] == 1
    assert time.monotonic() - begun < 60
    assert "another process of the run has failed or has ended" in log_of(job)
    resumed = Job(job.folder, OPTIONS, resume=True)
    run_ranks(resumed, 2)
    assert bytes_of(resumed) == bytes_of(two)


def _watched(job: Job) -> None:
    """Train; the first process dies at the job's write, or notes all writes."""
    from attention_rl_trainer.trainer import AttentionGuidedRLTrainer

    assert AttentionGuidedRLTrainer
    if int(os.environ["RANK"]) == 0:
        processes.watch_writes(job)
    train_and_note(job)


@pytest.fixture(scope="module")
def num_writes(tmp_path_factory: pytest.TempPathFactory) -> int:
    folder = tmp_path_factory.mktemp("watched")
    job = Job(folder, OPTIONS, events_file=folder / "events.txt")
    run_ranks(job, 2, _watched)
    return len((folder / "events.txt").read_text().splitlines())


@pytest.mark.parametrize("part", range(1, 9))
def test_killed_at_a_write(part: int, num_writes: int, two: Job, tmp_path: Path) -> None:
    at = num_writes * part // 9
    job = Job(tmp_path / "killed", OPTIONS, die_at=at)
    codes = wait_for(start_ranks(job, 2, _watched), 60)
    assert codes[0] == -signal.SIGKILL
    # The last writes come after the last step, when the other has nothing to wait for.
    assert codes[1] == (0 if part == 8 else 1)
    resumed = Job(job.folder, OPTIONS, resume=True)
    begun = any((job.run).glob("checkpoint-*"))
    run_ranks(resumed if begun else Job(job.folder, OPTIONS), 2)
    assert bytes_of(resumed) == bytes_of(two)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_process_stops_all_with_a_checkpoint(rank: int, two: Job, tmp_path: Path) -> None:
    job = Job(tmp_path / "stopped", OPTIONS)
    codes = wait_for(start_ranks(job, 2, functools.partial(_signalled, rank=rank, number=signal.SIGTERM)), 60)
    assert codes == [143, 143]
    assert (job.run / "checkpoint-3").is_dir()
    resumed = Job(job.folder, OPTIONS, resume=True)
    run_ranks(resumed, 2)
    assert bytes_of(resumed) == bytes_of(two)


def test_a_start_that_fails_fails_in_all_processes(tmp_path: Path) -> None:
    job = Job(tmp_path / "short", OPTIONS | {"num_kv_pairs": 4000})
    codes = wait_for(start_ranks(job, 2, train_and_note), 60)
    assert codes == [1, 1]
    log = log_of(job)
    assert "no article is long enough" in log
    assert "the first process failed: ValueError: no article is long enough" in log
