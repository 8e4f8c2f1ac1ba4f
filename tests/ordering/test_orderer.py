"""Orders of new memories: the steps are those of training, and greedy ones take what is likeliest."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from rich.console import Console
from tiny import adapted, tiny_llama
from transformers import PreTrainedTokenizerFast

from attention_rl_trainer.memories.pairs import MemoryBatch
from attention_rl_trainer.ordering import AttentionGuidedOrderer, OrderSettings, ReadingOrder
from attention_rl_trainer.rollout import Calibration, KVMemoryEnvironment, Separators, TrajectorySampler
from attention_rl_trainer.types import ArticleReference, StreamPosition

K = V = 6
EXACT = {"rel": 1e-5, "abs": 1e-6}


def figures(order: ReadingOrder) -> list[list[float]]:
    names = ("probability", "value_logprob", "query_gain", "model_gain", "order_gain")
    return [[getattr(step, name) for name in names] + list(step.probabilities) for step in order.steps]


def expect_same(order: ReadingOrder, other: ReadingOrder) -> None:
    assert (order.order, order.queries) == (other.order, other.queries)
    for ours, theirs in zip(figures(order), figures(other), strict=True):
        assert ours == pytest.approx(theirs, **EXACT)


def test_what_was_paid_for_in_training_is_left_out(orderer: AttentionGuidedOrderer) -> None:
    trained = {"order_coef": 1.0, "information_coef": 2.0, "num_queries": 4}
    options = OrderSettings(orderer.settings.options | trained).rollout(4, 4)

    assert (options.order_coef, options.information_coef, options.num_queries) == (0, 0, 1)


def test_a_drawn_order_is_that_of_a_rollout(orderer: AttentionGuidedOrderer, texts: list[str]) -> None:
    """Of a text of whole pieces, whose first is the example, as the trainer's sampler rolls it out."""
    encode = orderer.encoder.encode
    chunks = torch.tensor(encode(texts[0])[: 5 * (K + V)]).view(5, K + V)
    batch = MemoryBatch(
        example_keys=chunks[:1, :K],
        example_values=chunks[:1, K:],
        key_tokens=chunks[None, 1:, :K],
        value_tokens=chunks[None, 1:, K:],
        pair_numbers=torch.arange(1, 5)[None],
        articles=[ArticleReference("", "", 0, 0, StreamPosition())],
    )
    options = orderer.settings.rollout(4, 4)
    environment = KVMemoryEnvironment(orderer.settings.selection)
    separators = Separators.encode(orderer.encoder, options)
    sampler = TrajectorySampler(orderer.policy, environment, separators, options, seed=5, compute_order_gain=True)
    expected = sampler.sample(batch, [0])
    order = orderer.order(orderer.encoder.decode(chunks.flatten()), greedy=False, seed=5)
    assert order.order == [1 + int(step.selected_index) for step in expected.steps]
    assert order.queries == [orderer.encoder.decode(step.query_tokens[0]).strip() for step in expected.steps]
    for ours, step in zip(order.steps, expected.steps, strict=True):
        assert ours.probabilities == pytest.approx([0.0, *step.selection_probabilities[0].tolist()], **EXACT)
        assert ours.probability == pytest.approx(step.similarity_score.item(), **EXACT)
        assert ours.value_logprob == pytest.approx(step.policy_value_logprob.item(), **EXACT)
        for name in ("query_gain", "model_gain", "order_gain"):
            assert getattr(ours, name) == pytest.approx(getattr(step, name).item(), **EXACT)


def test_a_greedy_order_takes_the_likeliest_token_and_the_likeliest_piece(
    orderer: AttentionGuidedOrderer, passages: list[str]
) -> None:
    order = orderer.order(passages, "where is the lake", seed=1)
    assert sorted(order.order) == [0, 1, 2, 3]
    assert order.texts == [passages[index] for index in order.order]
    for number, step in enumerate(order.steps):
        assert step.index == max(range(4), key=step.probabilities.__getitem__)
        assert sum(step.probabilities) == pytest.approx(1)
        assert [step.probabilities[index] for index in order.order[:number]] == [0] * number
    assert order.steps[0].order_gain == 0
    expect_same(order, orderer.order(passages, "where is the lake", seed=2))
    # The first query, by the model's own forward of the whole prompt.
    encode, policy = orderer.encoder.encode, orderer.policy
    token_ids = [*encode(" Query:"), *encode(" where is the lake")[:K], *encode(" Response:")]
    token_ids += [*encode(" where is the lake")[K:], *encode(" Query:")]
    query: list[int] = []
    for _ in range(4):
        with policy.inference():
            logits = policy.model(torch.tensor([token_ids + query])).logits[0, -1]
        query.append(int(policy.allowed_ids[logits[policy.allowed_ids].argmax()]))
    assert order.queries[0] == orderer.encoder.decode(query).strip()


