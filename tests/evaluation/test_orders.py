"""Orders of a memory: the rules by hand, the scores against whole forwards, the oracles against enumeration."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from benchmarks.scene import offline_policy
from tiny import make_environment, make_sampler, random_batch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from attention_rl_trainer.evaluation.orders import (
    BEST,
    ORACLE,
    RANDOM,
    WORST,
    Order,
    OrderScorer,
    ScoredMemory,
    all_orders,
    article_order,
    attention_orders,
    bm25_order,
    embedding_order,
    random_orders,
    score_orders,
)
from attention_rl_trainer.memories.pairs import MemoryBatch
from attention_rl_trainer.memories.tokenization import PlainTextEncoder
from attention_rl_trainer.models.causal_lm import deterministic_inference
from attention_rl_trainer.rollout.layout import Separators
from attention_rl_trainer.rollout.sampler import RolloutOptions, TrajectorySampler

# JAX takes the GPU's memory at its first operation.
FAKE_JAX = """
def top_k(*arguments):
    raise SystemExit("JAX was used")
"""
ORDERS_BESIDE_JAX = """
import sys
import attention_rl_trainer.config
from attention_rl_trainer.evaluation.orders import bm25_order

def modules_of(package):
    return {name: module for name, module in sys.modules.items() if name.partition(".")[0] == package}

def order_beside(expected):
    assert bm25_order(["alpha", "beta", "gamma"], ["", "", ""], "gamma") == (2, 0, 1)
    assert modules_of("jax") == expected, modules_of("jax")

assert not modules_of("bm25s"), "rarely needed, and slow to import"
order_beside({})
order_beside({})
for name in modules_of("bm25s"):
    del sys.modules[name]
import jax.lax
order_beside({"jax": jax, "jax.lax": jax.lax})
"""


class TestRules:
    def test_article_order(self) -> None:
        assert article_order(torch.tensor([7, 2, 30, 5])) == (1, 3, 0, 2)

    def test_embedding_order_by_hand(self) -> None:
        # Degrees from the example's key; the mean of what was read stays near 0.
        angles = torch.deg2rad(torch.tensor([10.0, 80.0, 45.0, 0.0]))
        vectors = (
            torch.stack([angles.cos(), angles.sin()], dim=1)[:, None] * torch.tensor([3.0, 1, 2, 5])[:, None, None]
        )
        assert embedding_order(vectors, torch.tensor([[2.0, 0.0]])) == (3, 0, 2, 1)

    def test_bm25_follows_the_words_that_were_read(self) -> None:
        keys = ["granite quarry", "copper mine", "violin maker", "silver river"]
        values = ["sold to the violin", "near a river", "carved from copper", "flowing"]
        assert bm25_order(keys, values, "a town known for granite") == (0, 2, 1, 3)

    def test_bm25_looks_at_no_value_before_it_was_read(self) -> None:
        keys = ["first words", "second words", "third words"]
        same = bm25_order(keys, ["x", "y", "z"], "third")
        assert same[0] == 2
        assert bm25_order(keys, ["third third", "third", "q"], "third")[0] == 2

    @pytest.mark.parametrize("example", ["", "the of and", "unknown"])
    @pytest.mark.parametrize("keys", [["", "", ""], ["the", "of", "and"], ["alpha", "beta", "gamma"]])
    def test_bm25_without_words_in_common_keeps_the_order_of_the_memory(self, keys: list[str], example: str) -> None:
        assert bm25_order(keys, ["", "", ""], example) == (0, 1, 2)

    @pytest.mark.slow
    def test_bm25_leaves_jax_alone(self, tmp_path: Path) -> None:
        (tmp_path / "jax").mkdir()
        (tmp_path / "jax" / "__init__.py").touch()
        (tmp_path / "jax" / "lax.py").write_text(FAKE_JAX, encoding="utf-8")
        path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
        command, environment = [sys.executable, "-c", ORDERS_BESIDE_JAX], os.environ | {"PYTHONPATH": path}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
        assert done.returncode == 0, done.stderr

    def test_random_orders_are_seeded_permutations(self) -> None:
        orders = random_orders(5, 40, [1, 2])
        assert orders == random_orders(5, 40, [1, 2])
        assert orders != random_orders(5, 40, [1, 3])
        assert all(sorted(order) == [0, 1, 2, 3, 4] for order in orders)
        assert len(set(orders)) > 25

    def test_all_orders(self) -> None:
        assert len(set(all_orders(4))) == 24
        with pytest.raises(ValueError, match="7 pairs has too many orders to score them all; 6 pairs at most"):
            all_orders(7)


def memory_of(sampler: TrajectorySampler, batch: MemoryBatch, row: int = 0) -> ScoredMemory:
    with sampler.policy.inference():
        return ScoredMemory.of_row(sampler, batch, row)


def score_by_whole_forwards(sampler: TrajectorySampler, batch: MemoryBatch, order: Order, row: int = 0) -> list[float]:
    """Each value's log-probability from one forward of the base model over the whole sequence of an order."""
    separators = sampler.layout.separators
    query, response = torch.tensor(separators.query), torch.tensor(separators.response)
    around = [torch.tensor(frame, dtype=torch.int64) for frame in separators.around_keys]
    shown = [part for pair in zip(around, batch.key_tokens[row], strict=False) for part in pair] + around[-1:]
    sequence = [*shown, query, batch.example_keys[row], response, batch.example_values[row], query]
    starts = []
    for column in order:
        sequence.append(response)
        if sampler.layout.include_key_in_context:
            sequence.append(batch.key_tokens[row, column])
        starts.append(sum(len(part) for part in sequence))
        sequence += [batch.value_tokens[row, column], query]
    ids = torch.cat(sequence)[None]
    with deterministic_inference(sampler.policy.model), sampler.policy.model.disable_adapter():
        log_probabilities = sampler.policy.model(ids).logits.log_softmax(-1)[0]
    length = batch.value_tokens.shape[2]
    return [
        sum(log_probabilities[place - 1, ids[0, place]].item() for place in range(start, start + length)) / length
        for start in starts
    ]


