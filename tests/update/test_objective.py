"""The loss of a micro-batch: positions, KL over successive updates, dropout, checkpointing, extensions."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import checkpoint_activations, make_sampler, random_batch, tiny_gpt2, tiny_llama
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from attention_rl_trainer.models.modes import deterministic_inference, update_mode
from attention_rl_trainer.rollout.environment import KVMemoryEnvironment, MemoryEnvironment, Selection
from attention_rl_trainer.rollout.sampler import TrajectorySampler
from attention_rl_trainer.types import KeyValuePairs, Trajectory
from attention_rl_trainer.update.filter import RewardStatistics, Verdict
from attention_rl_trainer.update.kept import KeptTrajectories
from attention_rl_trainer.update.losses import LossOptions
from attention_rl_trainer.update.objective import LossTerms, compute_loss_terms
from attention_rl_trainer.update.previous_adapter import AdapterSnapshot


class Bench:
    """A rolled-out batch, all of it kept, with random advantages."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, rows: int = 4, **settings: Any):
        self.sampler: TrajectorySampler = make_sampler(model, tokenizer, **settings)
        self.policy = self.sampler.policy
        self.trajectory: Trajectory = self.sampler.sample(random_batch(rows), range(rows))
        self.snapshot = AdapterSnapshot(self.policy.model)
        verdict = Verdict(torch.ones(rows, dtype=torch.bool), RewardStatistics(), RewardStatistics())
        kept = KeptTrajectories.of(self.trajectory, verdict, LossOptions(), num_trajectories=16)
        generator = torch.Generator().manual_seed(2)
        self.kept = replace(kept, advantages=torch.randn(rows, 3, generator=generator))
        self.parameters = [p for p in self.policy.model.parameters() if p.requires_grad]

    def loss(self, kept: KeptTrajectories | None = None, **settings: Any) -> LossTerms:
        return compute_loss_terms(
            self.policy,
            self.policy.model,
            self.sampler.environment,
            self.snapshot,
            self.kept if kept is None else kept,
            LossOptions(**settings),
        )

    def gradient(self, **settings: Any) -> Tensor:
        with update_mode(self.policy.model, adapter_dropout=not settings.get("disable_dropout", True)):
            gradients = torch.autograd.grad(self.loss(**settings).loss, self.parameters)
        return torch.cat([gradient.flatten() for gradient in gradients])

    def move(self, size: float = 0.02, seed: int = 0) -> None:
        """Stand in for an optimizer step."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters:
                parameter.add_(size * torch.randn(parameter.shape, generator=generator))


@pytest.fixture
def bench(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> Bench:
    return Bench(model, tokenizer)


def test_policy_loss_equals_the_rollouts_own_numbers(bench: Bench) -> None:
    """At the weights of the rollout, - Σ_t A_t Σ_i log π is known from decoding."""
    logprobs = bench.trajectory.stack("query_logprobs").sum(dim=2)
    expected = -(bench.kept.advantages * logprobs).sum() / 16
    torch.testing.assert_close(bench.loss().policy, expected, atol=1e-5, rtol=1e-5)


def test_policy_gradient_equals_step_by_step_forwards(bench: Bench) -> None:
    """One forward over the trajectory against one forward for every query token."""
    bench.policy.model.eval()
    total = torch.zeros(())
    for row in range(4):
        for step, start in enumerate(bench.kept.query_starts):
            for position in range(start, start + 4):
                prefix = bench.kept.token_ids[row : row + 1, :position]
                distribution = bench.policy.query_log_probabilities(bench.policy.forward(prefix)[:, -1])
                index = bench.policy.allowed_index(bench.kept.token_ids[row : row + 1, position])
                total = total - bench.kept.advantages[row, step] * distribution[0, index[0]] / 16
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(total, bench.parameters)])
    torch.testing.assert_close(bench.gradient(beta=0.0), expected, atol=1e-5, rtol=1e-4)


def test_micro_batches_add_up(bench: Bench) -> None:
    whole = bench.loss(beta=0.3)
    bench.move()
    moved = bench.loss(beta=0.3)
    parts = [bench.loss(part, beta=0.3) for part in bench.kept.split(3)]
    assert [len(part) for part in bench.kept.split(3)] == [3, 1]
    torch.testing.assert_close(sum(part.loss for part in parts), moved.loss, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(sum(part.kl for part in parts), moved.kl, atol=1e-5, rtol=1e-4)
    assert not torch.equal(whole.loss, moved.loss)


def test_kl_is_zero_before_and_positive_with_a_gradient_after_a_step(bench: Bench) -> None:
    first = bench.loss()
    assert first.kl.item() == 0.0
    bench.snapshot.refresh()
    bench.move()
    second = bench.loss()
    assert second.kl.item() > 1e-4
    with_penalty, without = bench.gradient(beta=0.1), bench.gradient(beta=0.0)
    assert (with_penalty - without).norm() > 1e-4
    # A skipped batch refreshes nothing, so the distance is still that of the last step.
    assert bench.loss().kl.item() == second.kl.item()
    bench.snapshot.refresh()
    bench.move(seed=1)
    assert bench.loss().kl.item() > 1e-4


def test_kl_equals_the_definition_over_allowed_ids(bench: Bench) -> None:
    bench.move()
    policy, ids = bench.policy, bench.kept.token_ids
    positions = [p for start in bench.kept.query_starts for p in range(start, start + 4)]
    with deterministic_inference(policy.model):
        current = policy.query_log_probabilities(policy.forward(ids)[:, [p - 1 for p in positions]])
        with bench.snapshot.swapped_in():
            previous = policy.query_log_probabilities(policy.forward(ids)[:, [p - 1 for p in positions]])
    expected = (previous.exp() * (previous - current)).sum() / 16
    torch.testing.assert_close(bench.loss().kl, expected, atol=1e-5, rtol=1e-4)


def test_kl_is_what_kl_div_returns(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    original = torch.nn.functional.kl_div
    bench.move()
    before, gradient_before = bench.loss(beta=0.3), bench.gradient(beta=0.3)
    monkeypatch.setattr(torch.nn.functional, "kl_div", lambda *args, **options: 3 * original(*args, **options))
    after, gradient = bench.loss(beta=0.3), bench.gradient(beta=0.3)
    torch.testing.assert_close(after.kl, 3 * before.kl)
    torch.testing.assert_close(after.loss - before.loss, 0.6 * before.kl, atol=1e-6, rtol=1e-4)
    assert (gradient - gradient_before).norm() > 1e-4


def test_kl_to_the_base_model(bench: Bench) -> None:
    """The adapter differs from the base from the start, so this distance is positive at once."""
    assert bench.loss(kl_reference="base").kl.item() > 1e-3
    assert bench.loss(kl_reference="base", beta=0.0).kl is None  # not computed


def test_dropout_is_off_in_the_update(tokenizer: PreTrainedTokenizerFast) -> None:
    for model in (tiny_llama(attention_dropout=0.5), tiny_gpt2(attn_pdrop=0.5, resid_pdrop=0.5)):
        bench = Bench(model, tokenizer)
        bench.policy.model.train()
        assert torch.equal(bench.gradient(), bench.gradient())
        assert bench.loss().kl.item() == 0.0
        assert bench.policy.model.training
        first, second = bench.gradient(disable_dropout=False), bench.gradient(disable_dropout=False)
        assert not torch.equal(first, second)
        bench.policy.model.eval()
        torch.testing.assert_close(bench.gradient(), bench.gradient(disable_dropout=False))


@pytest.mark.parametrize("selector_coef", [0.0, 1.0])
def test_activation_checkpointing_recomputes_and_changes_nothing(
    tokenizer: PreTrainedTokenizerFast, selector_coef: float
) -> None:
    for build in (tiny_llama, tiny_gpt2):
        model = build()
        bench = Bench(model, tokenizer)
        bench.policy.model.train()
        bench.move()
        runs = 0

        def count(*_: object) -> None:
            nonlocal runs
            runs += 1

        layer = bench.policy.backbone.layers[0] if build is tiny_llama else bench.policy.backbone.h[0]
        # The recomputation stops once it has what the backward needs, so only the layer's beginning is sure to run.
        handle = (layer.self_attn if build is tiny_llama else layer.attn).register_forward_pre_hook(count)
        settings: dict[str, Any] = {"selector_coef": selector_coef}
        plain_loss, plain_gradient, plain_runs = bench.loss(**settings).loss, bench.gradient(**settings), runs
        checkpoint_activations(model)
        runs = 0
        loss, gradient = bench.loss(**settings).loss, bench.gradient(**settings)
        handle.remove()
        assert runs == plain_runs + 1, "the backward of the one gradient runs each layer again"
        torch.testing.assert_close(loss, plain_loss)
        torch.testing.assert_close(gradient, plain_gradient)


def test_selector_term_is_the_gradient_of_the_draws(bench: Bench) -> None:
    difference = bench.loss(selector_coef=1.0).loss - bench.loss().loss
    draws = bench.trajectory.stack("similarity_score").log()
    expected = -(bench.kept.advantages * draws).sum() / 16
    torch.testing.assert_close(difference, expected, atol=1e-5, rtol=1e-4)
    assert (bench.gradient(selector_coef=1.0) - bench.gradient()).norm() > 1e-5


def test_the_loss_leaves_the_environments_episodes_alone(bench: Bench) -> None:
    environment = bench.sampler.environment
    other = bench.kept.memory.select_rows(torch.tensor([0]))
    environment.reset(other)
    bench.loss(selector_coef=1.0)
    assert environment.pairs is other
    assert environment.available_mask.all()


def test_an_environment_without_log_prob_is_refused(bench: Bench) -> None:
    class Oldest(MemoryEnvironment):
        def reset(self, pairs: KeyValuePairs) -> None:
            raise NotImplementedError

        def step(self, query_vectors: Tensor, noise: Tensor) -> Selection:
            raise NotImplementedError

    bench.sampler.environment = Oldest()
    assert bench.loss().loss.isfinite()
    needed = "needs an environment with log_prob(memory, query_vectors, index), which Oldest lacks; write that method"
    with pytest.raises(TypeError, match=re.escape(needed)):
        bench.loss(selector_coef=1.0)


def test_a_log_prob_of_another_shape_is_refused(bench: Bench) -> None:
    class Summed(KVMemoryEnvironment):
        def log_prob(self, memory: KeyValuePairs, query_vectors: Tensor, index: Tensor) -> Tensor:
            return super().log_prob(memory, query_vectors, index).sum(dim=1, keepdim=True)

    bench.sampler.environment = Summed()
    with pytest.raises(ValueError, match=r"the environment's log_prob returns must have shape \[4, 3\], got \[4, 1\]"):
        bench.loss(selector_coef=1.0)


def test_reward_gradient_term_is_the_readers_own_score(bench: Bench) -> None:
    difference = bench.loss(reward_gradient_coef=2.0).loss - bench.loss().loss
    values = bench.trajectory.stack("policy_value_logprob").mean(dim=1)
    torch.testing.assert_close(difference, -2.0 * values.sum() / 16, atol=1e-5, rtol=1e-4)
    assert (bench.gradient(reward_gradient_coef=2.0) - bench.gradient()).norm() > 1e-5


def test_entropy_bonus(bench: Bench) -> None:
    difference = bench.loss(entropy_coef=0.5).loss - bench.loss().loss
    expected = -0.5 * bench.trajectory.stack("query_entropy").sum() / 16
    torch.testing.assert_close(difference, expected, atol=1e-5, rtol=1e-4)


def test_importance_ratios_start_at_one(bench: Bench) -> None:
    plain, ratios = bench.gradient(beta=0.0), bench.gradient(beta=0.0, num_iterations=2)
    torch.testing.assert_close(plain, ratios, atol=1e-5, rtol=1e-3)
    expected = -(bench.kept.advantages.sum(dim=1) * 4).sum() / 16
    torch.testing.assert_close(bench.loss(num_iterations=2).policy, expected, atol=1e-4, rtol=1e-4)


def test_only_adapter_parameters_get_a_gradient(bench: Bench) -> None:
    bench.loss(selector_coef=1.0, reward_gradient_coef=1.0).loss.backward()
    for name, parameter in bench.policy.model.named_parameters():
        assert (parameter.grad is not None) == (".lora_" in name), name


def test_vocabulary_logits_exist_at_query_positions_alone(llama: PreTrainedModel, tokenizer: Any) -> None:
    bench = Bench(llama, tokenizer, policy_options={"logits_chunk_size": 5})
    rows: list[int] = []
    handle = bench.policy.head.linear.register_forward_hook(lambda m, a, out: rows.append(out.shape[:-1].numel()))
    loss = bench.loss(beta=0.0).loss
    handle.remove()
    num_query_tokens = 4 * 3 * 4
    assert sum(rows) == num_query_tokens + 1  # and one position through the trainer's wrapper
    assert max(rows) <= 5
    assert loss.requires_grad
