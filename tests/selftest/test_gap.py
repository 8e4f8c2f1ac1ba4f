"""The gap between the random and the best policy, against slow reading and a recursion over plans."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from attention_rl_trainer.models.adapters import add_adapter
from attention_rl_trainer.models.causal_lm import deterministic_inference
from attention_rl_trainer.models.policy import PolicyModel
from attention_rl_trainer.selftest.gap import BaseReader, KnownPolicies, enumerate_policies
from attention_rl_trainer.selftest.language import (
    NUM_STEPS,
    NUM_TOPICS,
    VOCABULARY_SIZE,
    prompt_of,
    step_of,
    topic_names,
    topic_values,
)


@pytest.fixture
def policy() -> PolicyModel:
    """An adapted policy over a model that was taught nothing, far from uniform."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
    )
    model = add_adapter(LlamaForCausalLM(config), None)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.5)
    return PolicyModel(model, torch.arange(VOCABULARY_SIZE))


def read_slowly(policy: PolicyModel, context: torch.Tensor, name: torch.Tensor, value: int) -> list[float]:
    """Log-probability of a query, and of the value after it."""
    ids = torch.cat([context, name, torch.tensor([2])])
    with deterministic_inference(policy.model), policy.model.disable_adapter():
        scores = policy.model(ids[None]).logits.log_softmax(-1)[0]
    place = len(context)
    return [sum(scores[place - 1 + i, ids[place + i]].item() for i in range(2)), scores[-1, value].item()]


def test_reader_is_the_base_model(policy: PolicyModel) -> None:
    values = topic_values(3, np.random.default_rng(1))
    contexts, reader = prompt_of(values), BaseReader(policy)
    queries = torch.randint(3, VOCABULARY_SIZE, (3, 2))
    gains = reader.gains(contexts, queries, values[:, 4])
    probabilities, after_names = reader.read_names(contexts)
    for row in range(3):
        value = int(values[row, 4, 0])
        read = [read_slowly(policy, contexts[row], name, value) for name in topic_names()]
        weights = torch.tensor([query for query, _ in read]).softmax(0)
        assert probabilities[row].tolist() == pytest.approx(weights.tolist(), abs=1e-5)
        assert after_names[row, :, value].tolist() == pytest.approx([score for _, score in read], abs=1e-5)
        baseline = sum(w.item() * score for w, (_, score) in zip(weights, read, strict=True))
        own = read_slowly(policy, contexts[row], queries[row], value)[1]
        assert gains[row].item() == pytest.approx(own - baseline, abs=1e-5)


def test_policies_are_those_of_a_recursion(policy: PolicyModel) -> None:
    values = topic_values(2, np.random.default_rng(2))
    names, reader = topic_names(), BaseReader(policy)
    by_plan: dict[tuple[int, ...], list[float]] = {}
    random = 0.0

    def walk(article: int, context: torch.Tensor, plan: tuple[int, ...], gain: float, probability: float) -> None:
        nonlocal random
        if len(plan) == NUM_STEPS:
            by_plan.setdefault(plan, []).append(gain / NUM_STEPS)
            random += probability * gain / NUM_STEPS / 2
            return
        rest = [topic for topic in range(NUM_TOPICS) if topic not in plan]
        asked, _ = reader.read_names(context[None])
        total = asked[0, rest].sum().item()
        for topic in rest:
            name, value = names[topic], values[article, topic]
            step = step_of(name[None], value[None])[0]
            own = reader.gains(context[None], name[None], value[None]).item()
            share = asked[0, topic].item() / total
            walk(article, torch.cat([context, step]), (*plan, topic), gain + own, probability * share)

    for article in range(2):
        walk(article, prompt_of(values)[article], (), 0.0, 1.0)
    known = enumerate_policies(reader, values)
    means = {plan: sum(gains) / 2 for plan, gains in by_plan.items()}
    assert len(means) == 8 * 7 * 6
    assert known.best == pytest.approx(max(means.values()), abs=1e-5)
    assert means[known.best_plan] == pytest.approx(known.best, abs=1e-5)
    assert known.random == pytest.approx(random, abs=1e-5)


def test_gap_closed_by_hand() -> None:
    known = KnownPolicies((0, 1, 2), best=1.5, random=0.5)
    assert [known.gap_closed(gain) for gain in (0.5, 1.0, 1.5, 0.0)] == [0.0, 0.5, 1.0, -0.5]
