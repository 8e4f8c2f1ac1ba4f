"""A run that stopped and went on equals the one that never stopped, byte for byte; each in a process of its own."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from processes import Job, run

STEPS = 12
BATCH = 5  # of 30 articles, so that the sixth step ends an epoch
# Logged every second step, so that checkpoints lie between two logs.
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
PLACES = {"first step": 1, "mid-epoch": 3, "epoch border": 6}
WARMUPS = {"in warm-up": 40, "after warm-up": 1}
OPTIMIZERS = ("adamw_torch", "adamw_bnb_8bit")
# What a clock or the machine says.
TIMING = {
    "tokens_per_second",
    "rollout_seconds",
    "update_seconds",
    "peak_memory_gib",
    "train_runtime",
    "train_samples_per_second",
    "train_steps_per_second",
}


def whole_run(folder: Path, *, streaming: bool, optim: str, warmup: int) -> tuple[Job, Path]:
    """Run without a stop; the files lie in ``<folder>/whole`` then, and those that go on run where they lay."""
    options = OPTIONS | {"optim": optim, "warmup_episodes": warmup}
    job = Job(folder / "job", options, streaming=streaming, wide="bnb" in optim)
    assert run(job) == 0, (job.folder / "log.txt").read_text()
    return job, job.folder.rename(folder / "whole") / "run"


def untimed(state: bytes) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(state)
    content["log_history"] = [
        {name: value for name, value in entry.items() if name not in TIMING} for entry in content["log_history"]
    ]
    return content


def expect_same_end(job: Job, whole: Path, step: int) -> None:
    """Go on from a copy of a checkpoint, and compare every file of the last checkpoint, and the ledger."""
    shutil.copytree(whole / f"checkpoint-{step}", job.run / f"checkpoint-{step}")
    shutil.copy(whole / "trajectories.jsonl", job.run)
    resumed = replace(job, resume=str(job.run / f"checkpoint-{step}"))
    assert run(resumed) == 0, (job.folder / "log.txt").read_text()
    last = f"checkpoint-{STEPS}"
    names = {path.name for path in (whole / last).iterdir()}
    assert {path.name for path in (job.run / last).iterdir()} == names
    assert {"adapter_model.safetensors", "optimizer.safetensors", "random_states.safetensors"} <= names
    for name in sorted(names - {"trainer_state.json", "manifest.json"}):
        assert (job.run / last / name).read_bytes() == (whole / last / name).read_bytes(), name
    states = [untimed((run / last / "trainer_state.json").read_bytes()) for run in (job.run, whole)]
    assert states[0] == states[1]
    assert len([entry for entry in states[0]["log_history"] if "kl" in entry]) >= 1
    assert (job.run / "trajectories.jsonl").read_bytes() == (whole / "trajectories.jsonl").read_bytes()
    shutil.rmtree(job.folder)


def test_a_resumed_process_ends_like_the_whole_run(tmp_path: Path) -> None:
    job, whole = whole_run(tmp_path, streaming=True, optim="adamw_torch", warmup=1)
    for step in (1, 6):
        expect_same_end(job, whole, step)


@pytest.mark.slow
@pytest.mark.parametrize("optim", OPTIMIZERS)
@pytest.mark.parametrize("warmup", WARMUPS)
@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
def test_every_kind_of_resumed_run_ends_like_the_whole_run(
    streaming: bool, warmup: str, optim: str, tmp_path: Path
) -> None:
    job, whole = whole_run(tmp_path, streaming=streaming, optim=optim, warmup=WARMUPS[warmup])
    for step in PLACES.values():
        expect_same_end(job, whole, step)


@pytest.mark.slow
def test_what_else_a_step_leaves_behind(tmp_path: Path) -> None:
    """Updates over two rollouts, done twice, with dropout from the global random state, and a worker reading ahead."""
    options = OPTIONS | {
        "num_episodes": 2 * STEPS * BATCH,
        "gradient_accumulation_steps": 2,
        "num_iterations": 2,
        "disable_dropout": False,
        "dataloader_num_workers": 1,
        "warmup_episodes": 1,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "eval_on_start": True,
        "eval_episodes": 4,
        "eval_order_episodes": 2,
    }
    job = Job(tmp_path / "job", options)
    assert run(job) == 0, (job.folder / "log.txt").read_text()
    whole = job.folder.rename(tmp_path / "whole") / "run"
    for step in PLACES.values():
        expect_same_end(job, whole, step)


def test_the_comparison_sees_another_learning_rate(tmp_path: Path) -> None:
    """What the tests above rest on, and what is promised of options that may change: they act."""
    job, whole = whole_run(tmp_path, streaming=False, optim="adamw_torch", warmup=1)
    other = replace(job, options=job.options | {"learning_rate": 2e-2})
    with pytest.raises(AssertionError, match=r"adapter_model\.safetensors"):
        expect_same_end(other, whole, 6)
    assert "learning_rate (0.01 there, 0.02 here)" in (job.folder / "log.txt").read_text()
    state = json.loads((job.run / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    rates = {entry["step"]: entry["learning_rate"] for entry in state["log_history"] if "learning_rate" in entry}
    assert rates == pytest.approx(
        {step: (1e-2 if step <= 6 else 2e-2) * (1 - (step - 1) / STEPS) for step in range(2, STEPS + 1, 2)}
    )


def test_a_longer_run_has_its_own_schedule(tmp_path: Path) -> None:
    job, whole = whole_run(tmp_path, streaming=False, optim="adamw_torch", warmup=1)
    job.run.mkdir(parents=True)
    shutil.copytree(whole / f"checkpoint-{STEPS}", job.run / f"checkpoint-{STEPS}")
    longer = replace(job, resume=True, options=job.options | {"num_episodes": 2 * STEPS * BATCH})
    assert run(longer) == 0, (job.folder / "log.txt").read_text()
    state = json.loads((job.run / f"checkpoint-{2 * STEPS}" / "trainer_state.json").read_text())
    rates = {entry["step"]: entry["learning_rate"] for entry in state["log_history"] if "learning_rate" in entry}
    later = range(STEPS + 2, 2 * STEPS + 1, 2)
    assert [rates[step] for step in later] == pytest.approx([1e-2 * (1 - (step - 1) / (2 * STEPS)) for step in later])
