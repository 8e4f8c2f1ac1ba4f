"""The environment: availability, draws without replacement, an order's log-probability, and what a choice hears."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from tiny import make_environment
from torch import Tensor

from attention_rl_trainer.rollout.calibration import Calibration
from attention_rl_trainer.rollout.environment import (
    CalibratedEnvironment,
    DifferentiableEnvironment,
    KVMemoryEnvironment,
    MemoryEnvironment,
    Selection,
    SelectionOptions,
)
from attention_rl_trainer.types import KeyValuePairs


def make_pairs(rows: int = 3, num_pairs: int = 4, groups: int = 2, head_dim: int = 4) -> KeyValuePairs:
    return KeyValuePairs(
        key_tokens=torch.arange(rows * num_pairs * 3).view(rows, num_pairs, 3),
        value_tokens=torch.arange(rows * num_pairs * 2).view(rows, num_pairs, 2),
        key_vectors=torch.randn(rows, num_pairs, groups, head_dim),
        pair_numbers=torch.arange(1, num_pairs + 1).expand(rows, -1).clone(),
    )


def test_every_pair_is_read_exactly_once() -> None:
    environment, pairs = KVMemoryEnvironment(), make_pairs()
    environment.reset(pairs)
    drawn = []
    for _ in range(4):
        selection = environment.step(torch.randn(3, 4, 4), torch.rand(3))
        assert torch.equal(selection.pairs.value_tokens, pairs.value_tokens[torch.arange(3), selection.index])
        assert torch.equal(
            selection.pairs.key_embedding, pairs.key_vectors[torch.arange(3), selection.index].flatten(1)
        )
        drawn.append(selection.index)
    assert [sorted(row) for row in torch.stack(drawn, dim=1).tolist()] == [[0, 1, 2, 3]] * 3
    with pytest.raises(ValueError, match="used up"):
        environment.step(torch.randn(3, 4, 4), torch.rand(3))


def test_a_drawn_pair_has_probability_zero_afterwards() -> None:
    environment = KVMemoryEnvironment()
    environment.reset(make_pairs())
    first = environment.step(torch.randn(3, 4, 4), torch.rand(3))
    second = environment.step(torch.randn(3, 4, 4), torch.rand(3))
    assert second.probabilities.gather(1, first.index[:, None]).tolist() == [[0.0]] * 3
    torch.testing.assert_close(second.probabilities.sum(dim=1), torch.ones(3))


def expect_log_prob_of_the_steps(environment: KVMemoryEnvironment) -> list[torch.Tensor]:
    """Check an environment's `log_prob` against its steps; returns the probabilities of the draws, a step at a time."""
    pairs, queries = make_pairs(), torch.randn(3, 4, 4, 4)
    environment.reset(pairs)
    selections = [environment.step(queries[:, t], torch.rand(3)) for t in range(4)]
    index = torch.stack([selection.index for selection in selections], dim=1)
    taken = [s.probabilities.gather(1, s.index[:, None]).squeeze(1) for s in selections]
    torch.testing.assert_close(environment.log_prob(pairs, queries, index), torch.stack(taken, dim=1).log())
    return taken


def test_log_prob_equals_the_probabilities_of_the_steps() -> None:
    expect_log_prob_of_the_steps(make_environment(temperature=0.5))


@pytest.mark.parametrize("num_read", [0, 1, 3])
def test_log_prob_leaves_the_present_episodes_as_they_are(num_read: int) -> None:
    pairs, others = make_pairs(), make_pairs(rows=2, num_pairs=5)
    queries, noise = torch.randn(3, 4, 4, 4), torch.rand(3, 4)
    interrupted, plain = make_environment(temperature=0.5), make_environment(temperature=0.5)
    taken = []
    for environment in (interrupted, plain):
        environment.reset(pairs)
        drawn = []
        for step in range(4):
            if environment is interrupted and step == num_read:
                before = environment.available_mask.clone()
                for memory, index in ((pairs, torch.tensor([[3, 0]] * 3)), (others, torch.tensor([[4, 1]] * 2))):
                    first = environment.log_prob(memory, queries[: len(index), :2], index)
                    assert torch.equal(environment.log_prob(memory, queries[: len(index), :2], index), first)
                assert torch.equal(environment.available_mask, before)
                assert environment.pairs is pairs
            drawn.append(environment.step(queries[:, step], noise[:, step]))
        taken.append(drawn)
    for first, second in zip(*taken, strict=True):
        assert torch.equal(first.index, second.index)
        assert torch.equal(first.probabilities, second.probabilities)


