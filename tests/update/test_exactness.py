"""The expected gradient estimate equals the gradient of the expected reward, by enumerating every outcome of a toy.

The toy is a real Llama with a real memory: three keys, queries of two tokens over a vocabulary of three allowed ids,
two steps; 9 · 3 · 9 · 2 = 486 trajectories. Each goes through `compute_loss_terms`, as shipped, with its probability as
its weight, so that the loss's gradient is the expected estimate. The other side is autograd through the enumerated sum.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import make_environment
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from attention_rl_trainer.models.policy import PolicyModel
from attention_rl_trainer.types import KeyValuePairs
from attention_rl_trainer.update.kept import KeptTrajectories
from attention_rl_trainer.update.losses import LossOptions, step_advantages
from attention_rl_trainer.update.objective import compute_loss_terms
from attention_rl_trainer.update.previous_adapter import AdapterSnapshot

QUERY, RESPONSE, ALLOWED = 3, 4, (0, 1, 2)
NUM_KEYS, NUM_STEPS, QUERY_LENGTH, VALUE_LENGTH = 3, 2, 2, 2
PROMPT = [QUERY, 5, RESPONSE, 6, QUERY]
VALUES = torch.tensor([[7, 8], [9, 10], [11, 5]])


class Toy:
    """The policy, and all of its trajectories."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=12, hidden_size=16, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
            intermediate_size=16, max_position_embeddings=64, initializer_range=0.5,
        )  # fmt: skip
        model = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.normal_(std=0.3)
        self.policy = PolicyModel(model, torch.tensor(ALLOWED))
        self.environment = make_environment(temperature=0.3)
        self.snapshot = AdapterSnapshot(model)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.key_vectors = torch.randn(1, NUM_KEYS, 2, 4)
        queries = list(itertools.product(ALLOWED, repeat=QUERY_LENGTH))
        orders = list(itertools.permutations(range(NUM_KEYS), NUM_STEPS))
        self.outcomes = list(itertools.product(itertools.product(queries, repeat=NUM_STEPS), orders))
        self.token_ids = torch.tensor([self.sequence(*outcome) for outcome in self.outcomes])
        self.orders = torch.tensor([order for _, order in self.outcomes])
        start, block = len(PROMPT), QUERY_LENGTH + 1 + VALUE_LENGTH + 1
        self.query_starts = tuple(start + t * block for t in range(NUM_STEPS))
        self.value_starts = tuple(s + QUERY_LENGTH + 1 for s in self.query_starts)

    @staticmethod
    def sequence(queries: tuple[tuple[int, ...], ...], order: tuple[int, ...]) -> list[int]:
        ids = list(PROMPT)
        for number, (query, key) in enumerate(zip(queries, order, strict=True)):
            ids += [*query, RESPONSE, *VALUES[key].tolist()] + [QUERY] * (number < NUM_STEPS - 1)
        return ids

    def memory(self) -> KeyValuePairs:
        rows = len(self.outcomes)
        return KeyValuePairs(
            torch.zeros(rows, NUM_KEYS, 1, dtype=torch.int64),
            VALUES.expand(rows, -1, -1),
            self.key_vectors.expand(rows, -1, -1, -1),
            torch.arange(NUM_KEYS).expand(rows, -1),
        )

    def log_probabilities(self) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities of queries ``[n, T, L]`` and draws ``[n, T]``, and of value tokens ``[n, T, V]``.

        Written out independently of the library's update: one plain forward, positions by hand.
        """
        with self.policy.attention.capture_queries() as capture:
            output = self.policy.model(input_ids=self.token_ids)
        full = output.logits.log_softmax(-1)
        over_allowed = output.logits[..., list(ALLOWED)].log_softmax(-1)
        queries, vectors, values = [], [], []
        for query_start, value_start in zip(self.query_starts, self.value_starts, strict=True):
            tokens = [
                over_allowed[:, p - 1].gather(1, self.token_ids[:, p, None]).squeeze(1)
                for p in range(query_start, query_start + QUERY_LENGTH)
            ]
            queries.append(torch.stack(tokens, 1))
            vectors.append(capture.heads()[:, query_start : query_start + QUERY_LENGTH].mean(1))
            values.append(
                torch.stack(
                    [
                        full[:, p - 1].gather(1, self.token_ids[:, p, None]).squeeze(1)
                        for p in range(value_start, value_start + VALUE_LENGTH)
                    ],
                    1,
                )
            )
        draws = self.environment.log_prob(self.memory(), torch.stack(vectors, 1), self.orders)
        return torch.stack(queries, 1), draws, torch.stack(values, 1)

    def gradient(self, objective: Tensor) -> Tensor:
        gradients = torch.autograd.grad(objective, self.parameters, allow_unused=False)
        return torch.cat([g.flatten() for g in gradients])

    def estimate(
        self,
        step_rewards: Tensor,
        credit: str,
        options: LossOptions,
        baseline: float = 0.0,
        choice_values: Tensor | None = None,
    ) -> Tensor:
        """The expected gradient estimate of the shipped loss, with the sign of an ascent direction."""
        queries, draws, _ = self.log_probabilities()
        probability = (queries.sum((1, 2)) + draws.sum(1)).exp().detach()
        assert abs(probability.sum().item() - 1) < 1e-5
        kept = KeptTrajectories(
            token_ids=self.token_ids,
            query_starts=self.query_starts,
            value_starts=self.value_starts,
            query_length=QUERY_LENGTH,
            value_length=VALUE_LENGTH,
            rollout_logprobs=queries.detach(),
            selected_index=self.orders,
            memory=self.memory(),
            advantages=step_advantages(step_rewards, baseline, 1.0, advantage="centered", credit=credit),
            weights=probability,
            choice_values=choice_values,
        )
        terms = compute_loss_terms(self.policy, self.policy.model, self.environment, self.snapshot, kept, options)
        return self.gradient(-terms.loss)


@pytest.fixture(scope="module")
def toy() -> Toy:
    return Toy()


def causal_rewards(toy: Toy) -> Tensor:
    """A constant reward for each step, which depends on what was asked and read up to that step, ``[n, T]``."""
    torch.manual_seed(1)
    table: dict[tuple[object, ...], float] = {}
    rewards = []
    for queries, order in toy.outcomes:
        prefixes = [(queries[: t + 1], order[: t + 1]) for t in range(NUM_STEPS)]
        rewards.append([table.setdefault(prefix, torch.randn(()).item()) for prefix in prefixes])
    return torch.tensor(rewards)


def exact_gradient(toy: Toy, rewards: Callable[[Tensor], Tensor]) -> Tensor:
    queries, draws, values = toy.log_probabilities()
    probability = (queries.sum((1, 2)) + draws.sum(1)).exp()
    return toy.gradient((probability * rewards(values)).sum())


def relative_error(got: Tensor, expected: Tensor) -> float:
    return ((got - expected).norm() / expected.norm()).item()


JOINT = LossOptions(beta=0.0, selector_coef=1.0)


def test_every_trajectory_is_there(toy: Toy) -> None:
    assert len(toy.outcomes) == 9 * 3 * 9 * 2 == 486


@pytest.mark.parametrize("credit", ["trajectory", "return_to_go"])
@pytest.mark.parametrize("baseline", [0.0, 0.7])
def test_the_estimate_is_unbiased(toy: Toy, credit: str, baseline: float) -> None:
    rewards = causal_rewards(toy)
    expected = exact_gradient(toy, lambda values: rewards.mean(1))
    assert relative_error(toy.estimate(rewards, credit, JOINT, baseline), expected) < 1e-5


def test_step_credit_is_myopic(toy: Toy) -> None:
    rewards = causal_rewards(toy)
    expected = exact_gradient(toy, lambda values: rewards.mean(1))
    assert relative_error(toy.estimate(rewards, "step", JOINT) / NUM_STEPS, expected) > 0.05


@pytest.mark.parametrize("credit", ["trajectory", "return_to_go"])
def test_without_the_selector_term_the_bias_shows(toy: Toy, credit: str) -> None:
    rewards = causal_rewards(toy)
    expected = exact_gradient(toy, lambda values: rewards.mean(1))
    assert relative_error(toy.estimate(rewards, credit, LossOptions(beta=0.0)), expected) > 0.05


@pytest.mark.parametrize("credit", ["trajectory", "return_to_go"])
def test_with_the_reward_gradient_it_is_the_full_gradient(toy: Toy, credit: str) -> None:
    """The reward is the policy's own log-probability of the values, so it depends on the weights itself."""
    _, _, values = toy.log_probabilities()
    rewards = values.detach().mean(2)
    expected = exact_gradient(toy, lambda value_logprobs: value_logprobs.mean(dim=(1, 2)))
    full = LossOptions(beta=0.0, selector_coef=1.0, reward_gradient_coef=1.0)
    assert relative_error(toy.estimate(rewards, credit, full), expected) < 1e-5
    assert relative_error(toy.estimate(rewards, credit, JOINT), expected) > 0.05


