"""A run that stopped and resumed equals the one that never stopped, byte for byte; each in a process of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import Job, run

from attention_rl_trainer.durability.states import load_tree
from attention_rl_trainer.records.progress import load_parts
from attention_rl_trainer.types import StreamPosition

STEPS = 12
ARTICLES = 30
BATCH = 5
# Logged every second step, so that some checkpoints are between two logs.
OPTIONS: dict[str, Any] = {
    "num_episodes": STEPS * BATCH,
    "generation_batch_size": BATCH,
    "save_episodes": BATCH,
    "filter_threshold": 0.0,
    "shuffle_buffer_size": 7,
    "logging_steps": 2,
    "lr_scheduler_type": "linear",
    "training_batch_size": 2,
}
# After warm-up an optimizer step needs two batches: the first batch of a run has no history to be judged by, the second
# has, so that the first step trains already.
AFTER_WARMUP = {
    "gradient_accumulation_steps": 2,
    "num_episodes": 2 * STEPS * BATCH,
    "warmup_episodes": 1,
    # Of the second batch some are kept, whatever the rewards of the first.
    "filter_threshold": -1.0,
}
WARMUPS: dict[str, dict[str, Any]] = {"in warm-up": {"warmup_episodes": 40}, "after warm-up": AFTER_WARMUP}
PLACES = {
    "in warm-up": {"first step": 1, "mid-epoch": 3, "epoch border": 6},
    "after warm-up": {"first step": 1, "mid-epoch": 4, "epoch border": 6},
}
OPTIMIZERS = ("adamw_torch", "adamw_bnb_8bit")
SOURCES: dict[str, dict[str, bool]] = {"map": {}, "stream": {"streaming": True}, "entries": {"entries": True}}
# What a clock or the machine's memory says.
MEASURED = {
    "tokens_per_second",
    "rollout_seconds",
    "update_seconds",
    "peak_memory_gib",
    "train_runtime",
    "train_samples_per_second",
    "train_steps_per_second",
}


def whole_run(folder: Path, options: dict[str, Any], **kind: bool) -> tuple[Job, Path]:
    """Run a job of a kind without a stop; its files are in ``<folder>/whole``, and resumed runs are where they were."""
    job = Job(folder / "job", OPTIONS | options, **kind)
    assert run(job) == 0, (job.folder / "log.txt").read_text()
    return job, job.folder.rename(folder / "whole") / "run"


def unmeasured(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in entry.items() if name not in MEASURED} for entry in entries]


def state_of(checkpoint: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((checkpoint / "trainer_state.json").read_text())
    return content | {"log_history": unmeasured(content["log_history"])}


def expect_place(whole: Path, warmup: str, place: str) -> None:
    """Make sure that a checkpoint is where its name says, and that the run trains after it."""
    checkpoint = whole / f"checkpoint-{PLACES[warmup][place]}"
    saved, last = load_parts(checkpoint), load_parts(whole / f"checkpoint-{STEPS}")
    num_updates = saved["updater"]["num_updates"]
    assert (num_updates == 0) == (warmup == "in warm-up")
    assert num_updates < last["updater"]["num_updates"]
    position = StreamPosition.from_dict(saved["progress"]["position"])
    assert (position.index % ARTICLES == 0) == (place == "epoch border"), position
    if place == "first step":
        assert state_of(checkpoint)["global_step"] == 1


def expect_same_files(run_folder: Path, whole: Path) -> None:
    """Compare every file of the last checkpoint, every number that was logged, and the ledger."""
    last = f"checkpoint-{STEPS}"
    names = {path.name for path in (whole / last).iterdir()}
    assert {path.name for path in (run_folder / last).iterdir()} == names
    assert {"adapter_model.safetensors", "optimizer.safetensors", "random_states.safetensors"} <= names
    # The manifest holds the hash of the Trainer's state, and that what was measured.
    for name in ("adapter_model.safetensors", *sorted(names - {"trainer_state.json", "manifest.json"})):
        assert (run_folder / last / name).read_bytes() == (whole / last / name).read_bytes(), name
    assert state_of(run_folder / last) == state_of(whole / last)
    logged = [unmeasured(json.loads((path.parent / "logged.json").read_text())) for path in (run_folder, whole)]
    assert logged[0] == logged[1]
    assert "train_loss" in logged[0][-1]
    assert [entry["step"] for entry in logged[0] if "loss" in entry] == list(range(2, STEPS + 1, 2))
    assert (run_folder / "trajectories.jsonl").read_bytes() == (whole / "trajectories.jsonl").read_bytes()


def prepare(job: Job, whole: Path, step: int) -> Job:
    """Copy a checkpoint and what a run has beside it to where a job resumes from them."""
    shutil.copytree(whole / f"checkpoint-{step}", job.run / f"checkpoint-{step}")
    shutil.copy(whole / "trajectories.jsonl", job.run)
    if (before := whole / "evaluation" / "eval_before_training").is_dir():
        shutil.copytree(before, job.run / "evaluation" / before.name)
    return replace(job, resume=str(job.run / f"checkpoint-{step}"))


def expect_same_end(job: Job, whole: Path, step: int) -> None:
    """Resume from a copy of a checkpoint, and compare."""
    assert run(prepare(job, whole, step)) == 0, (job.folder / "log.txt").read_text()
    expect_same_files(job.run, whole)
    shutil.rmtree(job.folder)


def test_a_resumed_process_ends_like_the_whole_run(tmp_path: Path) -> None:
    job, whole = whole_run(tmp_path, AFTER_WARMUP, streaming=True)
    for place in ("first step", "epoch border"):
        expect_place(whole, "after warm-up", place)
        expect_same_end(job, whole, PLACES["after warm-up"][place])


def precisions(tree: object) -> Iterator[torch.dtype]:
    if isinstance(tree, dict):
        for branch in tree.values():
            yield from precisions(branch)
    elif isinstance(tree, torch.Tensor):
        yield tree.dtype


@pytest.mark.slow
@pytest.mark.parametrize("optim", OPTIMIZERS)
@pytest.mark.parametrize("warmup", WARMUPS)
@pytest.mark.parametrize("source", SOURCES)
def test_every_kind_of_resumed_run_ends_like_the_whole_run(
    source: str, warmup: str, optim: str, tmp_path: Path
) -> None:
    is_8bit = "8bit" in optim
    job, whole = whole_run(tmp_path, WARMUPS[warmup] | {"optim": optim}, **SOURCES[source], wide=is_8bit)
    optimizer = load_tree(whole / f"checkpoint-{STEPS}" / "optimizer.safetensors")["optimizer"]
    assert (torch.uint8 in set(precisions(optimizer["state"]))) == is_8bit
    for place, step in PLACES[warmup].items():
        expect_place(whole, warmup, place)
        expect_same_end(job, whole, step)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_what_else_a_step_leaves_behind(tmp_path: Path) -> None:
    """Updates over two rollouts, done twice, with dropout from the global random state, and a worker reading ahead."""
    options = AFTER_WARMUP | {
        "num_iterations": 2,
        "disable_dropout": False,
        "dataloader_num_workers": 1,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "eval_on_start": True,
        "eval_episodes": 4,
        "eval_order_episodes": 2,
    }
    job, whole = whole_run(tmp_path, options)
    for step in PLACES["after warm-up"].values():
        expect_same_end(job, whole, step)


# A program of its own, since what is forked from one server has that server's hash seed.
PROCESS = """
import sys

