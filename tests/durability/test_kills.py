"""A run that is killed resumes by ``--resume`` with nobody's help, wherever it was, and learns the same.

Real processes, real SIGKILL: at every write of a run from its first to its last, safetensors files torn in half, and at
random moments.
"""

from __future__ import annotations

import itertools
import os
import random
import shutil
import signal
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from processes import Job, adapter_hash, run, start

from attention_rl_trainer.durability.manifest import find_damage
from attention_rl_trainer.durability.staging import list_checkpoints
from attention_rl_trainer.records.ledger import read_ledger

EPISODES = 24
OPTIONS = {
    "num_episodes": EPISODES,
    "generation_batch_size": 4,
    # Checkpoints at steps 2, 4 and 6, of which one is kept: the others are rotated away.
    "save_episodes": 8,
    "save_total_limit": 1,
    "warmup_episodes": 1,
    "filter_threshold": float("-inf"),
}
CHUNKS = 12
MOMENTS = 50


@dataclass(frozen=True)
class Reference:
    """A run that nobody killed."""

    adapter: str
    events: list[str]
    seconds: float


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    folder = tmp_path_factory.mktemp("reference")
    job = Job(folder, OPTIONS, events_file=folder / "events.txt")
    process = start(job)
    wait_for_config(job)
    began = time.monotonic()
    process.join()
    assert process.exitcode == 0, (folder / "log.txt").read_text()
    events = (folder / "events.txt").read_text().splitlines()
    return Reference(adapter_hash(job), events, time.monotonic() - began)


def wait_for_config(job: Job) -> None:
    deadline = time.monotonic() + 120
    while not (job.run / "attention_rl_config.json").exists():
        assert time.monotonic() < deadline, "the run did not begin"
        time.sleep(0.002)


def expect_resumes(job: Job, reference: Reference) -> None:
    """Resume a killed run, and compare what it learned with the run that nobody killed."""
    log = job.folder / "log.txt"
    resumed = replace(job, resume=True, die_at=-1, events_file=None)
    assert run(resumed) == 0, log.read_text()
    assert adapter_hash(resumed) == reference.adapter
    assert [row.episode for row in read_ledger(job.run / "trajectories.jsonl")] == list(range(EPISODES))
    (checkpoint,) = list_checkpoints(job.run)
    assert checkpoint.name == "checkpoint-6"
    assert not find_damage(checkpoint)
    assert not list(job.run.glob("_staging-*")) + list(job.run.glob("_trash-*"))


def kill_at(event: int, folder: Path, reference: Reference, *, tear: bool = False) -> None:
    job = Job(folder, OPTIONS, die_at=event, tear=tear, events_file=folder / "events.txt")
    folder.mkdir(parents=True)
    assert run(job) == -signal.SIGKILL
    assert (folder / "events.txt").read_text().splitlines() == reference.events[: event + 1]
    expect_resumes(job, reference)
    shutil.rmtree(folder)


def event_of(reference: Reference, name: str) -> int:
    return reference.events.index(name)


@pytest.mark.parametrize(
    "event",
    [
        pytest.param("torn _staging-checkpoint-2/optimizer.safetensors", id="in the first checkpoint"),
        pytest.param("os.rename _staging-checkpoint-4", id="before the rename"),
        pytest.param("os.rename checkpoint-2", id="after the rename, before the rotation"),
    ],
)
def test_killed_while_it_writes_a_checkpoint(event: str, tmp_path: Path, reference: Reference) -> None:
    kill_at(event_of(reference, event), tmp_path / "killed", reference)


@pytest.mark.slow
@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_killed_at_every_write(chunk: int, tmp_path: Path, reference: Reference) -> None:
    # Before its options are written a run has not begun, and --resume says so.
    first = event_of(reference, "open attention_rl_config.json") + 1
    points = range(first + chunk, len(reference.events), CHUNKS)
    assert len(points) >= 5
    for event in points:
        kill_at(event, tmp_path / str(event), reference)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("step", [2, 4])
def test_killed_with_each_file_of_a_checkpoint_in_half(step: int, tmp_path: Path, reference: Reference) -> None:
    place = f" _staging-checkpoint-{step}"
    points = [number for number, event in enumerate(reference.events) if place in event]
    assert len(points) >= 12
    # At each write, and at what comes after the last one, the file before is torn.
    for event in (*points[1:], points[-1] + 1):
        kill_at(event, tmp_path / str(event), reference, tear=True)


@pytest.mark.slow
@pytest.mark.parametrize("chunk", range(5))
def test_killed_at_random_moments(chunk: int, tmp_path: Path, reference: Reference) -> None:
    moments, killed = random.Random(chunk), 0
    for number in itertools.count():
        job = Job(tmp_path / str(number), OPTIONS)
        process = start(job)
        wait_for_config(job)
        time.sleep(moments.uniform(0, reference.seconds))
        assert process.pid is not None
        with suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
        process.join()
        # A run that was faster than the reference has ended by itself, which resuming must not change either.
        assert process.exitcode in (-signal.SIGKILL, 0)
        killed += process.exitcode == -signal.SIGKILL
        expect_resumes(job, reference)
        if killed == MOMENTS // 5:
            break
        assert number < 3 * MOMENTS, "the moments are after the end of the run"


REPORTING = OPTIONS | {
    "report_at_end": True,
    "eval_strategy": "steps",
    "eval_steps": 3,
    "eval_episodes": 4,
    "eval_order_episodes": 2,
}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_at_the_writes_of_evaluations_and_of_the_report(tmp_path: Path) -> None:
    whole = Job(tmp_path / "whole", REPORTING, events_file=tmp_path / "events.txt")
    assert run(whole) == 0, (whole.folder / "log.txt").read_text()
    events = (tmp_path / "events.txt").read_text().splitlines()
    points = [number for number, event in enumerate(events) if "report/" in event or "evaluation/" in event]
    assert len(points) >= 12
    names = {str(path.relative_to(whole.run)) for path in whole.run.rglob("*") if path.is_file()}
    assert {"report/summary.md", "report/gains.png", "evaluation/eval/evaluation.md"} <= names
    for event in points:
        job = Job(tmp_path / str(event), REPORTING, die_at=event)
        assert run(job) == -signal.SIGKILL
        assert run(replace(job, resume=True, die_at=-1)) == 0, (job.folder / "log.txt").read_text()
        assert adapter_hash(job) == adapter_hash(whole)
        assert {str(path.relative_to(job.run)) for path in job.run.rglob("*") if path.is_file()} == names, events[event]
        for name in ("evaluation/eval/evaluation.json", "trajectories.jsonl"):
            assert (job.run / name).read_bytes() == (whole.run / name).read_bytes()
        shutil.rmtree(job.folder)


@pytest.mark.slow
def test_killed_again_and_again(tmp_path: Path, reference: Reference) -> None:
    job = Job(tmp_path, OPTIONS, die_at=event_of(reference, "open _staging-checkpoint-2/manifest.json"))
    assert run(job) == -signal.SIGKILL
    for event in (3, 10, 20):
        assert run(replace(job, resume=True, die_at=event)) == -signal.SIGKILL
    expect_resumes(job, reference)
