"""Advantages, policy loss, KL and the extensions against slow loops and cases worked by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from attention_rl_trainer.update.losses import (
    LossOptions,
    QueryTokens,
    distilled_choice_term,
    expected_choice_term,
    kl_divergence,
    policy_gradient_terms,
    query_terms,
    reward_gradient_term,
    selector_term,
    step_advantages,
)

REWARDS = torch.tensor([[1.0, 2.0, 6.0], [0.0, -3.0, 0.0]])


@pytest.mark.parametrize(
    ("advantage", "credit", "expected"),
    [
        ("reward", "trajectory", [[3.0, 3.0, 3.0], [-1.0, -1.0, -1.0]]),
        ("reward", "step", [[1.0, 2.0, 6.0], [0.0, -3.0, 0.0]]),
        ("reward", "return_to_go", [[3.0, 8 / 3, 2.0], [-1.0, -1.0, 0.0]]),
        ("centered", "trajectory", [[2.5, 2.5, 2.5], [-1.5, -1.5, -1.5]]),
        ("centered", "step", [[0.5, 1.5, 5.5], [-0.5, -3.5, -0.5]]),
        ("centered", "return_to_go", [[2.5, 7 / 3, 5.5 / 3], [-1.5, -4 / 3, -0.5 / 3]]),
        ("whitened", "trajectory", [[1.25, 1.25, 1.25], [-0.75, -0.75, -0.75]]),
        ("whitened", "step", [[0.25, 0.75, 2.75], [-0.25, -1.75, -0.25]]),
    ],
)
def test_advantages_by_hand(advantage: str, credit: str, expected: list[list[float]]) -> None:
    got = step_advantages(REWARDS, 0.5, 2.0, advantage=advantage, credit=credit)
    torch.testing.assert_close(got, torch.tensor(expected))


def test_whitening_without_spread_leaves_the_scale() -> None:
    got = step_advantages(REWARDS, 0.5, 0.0, advantage="whitened", credit="step")
    torch.testing.assert_close(got, REWARDS - 0.5)


def test_a_kept_trajectory_is_always_reinforced() -> None:
    """With a threshold of at least 0, centered advantages and trajectory credit: r > mean + k SD makes A > 0."""
    torch.manual_seed(3)
    rewards = torch.randn(500, 4) - 3  # all negative, where "reward" would push every one of them down
    mean, std = rewards.mean(1).mean().item(), rewards.mean(1).std(correction=0).item()
    kept = rewards[rewards.mean(1) > mean + std]
    assert len(kept) > 20
    assert (step_advantages(kept, mean, std, advantage="centered", credit="trajectory") > 0).all()
    assert (step_advantages(kept, mean, std, advantage="reward", credit="trajectory") < 0).all()


def test_reinforce_by_hand() -> None:
    logprobs = torch.tensor([-1.0, -2.0], requires_grad=True)
    terms = policy_gradient_terms(logprobs, torch.tensor([3.0, -0.5]))
    assert terms.tolist() == [3.0, -1.0]
    terms.sum().backward()
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == [-3.0, 0.5]


def test_importance_ratios_equal_reinforce_at_the_rollout_and_are_clipped_far_from_it() -> None:
    old, advantages = torch.tensor([-1.0, -2.0, -0.3]), torch.tensor([3.0, -0.5, 1.0])
    plain, ratio = old.clone().requires_grad_(), old.clone().requires_grad_()
    policy_gradient_terms(plain, advantages).sum().backward()
    policy_gradient_terms(ratio, advantages, old).sum().backward()
    assert plain.grad is not None
    torch.testing.assert_close(ratio.grad, plain.grad)
    # Ratios e^0.5 and e^-0.5: gains are clipped at 1.2, losses of probability of a bad token at 0.8.
    far = (old + torch.tensor([0.5, -0.5, -0.5])).requires_grad_()
    terms = policy_gradient_terms(far, advantages, old, epsilon=0.2)
    torch.testing.assert_close(terms, torch.tensor([-3.6, 0.4, -math.exp(-0.5)]))
    terms.sum().backward()
    assert far.grad is not None
    assert far.grad[:2].tolist() == [0.0, 0.0]
    assert far.grad[2] != 0


def test_kl_equals_the_summed_definition() -> None:
    previous, current = torch.randn(5, 7).log_softmax(-1), torch.randn(5, 7).log_softmax(-1)
    got = kl_divergence(previous, current)
    for row in range(5):
        pairs = zip(previous[row].tolist(), current[row].tolist(), strict=True)
        assert got[row].item() == pytest.approx(sum(math.exp(p) * (p - q) for p, q in pairs), abs=1e-5)
    assert (got > 0).all()
    assert kl_divergence(current, current).abs().max() == 0


def test_kl_by_hand() -> None:
    previous, current = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log()
    expected = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    assert kl_divergence(previous, current).item() == pytest.approx(expected, abs=1e-6)


def make_tokens(
    count: int, vocabulary: int = 11, ratios: bool = False, dtype: torch.dtype = torch.float32
) -> tuple[QueryTokens, Tensor]:
    head = torch.randn(4, vocabulary, dtype=dtype)
    return (
        QueryTokens(
            hidden=torch.randn(count, 4, dtype=dtype, requires_grad=True),
            previous_hidden=torch.randn(count, 4, dtype=dtype),
            index=torch.randint(0, vocabulary, (count,)),
            advantages=torch.randn(count, dtype=dtype),
            weights=torch.rand(count, dtype=dtype),
            rollout_logprobs=-torch.rand(count, dtype=dtype) * 3 if ratios else None,
        ),
        head,
    )


@pytest.mark.parametrize("ratios", [False, True])
@pytest.mark.parametrize("chunk_size", [1, 3, 10, 64])
def test_chunked_terms_equal_a_slow_loop(chunk_size: int, ratios: bool) -> None:
    tokens, head = make_tokens(10, ratios=ratios)
    terms = query_terms(tokens, lambda h: h @ head, beta=0.3, entropy_coef=0.2, chunk_size=chunk_size)
    policy = kl = entropy = 0.0
    for i in range(10):
        current = (tokens.hidden[i].detach() @ head).log_softmax(-1).tolist()
        assert tokens.previous_hidden is not None
        previous = (tokens.previous_hidden[i] @ head).log_softmax(-1).tolist()
        advantage, weight = tokens.advantages[i].item(), tokens.weights[i].item()
        logprob = current[tokens.index[i]]
        if tokens.rollout_logprobs is None:
            policy += -weight * advantage * logprob
        else:
            ratio = math.exp(logprob - tokens.rollout_logprobs[i].item())
            policy += -weight * min(ratio * advantage, max(0.8, min(1.2, ratio)) * advantage)
        kl += weight * sum(math.exp(p) * (p - q) for p, q in zip(previous, current, strict=True))
        entropy += -weight * sum(math.exp(q) * q for q in current)
    assert terms.policy.item() == pytest.approx(policy, abs=1e-4)
    assert terms.kl.item() == pytest.approx(kl, abs=1e-4)
    assert terms.entropy.item() == pytest.approx(entropy, abs=1e-4)
    assert terms.loss.item() == pytest.approx(policy + 0.3 * kl - 0.2 * entropy, abs=1e-4)


def autograd_loss(tokens: QueryTokens, head: Tensor, beta: float, entropy_coef: float) -> Tensor:
    """The loss over all tokens at once, as autograd sees it: `F.kl_div` on `log_softmax` of the same logits."""
    assert tokens.previous_hidden is not None
    current = F.log_softmax(tokens.hidden @ head, dim=-1)
    previous = F.log_softmax(tokens.previous_hidden @ head, dim=-1)
    logprobs = current.gather(1, tokens.index[:, None]).squeeze(1)
    kl = F.kl_div(current, previous, reduction="none", log_target=True).sum(dim=1)
    entropy = -(current.exp() * current).sum(dim=1)
    policy = policy_gradient_terms(logprobs, tokens.advantages, tokens.rollout_logprobs)
    return ((policy + beta * kl - entropy_coef * entropy) * tokens.weights).sum()


@pytest.mark.parametrize("beta", [0.0, 0.1, 5.0])
@pytest.mark.parametrize("entropy_coef", [0.0, 0.01, 2.0])
@pytest.mark.parametrize("ratios", [False, True])
@pytest.mark.parametrize("chunk_size", [1, 5, 12, 100])
def test_the_written_out_gradient_is_autograds(chunk_size: int, ratios: bool, entropy_coef: float, beta: float) -> None:
    tokens, head = make_tokens(12, ratios=ratios, dtype=torch.float64)
    loss = autograd_loss(tokens, head, beta, entropy_coef)
    expected = torch.autograd.grad(3 * loss, tokens.hidden)[0]
    terms = query_terms(tokens, lambda h: h @ head, beta=beta, entropy_coef=entropy_coef, chunk_size=chunk_size)
    # The loss is scaled after it, as gradient accumulation does.
    got = torch.autograd.grad(3 * terms.loss, tokens.hidden)[0]
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=1e-12)
    assert not terms.policy.requires_grad
    assert terms.loss.item() == pytest.approx(loss.item(), abs=1e-12)


@pytest.mark.parametrize("beta", [0.1, 5.0])
def test_the_written_out_gradient_in_float32_over_a_large_vocabulary(beta: float) -> None:
    tokens, head = make_tokens(6, vocabulary=50_000, ratios=True)
    expected = torch.autograd.grad(autograd_loss(tokens, head, beta, 0.01), tokens.hidden)[0]
    got = torch.autograd.grad(
        query_terms(tokens, lambda h: h @ head, beta=beta, entropy_coef=0.01).loss, tokens.hidden
    )[0]
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


class TestKLIsThatOfKLDiv:
    """Whatever `torch.nn.functional.kl_div` returns is what is trained on."""

    BETA = 0.7

    def loss_and_gradient(self, tokens: QueryTokens, head: Tensor) -> tuple[Tensor, Tensor]:
        loss = query_terms(tokens, lambda h: h @ head, beta=self.BETA, entropy_coef=0.2, chunk_size=5).loss
        return loss.detach(), torch.autograd.grad(loss, tokens.hidden)[0]

    def test_another_divergence_changes_loss_and_gradient(self, monkeypatch: pytest.MonkeyPatch) -> None:
        original = F.kl_div

        def to_uniform(input: Tensor, target: Tensor, *, reduction: str, log_target: bool) -> Tensor:
            assert (reduction, log_target) == ("none", True)
            uniform = torch.full_like(target, -math.log(target.shape[-1]))
            return original(input, uniform, reduction=reduction, log_target=log_target)

        tokens, head = make_tokens(12, dtype=torch.float64)
        loss_before, gradient_before = self.loss_and_gradient(tokens, head)
        monkeypatch.setattr(torch.nn.functional, "kl_div", to_uniform)
        loss, gradient = self.loss_and_gradient(tokens, head)
        expected = autograd_loss(tokens, head, self.BETA, 0.2)
        torch.testing.assert_close(loss, expected.detach(), atol=1e-12, rtol=1e-12)
        torch.testing.assert_close(gradient, torch.autograd.grad(expected, tokens.hidden)[0], atol=1e-12, rtol=1e-12)
        assert (loss - loss_before).abs() > 1e-2
        assert (gradient - gradient_before).norm() > 1e-2

    def test_a_multiple_of_it_is_a_multiple_in_the_loss(self, monkeypatch: pytest.MonkeyPatch) -> None:
        original = F.kl_div
        tokens, head = make_tokens(12, dtype=torch.float64)
        before = query_terms(tokens, lambda h: h @ head, beta=self.BETA)
        monkeypatch.setattr(torch.nn.functional, "kl_div", lambda *args, **options: 3 * original(*args, **options))
        after = query_terms(tokens, lambda h: h @ head, beta=self.BETA)
        torch.testing.assert_close(after.kl, 3 * before.kl)
        torch.testing.assert_close(after.per_token.kl, 3 * before.per_token.kl)
        torch.testing.assert_close(after.loss - before.loss, self.BETA * 2 * before.kl)
        assert torch.equal(after.policy, before.policy)


def test_without_a_previous_adapter_beta_pulls_nowhere() -> None:
    tokens, head = make_tokens(6)
    alone = replace(tokens, previous_hidden=None)
    gradients = [
        torch.autograd.grad(query_terms(alone, lambda h: h @ head, beta=beta).loss, alone.hidden)[0]
        for beta in (0.0, 5.0)
    ]
    assert torch.equal(*gradients)


def test_chunks_do_not_keep_logits_and_do_not_compute_them_twice() -> None:
    tokens, head = make_tokens(12)
    calls: list[int] = []

    def logits_of(hidden: Tensor) -> Tensor:
        calls.append(len(hidden))
        return hidden @ head

    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        terms = query_terms(tokens, logits_of, beta=0.1, chunk_size=4)
    outside = [size for size in saved if size > 4 * 11]
    assert outside == [12 * 4], "only the gradient of the hidden states outlives a chunk"
    terms.loss.backward()
    assert calls == [4] * 6, "three chunks, each under the policy and the previous adapter once"


def test_extension_terms_by_hand() -> None:
    choices = torch.tensor([[-1.0, -2.0], [-0.5, 0.0]])
    advantages, weights = torch.tensor([[1.0, 1.0], [2.0, -4.0]]), torch.tensor([0.5, 0.25])
    assert selector_term(choices, advantages, weights).item() == pytest.approx(0.5 * 3 + 0.25 * 1)
    values = torch.tensor([[[-1.0, -3.0], [-2.0, -2.0]], [[0.0, 0.0], [-4.0, 0.0]]]).flatten()
    term, logprobs = reward_gradient_term(
        values[:, None], torch.zeros(8, dtype=torch.int64), weights.repeat_interleave(4) / 4, lambda h, ids: h[:, 0]
    )
    assert term.item() == pytest.approx(0.5 * 2 + 0.25 * 1)
    assert torch.equal(logprobs, values)


CHOICES = torch.tensor([[[0.5, 0.25, 0.25], [0.0, 0.9, 0.1]]]).log()
WORTH = torch.tensor([[[1.0, 0.0, -1.0], [0.0, 0.2, 0.4]]])


def test_expected_choice_is_the_mean_worth() -> None:
    term = expected_choice_term(CHOICES, WORTH, torch.tensor([0.5]))

    assert term.item() == pytest.approx(-0.5 * ((0.5 - 0.25) + (0.18 + 0.04)))


def test_distilled_choice_is_the_divergence_from_the_softmax_of_the_worth() -> None:
    term = distilled_choice_term(CHOICES, WORTH, 0.2, torch.tensor([2.0]))

    expected = 0.0
    for step, columns in enumerate(([0, 1, 2], [1, 2])):
        target = [math.exp(float(WORTH[0, step, column]) / 0.2) for column in columns]
        for column, weight in zip(columns, target, strict=True):
            share = weight / sum(target)
            expected += share * (math.log(share) - float(CHOICES[0, step, column]))
    assert term.item() == pytest.approx(2.0 * expected, rel=1e-5)


def test_a_distilled_choice_that_is_the_target_costs_nothing_and_moves_nothing() -> None:
    scores = (WORTH / 0.2).masked_fill(CHOICES.isinf(), -torch.inf).requires_grad_()
    term = distilled_choice_term(scores.log_softmax(dim=-1), WORTH, 0.2, torch.ones(1))
    term.backward()

    assert term.item() == pytest.approx(0, abs=1e-6)
    assert scores.grad is not None
    assert scores.grad.abs().max() < 1e-6


def test_a_gradient_of_the_selector_needs_its_term() -> None:
    with pytest.raises(ValueError, match=r"^selector_gradient is 'expected', but selector_coef is 0, .*above 0$"):
        LossOptions(selector_gradient="expected").check_options()
    LossOptions(selector_gradient="expected", selector_coef=0.5).check_options()
    assert not LossOptions(selector_coef=1.0).needs_choice_values
    assert LossOptions(selector_coef=1.0, selector_gradient="distilled").needs_choice_values
