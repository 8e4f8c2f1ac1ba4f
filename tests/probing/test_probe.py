"""The probe: a fit of a tiny model against a slow one, a head that was planted in one, and what a fit leaves alone."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from tiny import adapted, random_batch, tiny_llama
from tiny_families import build
from torch import Tensor
from transformers import PreTrainedModel

from attention_rl_trainer.memories.pairs import MemoryBatch
from attention_rl_trainer.models.attention import AttentionLayer
from attention_rl_trainer.models.heads import ChosenHeads, HeadNumber, readable_layers
from attention_rl_trainer.models.policy import PolicyModel, PolicyOptions
from attention_rl_trainer.probing.calibrate import Fitted, Probe
from attention_rl_trainer.rollout.calibration import Calibration
from attention_rl_trainer.rollout.environment import SelectionOptions
from attention_rl_trainer.rollout.layout import Layout, Separators

LAYOUT = Layout(Separators(query=(5, 6), response=(7,)), 2, tokens_per_query=4, tokens_per_key=6, tokens_per_value=5)
CALIBRATED: dict[str, Any] = {
    "selection_temperature": "auto",
    "head_aggregation": "scores",
    "head_similarity": "cosine",
    "center_vectors": True,
}


def probe_of(model: PreTrainedModel, heads: dict[str, Any] | None = None, **selection: Any) -> Probe:
    options = PolicyOptions(**{"attention_heads": "probe", "probe_heads": 3} | (heads or {}))
    policy = PolicyModel(adapted(model, scale=0.5), torch.arange(5, 380), options)
    return Probe(policy, LAYOUT, options, SelectionOptions(**CALIBRATED | selection))


def fit(model: PreTrainedModel, memories: MemoryBatch, heads: dict[str, Any] | None = None, **options: Any) -> Fitted:
    return probe_of(model, heads, **options).fit(memories, {"model": "tiny"})


class SlowProbe:
    """The same by loops and whole forwards, over an untouched base model: heads, means, temperature and figures.

    Vectors are lists of numbers by (memory, pair), for each head that may be chosen.
    """

    def __init__(self, base: PreTrainedModel, memories: MemoryBatch) -> None:
        self.base, self.layers = base, readable_layers(base)
        self.count, self.pairs, _ = memories.key_tokens.shape
        self.heads = {
            HeadNumber(number, head): (
                number,
                head,
                head * layer.heads.num_key_value_groups // layer.heads.num_query_heads,
            )
            for number, layer in self.layers.items()
            for head in range(layer.heads.num_query_heads)
        }
        self.queries: dict[HeadNumber, dict[tuple[int, int], list[float]]] = {head: {} for head in self.heads}
        self.keys: dict[HeadNumber, dict[tuple[int, int], list[float]]] = {head: {} for head in self.heads}
        for memory in range(self.count):
            example = [*memories.example_keys[memory].tolist(), 7, *memories.example_values[memory].tolist()]
            for pair in range(self.pairs):
                key = memories.key_tokens[memory, pair].tolist()
                after_prompt = self._means([5, 6, *example, 5, 6, *key[:3]], 3, keys=False)
                alone = self._means(key, 6, keys=True)
                for head, (layer, place, group) in self.heads.items():
                    self.queries[head][memory, pair] = after_prompt[layer][place].tolist()
                    self.keys[head][memory, pair] = alone[layer][group].tolist()

    @torch.no_grad()
    def _means(self, ids: list[int], last: int, *, keys: bool) -> dict[int, Tensor]:
        with ExitStack() as stack:
            captures = {
                number: stack.enter_context(layer.capture_keys() if keys else layer.capture_queries())
                for number, layer in self.layers.items()
            }
            self.base(input_ids=torch.tensor([ids]), use_cache=False)
        return {number: capture.heads()[0, -last:].mean(dim=0) for number, capture in captures.items()}

    def similarity(self, head: HeadNumber, memories: Sequence[int], fitted: Sequence[int]) -> list[list[list[float]]]:
        """Cosines less the means over some memories, by memory, asked pair and found pair."""
        sides = []
        for vectors in (self.queries[head], self.keys[head]):
            rows = [vectors[memory, pair] for memory in fitted for pair in range(self.pairs)]
            mean = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
            sides.append({place: [x - m for x, m in zip(v, mean, strict=True)] for place, v in vectors.items()})

        def cosine(q: list[float], k: list[float]) -> float:
            return sum(map(float.__mul__, q, k)) / math.sqrt(sum(x * x for x in q) * sum(x * x for x in k))

        queries, keys = sides
        every = range(self.pairs)
        return [[[cosine(queries[m, a], keys[m, f]) for f in every] for a in every] for m in memories]

    def best(self, count: int) -> list[HeadNumber]:
        """By the first half of the memories."""
        first = range(self.count // 2)
        accuracy = {}
        for head in self.heads:
            table = self.similarity(head, first, first)
            accuracy[head] = sum(row.index(max(row)) == asked for rows in table for asked, row in enumerate(rows))
        return sorted(self.heads, key=lambda head: (-accuracy[head], head))[:count]

    def scores(self, heads: Sequence[HeadNumber]) -> Tensor:
        """Mean cosine on the second half of the memories, less the means over all of them."""
        second, everything = range(self.count // 2, self.count), range(self.count)
        tables = [torch.tensor(self.similarity(head, second, everything), dtype=torch.float64) for head in heads]
        return torch.stack(tables).mean(dim=0)

    @staticmethod
    def temperature(scores: Tensor) -> float:
        grid = torch.logspace(-3, 3, 2769, dtype=torch.float64)
        logprobs = (scores[None] / grid[:, None, None, None]).log_softmax(dim=-1)
        return grid[logprobs.diagonal(dim1=2, dim2=3).mean(dim=(1, 2)).argmax()].item()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "phi3", "qwen3", "gemma", "llama+multi_query"])
def test_a_fit_equals_the_slow_one(family: str) -> None:
    memories = random_batch(7, num_pairs=4)
    fitted = fit(build(family), memories)
    calibration, slow = fitted.calibration, SlowProbe(build(family), memories)
    best = slow.best(3)
    assert calibration.heads == tuple(best)
    for place, head in enumerate(best):
        for means, vectors in ((calibration.query_means, slow.queries), (calibration.key_means, slow.keys)):
            assert means is not None
            mean = torch.tensor(list(vectors[head].values())).mean(dim=0)
            torch.testing.assert_close(means[place], mean, atol=2e-5, rtol=1e-4)
    scores = slow.scores(best)
    assert calibration.temperature == pytest.approx(slow.temperature(scores), rel=0.01)
    right = (scores / calibration.temperature).softmax(dim=-1).diagonal(dim1=1, dim2=2).mean().item()
    assert calibration.figures["p_right"] == pytest.approx(right, abs=1e-3)
    assert calibration.figures["chance"] == 0.25
    assert calibration.origin["model"] == "tiny"


def planted(head: HeadNumber) -> PreTrainedModel:
    """A tiny Llama in which one head of the first layer compares tokens with themselves."""
    model = tiny_llama(num_hidden_layers=3)
    attention = model.model.layers[head.layer].self_attn
    group = head.head // 2
    with torch.no_grad():
        queries = attention.q_proj.weight[8 * head.head : 8 * head.head + 8]
        queries.copy_(attention.k_proj.weight[8 * group : 8 * group + 8])
    return model


@pytest.mark.parametrize("head", ["0.1", "0.2"])
def test_a_head_that_was_planted_in_a_model_is_found(head: str) -> None:
    number = HeadNumber.parse(head)
    memories = random_batch(8, num_pairs=5)
    fitted = fit(planted(number), memories, {"probe_heads": 1})
    assert fitted.calibration.heads == (number,)
    accuracy = {
        HeadNumber(layer, h): a for layer, values in fitted.heads.accuracy.items() for h, a in enumerate(values)
    }
    assert accuracy.pop(number) > 0.7
    assert max(accuracy.values()) < 0.65
    figures = fitted.calibration.figures
    assert figures["p_right"] > figures["p_right_literal"] + 0.2
    assert figures["selection_information"] > figures["selection_information_literal"] + 0.2
    # It finds them on memories that it was not fitted to as well.
    held_out = probe_of(planted(number), {"probe_heads": 1})
    again = held_out.figures(fitted.calibration, random_batch(8, num_pairs=5, seed=11))
    assert again.keys() == figures.keys()
    assert again["p_right"] > again["p_right_literal"] + 0.2


def test_two_fits_are_equal_to_the_bit() -> None:
    memories = random_batch(6)
    first = fit(tiny_llama(), memories).calibration
    torch.rand(5)
    random.random()
    second = fit(tiny_llama(), memories).calibration
    assert first.digest == second.digest
    assert (first.temperature, first.heads, first.figures) == (second.temperature, second.heads, second.figures)
    for name in ("query_means", "key_means"):
        assert torch.equal(getattr(first, name), getattr(second, name))


def test_a_fit_leaves_everything_as_it_was() -> None:
    model = tiny_llama()
    probe = probe_of(model)
    wrapped = [module for module in model.modules() if hasattr(module, "lora_A")]
    assert wrapped
    model.train()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    states = torch.get_rng_state(), random.getstate()
    probe.fit(random_batch(4), {})
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert model.training
    assert torch.is_grad_enabled()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module.disable_adapters for module in wrapped)
    model.train()


def test_the_adapter_is_not_heard() -> None:
    memories = random_batch(6)
    plain, other = tiny_llama(), tiny_llama()
    options = PolicyOptions(attention_heads="probe", probe_heads=3)
    digests = []
    for model, scale in ((plain, 0.0), (other, 2.0)):
        policy = PolicyModel(adapted(model, scale=scale), torch.arange(5, 380), options)
        digests.append(
            Probe(policy, LAYOUT, options, SelectionOptions(**CALIBRATED)).fit(memories, {}).calibration.digest
        )
    assert digests[0] == digests[1]


class TestWhatIsGiven:
    MEMORIES = random_batch(6)

    def test_a_fixed_temperature_is_respected(self) -> None:
        free, fixed = fit(tiny_llama(), self.MEMORIES), fit(tiny_llama(), self.MEMORIES, selection_temperature=0.37)
        assert fixed.calibration.temperature == 0.37
        assert free.calibration.temperature != 0.37
        assert fixed.calibration.heads == free.calibration.heads

    def test_heads_that_are_named_are_respected_in_their_order(self) -> None:
        named = fit(tiny_llama(num_hidden_layers=3), self.MEMORIES, {"attention_heads": ["1.3", "0.0,1.1"]}).calibration
        numbers = (HeadNumber(1, 3), HeadNumber(0, 0), HeadNumber(1, 1))
        assert named.heads == numbers
        slow = SlowProbe(tiny_llama(num_hidden_layers=3), self.MEMORIES)
        assert named.query_means is not None
        for place, number in enumerate(numbers):
            mean = torch.tensor(list(slow.queries[number].values())).mean(dim=0)
            torch.testing.assert_close(named.query_means[place], mean, atol=2e-5, rtol=1e-4)
        assert named.temperature == pytest.approx(slow.temperature(slow.scores(numbers)), rel=0.01)

    @pytest.mark.parametrize("layer", [0, -1])
    def test_all_heads_of_one_layer(self, layer: int) -> None:
        fitted = fit(tiny_llama(), self.MEMORIES, {"attention_heads": "layer", "attention_layer": layer})
        calibration = fitted.calibration
        assert calibration.heads is None
        assert list(fitted.heads.accuracy) == [layer % 2]
        slow = SlowProbe(tiny_llama(), self.MEMORIES)
        numbers = [HeadNumber(layer % 2, head) for head in range(4)]
        means = torch.stack([torch.tensor(list(slow.queries[number].values())).mean(dim=0) for number in numbers])
        assert calibration.query_means is not None
        torch.testing.assert_close(calibration.query_means, means, atol=2e-5, rtol=1e-4)
        assert calibration.key_means is not None
        means = torch.stack([torch.tensor(list(slow.keys[numbers[h]].values())).mean(dim=0) for h in (0, 2)])
        torch.testing.assert_close(calibration.key_means, means, atol=2e-5, rtol=1e-4)
        assert calibration.temperature == pytest.approx(slow.temperature(slow.scores(numbers)), rel=0.01)

    def test_without_centring_there_are_no_means(self) -> None:
        calibration = fit(tiny_llama(), self.MEMORIES, center_vectors=False).calibration
        assert (calibration.query_means, calibration.key_means) == (None, None)
        assert calibration.heads is not None

    def test_the_means_fit_what_the_chosen_heads_give(self) -> None:
        model = tiny_llama()
        calibration = fit(model, self.MEMORIES).calibration
        assert calibration.heads is not None
        assert calibration.query_means is not None
        assert calibration.query_means.shape == (3, ChosenHeads(tiny_llama(), calibration.heads).heads.head_dim)

    def test_origin_names_what_the_fit_depends_on(self) -> None:
        origin = fit(tiny_llama(), self.MEMORIES).calibration.origin
        assert origin["model"] == "tiny"
        assert (origin["head_similarity"], origin["center_vectors"]) == ("cosine", True)


class TestRefusals:
    @pytest.mark.parametrize("rows", [0, 1])
    def test_too_few_memories(self, rows: int) -> None:
        with pytest.raises(ValueError, match=f"takes two memories of two pairs or more, got {rows} of 5; raise calibr"):
            fit(tiny_llama(), random_batch(2).select_rows(range(rows)))

    def test_memories_of_a_single_pair(self) -> None:
        with pytest.raises(ValueError, match=r"got 4 of 1; raise calibration_memories, num_kv_pairs or subset_frac"):
            fit(tiny_llama(), random_batch(4, num_pairs=1))

    def test_more_heads_than_there_are(self) -> None:
        with pytest.raises(ValueError, match="probe_heads is 9, but the model has 8 heads"):
            fit(tiny_llama(), random_batch(2), {"probe_heads": 9})


def test_a_literal_layer_of_other_heads_is_measured_and_not_chosen_from() -> None:
    """Layers 0 and 1 have heads of 32, and the last one, from which the literal selector reads, of 48."""
    kinds = ["sliding_attention", "sliding_attention", "full_attention"]
    model = build("gemma4_text", layer_types=kinds, num_hidden_layers=3)
    assert AttentionLayer(model).heads.head_dim == 48
    fitted = fit(model, random_batch(4), {"probe_heads": 8})
    assert fitted.calibration.heads is not None
    assert {head.layer for head in fitted.calibration.heads} == {0, 1}
    assert "p_right_literal" in fitted.calibration.figures
    with pytest.raises(ValueError, match="probe_heads is 9, but the model has 8 heads"):
        fit(build("gemma4_text", layer_types=kinds, num_hidden_layers=3), random_batch(4), {"probe_heads": 9})


def test_what_is_measured_is_what_the_environment_selects_with() -> None:
    memories = random_batch(6)
    probe = probe_of(tiny_llama())
    calibration = probe.fit(memories, {}).calibration
    assert isinstance(calibration, Calibration)
    figures = probe.figures(calibration, memories.select_rows(range(3, 6)))
    assert figures == pytest.approx(dict(calibration.figures), abs=1e-6)
