"""The selector against a slow loop, against cases worked by hand, its draws, and what it hears of a query."""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from attention_rl_trainer.rollout.selector import (
    Selector,
    compute_similarity,
    sample_key_value,
    selection_information,
    selection_log_probabilities,
)


def loop_probabilities(
    query: Tensor, keys: Tensor, available: Tensor, temperature: float, aggregation: str, similarity: str = "dot"
) -> list[list[float]]:
    """The definition, one number at a time."""
    rows = []
    num_heads, head_dim = query.shape[1:]
    num_keys, num_groups = keys.shape[1:3]
    for row in range(query.shape[0]):
        scores = [[0.0] * num_keys for _ in range(num_heads)]
        for head in range(num_heads):
            group = head // (num_heads // num_groups)
            for key in range(num_keys):
                q, k = query[row, head].tolist(), keys[row, key, group].tolist()
                dot = sum(q[i] * k[i] for i in range(head_dim))
                norm = math.sqrt(head_dim)
                if similarity == "cosine":
                    norm = math.sqrt(sum(x * x for x in q)) * math.sqrt(sum(x * x for x in k))
                scores[head][key] = dot / norm / temperature
        if aggregation == "scores":
            scores = [[sum(column) / num_heads for column in zip(*scores, strict=True)]]
        mean = [0.0] * num_keys
        for head_scores in scores:
            exponents = [math.exp(s) if available[row, k] else 0.0 for k, s in enumerate(head_scores)]
            for key in range(num_keys):
                mean[key] += exponents[key] / sum(exponents) / len(scores)
        rows.append(mean)
    return rows


@pytest.mark.parametrize("aggregation", ["probabilities", "scores"])
@pytest.mark.parametrize("temperature", [0.1, 1.0, 3.0])
@pytest.mark.parametrize(("heads", "groups"), [(6, 2), (4, 4), (3, 1)])
def test_equals_the_slow_loop(aggregation: str, temperature: float, heads: int, groups: int) -> None:
    query, keys = torch.randn(3, heads, 5), torch.randn(3, 4, groups, 5)
    available = torch.tensor([[True, True, True, True], [False, True, False, True], [False, False, True, False]])
    got = selection_log_probabilities(compute_similarity(query, keys), available, temperature, aggregation).exp()
    expected = torch.tensor(loop_probabilities(query, keys, available, temperature, aggregation))
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(got.sum(dim=1), torch.ones(3))
    assert bool((got[~available] == 0).all())


def test_two_heads_worked_by_hand() -> None:
    # D = 4, so scores are halved. Head 0 scores the keys (2, 0), head 1 (0, 2): opposite votes of the same strength.
    query = torch.tensor([[[2.0, 0, 0, 0], [0, 2.0, 0, 0]]])
    keys = torch.tensor([[[[2.0, 0, 0, 0]], [[0, 2.0, 0, 0]]]])
    similarity = compute_similarity(query, keys)
    assert similarity.tolist() == [[[2.0, 0.0], [0.0, 2.0]]]
    everything = torch.ones(1, 2, dtype=torch.bool)
    assert selection_log_probabilities(similarity, everything).exp().tolist() == [[0.5, 0.5]]
    # A third head that scores (2, 0) breaks the tie: averaged probabilities give 2/3 σ(2) + 1/3 σ(-2), averaged
    # scores σ(2/3).
    similarity = torch.cat([similarity, similarity[:, :1]], dim=1)
    sigmoid = 1 / (1 + math.exp(-2))
    by_probabilities = selection_log_probabilities(similarity, everything).exp()[0, 0].item()
    assert by_probabilities == pytest.approx(2 / 3 * sigmoid + 1 / 3 * (1 - sigmoid), abs=1e-6)
    by_scores = selection_log_probabilities(similarity, everything, 1.0, "scores").exp()[0, 0].item()
    assert by_scores == pytest.approx(1 / (1 + math.exp(-2 / 3)), abs=1e-6)


def test_grouped_heads_read_their_own_group() -> None:
    # Heads 0, 1 share group 0 and heads 2, 3 group 1; only group 1 of the second key is non-zero.
    query = torch.ones(1, 4, 1)
    keys = torch.tensor([[[[0.0], [0.0]], [[0.0], [3.0]]]])
    assert compute_similarity(query, keys).tolist() == [[[0, 0], [0, 0], [0, 3], [0, 3]]]