def choice_values(toy: Toy) -> Tensor:
    """What each choice would tell after every query and draw so far, ``[n, T, M]``; 0 where a key was drawn."""
    torch.manual_seed(2)
    table: dict[tuple[object, ...], Tensor] = {}
    rows = []
    for queries, order in toy.outcomes:
        steps = []
        for step in range(NUM_STEPS):
            unread = torch.tensor([float(key not in order[:step]) for key in range(NUM_KEYS)])
            steps.append(table.setdefault((queries[: step + 1], order[:step]), torch.randn(NUM_KEYS)) * unread)
        rows.append(torch.stack(steps))
    return torch.stack(rows)


def test_the_expected_choice_has_the_gradient_of_reinforcing_every_draw(toy: Toy) -> None:
    """Reinforcing each draw by what it tells, enumerated over all draws: the same mean, without a draw's noise."""
    values = choice_values(toy)
    queries, draws, _ = toy.log_probabilities()
    probability = (queries.sum((1, 2)) + draws.sum(1)).exp().detach()
    drawn = values.gather(2, toy.orders[:, :, None]).squeeze(2)
    # The queries' own part is 0 here; it names the weights that the draws do not depend on.
    expected = toy.gradient((probability * (drawn * draws).sum(1)).sum() + 0 * queries.sum())

    nothing, options = torch.zeros(len(toy.outcomes), NUM_STEPS), {"beta": 0.0, "selector_coef": 1.0}
    exact = LossOptions(**options, selector_gradient="expected")
    found = toy.estimate(nothing, "step", exact, choice_values=values)
    sampled = toy.estimate(drawn, "step", LossOptions(**options)) - toy.estimate(drawn, "step", LossOptions(beta=0.0))

    assert relative_error(found, expected) < 1e-5
    assert relative_error(sampled, expected) < 1e-5


def test_a_distilled_choice_at_a_high_temperature_points_where_the_expected_one_does(toy: Toy) -> None:
    """At a uniform choice, KL(softmax(a / τ) || p) falls by the worth of the choices, in units of τ, to first order."""
    values = choice_values(toy)
    toy.environment = make_environment(temperature=1e4)
    try:
        nothing, options = torch.zeros(len(toy.outcomes), NUM_STEPS), {"beta": 0.0, "selector_coef": 1.0}
        expected = toy.estimate(
            nothing, "step", LossOptions(**options, selector_gradient="expected"), choice_values=values
        )
        distilled = LossOptions(**options, selector_gradient="distilled", distillation_temperature=100.0)
        found = toy.estimate(nothing, "step", distilled, choice_values=values)
    finally:
        toy.environment = make_environment(temperature=0.3)

    assert relative_error(100.0 * found, expected) < 0.05