def test_draws_depend_on_the_seed_alone(orderer: AttentionGuidedOrderer, passages: list[str]) -> None:
    first = orderer.order(passages, greedy=False, seed=1)
    expect_same(first, orderer.order(passages, greedy=False, seed=1))
    assert {tuple(orderer.order(passages, greedy=False, seed=seed).queries) for seed in (1, 2, 3)} != {
        tuple(first.queries)
    }
    assert (first.is_greedy, orderer.order(passages).is_greedy) == (False, True)
    # The temperature of training holds again after a greedy order.
    assert orderer.policy.query_temperature == 1


def test_the_first_pieces_do_not_depend_on_how_many_are_read(
    orderer: AttentionGuidedOrderer, passages: list[str]
) -> None:
    whole, first = orderer.order(passages), orderer.order(passages, top_k=2)
    assert len(first.steps) == 2
    expect_same(first, replace(whole, steps=whole.steps[:2]))
    expect_same(whole, orderer.order(passages, top_k=9))


def test_memories_of_a_batch_are_read_as_if_alone(orderer: AttentionGuidedOrderer, passages: list[str]) -> None:
    memories: list[Any] = [passages, [("lake", passages[0]), ("sea", passages[2])], passages[::-1], passages[:1]]
    contexts = [None, "where", ("who", "kings"), None]
    together = orderer.order_batch(memories, contexts)
    for memory, context, order in zip(memories, contexts, together, strict=True):
        expect_same(order, orderer.order(memory, context))
    for order, other in zip(together, orderer.order_batch(memories, contexts, batch_size=1), strict=True):
        expect_same(order, other)
    assert orderer.order_batch([]) == []


def test_what_was_read_before_matters(orderer: AttentionGuidedOrderer, passages: list[str]) -> None:
    logprobs = {orderer.order(passages, context).steps[0].value_logprob for context in (None, "lake", ("lake", "sea"))}
    assert len(logprobs) == 3


def test_a_fitted_selector_comes_from_the_calibration(
    tokenizer: PreTrainedTokenizerFast, orderer: AttentionGuidedOrderer, passages: list[str]
) -> None:
    model = adapted(tiny_llama())
    options = {**orderer.settings.options, "selection_temperature": "auto"}
    fitted = AttentionGuidedOrderer(model, tokenizer, OrderSettings(options, Calibration(0.2)))
    expect_same(fitted.order(passages), orderer.order(passages))
    with pytest.raises(ValueError, match=r"selects by what was fitted.* no selector_calibration\.safetensors"):
        AttentionGuidedOrderer(model, tokenizer, OrderSettings(options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"max_value_tokens": 0}, "max_value_tokens must be at least 1"),
        ({"batch_size": -1}, "batch_size must be at least 1"),
        ({"contexts": ["a", "b"]}, "there are 2 contexts for 1 memories"),
    ],
    ids=["top_k", "value", "batch", "contexts"],
)
def test_options_out_of_range_are_named(
    options: dict[str, Any], message: str, orderer: AttentionGuidedOrderer, passages: list[str]
) -> None:
    with pytest.raises(ValueError, match=message):
        orderer.order_batch([passages], **options)


def test_what_does_not_fit_the_context_says_what_would(orderer: AttentionGuidedOrderer, texts: list[str]) -> None:
    passages = [" ".join(text.split()[:90]) for text in texts[:6]]
    with pytest.raises(ValueError, match=r"to read 6 pieces of up to \d+ tokens takes \d+ tokens") as caught:
        orderer.order(passages)
    assert "the model's context holds 512; set top_k to" in str(caught.value)
    fitting = int(str(caught.value).split("set top_k to ")[1].split()[0])
    assert len(orderer.order(passages, top_k=fitting).steps) == fitting
    with pytest.raises(ValueError, match=f"set top_k to {fitting} or less"):
        orderer.order(passages, top_k=fitting + 1)
    assert len(orderer.order(passages, max_value_tokens=20).steps) == 6
    with pytest.raises(ValueError, match=r"holds 512; give max_value_tokens or shorter pieces$"):
        orderer.order([texts[0], texts[1]], top_k=1)


def test_an_order_is_json_and_a_table(orderer: AttentionGuidedOrderer, passages: list[str]) -> None:
    order = orderer.order([f"[bold]{passages[0]}", passages[1]], "a question")
    found = json.loads(order.to_json(labels=["a.txt", "[b].txt"]))
    assert found["order"] == order.order
    assert found["order_gain"] == pytest.approx(sum(step.order_gain for step in order.steps) / 2)
    for step, ours in zip(found["steps"], order.steps, strict=True):
        assert step.pop("label") == ["a.txt", "[b].txt"][ours.index]
        assert step.pop("text") == order.pieces[ours.index]
        assert step == {**asdict(ours), "probabilities": list(ours.probabilities)}
    assert (found["context"], found["is_greedy"]) == ("a question", True)
    assert found["trust"] == order.trust.to_dict()
    with (console := Console(width=200)).capture() as printed:
        console.print(order.to_table(["a.txt", "[b].txt"]))
    lines = printed.get().splitlines()
    assert "[bold]" in "".join(lines)
    first = next(line for line in lines if line.startswith("│ 1 "))
    assert ["a.txt", "[b].txt"][order.order[0]] in first
    assert f"{order.steps[0].probability:.2f}" in first
