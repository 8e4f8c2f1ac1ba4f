"""A run that is stopped by a signal, and two runs in one folder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
from finished_run import OPTIONS, EndAt
from processes import Job, build_trainer, run, start, train
from tiny import article_texts, byte_level_tokenizer, tiny_config, tiny_llama
from torch.utils.data import get_worker_info
from transformers import TrainerCallback

from attention_rl_trainer.durability import staging
from attention_rl_trainer.durability.guard import Interruption, RunLockedError, run_lock
from attention_rl_trainer.durability.manifest import find_damage
from attention_rl_trainer.durability.staging import list_checkpoints
from attention_rl_trainer.trainer import AttentionGuidedRLTrainer


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


class SignalAt(TrainerCallback):
    """Sends a signal to its own process in the middle of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


class HangingRows(Sequence[Mapping[str, str]]):
    """Twenty articles, of which a file system does not hand out all."""

    def __init__(self, served: int, told: Path) -> None:
        self.served = served
        self.told = told  # which process hangs
        self.texts = article_texts(20)

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: Any) -> Any:
        if get_worker_info() is not None:
            self.served -= 1
            if self.served < 0:
                self.told.write_text(str(os.getpid()))
                time.sleep(3600)
        return {"text": self.texts[index]}


def train_on_rows_that_hang(job: Job) -> None:
    """The run's last batches, or those beyond its last, never come."""
    texts = article_texts(20)
    trainer = AttentionGuidedRLTrainer(
        model=tiny_llama(),
        args=tiny_config(job.folder, **job.options),
        train_dataset=HangingRows(9, job.folder / "hangs"),
        processing_class=byte_level_tokenizer(texts),
    )
    trainer.add_callback(TellSteps(job.folder))
    trainer.train()


class TellSteps(TrainerCallback):
    """Writes down which step begins."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        (self.folder / "step").write_text(str(state.global_step + 1))


# A script, whose output goes where the test says.
PROGRAM = """
import sys

sys.path[:0] = {path!r}
from pathlib import Path

from processes import Job
from test_signals import slow_train