def test_log_prob_needs_no_episode_and_does_not_depend_on_one() -> None:
    environment, pairs = KVMemoryEnvironment(), make_pairs()
    queries, index = torch.randn(3, 2, 4, 4), torch.tensor([[1, 3], [0, 2], [2, 1]])
    fresh = environment.log_prob(pairs, queries, index)
    environment.reset(make_pairs())
    environment.step(queries[:, 0], torch.rand(3))
    assert torch.equal(environment.log_prob(pairs, queries, index), fresh)


def test_log_prob_of_all_orders_sums_to_one() -> None:
    environment, pairs = make_environment(head_aggregation="scores"), make_pairs(rows=1, num_pairs=3)
    queries = torch.randn(1, 3, 4, 4)
    orders = [torch.tensor([order]) for order in itertools.permutations(range(3))]
    total = sum(environment.log_prob(pairs, queries, order).sum().exp() for order in orders)
    assert float(total) == pytest.approx(1.0, abs=1e-6)


def test_log_prob_has_a_gradient_to_the_queries() -> None:
    queries = torch.randn(3, 4, 4, 4, requires_grad=True)
    KVMemoryEnvironment().log_prob(make_pairs(), queries, torch.tensor([[0, 1, 2, 3]] * 3)).sum().backward()
    assert queries.grad is not None
    assert bool(queries.grad.isfinite().all())
    assert queries.grad[:, :3].abs().min() > 0
    assert queries.grad[:, 3].abs().max() == 0  # the last pair is drawn for certain


def test_protocols() -> None:
    class Bare:
        def reset(self, pairs: KeyValuePairs) -> None: ...

        def step(self, query_vectors: Tensor, noise: Tensor) -> Selection: ...

    assert isinstance(KVMemoryEnvironment(), DifferentiableEnvironment)
    assert isinstance(Bare(), MemoryEnvironment)
    assert not isinstance(Bare(), DifferentiableEnvironment)


def test_use_before_reset_and_bad_temperature_are_refused() -> None:
    with pytest.raises(RuntimeError, match="reset"):
        KVMemoryEnvironment().step(torch.randn(1, 2, 2), torch.rand(1))
    with pytest.raises(ValueError, match="selection_temperature must be above 0 and finite, got 0"):
        make_environment(temperature=0)


def made_up_calibration(dtype: torch.dtype = torch.float32) -> Calibration:
    """Of 4 heads and 2 groups, as `make_pairs` has them."""
    generator = torch.Generator().manual_seed(9)
    return Calibration(0.25, None, *(torch.randn(rows, 4, generator=generator).to(dtype) for rows in (4, 2)))


def calibrated(dtype: torch.dtype = torch.float32, **changes: Any) -> KVMemoryEnvironment:
    """The whole recipe: cosines of vectors less their means, at a fitted temperature."""
    fields: dict[str, Any] = {
        "selection_temperature": "auto",
        "head_aggregation": "scores",
        "head_similarity": "cosine",
        "center_vectors": True,
    }
    return KVMemoryEnvironment(SelectionOptions(**fields | changes), made_up_calibration(dtype))


