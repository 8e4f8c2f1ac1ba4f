"""Updates on the device: the CPU's gradient, optimizer steps that move weights, and a run that resumes exactly."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from moving import moved, tiny_policy, tiny_sampler
from tiny import random_batch, tiny_llama, tiny_trainer
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedTokenizerFast

from attention_rl_trainer.records.ledger import LEDGER_NAME
from attention_rl_trainer.rollout.environment import KVMemoryEnvironment, SelectionOptions
from attention_rl_trainer.trainer import AttentionGuidedRLTrainer
from attention_rl_trainer.update.filter import RewardStatistics, Verdict
from attention_rl_trainer.update.kept import KeptTrajectories
from attention_rl_trainer.update.losses import LossOptions
from attention_rl_trainer.update.objective import compute_loss_terms
from attention_rl_trainer.update.previous_adapter import AdapterSnapshot

CPU = torch.device("cpu")
ROWS = 4
EVERY_TERM = LossOptions(selector_coef=0.5, reward_gradient_coef=0.5, entropy_coef=0.01)
SELECTION = SelectionOptions(0.1, "scores", "cosine")
# Of the gradient's norm. In bfloat16 the CPU's own gradient is as far from the one in float32.
GRADIENT_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}


def kept_on_the_cpu(tokenizer: PreTrainedTokenizerFast, dtype: torch.dtype) -> KeptTrajectories:
    """Trajectories that the CPU rolled out, all of them kept."""
    policy = tiny_policy(CPU, dtype, tokenizer, attention_heads=["0.3", "1.1"])
    trajectories = tiny_sampler(policy, tokenizer, KVMemoryEnvironment(SELECTION)).sample(
        random_batch(ROWS), range(ROWS)
    )
    verdict = Verdict(torch.ones(ROWS, dtype=torch.bool), RewardStatistics(), RewardStatistics())
    return KeptTrajectories.of(trajectories, verdict, EVERY_TERM, ROWS)


def gradient_on(
    device: torch.device, dtype: torch.dtype, tokenizer: PreTrainedTokenizerFast, kept: KeptTrajectories
) -> tuple[Tensor, Tensor]:
    """Loss and gradient of every term on a device, on the CPU."""
    policy = tiny_policy(device, dtype, tokenizer, attention_heads=["0.3", "1.1"])
    snapshot = AdapterSnapshot(policy.model)
    trained = [parameter for parameter in policy.model.parameters() if parameter.requires_grad]
    with torch.no_grad():
        for parameter in trained:
            parameter.mul_(1.3)  # so that there is a KL
    policy.model.train()
    terms = compute_loss_terms(
        policy, policy.model, KVMemoryEnvironment(SELECTION), snapshot, moved(kept, device), EVERY_TERM
    )
    assert terms.kl is not None
    assert terms.kl.item() > 0
    terms.loss.backward()
    return terms.loss.detach().cpu(), torch.cat([p.grad.flatten().cpu() for p in trained if p.grad is not None])


def test_the_gradient_equals_that_of_the_cpu(
    device: torch.device,
    dtype: torch.dtype,
    tokenizer: PreTrainedTokenizerFast,
    record_property: Callable[[str, object], None],
) -> None:
    kept = kept_on_the_cpu(tokenizer, dtype)
    loss, gradient = gradient_on(device, dtype, tokenizer, kept)
    expected_loss, expected = gradient_on(CPU, dtype, tokenizer, kept)
    difference = ((gradient - expected).norm() / expected.norm()).item()
    record_property("relative difference of the gradient", difference)
    record_property("difference of the loss", (loss - expected_loss).abs().item())
    assert gradient.isfinite().all()
    assert difference < GRADIENT_TOLERANCE[dtype]


def trainer_on(
    device: torch.device, folder: Path, texts: list[str], tokenizer: PreTrainedTokenizerFast, **options: Any
) -> AttentionGuidedRLTrainer:
    """A trainer of a tiny Llama on a device; every trajectory after the first 8 is trained on."""
    model = options.pop("model", None)
    defaults: dict[str, Any] = {"warmup_episodes": 8, "filter_threshold": None, "use_cpu": device.type == "cpu"}
    trainer = tiny_trainer(folder, texts, tokenizer, model, options.pop("parts", None), **defaults | options)
    assert trainer.policy.device == device
    return trainer


def trained_weights(trainer: AttentionGuidedRLTrainer) -> dict[str, Tensor]:
    """Copies of the adapter's weights."""
    parameters = trainer.policy.model.named_parameters()
    return {name: parameter.detach().cpu().clone() for name, parameter in parameters if parameter.requires_grad}


