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

from attention_rl_trainer.memories.tokenization import PlainTextEncoder
from attention_rl_trainer.models.heads import HeadNumber
from attention_rl_trainer.models.modes import deterministic_inference, update_mode
from attention_rl_trainer.rollout.calibration import Calibration
from attention_rl_trainer.rollout.environment import (
    KVMemoryEnvironment,
    MemoryEnvironment,
    Selection,
    SelectionOptions,
)
from attention_rl_trainer.rollout.layout import Layout, LayoutOptions, Separators
from attention_rl_trainer.rollout.sampler import TrajectorySampler
from attention_rl_trainer.types import KeyValuePairs, Trajectory
from attention_rl_trainer.update.filter import RewardStatistics, Verdict
from attention_rl_trainer.update.kept import KeptTrajectories, OtherQueries
from attention_rl_trainer.update.losses import LossOptions
from attention_rl_trainer.update.objective import LossTerms, compute_loss_terms
from attention_rl_trainer.update.previous_adapter import AdapterSnapshot

CPU = torch.device("cpu")


class Bench:
    """A rolled-out batch, all of it kept, with random advantages."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast,
        rows: int = 4,
        show_keys: str = "none",
        **settings: Any,
    ):
        self.sampler: TrajectorySampler = make_sampler(model, tokenizer, **settings)
        if show_keys != "none":
            sizes = LayoutOptions(
                num_kv_pairs=6, subset_fraction=1.0, num_steps=3, tokens_per_query=4, show_keys=show_keys
            )
            self.sampler.layout = Layout.of(sizes, Separators.encode(PlainTextEncoder(tokenizer), sizes))
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


@pytest.fixture(params=["none", "numbered"])
def calibrated(request: pytest.FixtureRequest, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> Bench:
    """Heads of both layers out of order, less made-up means; with and without the keys before the prompt."""
    generator = torch.Generator().manual_seed(6)
    heads = ["1.2", "0.3", "1.0"]
    means = [torch.randn(3, 8, generator=generator) for _ in range(2)]
    environment = KVMemoryEnvironment(
        SelectionOptions("auto", "scores", "cosine", center_vectors=True),
        Calibration(0.1, tuple(map(HeadNumber.parse, heads)), *means),
    )
    return Bench(
        model, tokenizer, show_keys=request.param, environment=environment, policy_options={"attention_heads": heads}
    )


class TestCalibratedAndShown:
    """The update sees the tokens and the draws of a rollout whose heads are chosen and whose keys are shown."""

    def test_the_numbers_are_the_rollouts_own(self, calibrated: Bench) -> None:
        logprobs = calibrated.trajectory.stack("query_logprobs").sum(dim=2)
        expected = -(calibrated.kept.advantages * logprobs).sum() / 16
        torch.testing.assert_close(calibrated.loss().policy, expected, atol=1e-5, rtol=1e-5)
        difference = calibrated.loss(selector_coef=1.0).loss - calibrated.loss().loss
        draws = calibrated.trajectory.stack("similarity_score").log()
        torch.testing.assert_close(difference, -(calibrated.kept.advantages * draws).sum() / 16, atol=1e-4, rtol=1e-4)
        difference = calibrated.loss(reward_gradient_coef=2.0).loss - calibrated.loss().loss
        values = calibrated.trajectory.stack("policy_value_logprob").mean(dim=1)
        torch.testing.assert_close(difference, -2.0 * values.sum() / 16, atol=1e-5, rtol=1e-4)

    def test_the_gradient_of_the_draws_is_that_of_forwards_step_by_step(self, calibrated: Bench) -> None:
        policy, kept = calibrated.policy, calibrated.kept
        policy.model.eval()
        environment = calibrated.sampler.environment
        assert isinstance(environment, KVMemoryEnvironment)
        means = environment.selector.query_means, environment.selector.key_means
        assert means[0] is not None
        assert means[1] is not None
        total = torch.zeros(())
        for row in range(4):
            available = [True] * 5
            for step, start in enumerate(kept.query_starts):
                with policy.attention.capture_queries() as capture:
                    policy.forward(kept.token_ids[row : row + 1, : start + 4])
                query = capture.heads()[0, -4:].mean(dim=0) - means[0]
                keys = kept.memory.key_vectors[row] - means[1]
                scores = torch.nn.functional.cosine_similarity(query[None], keys, dim=-1).mean(dim=1) / 0.1
                drawn = int(kept.selected_index[row, step])
                unread = [pair for pair in range(5) if available[pair]]
                logprob = scores[drawn] - scores[unread].logsumexp(dim=0)
                total = total - kept.advantages[row, step] * logprob / 16
                available[drawn] = False
        expected = torch.autograd.grad(total, calibrated.parameters, allow_unused=True)
        flat = torch.cat(
            [
                (torch.zeros_like(parameter) if gradient is None else gradient).flatten()
                for parameter, gradient in zip(calibrated.parameters, expected, strict=True)
            ]
        )
        assert flat.norm() > 1e-3
        got = calibrated.gradient(selector_coef=1.0, beta=0.0) - calibrated.gradient(beta=0.0)
        torch.testing.assert_close(got, flat, atol=1e-4, rtol=1e-3)

    def test_activation_checkpointing_changes_nothing(self, calibrated: Bench) -> None:
        calibrated.policy.model.train()
        calibrated.move()
        plain = calibrated.loss(selector_coef=1.0).loss, calibrated.gradient(selector_coef=1.0)
        checkpoint_activations(calibrated.policy.model)
        torch.testing.assert_close(calibrated.loss(selector_coef=1.0).loss, plain[0])
        torch.testing.assert_close(calibrated.gradient(selector_coef=1.0), plain[1])

    def test_the_keys_are_a_part_of_what_is_read(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        shown = Bench(model, tokenizer, show_keys="plain")
        layout = shown.sampler.layout.for_batch(random_batch(4))
        assert shown.kept.query_starts == layout.query_starts
        assert torch.equal(shown.kept.token_ids[:, : layout.prompt_tokens], layout.prompt(random_batch(4), CPU))
        before = shown.loss().policy
        changed = shown.kept.token_ids.clone()
        changed[:, 0] = changed[:, 0] % 300 + 1
        other = shown.loss(replace(shown.kept, token_ids=changed)).policy
        assert (other - before).abs() > 1e-4


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


class TestGroups:
    """Further queries of each context, which are branches of the update's forward."""

    @pytest.fixture
    def group(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> Bench:
        bench = Bench(model, tokenizer)
        generator = torch.Generator().manual_seed(4)
        shape = (4, 3, 2)
        queries = bench.policy.allowed_ids[torch.randint(0, 300, (*shape, 4), generator=generator)]
        others = OtherQueries(queries, torch.zeros(*shape, 4), torch.randn(4, 3, 3, generator=generator))
        bench.kept = replace(bench.kept, others=others)
        return bench

    @staticmethod
    def separate_losses(bench: Bench, beta: float) -> Tensor:
        """The loss by one forward for each query alone: a third of each query's part."""
        others, total = bench.kept.others, torch.zeros(())
        assert others is not None
        for step, start in enumerate(bench.kept.query_starts):
            own = bench.kept.token_ids[:, start : start + 4]
            queries = [own, *others.token_ids[:, step].unbind(dim=1)]
            for query, advantages in zip(queries, others.advantages[:, step].unbind(dim=1), strict=True):
                text = torch.cat([bench.kept.token_ids[:, :start], query], dim=1)
                with torch.no_grad(), bench.snapshot.swapped_in():
                    before = bench.policy.query_log_probabilities(bench.policy.forward(text)[:, start - 1 : -1])
                after = bench.policy.query_log_probabilities(bench.policy.forward(text)[:, start - 1 : -1])
                index = bench.policy.allowed_index(query)
                reinforced = -(advantages[:, None] * after.gather(2, index[:, :, None]).squeeze(2)).sum(dim=1)
                divergence = (before.exp() * (before - after)).sum(dim=(1, 2))
                total = total + ((reinforced + beta * divergence) / 3 / 16).sum()
        return total

    def test_loss_and_gradient_are_those_of_separate_forwards(self, group: Bench) -> None:
        group.policy.model.eval()
        group.move()
        expected = self.separate_losses(group, beta=0.3)
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(expected, group.parameters)])

        torch.testing.assert_close(group.loss(beta=0.3).loss, expected.detach(), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(group.gradient(beta=0.3), gradient, atol=1e-5, rtol=1e-3)

    def test_the_other_terms_are_those_of_the_trajectory_alone(self, group: Bench) -> None:
        settings = {"selector_coef": 1.0, "reward_gradient_coef": 2.0}
        added = group.loss(**settings).loss - group.loss().loss
        group.kept = replace(group.kept, others=None)

        torch.testing.assert_close(added, group.loss(**settings).loss - group.loss().loss, atol=1e-5, rtol=1e-4)

    def test_the_draws_are_reinforced_by_the_steps_own_reward(self, group: Bench) -> None:
        """How a query of the group compares with the others says nothing of what it drew."""
        others = group.kept.others
        assert others is not None
        compared = replace(group.kept, others=replace(others, advantages=5 * others.advantages))
        term = group.loss(selector_coef=1.0).loss - group.loss().loss

        torch.testing.assert_close(
            group.loss(compared, selector_coef=1.0).loss - group.loss(compared).loss, term, atol=1e-4, rtol=1e-4
        )

    def test_micro_batches_add_up(self, group: Bench) -> None:
        parts = [group.loss(part, beta=0.3).loss for part in group.kept.split(3)]

        torch.testing.assert_close(sum(parts), group.loss(beta=0.3).loss, atol=1e-5, rtol=1e-5)

    def test_a_later_iteration_clips_each_by_its_own_rollout(self, group: Bench) -> None:
        others = group.kept.others
        assert others is not None
        far = replace(group.kept, others=replace(others, rollout_logprobs=others.rollout_logprobs - 50))
        near = group.loss(num_iterations=2).policy

        assert not torch.isclose(group.loss(far, num_iterations=2).policy, near)