def loop_choice(query: Tensor, keys: Tensor, available: Tensor, calibration: Calibration) -> list[float]:
    """The definition for one query ``[H, D]`` and one memory ``[M, G, D]``, one number at a time."""
    assert calibration.query_means is not None
    assert calibration.key_means is not None
    scores = []
    for key in keys:
        cosines = []
        for head, vector in enumerate((query - calibration.query_means).tolist()):
            group = head * keys.shape[1] // query.shape[0]
            other = (key[group] - calibration.key_means[group]).tolist()
            lengths = math.sqrt(sum(x * x for x in vector) * sum(x * x for x in other))
            cosines.append(sum(x * y for x, y in zip(vector, other, strict=True)) / lengths)
        scores.append(sum(cosines) / len(cosines) / calibration.temperature)
    weights = [math.exp(score) if free else 0.0 for score, free in zip(scores, available.tolist(), strict=True)]
    return [weight / sum(weights) for weight in weights]


def entropy_of(probabilities: list[float]) -> float:
    return -sum(p * math.log(p) for p in probabilities if p > 0)


class TestCalibrated:
    def test_a_step_and_what_it_hears_equal_the_definition_after_some_draws_too(self) -> None:
        environment, pairs, calibration = calibrated(), make_pairs(rows=3), made_up_calibration()
        environment.reset(pairs)
        available = torch.ones(3, 4, dtype=torch.bool)
        for step in range(4):
            queries = torch.randn(3, 4, 4)
            selection = environment.step(queries, torch.rand(3))
            assert selection.information is not None
            for row in range(3):
                memory = pairs.key_vectors[row]
                asked = [loop_choice(query, memory, available[row], calibration) for query in queries]
                assert selection.probabilities[row].tolist() == pytest.approx(asked[row], abs=1e-5)
                mean = [sum(column) / 3 for column in zip(*asked, strict=True)]
                heard = entropy_of(mean) - sum(map(entropy_of, asked)) / 3
                assert selection.information[row].item() == pytest.approx(heard, abs=1e-5)
                assert step == 3 or heard > 1e-3
            assert torch.equal(environment.available_mask.sum(dim=1), torch.full((3,), 3 - step))
            available = available.scatter(1, selection.index[:, None], False)

    def test_of_one_row_nothing_is_measured(self) -> None:
        environment = KVMemoryEnvironment()
        environment.reset(make_pairs(rows=1))
        assert environment.step(torch.randn(1, 4, 4), torch.rand(1)).information is None

    def test_a_row_is_asked_with_its_own_query_and_those_before_it(self) -> None:
        # Of 40 rows, each memory is asked with 32 queries: its own and 31 others.
        environment, pairs, queries = make_environment(temperature=0.1), make_pairs(rows=40), torch.randn(40, 4, 4)
        environment.reset(pairs)
        information = environment.step(queries, torch.rand(40)).information
        assert information is not None
        for row in (0, 7, 39):
            asked = queries[[(row - shift) % 40 for shift in range(32)]]
            memory = pairs.key_vectors[row].expand(32, -1, -1, -1)
            everything = torch.ones(32, 4, dtype=torch.bool)
            choices = environment.selector.log_probabilities(asked, memory, everything).exp()
            mean = entropy_of(choices.mean(dim=0).tolist()) - sum(map(entropy_of, choices.tolist())) / 32
            assert information[row].item() == pytest.approx(mean, abs=1e-5)

    def test_equal_queries_say_nothing(self) -> None:
        environment = make_environment(temperature=0.1)
        environment.reset(make_pairs())
        information = environment.step(torch.randn(4, 4).expand(3, -1, -1), torch.rand(3)).information
        assert information is not None
        assert information.abs().max() < 1e-6

    def test_what_is_heard_changes_no_draw(self) -> None:
        pairs, queries, noise = make_pairs(), torch.randn(3, 4, 4), torch.rand(3)
        together, drawn = calibrated(), []
        together.reset(pairs)
        selection = together.step(queries, noise)
        for row in range(3):
            alone = calibrated()
            alone.reset(pairs.select_rows(torch.tensor([row])))
            drawn.append(alone.step(queries[row : row + 1], noise[row : row + 1]))
        assert torch.equal(selection.index, torch.cat([one.index for one in drawn]))
        torch.testing.assert_close(selection.probabilities, torch.cat([one.probabilities for one in drawn]))

    @pytest.mark.parametrize(
        "changes", [{}, {"head_aggregation": "probabilities"}, {"head_similarity": "dot"}], ids=str
    )
    def test_log_prob_equals_the_probabilities_of_the_steps(self, changes: dict[str, Any]) -> None:
        taken = expect_log_prob_of_the_steps(calibrated(**changes))
        assert (taken[0] < 0.99).any()

    @pytest.mark.parametrize("similarity", ["dot", "cosine"])
    def test_gradient_of_log_prob(self, similarity: str) -> None:
        environment, pairs = calibrated(torch.float64, head_similarity=similarity), make_pairs(rows=2, num_pairs=3)
        pairs = KeyValuePairs(pairs.key_tokens, pairs.value_tokens, pairs.key_vectors.double(), pairs.pair_numbers)
        queries = torch.randn(2, 2, 4, 4, dtype=torch.float64, requires_grad=True)
        index = torch.tensor([[2, 0], [0, 1]])
        assert torch.autograd.gradcheck(lambda vectors: environment.log_prob(pairs, vectors, index), queries)

    def test_a_fixed_temperature_is_respected(self) -> None:
        assert calibrated(selection_temperature=0.7).selector.temperature == 0.7
        assert calibrated().selector.temperature == 0.25

    def test_vectors_are_centred_only_where_it_is_asked_for(self) -> None:
        selector = calibrated(center_vectors=False).selector
        assert (selector.query_means, selector.key_means, selector.temperature) == (None, None, 0.25)

    @pytest.mark.parametrize("changes", [{"center_vectors": True}, {"selection_temperature": "auto"}], ids=str)
    def test_what_must_be_fitted_is_asked_for(self, changes: dict[str, Any]) -> None:
        environment, pairs = KVMemoryEnvironment(SelectionOptions(**changes)), make_pairs()
        assert isinstance(environment, CalibratedEnvironment)
        environment.reset(pairs)
        with pytest.raises(RuntimeError, match=r"need what is fitted before training; call calibrate\(calibration\)"):
            environment.step(torch.randn(3, 4, 4), torch.rand(3))
        with pytest.raises(RuntimeError, match="need what is fitted"):
            environment.log_prob(pairs, torch.randn(3, 1, 4, 4), torch.zeros(3, 1, dtype=torch.int64))
        environment.calibrate(made_up_calibration())
        environment.step(torch.randn(3, 4, 4), torch.rand(3))

    def test_a_calibration_without_means_is_refused_where_means_are_to_be_subtracted(self) -> None:
        options = SelectionOptions(center_vectors=True)
        with pytest.raises(ValueError, match="center_vectors is true, but the calibration has no means"):
            KVMemoryEnvironment(options).calibrate(Calibration(0.1))
        with pytest.raises(ValueError, match="center_vectors is true, but the calibration has no means"):
            KVMemoryEnvironment(options, Calibration(0.1))


class TestOptions:
    @pytest.mark.parametrize(("given", "temperature"), [("0.05", 0.05), ("1e-2", 0.01), (2, 2.0), ("auto", None)])
    def test_a_temperature_may_come_as_text(self, given: Any, temperature: float | None) -> None:
        options = SelectionOptions(selection_temperature=given)
        assert options.fixed_temperature == temperature
        assert options.is_fitted == (temperature is None)
        assert SelectionOptions(selection_temperature=given, center_vectors=True).is_fitted

    @pytest.mark.parametrize("given", ["cold", "", "-0.1", "nan", "inf", 0, -1.0, float("nan"), True, None])
    def test_another_temperature_is_refused(self, given: Any) -> None:
        with pytest.raises(ValueError, match="selection_temperature must be"):
            SelectionOptions(selection_temperature=given)