def expect_trained(trainer: AttentionGuidedRLTrainer) -> None:
    """Train, and make sure that every weight is finite and some have moved."""
    before = trained_weights(trainer)
    trainer.train()
    after = trained_weights(trainer)
    assert trainer.updater.num_updates > 0
    assert all(weight.isfinite().all() for weight in after.values())
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_a_run_trains_and_is_evaluated(
    device: torch.device, dtype: torch.dtype, tmp_path: Path, texts: list[str], tokenizer: PreTrainedTokenizerFast
) -> None:
    rows = [{"title": f"held out {number}", "text": text} for number, text in enumerate(texts[20:])]
    trainer = trainer_on(
        device,
        tmp_path,
        texts[:20],
        tokenizer,
        model=tiny_llama().to(dtype),
        parts={"eval_dataset": rows},
        num_episodes=32,
        num_iterations=2,
        eval_episodes=8,
        eval_order_episodes=4,
        report_at_end=True,
    )
    expect_trained(trainer)
    assert trainer.evaluate()["eval_reward"] == pytest.approx(0, abs=20)
    assert trainer.optimizer is not None
    states = trainer.optimizer.state.values()
    assert {state["exp_avg"].device for state in states} == {device}


def test_activation_checkpointing_trains(
    device: torch.device, dtype: torch.dtype, tmp_path: Path, texts: list[str], tokenizer: PreTrainedTokenizerFast
) -> None:
    model = tiny_llama().to(dtype)
    expect_trained(trainer_on(device, tmp_path, texts, tokenizer, model=model, activation_checkpointing=True))


class Resumption:
    """Three runs of one kind: one that never stops, the same again, and the first resumed from its middle.

    Attributes:
        spread: largest difference of a trained weight between the two that never stop.
        difference: the same between the first and the resumed one.
        is_exact: whether the resumed one left the same bytes, those of the last adapter and of the ledger.
    """

    def __init__(self, folder: Path, make_trainer: Callable[..., AttentionGuidedRLTrainer]) -> None:
        options = {"num_episodes": 48, "save_episodes": 24, "lr_scheduler_type": "linear"}

        def run(name: str, checkpoint: str | None = None) -> tuple[dict[str, Tensor], list[bytes]]:
            trainer = make_trainer(folder / name, **options)
            trainer.train(resume_from_checkpoint=checkpoint)
            assert trainer.updater.num_updates > 0
            files = ("checkpoint-6/adapter_model.safetensors", LEDGER_NAME)
            return trained_weights(trainer), [(folder / name / "run" / file).read_bytes() for file in files]

        whole, files = run("whole")
        again, _ = run("again")
        resumed, resumed_files = run("whole", str(folder / "whole" / "run" / "checkpoint-3"))
        self.spread = max((whole[name] - again[name]).abs().max().item() for name in whole)
        self.difference = max((whole[name] - resumed[name]).abs().max().item() for name in whole)
        self.is_exact = files == resumed_files

    def expect_exact(self) -> None:
        """Fail where the resumed run is not the one that never stopped."""
        found = f"two runs that never stopped differ by {self.spread}, a resumed one by {self.difference}"
        assert self.is_exact, found
        assert self.difference == 0, found


@pytest.mark.parametrize("kernel", ["exact", "default"])
def test_a_resumed_run_ends_as_one_that_never_stopped(
    device: torch.device,
    tmp_path: Path,
    texts: list[str],
    tokenizer: PreTrainedTokenizerFast,
    kernel: str,
    record_property: Callable[[str, object], None],
) -> None:
    """To the last bit with attention that sums in a fixed order.

    The backward of CUDA's fused attention adds in whatever order its blocks end, so that two runs that never stopped
    may differ in the last bits too; then resuming is asked to be about as close as these are.
    """

    def make_trainer(folder: Path, **options: Any) -> AttentionGuidedRLTrainer:
        return trainer_on(device, folder, texts, tokenizer, **options)

    with sdpa_kernel(SDPBackend.MATH) if kernel == "exact" else nullcontext():
        found = Resumption(tmp_path, make_trainer)
    record_property("two runs differ by", found.spread)
    record_property("a resumed run differs by", found.difference)
    if kernel == "exact" or found.spread == 0:
        found.expect_exact()
    else:
        assert found.difference < max(100 * found.spread, 1e-4)
