"""Nothing grows with the steps of a run, and nothing is left on the model after it, however it ended."""

from __future__ import annotations

import gc
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from processes import Job, build_trainer, run
from tiny import tiny_trainer
from torch import nn
from transformers import PreTrainedTokenizerFast, TrainerCallback

from attention_rl_trainer.trainer import AttentionGuidedRLTrainer

STEPS = 220
SETTLED = 20


def resident_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("the system does not say")


class WatchMemory(TrainerCallback):
    def __init__(self) -> None:
        self.sizes: dict[int, int] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in (SETTLED, STEPS):
            gc.collect()
            self.sizes[state.global_step] = resident_bytes()


class Leak(TrainerCallback):
    """Keeps 64 KiB of each step."""

    def __init__(self) -> None:
        self.kept: list[bytes] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.kept.append(os.urandom(2**16))


def train_and_leak(job: Job) -> None:
    train_and_watch(job, Leak())


def train_and_watch(job: Job, *callbacks: TrainerCallback) -> None:
    trainer = build_trainer(job)
    for callback in callbacks:
        trainer.add_callback(callback)
    watch = WatchMemory()
    trainer.add_callback(watch)
    trainer.train()
    (job.folder / "sizes.json").write_text(json.dumps([watch.sizes[SETTLED], watch.sizes[STEPS]]))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the size of the process from /proc")
@pytest.mark.parametrize("leaks", [False, True], ids=["as it is", "with a leak"])
def test_memory_does_not_grow(leaks: bool, tmp_path: Path) -> None:
    options = {
        "num_episodes": STEPS * 8,
        "warmup_episodes": 1,
        "filter_threshold": 0.0,
        "save_episodes": 160,
        "save_total_limit": 2,
        "order_coef": 0.5,
        "entropy_coef": 0.01,
        "num_iterations": 2,
    }
    job = Job(tmp_path, options, streaming=True)
    assert run(job, train_and_leak if leaks else train_and_watch) == 0, (tmp_path / "log.txt").read_text()
    settled, last = json.loads((tmp_path / "sizes.json").read_text())
    sizes = f"{settled / 2**20:.1f} MiB after {SETTLED} steps, {last / 2**20:.1f} after {STEPS}"
    assert (last >= 1.01 * settled) == leaks, sizes


def hooks_of(model: nn.Module) -> list[tuple[str, str, int]]:
    kinds = [name for name in vars(model) if name.endswith("_hooks")]
    assert "_forward_hooks" in kinds
    found = [(name, kind, len(getattr(module, kind))) for name, module in model.named_modules() for kind in kinds]
    return [entry for entry in found if entry[2]]


def count_forwards(
    trainer: AttentionGuidedRLTrainer, fatal: int | None = None, error: type[BaseException] = RuntimeError
) -> int:
    """Train, and count the last layer's forwards; raise at the fatal one."""
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == fatal:
            raise error("injected")

    handle = trainer.policy.model.get_base_model().model.layers[-1].mlp.register_forward_hook(count)
    try:
        trainer.train()
    finally:
        handle.remove()
    return calls


class CtrlC(TrainerCallback):
    """Sends its own process what the terminal sends."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)


class TestHooks:
    def build(self, folder: Path, texts: list[str], tokenizer: PreTrainedTokenizerFast) -> AttentionGuidedRLTrainer:
        options = {"num_episodes": 16, "warmup_episodes": 1, "filter_threshold": float("-inf"), "selector_coef": 1.0}
        return tiny_trainer(folder, texts, tokenizer, **options)

    def test_none_are_left_after_training(
        self, tmp_path: Path, texts: list[str], tokenizer: PreTrainedTokenizerFast
    ) -> None:
        trainer = self.build(tmp_path, texts, tokenizer)
        before = hooks_of(trainer.policy.model)
        trainer.train()
        assert hooks_of(trainer.policy.model) == before

    def test_none_are_left_after_a_signal(
        self, tmp_path: Path, texts: list[str], tokenizer: PreTrainedTokenizerFast
    ) -> None:
        trainer = self.build(tmp_path, texts, tokenizer)
        before = hooks_of(trainer.policy.model)
        trainer.add_callback(CtrlC())
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
        assert trainer.state.global_step == 1
        assert hooks_of(trainer.policy.model) == before

    @pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
    @pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
    def test_none_are_left_after_an_error(
        self,
        share: float,
        error: type[BaseException],
        tmp_path: Path,
        texts: list[str],
        tokenizer: PreTrainedTokenizerFast,
    ) -> None:
        """The last forward of a run belongs to an update, those before mostly to rollouts."""
        total = count_forwards(self.build(tmp_path / "whole", texts, tokenizer))
        trainer = self.build(tmp_path, texts, tokenizer)
        before = hooks_of(trainer.policy.model)
        with pytest.raises(error):
            count_forwards(trainer, int(share * total), error)
        assert hooks_of(trainer.policy.model) == before
        # The model is as usable as before.
        assert count_forwards(trainer) == total
        assert trainer.progress.num_episodes == 16