def test_temperature_divides() -> None:
    similarity = torch.tensor([[[1.0, 0.0]]])
    available = torch.ones(1, 2, dtype=torch.bool)
    cold = selection_log_probabilities(similarity, available, 0.5).exp()[0, 0].item()
    assert cold == pytest.approx(1 / (1 + math.exp(-2)), abs=1e-6)


@pytest.mark.parametrize("aggregation", ["probabilities", "scores"])
def test_gradient_is_finite_beside_masked_keys(aggregation: str) -> None:
    similarity = torch.randn(2, 3, 4, requires_grad=True)
    available = torch.tensor([[True, False, True, False], [True, True, True, True]])
    log_probabilities = selection_log_probabilities(similarity, available, 1.0, aggregation)
    log_probabilities.gather(1, torch.tensor([[0], [3]])).sum().backward()
    assert similarity.grad is not None
    assert bool(similarity.grad.isfinite().all())
    assert bool((similarity.grad[0, :, 1] == 0).all())
    assert similarity.grad.abs().sum() > 0


def test_a_used_up_memory_is_refused() -> None:
    with pytest.raises(ValueError, match="used up"):
        selection_log_probabilities(torch.randn(2, 1, 3), torch.tensor([[True] * 3, [False] * 3]))


def test_unfitting_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"got \[2, 5, 1, 3\]"):
        compute_similarity(torch.randn(2, 4, 8), torch.randn(2, 5, 1, 3))
    with pytest.raises(ValueError, match="cannot share 3 key groups"):
        compute_similarity(torch.randn(2, 4, 8), torch.randn(2, 5, 3, 8))


