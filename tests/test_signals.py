"""A run that is stopped by a signal, and two runs in one folder."""

from __future__ import annotations

import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from finished_run import OPTIONS, EndAt
from processes import Job, build_trainer, run, start, train

from attention_rl_trainer.durability import RunLockedError, staging
from attention_rl_trainer.durability.interruption import Interruption
from attention_rl_trainer.durability.lock import run_lock
from attention_rl_trainer.durability.manifest import find_damage
from attention_rl_trainer.durability.staging import (
    list_checkpoints,
)


class TestLock:
    def test_two_runs_in_one_folder(self, tmp_path: Path) -> None:
        job = Job(tmp_path, OPTIONS)
        with run_lock(job.run):
            with pytest.raises(RunLockedError, match=r"another run writes to output_dir .*run"):
                build_trainer(job).train()
            assert run(job) == 1
            assert "RunLockedError" in (tmp_path / "log.txt").read_text()
        assert run(job) == 0, (tmp_path / "log.txt").read_text()

    def test_a_killed_run_leaves_no_lock(self, tmp_path: Path) -> None:
        job = Job(tmp_path, OPTIONS, die_at=3)
        assert run(job) == -signal.SIGKILL
        with run_lock(job.run):
            pass


def slow_train(job: Job) -> None:
    """A run whose steps take long enough for a signal to hit one."""
    trainer = build_trainer(job)
    roll_out = trainer.sampler.sample

    def slowly(*arguments: Any, **options: Any) -> Any:
        (job.folder / "step").write_text(str(trainer.state.global_step + 1))
        time.sleep(0.3)
        return roll_out(*arguments, **options)

    trainer.sampler.sample = slowly  # type: ignore[method-assign]
    trainer.train(resume_from_checkpoint=job.resume)
    trainer.save_model()


def slow_train_in_a_group(job: Job) -> None:
    os.setsid()
    slow_train(job)


def train_and_save_slowly(job: Job) -> None:
    write = staging.sync

    def slowly(path: Path) -> None:
        time.sleep(0.05)
        write(path)

    staging.sync = slowly
    train(job)


# The exit code of a forked process; that of a script is 130 after SIGINT.
SECOND_SIGNALS = [(signal.SIGTERM, -signal.SIGTERM), (signal.SIGINT, 1)]


class TestSignals:
    def test_a_run_that_a_callback_ends_leaves_a_checkpoint(self, tmp_path: Path) -> None:
        job = Job(tmp_path, OPTIONS | {"save_episodes": 1000})
        trainer = build_trainer(job)
        trainer.add_callback(EndAt(3))
        trainer.train()
        assert [path.name for path in list_checkpoints(job.run)] == ["checkpoint-3"]

    def test_a_signal_to_the_whole_group_with_a_worker(self, tmp_path: Path) -> None:
        job = Job(tmp_path, OPTIONS | {"dataloader_num_workers": 1})
        process = start(job, slow_train_in_a_group)
        wait_for_step(job, 3)
        assert process.pid is not None
        os.killpg(process.pid, signal.SIGTERM)
        process.join(60)
        assert process.exitcode == 143, (tmp_path / "log.txt").read_text()
        assert not find_damage(list_checkpoints(job.run)[-1])

    @pytest.mark.parametrize(("second", "code"), SECOND_SIGNALS)
    def test_two_signals_while_a_checkpoint_is_written(
        self, second: int, code: int, finished: Path, tmp_path: Path
    ) -> None:
        job = Job(tmp_path, OPTIONS)
        process = start(job, train_and_save_slowly)
        staging = job.run / "_staging-checkpoint-4"
        deadline = time.monotonic() + 120
        while not staging.is_dir() and time.monotonic() < deadline:
            time.sleep(0.002)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGTERM)
        time.sleep(0.1)
        assert staging.is_dir(), "the first signal lets it write on"
        os.kill(process.pid, second)
        process.join(60)
        assert process.exitcode == code
        assert [path.name for path in list_checkpoints(job.run)] == ["checkpoint-2"]
        assert run(replace(job, resume=True)) == 0, (tmp_path / "log.txt").read_text()
        reference = (finished / "run" / "adapter_model.safetensors").read_bytes()
        assert (job.run / "adapter_model.safetensors").read_bytes() == reference

    @pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 1)])
    def test_the_first_leaves_a_checkpoint_within_a_step(
        self, number: int, code: int, finished: Path, tmp_path: Path
    ) -> None:
        job = Job(tmp_path, OPTIONS | {"save_episodes": 1000})
        process = start(job, slow_train)
        step = wait_for_step(job, 3)
        assert process.pid is not None
        os.kill(process.pid, number)
        process.join(60)
        log = (tmp_path / "log.txt").read_text()
        # A KeyboardInterrupt of a forked process ends in 1; that of a script in 130, see test_example.
        assert process.exitcode == code, log
        assert "the run stops after this step, with a checkpoint" in log
        (checkpoint,) = list_checkpoints(job.run)
        assert int(checkpoint.name.rpartition("-")[2]) in (step, step + 1)
        assert not find_damage(checkpoint)
        assert run(replace(job, resume=True)) == 0, (tmp_path / "log.txt").read_text()
        reference = (finished / "run" / "adapter_model.safetensors").read_bytes()
        assert (job.run / "adapter_model.safetensors").read_bytes() == reference

    @pytest.mark.parametrize(("second", "code"), SECOND_SIGNALS)
    def test_the_second_ends_it_at_once_and_breaks_nothing(
        self, second: int, code: int, finished: Path, tmp_path: Path
    ) -> None:
        job = Job(tmp_path, OPTIONS)
        process = start(job, slow_train)
        wait_for_step(job, 4)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGTERM)
        time.sleep(0.05)
        os.kill(process.pid, second)
        process.join(60)
        assert process.exitcode == code
        assert [find_damage(path) for path in list_checkpoints(job.run)] == [[]]
        assert run(replace(job, resume=True)) == 0, (tmp_path / "log.txt").read_text()
        reference = (finished / "run" / "adapter_model.safetensors").read_bytes()
        assert (job.run / "adapter_model.safetensors").read_bytes() == reference

    def test_handlers_are_given_back(self) -> None:
        before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        with Interruption() as interruption:
            assert signal.getsignal(signal.SIGINT) != before[0]
            os.kill(os.getpid(), signal.SIGTERM)
            assert interruption.received is signal.SIGTERM
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
        with pytest.raises(SystemExit) as caught:
            interruption.raise_received()
        assert caught.value.code == 143

    def test_outside_of_the_main_thread_nothing_is_taken(self, tmp_path: Path) -> None:
        failures: list[BaseException] = []

        def work() -> None:
            try:
                build_trainer(Job(tmp_path, OPTIONS | {"num_episodes": 4})).train()
            except BaseException as error:
                failures.append(error)

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert not failures
        assert list_checkpoints(tmp_path / "run")


def wait_for_step(job: Job, step: int) -> int:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if (job.folder / "step").exists():
            written = (job.folder / "step").read_text()
            if written and int(written) >= step:
                return int(written)
        time.sleep(0.01)
    raise AssertionError("the run did not get there")