sys.path[:0] = {path!r}
from pathlib import Path

from processes import Job, train

train(Job(Path({folder!r}), {options!r}, resume={resume!r}))
"""


@pytest.mark.slow
def test_the_order_of_sets_leaves_no_trace(tmp_path: Path) -> None:
    """Strings hash, and sets are ordered, differently in each process."""

    def run_program(job: Job, hash_seed: str) -> None:
        program = PROCESS.format(path=sys.path, folder=str(job.folder), options=job.options, resume=job.resume)
        environment = os.environ | {"PYTHONHASHSEED": hash_seed, "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, "-c", program], env=environment, check=True, timeout=240)

    job = Job(tmp_path / "job", OPTIONS | AFTER_WARMUP)
    run_program(job, "1")
    whole = job.folder.rename(tmp_path / "whole") / "run"
    run_program(prepare(job, whole, 4), "2")
    expect_same_files(job.run, whole)


def test_the_comparison_sees_another_learning_rate(tmp_path: Path) -> None:
    """What the tests above rest on, and what is promised of options that may change: they act."""
    job, whole = whole_run(tmp_path, {"warmup_episodes": 1})
    other = replace(job, options=job.options | {"learning_rate": 2e-2})
    with pytest.raises(AssertionError, match=r"adapter_model\.safetensors"):
        expect_same_end(other, whole, 6)
    assert "learning_rate (0.01 there, 0.02 here)" in (job.folder / "log.txt").read_text()
    state = json.loads((job.run / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    rates = {entry["step"]: entry["learning_rate"] for entry in state["log_history"] if "learning_rate" in entry}
    assert rates == pytest.approx(
        {step: (1e-2 if step <= 6 else 2e-2) * (1 - (step - 1) / STEPS) for step in range(2, STEPS + 1, 2)}
    )


@pytest.mark.slow
def test_a_longer_run_has_its_own_schedule(tmp_path: Path) -> None:
    job, whole = whole_run(tmp_path, {"warmup_episodes": 1})
    job.run.mkdir(parents=True)
    shutil.copytree(whole / f"checkpoint-{STEPS}", job.run / f"checkpoint-{STEPS}")
    longer = replace(job, resume=True, options=job.options | {"num_episodes": 2 * STEPS * BATCH})
    assert run(longer) == 0, (job.folder / "log.txt").read_text()
    state = json.loads((job.run / f"checkpoint-{2 * STEPS}" / "trainer_state.json").read_text())
    rates = {entry["step"]: entry["learning_rate"] for entry in state["log_history"] if "learning_rate" in entry}
    later = range(STEPS + 2, 2 * STEPS + 1, 2)
    assert [rates[step] for step in later] == pytest.approx([1e-2 * (1 - (step - 1) / (2 * STEPS)) for step in later])