def test_draws_follow_the_probabilities() -> None:
    probabilities = torch.tensor([0.1, 0.0, 0.6, 0.3]).repeat(20000, 1)
    noise = torch.rand(20000, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    counts = torch.bincount(sample_key_value(probabilities, noise), minlength=4) / 20000
    assert counts[1] == 0
    torch.testing.assert_close(counts, probabilities[0], atol=0.011, rtol=0)  # 3.2 standard errors


def test_draw_worked_by_hand() -> None:
    probabilities = torch.tensor([[0.25, 0.25, 0.5]]).repeat(5, 1)
    noise = torch.tensor([0.0, 0.2499, 0.25, 0.5, 0.9999], dtype=torch.float64)
    assert sample_key_value(probabilities, noise).tolist() == [0, 0, 1, 2, 2]


def literal_log_probabilities(
    query: Tensor, keys: Tensor, available: Tensor, temperature: float, aggregation: str
) -> Tensor:
    """The seed document's selector, in the operations and the order in which it was first written."""
    groups = keys.shape[2]
    grouped = torch.unflatten(query, 1, (groups, query.shape[1] // groups))
    scores = torch.einsum("bgrd,bmgd->bgrm", grouped, keys).flatten(1, 2) / math.sqrt(query.shape[2]) / temperature
    if aggregation == "scores":
        return torch.log_softmax(scores.mean(dim=1).masked_fill(~available, -torch.inf), dim=-1)
    per_head = torch.log_softmax(scores.masked_fill(~available[:, None], -torch.inf), dim=-1)
    mean = torch.logsumexp(per_head.masked_fill(~available[:, None], 0.0), dim=1) - math.log(query.shape[1])
    return mean.masked_fill(~available, -torch.inf)


class TestCalibratedSelector:
    """s_k = mean over h of cos(q_h - μ^q_h, k_g(h) - μ^k_g(h)), p = softmax(s / τ), and what it is made of."""

    AVAILABLE = torch.tensor([[True, True, True, True], [False, True, False, True], [False, False, True, False]])

    @pytest.mark.parametrize("aggregation", ["probabilities", "scores"])
    @pytest.mark.parametrize("similarity", ["dot", "cosine"])
    @pytest.mark.parametrize("centred", [False, True])
    @pytest.mark.parametrize(("heads", "groups"), [(6, 2), (4, 4), (3, 1)])
    def test_equals_the_slow_loop(
        self, heads: int, groups: int, centred: bool, similarity: str, aggregation: str
    ) -> None:
        query, keys = torch.randn(3, heads, 5), torch.randn(3, 4, groups, 5)
        means = (torch.randn(heads, 5), torch.randn(groups, 5)) if centred else (None, None)
        selector = Selector(0.3, aggregation, similarity, *means)
        got = selector.log_probabilities(query, keys, self.AVAILABLE).exp()
        if centred:
            query = torch.stack([row - means[0] for row in query])
            keys = torch.stack([torch.stack([key - means[1] for key in row]) for row in keys])
        expected = torch.tensor(loop_probabilities(query, keys, self.AVAILABLE, 0.3, aggregation, similarity))
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-4)
        assert bool((got[~self.AVAILABLE] == 0).all())

    def test_worked_by_hand(self) -> None:
        # Less its mean (1, 1), the query is (3, 4); less theirs (0, 1), the keys are (4, 3), (-3, -4) and (0, 2).
        # Cosines 24/25, -1 and 4/5; at τ = 1/5 the logits are 4.8, -5 and 4.
        query, keys = torch.tensor([[[4.0, 5.0]]]), torch.tensor([[[[4.0, 4.0]], [[-3.0, -3.0]], [[0.0, 3.0]]]])
        selector = Selector(0.2, "scores", "cosine", torch.tensor([[1.0, 1.0]]), torch.tensor([[0.0, 1.0]]))
        assert selector.similarity(query, keys)[0, 0].tolist() == pytest.approx([0.96, -1.0, 0.8], abs=1e-6)
        everything = torch.ones(1, 3, dtype=torch.bool)
        weights = [math.exp(logit) for logit in (4.8, -5.0, 4.0)]
        expected = [weight / sum(weights) for weight in weights]
        got = selector.log_probabilities(query, keys, everything).exp()[0].tolist()
        assert got == pytest.approx(expected, abs=1e-6)
        # As they are: (4, 5) with (4, 4), (-3, -3) and (0, 3).
        bare = Selector(0.2, "scores", "cosine").similarity(query, keys)[0, 0].tolist()
        norm = math.sqrt(41)
        assert bare == pytest.approx([36 / norm / math.sqrt(32), -27 / norm / math.sqrt(18), 5 / norm], abs=1e-6)

    @pytest.mark.parametrize("aggregation", ["probabilities", "scores"])
    @pytest.mark.parametrize("temperature", [1.0, 0.1])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_the_literal_one_is_bit_equal_to_what_it_was(
        self, dtype: torch.dtype, temperature: float, aggregation: str
    ) -> None:
        query, keys = torch.randn(3, 6, 8, dtype=dtype), torch.randn(3, 4, 2, 8, dtype=dtype)
        got = Selector(temperature, aggregation).log_probabilities(query, keys, self.AVAILABLE)
        assert torch.equal(got, literal_log_probabilities(query, keys, self.AVAILABLE, temperature, aggregation))

    @pytest.mark.parametrize("similarity", ["dot", "cosine"])
    @pytest.mark.parametrize("aggregation", ["probabilities", "scores"])
    def test_what_all_vectors_share_is_not_heard(self, aggregation: str, similarity: str) -> None:
        query, keys = torch.randn(3, 4, 5, dtype=torch.float64), torch.randn(3, 4, 2, 5, dtype=torch.float64)

        def fitted(query: Tensor, keys: Tensor) -> Tensor:
            means = query.mean(dim=0), keys.flatten(0, 1).mean(dim=0)
            return Selector(0.1, aggregation, similarity, *means).log_probabilities(query, keys, self.AVAILABLE).exp()

        shift = 50 * torch.randn(4, 5, dtype=torch.float64), 50 * torch.randn(2, 5, dtype=torch.float64)
        plain = fitted(query, keys)
        torch.testing.assert_close(fitted(query + shift[0], keys), plain, atol=1e-9, rtol=0)
        torch.testing.assert_close(fitted(query, keys + shift[1]), plain, atol=1e-9, rtol=0)
        literal = Selector(0.1, aggregation, similarity)
        heard = literal.log_probabilities(query + shift[0], keys, self.AVAILABLE).exp()
        assert (heard - literal.log_probabilities(query, keys, self.AVAILABLE).exp()).abs().max() > 0.1

    def test_length_is_not_heard_under_cosine(self) -> None:
        query, keys = torch.randn(3, 4, 5), torch.randn(3, 4, 2, 5)
        lengths = 10 ** (4 * torch.rand(3, 4, 1) - 2), 10 ** (4 * torch.rand(3, 4, 2, 1) - 2)
        cosine = Selector(0.1, "scores", "cosine")
        plain = cosine.similarity(query, keys)
        torch.testing.assert_close(cosine.similarity(lengths[0] * query, lengths[1] * keys), plain, atol=1e-5, rtol=0)
        assert plain.abs().max() <= 1 + 1e-6
        assert not torch.allclose(Selector().similarity(lengths[0] * query, keys), Selector().similarity(query, keys))

    @pytest.mark.parametrize("similarity", ["dot", "cosine"])
    def test_a_vector_of_zeros_gives_finite_numbers(self, similarity: str) -> None:
        query, keys = torch.randn(3, 4, 5), torch.randn(3, 4, 2, 5)
        query[0], keys[1, 2] = 0, 0
        query.requires_grad_()
        log_probabilities = Selector(0.1, "scores", similarity).log_probabilities(query, keys, self.AVAILABLE)
        # Such a query says nothing, so all pairs are alike.
        torch.testing.assert_close(log_probabilities[0].exp(), torch.full((4,), 0.25))
        log_probabilities[self.AVAILABLE].sum().backward()
        assert query.grad is not None
        assert bool(query.grad.isfinite().all())

    @pytest.mark.parametrize("aggregation", ["probabilities", "scores"])
    @pytest.mark.parametrize("similarity", ["dot", "cosine"])
    @pytest.mark.parametrize("centred", [False, True])
    def test_gradient(self, centred: bool, similarity: str, aggregation: str) -> None:
        query = torch.randn(3, 4, 3, dtype=torch.float64, requires_grad=True)
        keys = torch.randn(3, 4, 2, 3, dtype=torch.float64, requires_grad=True)
        both = torch.randn(4, 3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
        selector = Selector(0.5, aggregation, similarity, *(both if centred else (None, None)))

        def draws(query: Tensor, keys: Tensor) -> Tensor:
            return selector.log_probabilities(query, keys, self.AVAILABLE)[self.AVAILABLE]

        assert torch.autograd.gradcheck(draws, (query, keys))

    def test_means_of_another_shape_are_refused(self) -> None:
        query, keys = torch.randn(3, 4, 5), torch.randn(3, 4, 2, 5)
        for means in ((torch.zeros(1, 5), torch.zeros(2, 5)), (torch.zeros(4, 5), torch.zeros(1, 5))):
            with pytest.raises(ValueError, match="means"):
                Selector(1.0, "scores", "cosine", *means).similarity(query, keys)


def enumerated_information(weights: Sequence[float], choices: Sequence[Sequence[float]]) -> float:
    """Σ p(q, k) log p(q, k) / (p(q) p(k)) over the table of queries and choices, nats."""
    marginal = [sum(w * row[k] for w, row in zip(weights, choices, strict=True)) for k in range(len(choices[0]))]
    total = 0.0
    for weight, row in zip(weights, choices, strict=True):
        for k, probability in enumerate(row):
            if weight * probability > 0:
                total += weight * probability * math.log(weight * probability / (weight * marginal[k]))
    return total


class TestSelectionInformation:
    @pytest.mark.parametrize("num_queries", [1, 2, 7])
    def test_is_the_mutual_information_of_the_joint_table(self, num_queries: int) -> None:
        logits = 3 * torch.randn(4, num_queries, 5, dtype=torch.float64)
        logits[..., 2] = -torch.inf  # a pair that was read
        probabilities = logits.softmax(dim=-1)
        got = selection_information(probabilities)
        uniform = [1 / num_queries] * num_queries
        expected = [enumerated_information(uniform, memory) for memory in probabilities.tolist()]
        assert got.shape == (4,)
        assert got.tolist() == pytest.approx(expected, abs=1e-12)
        if num_queries == 1:
            assert got.abs().max() < 1e-12

    def test_a_deaf_selector_hears_nothing_however_sharp_it_is(self) -> None:
        for favourite in (torch.tensor([0.0, 1.0, 0.0]), torch.tensor([0.2, 0.5, 0.3])):
            assert selection_information(favourite.expand(6, 3)).item() == pytest.approx(0, abs=1e-7)

    @pytest.mark.parametrize("num_pairs", [2, 5, 16])
    def test_a_perfect_one_hears_the_logarithm_of_the_pairs(self, num_pairs: int) -> None:
        perfect = torch.eye(num_pairs)[torch.randperm(num_pairs)]
        assert selection_information(perfect).item() == pytest.approx(math.log(num_pairs), abs=1e-6)
        # More queries than pairs, each pair meant as often as the others, do not say more.
        assert selection_information(perfect.repeat(3, 1)).item() == pytest.approx(math.log(num_pairs), abs=1e-6)

    def test_worked_by_hand(self) -> None:
        # Mean choice (1/2, 1/2), log 2; mean entropy of (1, 0) and (0, 1) and twice (1/2, 1/2): half of log 2.
        choices = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5], [0.5, 0.5]])
        assert selection_information(choices).item() == pytest.approx(math.log(2) / 2, abs=1e-6)