@pytest.mark.parametrize("max_rows", [1, 3, 100])
@pytest.mark.parametrize("include_key", [False, True])
def test_scores_are_those_of_whole_forwards(
    include_key: bool, max_rows: int, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    sampler = make_sampler(model, tokenizer, include_key_in_context=include_key)
    batch = random_batch(2, num_pairs=3)
    scorer = OrderScorer(sampler.policy, memory_of(sampler, batch, 1), max_rows=max_rows)
    orders = [*itertools.permutations(range(3)), (2,), (0, 2)]
    scorer.read(orders)
    for order in orders:
        expected = score_by_whole_forwards(sampler, batch, order, row=1)
        got = [scorer.value_logprob(order[: depth + 1]) for depth in range(len(order))]
        assert got == pytest.approx(expected, abs=1e-5)
        assert scorer.score(order) == pytest.approx(sum(expected) / len(expected), abs=1e-5)


def test_a_beginning_is_read_once(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    sampler = make_sampler(llama, tokenizer)
    memory = memory_of(sampler, random_batch(1, num_pairs=4))
    scorer = OrderScorer(sampler.policy, memory)
    read = []
    handle = sampler.policy.backbone.register_forward_pre_hook(
        lambda module, arguments, options: read.append(options["input_ids"].numel()), with_kwargs=True
    )
    block, prompt = memory.blocks.shape[1], memory.prompt.shape[1]
    scorer.read(all_orders(4))
    # 4 + 12 + 24 + 24 beginnings, not 24 orders of 4.
    assert sum(read) == prompt + 64 * block
    read.clear()
    scorer.read(all_orders(4))
    assert read == []
    for max_rows in (1, 3, 100):
        fresh = OrderScorer(sampler.policy, memory, max_rows=max_rows)
        read.clear()
        assert fresh.greedy_oracle() == scorer.greedy_oracle()
        # The candidates of every step, 4 + 3 + 2 + 1, after what the steps before read.
        assert sum(read) == 2 * (prompt + 10 * block)
    handle.remove()


def test_oracles_against_enumeration(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    sampler = make_sampler(model, tokenizer)
    batch = random_batch(3, num_pairs=4)
    records = score_orders(sampler, batch, range(3), PlainTextEncoder(tokenizer))
    for row, record in enumerate(records):
        by_order = {
            order: sum(score_by_whole_forwards(sampler, batch, order, row)) / 4
            for order in itertools.permutations(range(4))
        }
        scores = record.scores
        assert scores[BEST] == pytest.approx(max(by_order.values()), abs=1e-5)
        assert scores[WORST] == pytest.approx(min(by_order.values()), abs=1e-5)
        assert scores[RANDOM] == pytest.approx(sum(by_order.values()) / 24, abs=1e-5)
        assert scores["article order"] == pytest.approx(by_order[0, 1, 2, 3], abs=1e-5)
        assert scores["reverse"] == pytest.approx(by_order[3, 2, 1, 0], abs=1e-5)
        greedy: Order = ()
        while len(greedy) < 4:
            rest = [column for column in range(4) if column not in greedy]
            greedy = max(
                ((*greedy, column) for column in rest),
                key=lambda order: score_by_whole_forwards(sampler, batch, order, row)[-1],
            )
        assert scores[ORACLE] == pytest.approx(by_order[greedy], abs=1e-5)
        # Nothing beats the exact order.
        assert all(score <= scores[BEST] for score in scores.values())
        assert set(scores) == {
            *("learned", "untrained attention", "article order", "reverse", "BM25", "embedding similarity"),
            *(RANDOM, ORACLE, BEST, WORST),
        }


def test_keys_that_are_shown_can_be_read_from_top_to_bottom(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    sampler = make_sampler(llama, tokenizer, show_keys="plain", num_kv_pairs=5)
    batch = replace(random_batch(1, num_pairs=4), pair_numbers=torch.tensor([[30, 2, 7, 5]]))
    (record,) = score_orders(sampler, batch, [5], PlainTextEncoder(tokenizer))
    by_order = {
        order: sum(score_by_whole_forwards(sampler, batch, order)) / 4 for order in ((0, 1, 2, 3), (1, 3, 2, 0))
    }
    assert record.scores["as listed"] == pytest.approx(by_order[0, 1, 2, 3], abs=1e-5)
    assert record.scores["article order"] == pytest.approx(by_order[1, 3, 2, 0], abs=1e-5)
    assert abs(by_order[0, 1, 2, 3] - by_order[1, 3, 2, 0]) > 1e-4


def test_a_large_memory_has_drawn_random_orders_and_no_exact_one(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    sampler = make_sampler(llama, tokenizer)
    batch = random_batch(1, num_pairs=7)
    (record,) = score_orders(sampler, batch, [5], PlainTextEncoder(tokenizer), num_random=3)
    drawn = random_orders(7, 3, (sampler.seed, 5))
    expected = [sum(score_by_whole_forwards(sampler, batch, order)) / 7 for order in drawn]
    assert record.scores[RANDOM] == pytest.approx(sum(expected) / 3, abs=1e-5)
    assert BEST not in record.scores


def test_the_learned_order_is_the_rollouts(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    batch = random_batch(4, num_pairs=5)
    whole = make_sampler(model, tokenizer, num_steps=5)
    learned = attention_orders(whole, batch, range(4), untrained=False)
    rolled_out = whole.sample(batch, range(4)).stack("selected_index")
    assert learned == [tuple(row) for row in rolled_out.tolist()]
    # Fewer steps in training are the beginning of it.
    options = RolloutOptions(num_steps=2, tokens_per_query=4, subset_fraction=1.0)
    short = TrajectorySampler(whole.policy, whole.environment, whole.layout.separators, options, whole.seed)
    assert attention_orders(short, batch, range(4), untrained=False) == learned
    assert short.sample(batch, range(4)).stack("selected_index").tolist() == [list(order[:2]) for order in learned]


def test_untrained_attention_is_the_base_models(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    batch = random_batch(16, num_pairs=5)
    sampler = make_sampler(llama, tokenizer, num_steps=5)
    untrained = attention_orders(sampler, batch, range(16), untrained=True)
    assert untrained != attention_orders(sampler, batch, range(16), untrained=False)
    with torch.no_grad():
        for parameter in sampler.policy.model.parameters():
            if parameter.requires_grad:
                parameter.zero_()
    assert attention_orders(sampler, batch, range(16), untrained=False) == untrained
    assert attention_orders(sampler, batch, range(16), untrained=True) == untrained


def test_ease_of_the_chosen_values(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    sampler = make_sampler(llama, tokenizer, num_steps=2)
    batch = random_batch(2, num_pairs=4)
    learned = attention_orders(sampler, batch, range(2), untrained=False)
    for row, record in enumerate(score_orders(sampler, batch, range(2), PlainTextEncoder(tokenizer))):
        alone = [score_by_whole_forwards(sampler, batch, (column,), row)[0] for column in range(4)]
        chosen = [alone[column] for column in learned[row][:2]]
        assert record.chosen_ease == pytest.approx(sum(chosen) / 2 - sum(alone) / 4, abs=1e-5)


@pytest.mark.slow
def test_bm25_wins_on_an_article_built_for_it() -> None:
    """Each letter names the next; a reader predicts it best who comes from the one before, and so do its words."""
    policy, tokenizer = offline_policy(torch.float32)
    encoder = PlainTextEncoder(tokenizer)
    names = ["Quorvex", "Zindral", "Mofterby", "Klathune", "Ribzogar", "Wexpodin"]

    def cut(text: str, length: int) -> list[int]:
        return (encoder.encode(text) + encoder.encode(" and so on and so forth and so it goes on and on"))[:length]

    def letter(debtor: str, creditor: str) -> list[int]:
        return cut(f" {debtor} owes nine silver coins to {creditor}; {creditor} owes nine silver coins to", 20)

    keys = [cut(f" The {name} letter reads as follows today", 12) for name in names[:5]]
    values = [letter(debtor, creditor) for debtor, creditor in itertools.pairwise(names)]
    place_in_article = [3, 0, 4, 2, 1]
    batch = MemoryBatch(
        example_keys=torch.tensor([cut(" The opening letter reads as follows today", 12)]),
        example_values=torch.tensor([letter("Opening", names[0])]),
        key_tokens=torch.tensor([[keys[place] for place in place_in_article]]),
        value_tokens=torch.tensor([[values[place] for place in place_in_article]]),
        pair_numbers=torch.arange(1, 6)[None],
        articles=random_batch(1).articles,
    )
    options = RolloutOptions(num_steps=5, tokens_per_query=8)
    sampler = TrajectorySampler(policy, make_environment(0.1), Separators.encode(encoder), options, seed=0)
    (record,) = score_orders(sampler, batch, [0], encoder)
    others = {name: score for name, score in record.scores.items() if name not in ("BM25", BEST, ORACLE)}
    assert record.scores["BM25"] == record.scores[BEST]
    assert record.scores["BM25"] > max(others.values()) + 0.2