slow_train(Job(Path({folder!r}), {options!r}))
"""


def train_and_save_slowly(job: Job) -> None:
    write = staging.sync

    def slowly(path: Path) -> None:
        time.sleep(0.05)
        write(path)

    staging.sync = slowly
    train(job)


# The exit code of a forked process; that of a script is 130 after SIGINT.
SECOND_SIGNALS = [(signal.SIGTERM, -signal.SIGTERM), (signal.SIGINT, 1)]


def send(process: ForkServerProcess, *numbers: int, pause: float = 0.05) -> None:
    """Send signals one after the other, and wait for the end."""
    assert process.pid is not None
    for count, number in enumerate(numbers):
        time.sleep(pause if count else 0)
        os.kill(process.pid, number)
    process.join(60)


# Evaluations that take no time; when they come is added.
EVALUATION: dict[str, Any] = {"eval_episodes": 2, "eval_tables": False}


def expect_resumes(job: Job, finished: Path) -> None:
    """Resume a run that was stopped; it learns what the run learned that nobody stopped."""
    assert run(replace(job, resume=True)) == 0, (job.folder / "log.txt").read_text()
    reference = (finished / "run" / "adapter_model.safetensors").read_bytes()
    assert (job.run / "adapter_model.safetensors").read_bytes() == reference


class TestSignals:
    def test_a_run_that_a_callback_ends_leaves_a_checkpoint(self, tmp_path: Path) -> None:
        job = Job(tmp_path, OPTIONS | {"save_episodes": 1000})
        trainer = build_trainer(job)
        trainer.add_callback(EndAt(3))
        trainer.train()
        assert [path.name for path in list_checkpoints(job.run)] == ["checkpoint-3"]

    @pytest.mark.slow
    def test_a_signal_to_the_whole_group_with_a_worker(self, tmp_path: Path) -> None:
        job = Job(tmp_path, OPTIONS | {"dataloader_num_workers": 1})
        process = start(job, slow_train_in_a_group)
        wait_for_step(job, 3)
        assert process.pid is not None
        os.killpg(process.pid, signal.SIGTERM)
        process.join(60)
        assert process.exitcode == 143, (tmp_path / "log.txt").read_text()
        assert not find_damage(list_checkpoints(job.run)[-1])

    @pytest.mark.slow
    def test_nobody_reads_any_more_what_is_printed(self, tmp_path: Path) -> None:
        """Ctrl-C on ``python … 2>&1 | tee log`` ends ``tee`` too."""
        options = OPTIONS | {"save_episodes": 1000, "disable_tqdm": False, "filter_threshold": -1e9}
        program = PROGRAM.format(path=sys.path, folder=str(tmp_path), options=options)
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-u", "-c", program]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment) as process:
            wait_for_step(Job(tmp_path), 3)
            process.send_signal(signal.SIGINT)
            assert process.stdout is not None
            process.stdout.close()
            process.wait(60)
        # As Python ends after a KeyboardInterrupt.
        assert process.returncode == -signal.SIGINT
        (checkpoint,) = list_checkpoints(tmp_path / "run")
        assert not find_damage(checkpoint)

    @pytest.mark.slow
    def test_a_worker_that_hangs_keeps_nobody_from_stopping(self, tmp_path: Path) -> None:
        job = Job(tmp_path, OPTIONS | {"dataloader_num_workers": 1})
        process = start(job, train_on_rows_that_hang)
        wait_for_step(job, 2)
        send(process, signal.SIGTERM, signal.SIGTERM, pause=0.5)
        assert process.exitcode == -signal.SIGTERM, (tmp_path / "log.txt").read_text()
        expect_gone(int((tmp_path / "hangs").read_text()))

    @pytest.mark.slow
    def test_a_worker_that_hangs_keeps_nobody_from_ending(self, tmp_path: Path) -> None:
        job = Job(tmp_path, OPTIONS | {"dataloader_num_workers": 1, "num_episodes": 8})
        process = start(job, train_on_rows_that_hang)
        process.join(60)
        assert process.exitcode == 0, (tmp_path / "log.txt").read_text()
        expect_gone(int((tmp_path / "hangs").read_text()))

    def test_no_evaluation_comes_after_the_checkpoint(self, tmp_path: Path) -> None:
        options = EVALUATION | {"eval_strategy": "epoch"}
        # A metric by which an evaluation without numbers could not be judged.
        options |= {"metric_for_best_model": "reward"}
        job = Job(tmp_path, OPTIONS | options)
        trainer = build_trainer(job)
        trainer.add_callback(SignalAt(3))
        with pytest.raises(SystemExit):
            trainer.train()
        assert [path.name for path in list_checkpoints(job.run)] == ["checkpoint-2", "checkpoint-3"]
        assert not [entry for entry in trainer.state.log_history if "eval_reward" in entry]
        trainer = build_trainer(job)
        trainer.train(resume_from_checkpoint=True)
        assert [entry["step"] for entry in trainer.state.log_history if "eval_reward" in entry] == [6]

    def test_after_the_last_step_it_comes(self, tmp_path: Path) -> None:
        """No run will resume from there."""
        options = EVALUATION | {"eval_strategy": "epoch"}
        trainer = build_trainer(Job(tmp_path, OPTIONS | options))
        trainer.add_callback(SignalAt(6))
        with pytest.raises(SystemExit):
            trainer.train()
        assert [entry["step"] for entry in trainer.state.log_history if "eval_reward" in entry] == [6]

    def test_a_signal_in_an_evaluation_is_followed_by_the_checkpoint(self, tmp_path: Path) -> None:
        options = EVALUATION | {"eval_strategy": "steps", "eval_steps": 3}
        trainer = build_trainer(Job(tmp_path, OPTIONS | options | {"save_episodes": 1000}))
        evaluate = trainer.evaluate

        def interrupted(*arguments: Any, **given: Any) -> dict[str, float]:
            os.kill(os.getpid(), signal.SIGTERM)
            return evaluate(*arguments, **given)

        trainer.evaluate = interrupted  # type: ignore[method-assign]
        with pytest.raises(SystemExit):
            trainer.train()
        assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["checkpoint-3"]

    def test_an_evaluation_before_the_checkpoint_is_done(self, tmp_path: Path) -> None:
        """The run that resumes begins after it."""
        options = EVALUATION | {"eval_strategy": "steps", "eval_steps": 3}
        trainer = build_trainer(Job(tmp_path, OPTIONS | options))
        trainer.add_callback(SignalAt(3))
        with pytest.raises(SystemExit):
            trainer.train()
        assert [entry["step"] for entry in trainer.state.log_history if "eval_reward" in entry] == [3]

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
        expect_resumes(job, finished)

    @pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 1)])
    def test_the_first_leaves_a_checkpoint_within_a_step(
        self, number: int, code: int, finished: Path, tmp_path: Path
    ) -> None:
        job = Job(tmp_path, OPTIONS | {"save_episodes": 1000})
        process = start(job, slow_train)
        step = wait_for_step(job, 3)
        send(process, number)
        log = (tmp_path / "log.txt").read_text()
        # A KeyboardInterrupt of a forked process ends in 1; that of a script in 130, see test_example.
        assert process.exitcode == code, log
        assert "the run stops after this step, with a checkpoint; a second signal stops it at once" in log
        (checkpoint,) = list_checkpoints(job.run)
        assert int(checkpoint.name.rpartition("-")[2]) in (step, step + 1)
        assert not find_damage(checkpoint)
        expect_resumes(job, finished)

    @pytest.mark.parametrize(("second", "code"), SECOND_SIGNALS)
    def test_the_second_ends_it_at_once_and_breaks_nothing(
        self, second: int, code: int, finished: Path, tmp_path: Path
    ) -> None:
        job = Job(tmp_path, OPTIONS)
        process = start(job, slow_train)
        wait_for_step(job, 4)
        send(process, signal.SIGTERM, second)
        assert process.exitcode == code
        assert [find_damage(path) for path in list_checkpoints(job.run)] == [[]]
        expect_resumes(job, finished)

    def test_the_second_acts_also_where_it_was_ignored(self) -> None:
        """A shell lets what it starts in the background ignore SIGINT."""
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            with Interruption() as interruption:
                os.kill(os.getpid(), signal.SIGINT)
                assert interruption.received is signal.SIGINT
                with pytest.raises(KeyboardInterrupt):
                    os.kill(os.getpid(), signal.SIGINT)
        finally:
            signal.signal(signal.SIGINT, before)

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


def expect_gone(process_id: int) -> None:
    """Wait until a process that is not our own child has ended."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            os.kill(process_id, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    raise AssertionError(f"process {process_id} is still there")


def wait_for_step(job: Job, step: int) -> int:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if (job.folder / "step").exists():
            written = (job.folder / "step").read_text()
            if written and int(written) >= step:
                return int(written)
        time.sleep(0.01)
    raise AssertionError("the run did not get there")