class Toy:
    """A world that can be enumerated: memories of pairs whose values are words, and queries that draw a pair.

    A query is written without sight of the memory, so it depends on nothing; the memories are equally likely.
    """

    def __init__(self, seed: int, *, num_memories: int, different_values: bool) -> None:
        source, generator = random.Random(seed), torch.Generator().manual_seed(seed)
        num_pairs, num_queries = source.randint(2, 4), source.randint(2, 5)
        words = [(first, second) for first in range(2) for second in range(2)]
        self.memories = [
            source.sample(words, num_pairs) if different_values else source.choices(words, k=num_pairs)
            for _ in range(num_memories)
        ]
        keys = torch.randn(num_memories, num_pairs, 2, 3, generator=generator)
        queries = torch.randn(num_queries, 4, 3, generator=generator)
        temperature = 10 ** source.uniform(-2, 0.5)
        means = (queries.mean(dim=0), keys.flatten(0, 1).mean(dim=0)) if source.random() < 0.5 else (None, None)
        selector = Selector(temperature, "scores", source.choice(["dot", "cosine"]), *means)
        available = torch.ones(1, num_pairs, dtype=torch.bool)
        self.choices: list[list[list[float]]] = [
            [
                selector.log_probabilities(q[None], k[None], available)[0].double().softmax(dim=0).tolist()
                for q in queries
            ]
            for k in keys
        ]
        """p(pair | query, memory), by memory, query and pair."""
        drawn = [source.random() ** 4 for _ in range(num_queries)]
        self.policy = [weight / sum(drawn) for weight in drawn]

    def reader(self, queries: Sequence[int], weights: Sequence[float]) -> dict[tuple[int, ...], float]:
        """A calibrated reader's p(value) after one of some queries: Bayes over memories and draws.

        Silence is all queries by their probabilities: a reader that knows the policy, but not what it asked.
        """
        found: dict[tuple[int, ...], float] = defaultdict(float)
        for memory, values in enumerate(self.memories):
            for query, weight in zip(queries, weights, strict=True):
                for pair, value in enumerate(values):
                    found[value] += weight * self.choices[memory][query][pair] / len(self.memories)
        return found

    def gain(self) -> float:
        """Expected log p(value | query) less log p(value | silence), nats per token, token by token."""
        everything = range(len(self.policy))
        silent, total = self.reader(everything, self.policy), 0.0
        for query, weight in enumerate(self.policy):
            told = self.reader([query], [1.0])
            for value, probability in told.items():
                by_token = []
                for length in (1, 2):
                    scores = []
                    for belief in (told, silent):
                        both = [
                            sum(p for other, p in belief.items() if other[:size] == value[:size])
                            for size in (length - 1, length)
                        ]
                        scores.append(math.log(both[1] / both[0]) if both[1] > 0 else 0.0)
                    by_token.append(scores[0] - scores[1])
                total += weight * probability * sum(by_token) / len(by_token)
        return total

    def information(self) -> float:
        """I(query; choice) of the memories' mean, nats."""
        per_memory = [enumerated_information(self.policy, choices) for choices in self.choices]
        return sum(per_memory) / len(per_memory)


