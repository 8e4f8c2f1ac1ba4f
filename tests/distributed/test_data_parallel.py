"""A run of several processes is the run that one process would make of the same trajectories."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import processes
import pytest
from processes import Job
from ranks import ledger_of, notes_of, run_ranks, train_variants
from safetensors.torch import load_file

from attention_rl_trainer.probing.calibrated import CALIBRATED

pytestmark = pytest.mark.distributed

ALWAYS = float("-inf")
NOWHERE = Path()
Variants: TypeAlias = Mapping[str, tuple[Job, Sequence[int] | None]]


def variant(
    kept: Sequence[int] | None = None, *, streaming: bool = False, entries: bool = False, **options: Any
) -> tuple[Job, Sequence[int] | None]:
    defaults = {"num_episodes": 24, "generation_batch_size": 4, "save_episodes": 8, "warmup_episodes": 1}
    # Adam divides a small gradient by its own size: its rounding shows in proportion to the learning rate.
    plain = {"training_batch_size": 4, "filter_threshold": 0.0, "disable_dropout": True, "learning_rate": 2e-4}
    return Job(NOWHERE, defaults | plain | options, streaming=streaming, entries=entries), kept


RUNS: Variants = {
    "as it is": variant(),
    "streamed": variant(streaming=True),
    "entries": variant(entries=True, num_steps=2),
    "iterations": variant(num_iterations=3, beta=0.5),
    "accumulated": variant(gradient_accumulation_steps=2, filter_threshold=ALWAYS),
    "a cut batch": variant(num_episodes=19),
    "fewer than processes": variant(num_episodes=17, filter_threshold=ALWAYS),
    "warm start": variant(warm_start_episodes=16, warm_start_mismatch=0.3),
    "micro-batches": variant(training_batch_size=1),
    "checkpointed": variant(gradient_checkpointing=True),
    "selector": variant(selector_coef=0.5, reward_gradient_coef=2.0),
    "information": variant(information_coef=1.0, selector_coef=0.5, selector_gradient="distilled"),
    "groups": variant(num_queries=2, credit="step", selector_coef=0.5),
    "told first": variant(warm_start_episodes=16, warm_start_temperature=0.01),
    "article order first": variant(warm_start_episodes=16, warm_start_order="article"),
    "calibrated": variant(**CALIBRATED, calibration_memories=6),
    "logged rarely": variant(logging_steps=2),
}
PATTERNS: Variants = {
    f"{first} and {second}": variant((first, second), num_episodes=16)
    for first, second in ((0, 0), (0, 4), (4, 0), (1, 3), (3, 1), (4, 4), (0, 1), (2, 0))
}
OF_TWO = RUNS | PATTERNS


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of two processes with four trajectories each."""
    job = Job(tmp_path_factory.mktemp("two"))
    run_ranks(job, 2, functools.partial(train_variants, variants=OF_TWO), seconds=300)
    return job.folder


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in one process, whose batches are those of both."""
    return run_alone(tmp_path_factory.mktemp("one"), OF_TWO, count=2)


def run_alone(folder: Path, variants: Variants, count: int) -> Path:
    whole = {
        name: (replace(job, options=job.options | {"generation_batch_size": 4 * count}), kept)
        for name, (job, kept) in variants.items()
    }
    job = Job(folder)
    code = processes.run(job, functools.partial(train_variants, variants=whole))
    assert code == 0, (folder / "log.txt").read_text()[-3000:]
    return folder


def expect_same_run(found: Path, expected: Path, num_processes: int) -> None:
    """Compare the adapters, the ledgers and the logs of two runs; within each, the processes."""
    notes, (alone,) = notes_of(found, num_processes), notes_of(expected, 1)
    for other in notes[1:]:
        assert other["adapters"] == notes[0]["adapters"]
        assert other["statistics"] == notes[0]["statistics"]
        assert other["collectives"] == notes[0]["collectives"]
    assert {item["world_size"] for item in notes} == {num_processes}
    expect_same_adapter(found / "run", expected / "run")
    rows, others = ledger_of(found / "run"), ledger_of(expected / "run")
    assert [row["episode"] for row in rows] == list(range(len(others)))
    exact = ("title", "order", "queries", "verdict", "pair_numbers", "step", "epoch")
    for row, other in zip(rows, others, strict=True):
        assert {name: row[name] for name in exact} == {name: other[name] for name in exact}
        assert row["reward"] == pytest.approx(other["reward"], abs=1e-5)
    # What queries of a batch are to one another is measured within each process's share of it.
    within = {"query_diversity", "selection_information", "query_bound"}
    free = within | {"tokens_per_second", "rollout_seconds", "update_seconds", "peak_memory_gib"}
    for log, other in zip(notes[0]["logs"], alone["logs"], strict=True):
        compared = other.keys() - free - {name for name in other if name.startswith("train_")}
        assert log.keys() >= compared
        for name in compared:
            assert log[name] == pytest.approx(other[name], abs=2e-5), name


def expect_same_adapter(first: Path, second: Path, tolerance: float = 1e-5) -> None:
    name = "adapter_model.safetensors"
    found, expected = load_file(first / name), load_file(second / name)
    assert found.keys() == expected.keys()
    for key, tensor in found.items():
        assert (tensor - expected[key]).abs().max() <= tolerance, key


@pytest.mark.parametrize("name", OF_TWO)
def test_two_processes_are_as_one(name: str, two: Path, one: Path) -> None:
    expect_same_run(two / name, one / name, 2)


def test_the_runs_learn_something(two: Path) -> None:
    for name, (_, kept) in OF_TWO.items():
        adapters = notes_of(two / name, 2)[0]["adapters"]
        assert (len(set(adapters)) > 1) == (kept is None or sum(kept) > 0), name


def test_one_of_four_processes_keeps_all(tmp_path: Path) -> None:
    variants = {"four": variant((0, 0, 4, 0), num_episodes=32)}
    job = Job(tmp_path / "ranks")
    run_ranks(job, 4, functools.partial(train_variants, variants=variants))
    expect_same_run(job.folder / "four", run_alone(tmp_path / "alone", variants, count=4) / "four", 4)
