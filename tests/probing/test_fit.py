"""Heads, means and temperature against slow loops, and a head that is known to retrieve."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from attention_rl_trainer.models.heads import HeadNumber
from attention_rl_trainer.probing.fit import (
    HeadScores,
    choices,
    fit_temperature,
    means_of,
    score_heads,
    selection_quality,
    take_heads,
)
from attention_rl_trainer.probing.vectors import LayerVectors
from attention_rl_trainer.rollout.selector import Selector


def made_up(
    memories: int = 5, pairs: int = 4, heads: int = 4, groups: int = 2, *, noise: float = 1.5, seed: int = 0
) -> LayerVectors:
    """Queries that resemble the keys of their group the less, the higher the head's number; all far from 0."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(memories, pairs, groups, 6, generator=generator)
    queries = keys.repeat_interleave(heads // groups, dim=2)
    scale = noise * torch.linspace(0.3, 2, heads)[:, None]
    queries = queries + scale * torch.randn(queries.shape, generator=generator)
    common = 3 * torch.randn(2, 6, generator=generator)
    return LayerVectors(queries + common[0], keys + common[1])


def loop_similarity(query: Sequence[float], key: Sequence[float], similarity: str) -> float:
    dot = sum(q * k for q, k in zip(query, key, strict=True))
    if similarity == "dot":
        return dot / math.sqrt(len(query))
    return dot / math.sqrt(sum(q * q for q in query) * sum(k * k for k in key))


def loop_mean(vectors: Sequence[Sequence[float]]) -> list[float]:
    return [sum(column) / len(vectors) for column in zip(*vectors, strict=True)]


def loop_scores(vectors: LayerVectors, similarity: str, *, center: bool) -> list[list[list[list[float]]]]:
    """By head, memory, asked pair and found pair: the definition, one number at a time."""
    memories, pairs, heads, _ = vectors.queries.shape
    per_group = heads // vectors.keys.shape[2]
    everything = [(memory, pair) for memory in range(memories) for pair in range(pairs)]
    scores = []
    for head in range(heads):
        queries = {place: vectors.queries[(*place, head)].tolist() for place in everything}
        keys = {place: vectors.keys[(*place, head // per_group)].tolist() for place in everything}
        for side in (queries, keys) if center else ():
            mean = loop_mean(list(side.values()))
            for place, vector in side.items():
                side[place] = [x - m for x, m in zip(vector, mean, strict=True)]
        scores.append(
            [
                [
                    [loop_similarity(queries[memory, asked], keys[memory, found], similarity) for found in range(pairs)]
                    for asked in range(pairs)
                ]
                for memory in range(memories)
            ]
        )
    return scores


def loop_accuracy(vectors: LayerVectors, similarity: str, *, center: bool) -> list[float]:
    accuracy = []
    for memories in loop_scores(vectors, similarity, center=center):
        hits = [row.index(max(row)) == asked for memory in memories for asked, row in enumerate(memory)]
        accuracy.append(sum(hits) / len(hits))
    return accuracy


def loop_choices(
    vectors: LayerVectors, similarity: str, temperature: float, aggregation: str, *, center: bool
) -> Tensor:
    """Probabilities by memory, asked pair and found pair."""
    by_head = torch.tensor(loop_scores(vectors, similarity, center=center), dtype=torch.float64) / temperature
    if aggregation == "scores":
        return by_head.mean(dim=0).softmax(dim=-1)
    return by_head.softmax(dim=-1).mean(dim=0)


def fitted_selector(vectors: LayerVectors, similarity: str, aggregation: str, *, center: bool) -> Selector:
    means = means_of(vectors) if center else (None, None)
    return Selector(1.0, aggregation, similarity, *means)


OPTIONS = [
    pytest.param("dot", "probabilities", False, id="literal"),
    pytest.param("dot", "scores", True, id="centred"),
    pytest.param("cosine", "scores", False, id="cosine"),
    pytest.param("cosine", "scores", True, id="calibrated"),
    pytest.param("cosine", "probabilities", True, id="calibrated, by heads"),
]


class TestAgainstLoops:
    @pytest.mark.parametrize(("similarity", "aggregation", "center"), OPTIONS)
    def test_accuracy_of_each_head(self, similarity: str, aggregation: str, center: bool) -> None:
        layers = {3: made_up(), 7: made_up(heads=2, groups=1, seed=1)}
        found = score_heads(layers, center=center, head_similarity=similarity)
        assert found.chance == 0.25
        assert found.accuracy.keys() == {3, 7}
        for number, vectors in layers.items():
            expected = loop_accuracy(vectors, similarity, center=center)
            assert found.accuracy[number].tolist() == pytest.approx(expected, abs=1e-6)
            assert len(set(expected)) > 1

    def test_means(self) -> None:
        vectors = made_up()
        queries, keys = means_of(vectors)
        for head in range(4):
            every = [vectors.queries[memory, pair, head].tolist() for memory in range(5) for pair in range(4)]
            assert queries[head].tolist() == pytest.approx(loop_mean(every), abs=1e-5)
        for group in range(2):
            every = [vectors.keys[memory, pair, group].tolist() for memory in range(5) for pair in range(4)]
            assert keys[group].tolist() == pytest.approx(loop_mean(every), abs=1e-5)

    # More memories than are compared at once.
    @pytest.mark.parametrize("memories", [1, 16, 35])
    @pytest.mark.parametrize(("similarity", "aggregation", "center"), OPTIONS)
    def test_choices(self, similarity: str, aggregation: str, center: bool, memories: int) -> None:
        vectors = made_up(memories, pairs=3)
        selector = replace(fitted_selector(vectors, similarity, aggregation, center=center), temperature=0.4)
        expected = loop_choices(vectors, similarity, 0.4, aggregation, center=center).float()
        torch.testing.assert_close(choices(vectors, selector).exp(), expected, atol=1e-4, rtol=1e-3)

    @pytest.mark.parametrize(("similarity", "aggregation", "center"), OPTIONS)
    def test_quality(self, similarity: str, aggregation: str, center: bool) -> None:
        vectors = made_up()
        selector = replace(fitted_selector(vectors, similarity, aggregation, center=center), temperature=0.4)
        quality = selection_quality(vectors, selector)
        right, heard, surprise = [], [], []
        for memory in loop_choices(vectors, similarity, 0.4, aggregation, center=center).tolist():
            entropies = [-sum(p * math.log(p) for p in row if p > 0) for row in memory]
            mean = loop_mean(memory)
            right += [memory[pair][pair] for pair in range(4)]
            surprise += entropies
            heard.append(-sum(p * math.log(p) for p in mean) - sum(entropies) / 4)
        assert quality.p_right == pytest.approx(sum(right) / 20, abs=1e-4)
        assert quality.entropy == pytest.approx(sum(surprise) / 20, abs=1e-4)
        assert quality.information == pytest.approx(sum(heard) / 5, abs=1e-4)

    @pytest.mark.parametrize(("similarity", "aggregation", "center"), OPTIONS)
    @pytest.mark.parametrize("noise", [0.7, 1.5, 3.0])
    def test_temperature_is_the_best_of_a_fine_grid(
        self, noise: float, similarity: str, aggregation: str, center: bool
    ) -> None:
        vectors = made_up(memories=8, noise=noise)
        scores = torch.tensor(loop_scores(vectors, similarity, center=center), dtype=torch.float64)
        grid = torch.logspace(-3, 3, 2769, dtype=torch.float64)  # steps of 0.5%
        by_head = scores[None] / grid[:, None, None, None, None]
        chosen = (
            by_head.mean(dim=1).log_softmax(dim=-1)
            if aggregation == "scores"
            else by_head.log_softmax(dim=-1).logsumexp(dim=1) - math.log(4)
        )
        likelihood = chosen.diagonal(dim1=2, dim2=3).mean(dim=(1, 2))
        found = fit_temperature(vectors, fitted_selector(vectors, similarity, aggregation, center=center))
        nearest = (grid.log() - math.log(found)).abs().argmin()
        enough = -1 / likelihood_terms(vectors)
        if likelihood.max() > enough:
            # All right pairs together miss one nat, and at a higher temperature they miss more.
            assert likelihood[nearest] == pytest.approx(enough, rel=0.05)
            assert (likelihood[grid > 1.02 * found] < enough).all()
            return
        assert likelihood[nearest] >= likelihood.max() - 1e-4
        # Where heads are always right, or always wrong, all temperatures that are low enough are nearly as good.
        best = grid[likelihood.argmax()].item()
        is_peak = likelihood.max() - likelihood[(grid < best / 1.1) | (grid > best * 1.1)].max() > 5e-5
        assert is_peak or noise < 3
        if is_peak:
            assert found == pytest.approx(best, rel=0.01)

    def test_what_is_certain_is_cold_and_what_says_nothing_hot(self) -> None:
        # Cosines of 1 and 0: log(1 + 5 · exp(-1 / τ)) = 1 / 6, all six right pairs together missing one nat.
        certain = LayerVectors(torch.eye(6)[None, :, None] * 4, torch.eye(6)[None, :, None] * 4)
        by_hand = 1 / math.log(5 / (math.exp(1 / 6) - 1))
        assert fit_temperature(certain, Selector(1.0, "scores", "cosine")) == pytest.approx(by_hand, rel=5e-3)
        wrong = LayerVectors(-certain.queries, certain.keys)
        assert fit_temperature(wrong, Selector(1.0, "scores", "cosine")) > 100


def likelihood_terms(vectors: LayerVectors) -> int:
    return vectors.queries.shape[0] * vectors.queries.shape[1]


class TestBest:
    def test_the_better_first_and_of_equals_the_lower(self) -> None:
        scores = HeadScores({9: torch.tensor([0.5, 0.7, 0.5]), 2: torch.tensor([0.1, 0.5, 0.9])}, 0.25)
        ranked = ["2.2", "9.1", "2.1", "9.0", "9.2", "2.0"]
        for count in range(1, 7):
            assert scores.best(count) == tuple(map(HeadNumber.parse, ranked[:count]))

    def test_rounding_makes_no_difference(self) -> None:
        # Means of the same count of hits, summed in another order.
        scores = HeadScores({1: torch.tensor([0.3 - 1e-8, 0.3]), 0: torch.tensor([0.3 - 2e-8])}, 0.25)
        assert scores.best(3) == (HeadNumber(0, 0), HeadNumber(1, 0), HeadNumber(1, 1))

    def test_more_heads_than_there_are_are_refused(self) -> None:
        scores = HeadScores({1: torch.zeros(2), 0: torch.zeros(3)}, 0.25)
        with pytest.raises(ValueError, match="probe_heads is 6, but the model has 5 heads that could select"):
            scores.best(6)

    def test_each_is_taken_with_the_keys_of_its_group(self) -> None:
        layers = {3: made_up(), 7: made_up(heads=4, groups=4, seed=1), 9: made_up(heads=2, groups=1, seed=2)}
        numbers = [HeadNumber(7, 2), HeadNumber(3, 2), HeadNumber(9, 1), HeadNumber(3, 1)]
        taken = take_heads(layers, numbers)
        assert taken.queries.shape == taken.keys.shape == (5, 4, 4, 6)
        for place, (layer, head, group) in enumerate([(7, 2, 2), (3, 2, 1), (9, 1, 0), (3, 1, 0)]):
            assert torch.equal(taken.queries[:, :, place], layers[layer].queries[:, :, head])
            assert torch.equal(taken.keys[:, :, place], layers[layer].keys[:, :, group])

    @pytest.mark.parametrize("planted", [(3, 2), (7, 1)])
    def test_the_one_head_that_retrieves_is_found(self, planted: tuple[int, int]) -> None:
        """Its queries are its keys, but for a mean that hides them; the others are noise around theirs."""
        generator = torch.Generator().manual_seed(5)
        layers = {}
        for number in (3, 7):
            queries = torch.randn(12, 5, 4, 6, generator=generator)
            keys = torch.randn(12, 5, 2, 6, generator=generator)
            if number == planted[0]:
                queries[:, :, planted[1]] = 0.5 * keys[:, :, planted[1] // 2]
            layers[number] = LayerVectors(
                queries + 40 * torch.randn(4, 6, generator=generator),
                keys + 40 * torch.randn(2, 6, generator=generator),
            )
        scores = score_heads(layers, center=True, head_similarity="cosine")
        assert scores.best(1) == (HeadNumber(*planted),)
        assert scores.accuracy[planted[0]][planted[1]] == 1
        assert sum(values.sum() for values in scores.accuracy.values()) - 1 < 7 * 0.4
        uncentred = score_heads(layers, center=False, head_similarity="dot")
        assert uncentred.accuracy[planted[0]][planted[1]] < 0.5
        taken = take_heads(layers, scores.best(1))
        selector = Selector(1.0, "scores", "cosine", *means_of(taken))
        temperature = fit_temperature(taken, selector)
        quality = selection_quality(taken, replace(selector, temperature=temperature))
        assert quality.p_right > 0.98
        assert quality.information == pytest.approx(math.log(5), abs=0.1)