class TestBound:
    """What a query written without sight of the memory is worth over silence: at most I(query; choice) / V."""

    def test_no_policy_and_no_selector_exceeds_it(self) -> None:
        shares = []
        for seed in range(200):
            toy = Toy(seed, num_memories=random.Random(seed).randint(1, 4), different_values=seed % 2 == 0)
            gain, bound = toy.gain(), toy.information() / 2
            assert -1e-9 <= gain <= bound + 1e-9, seed
            shares.append(gain / max(bound, 1e-9))
        # It would bound nothing if all gains were tiny.
        assert max(shares) > 0.999
        assert min(shares) < 0.1

    def test_it_is_reached_where_the_pair_is_the_value(self) -> None:
        for seed in range(20):
            toy = Toy(seed, num_memories=1, different_values=True)
            assert toy.gain() == pytest.approx(toy.information() / 2, abs=1e-9)

    def test_the_measured_information_is_that_of_the_table_for_equally_likely_queries(self) -> None:
        toy = Toy(3, num_memories=3, different_values=True)
        toy.policy = [1 / len(toy.policy)] * len(toy.policy)
        measured = selection_information(torch.tensor(toy.choices, dtype=torch.float64)).mean().item()
        assert toy.information() == pytest.approx(measured, abs=1e-9)
        assert toy.gain() <= measured / 2
