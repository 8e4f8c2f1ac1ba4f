"""The two tables of an evaluation: what is in them, how they are written, and that they repeat themselves."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_sampler, random_batch, tiny_llama
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from attention_rl_trainer.evaluation.evaluate import evaluate_policy
from attention_rl_trainer.evaluation.orders import BEST, ORACLE, RANDOM, WORST, score_orders
from attention_rl_trainer.evaluation.queries import (
    CONTROL,
    EMPTY,
    FORM,
    OTHER_KEY,
    OWN_KEY,
    POLICY,
    names_its_pair,
)
from attention_rl_trainer.evaluation.tables import EvaluationTables, TableBuilder
from attention_rl_trainer.memories.pairs import MemoryBatch
from attention_rl_trainer.memories.tokenization import PlainTextEncoder
from attention_rl_trainer.types import Trajectory


def build_tables(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, num_pairs: int = 4) -> EvaluationTables:
    sampler = make_sampler(model, tokenizer)
    builder = TableBuilder(sampler, PlainTextEncoder(tokenizer), num_counterfactuals=2, num_random=3)
    batches = [random_batch(4, num_pairs=num_pairs), random_batch(3, num_pairs=num_pairs, seed=4)]
    results = evaluate_policy(sampler, batches, 6, builder.add)
    assert results["episodes"] == 6
    tables = builder.build()
    # The same trajectories, measured by the rollout itself.
    for name in ("reward", "query_gain", "model_gain", "distinct_queries", "selection_information", "query_bound"):
        assert tables.parts[name].mean == pytest.approx(results[name], abs=1e-6)
    return tables


def test_tables_are_paired_and_consistent(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    tables = build_tables(model, tokenizer)
    # Titles repeat in the second batch: six trajectories on four articles.
    assert {(estimate.num_values, estimate.num_clusters) for estimate in tables.orders.values()} == {(6, 4)}
    for name, gain in tables.order_gains.items():
        assert gain.mean == pytest.approx(tables.orders[name].mean - tables.orders[RANDOM].mean, abs=1e-9)
    assert set(tables.order_gains) == set(tables.orders) - {RANDOM}
    gap = tables.orders[BEST].mean - tables.orders[RANDOM].mean
    for name, share in tables.share_closed.items():
        assert share.mean == pytest.approx(tables.order_gains[name].mean / gap, abs=1e-9)
    assert set(tables.share_closed) == set(tables.orders) - {RANDOM, BEST, WORST}
    assert tables.share_closed[ORACLE].mean <= 1
    for name, row in ((EMPTY, EMPTY), (CONTROL, CONTROL), (FORM, OTHER_KEY)):
        assert tables.policy_less[name].mean == pytest.approx(
            tables.queries[POLICY].mean - tables.queries[row].mean, abs=1e-9
        )
    assert len({estimate.mean for estimate in tables.policy_less.values()}) == 3
    assert tables.metrics() == {
        "order_over_random": tables.order_gains["learned"].mean,
        "order_share_closed": tables.share_closed["learned"].mean,
        "query_over_counterfactuals": tables.queries[POLICY].mean,
        "query_over_empty": tables.policy_less[EMPTY].mean,
        "query_over_control": tables.policy_less[CONTROL].mean,
        "query_over_form": tables.policy_less[FORM].mean,
        "names_its_pair": tables.parts["names_its_pair"].mean,
        "distinct_queries": tables.parts["distinct_queries"].mean,
        "query_bound": tables.parts["query_bound"].mean,
    }


def test_what_the_queries_say(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """Each query begins as the key does of the pair drawn at a step: the first two their own, the third the second's.

    In the second row they are all the first's.
    """
    asked_at = torch.tensor([[0, 1, 1], [0, 0, 0], [0, 1, 1], [0, 1, 1]])
    sampler = make_sampler(llama, tokenizer)
    builder = TableBuilder(sampler, PlainTextEncoder(tokenizer))
    # Two trajectories on one article, so that the control queries are not the queries in another order.
    batch = random_batch(4).select_rows([0, 0, 1, 2])
    trajectory = sampler.sample(batch, range(4))
    keys = torch.stack([step.selected_pair.key_tokens[:, :4] for step in trajectory.steps], dim=1)
    queries = keys[torch.arange(4)[:, None], asked_at]
    steps = [replace(step, query_tokens=queries[:, number]) for number, step in enumerate(trajectory.steps)]
    trajectory = replace(trajectory, steps=steps)
    builder.add(batch, trajectory)
    parts = builder.build().parts
    named, distinct = parts["names_its_pair"], parts["distinct_queries"]
    assert (named.mean, named.num_values, named.num_clusters) == (pytest.approx(7 / 12), 4, 3)
    assert (distinct.mean, distinct.num_values, distinct.num_clusters) == (pytest.approx(7 / 4), 4, 3)
    by_chance = names_its_pair(trajectory, queries[[2, 2, 3, 0]]).double().mean().item()
    assert parts["control_names_its_pair"].mean == pytest.approx(by_chance)
    assert by_chance < 0.3


def test_what_the_selector_hears_is_of_the_trajectories_that_had_company(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    sampler = make_sampler(llama, tokenizer)
    builder, seen = TableBuilder(sampler, PlainTextEncoder(tokenizer)), []
    batches = [random_batch(1, seed=6), random_batch(3), random_batch(1, seed=4)]

    def observe(batch: MemoryBatch, trajectory: Trajectory) -> None:
        builder.add(batch, trajectory)
        seen.append(trajectory)

    evaluate_policy(sampler, batches, 5, observe)
    tables = builder.build()
    information = tables.parts["selection_information"]
    assert (information.num_values, information.num_clusters) == (3, 3)
    assert tables.parts["reward"].num_values == 5
    measured = seen[1].stack("selection_information").mean(dim=1)
    assert information.mean == pytest.approx(measured.mean().item(), rel=1e-5)
    assert information.low is not None
    assert information.high is not None
    assert measured.min().item() - 1e-6 <= information.low < information.mean < information.high
    bound = tables.parts["query_bound"]
    # V is 5.
    assert [bound.mean * 5, (bound.low or 0) * 5, (bound.high or 0) * 5] == pytest.approx(
        [information.mean, information.low, information.high]
    )


def test_the_greedy_oracle_is_the_yardstick_of_large_memories(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    tables = build_tables(llama, tokenizer, num_pairs=7)
    assert BEST not in tables.orders
    assert tables.share_closed[ORACLE].mean == pytest.approx(1.0)


def test_an_evaluation_repeats_itself_to_the_last_digit(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    first, again = (build_tables(tiny_llama(), tokenizer) for _ in range(2))
    assert first == again
    for name, tables in {"a": first, "b": again}.items():
        files = tables.write(tmp_path / name / "deeper")
        assert [file.name for file in files] == ["evaluation.json", "evaluation.md"]
    for name in ("evaluation.json", "evaluation.md"):
        texts = [(tmp_path / folder / "deeper" / name).read_bytes() for folder in ("a", "b")]
        assert texts[0] == texts[1]


def test_what_is_written(tmp_path: Path, llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    tables = build_tables(llama, tokenizer)
    tables.write(tmp_path)
    stored = json.loads((tmp_path / "evaluation.json").read_text(encoding="utf-8"))
    assert stored["orders"][RANDOM]["mean"] == tables.orders[RANDOM].mean
    assert stored["settings"] == {"seed": 7, "T": 3, "L": 4, "counterfactuals": 2}
    page = (tmp_path / "evaluation.md").read_text(encoding="utf-8")
    assert page.count(": 6 memories of 4 articles") == 2
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("|")]
    # Best first; the random order has neither a difference from itself nor a share.
    assert rows[2] == [BEST, str(tables.orders[BEST]), str(tables.order_gains[BEST]), ""]
    assert [RANDOM, str(tables.orders[RANDOM]), "", ""] in rows
    assert ["policy less empty query", str(tables.policy_less[EMPTY])] in rows
    assert ["policy less form control", str(tables.policy_less[FORM])] in rows
    assert ["another key of the article (form control)", str(tables.queries[OTHER_KEY])] in rows
    assert ["different queries of a trajectory, of T", str(tables.parts["distinct_queries"])] in rows
    assert ["bound: selection information / V", str(tables.parts["query_bound"])] in rows
    bound = tables.parts["query_bound"].mean
    assert f"a query that tells only which pair it drew is worth at most {bound:+.3f} over silence" in page


@pytest.mark.parametrize("num_scored", [0, 1, 5])
def test_orders_of_a_few_trajectories_alone(
    num_scored: int, llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    sampler = make_sampler(llama, tokenizer)
    builders = [
        TableBuilder(sampler, PlainTextEncoder(tokenizer), num_counterfactuals=2, num_order_episodes=count)
        for count in (None, num_scored)
    ]
    # 3 and 3 trajectories, so that one batch is measured in part.
    for builder in builders:
        evaluate_policy(sampler, [random_batch(3), random_batch(3, seed=4)], 6, builder.add)
    whole, part = (builder.build() for builder in builders)
    assert part.queries == whole.queries
    assert {name: estimate for name, estimate in part.parts.items() if name != "chosen_ease"} == {
        name: estimate for name, estimate in whole.parts.items() if name != "chosen_ease"
    }
    assert {estimate.num_values for estimate in part.orders.values()} == ({num_scored} if num_scored else set())
    assert ("order_over_random" in part.metrics()) == ("chosen_ease" in part.parts) == (num_scored > 0)
    assert ("not measured" in part.to_markdown()) == (num_scored == 0)
    if num_scored == 1:
        first, *_ = score_orders(sampler, random_batch(3), range(3), PlainTextEncoder(tokenizer))
        assert {name: estimate.mean for name, estimate in part.orders.items()} == first.scores


def test_nothing_measured_is_an_error(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    builder = TableBuilder(make_sampler(llama, tokenizer), PlainTextEncoder(tokenizer))
    with pytest.raises(ValueError, match="nothing was measured"):
        builder.build()


def repeated(batch: MemoryBatch, rows: list[int]) -> MemoryBatch:
    """Let all pairs of some memories be the same."""
    keys, values = batch.key_tokens.clone(), batch.value_tokens.clone()
    keys[rows], values[rows] = keys[rows][:, :1], values[rows][:, :1]
    return replace(batch, key_tokens=keys, value_tokens=values)


class TestNothingToCompare:
    """What has no value in a setting is left out; the rest of the tables is there."""

    def tables(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, batches: list[MemoryBatch], **options: Any
    ) -> EvaluationTables:
        sampler = make_sampler(model, tokenizer, **options)
        builder = TableBuilder(sampler, PlainTextEncoder(tokenizer), num_counterfactuals=2)
        evaluate_policy(sampler, batches, 99, builder.add)
        return builder.build()

    @pytest.mark.parametrize("num_pairs", [1, 4, 7])
    def test_orders_that_are_all_the_same(
        self, num_pairs: int, tmp_path: Path, llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        batch = repeated(random_batch(3, num_pairs=num_pairs), [0, 1, 2])
        tables = self.tables(llama, tokenizer, [batch], num_steps=1)
        assert tables.share_closed == {}
        assert tables.metrics()["order_over_random"] == pytest.approx(0.0, abs=1e-5)
        assert "order_share_closed" not in tables.metrics()
        assert "query_over_empty" in tables.metrics()
        assert tables.orders.keys() >= {"learned", RANDOM, ORACLE}
        for file in tables.write(tmp_path):
            assert "nan" not in file.read_text(encoding="utf-8").lower()

    def test_one_pair_is_not_told_from_others(
        self, tmp_path: Path, llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        tables = self.tables(llama, tokenizer, [random_batch(3, num_pairs=1)], num_steps=1)
        assert tables.queries.keys() == {POLICY, EMPTY, OWN_KEY, CONTROL}
        assert tables.policy_less.keys() == {EMPTY, CONTROL}
        assert not {"names_its_pair", "control_names_its_pair"} & tables.parts.keys()
        assert not {"names_its_pair", "query_over_form"} & tables.metrics().keys()
        # With one pair there is no choice.
        assert tables.metrics()["query_bound"] == pytest.approx(0, abs=1e-6)
        assert FORM not in tables.write(tmp_path)[1].read_text(encoding="utf-8")

    def test_trajectories_alone_have_no_bound(self, llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
        whole = random_batch(3)
        tables = self.tables(llama, tokenizer, [whole.select_rows([row]) for row in range(3)])
        assert not {"selection_information", "query_bound"} & tables.parts.keys()
        assert "query_bound" not in tables.metrics()
        assert "bound" not in tables.to_markdown()
        assert tables.parts["distinct_queries"].num_values == 3

    def test_one_memory_without_a_gap_leaves_no_interval(
        self, tmp_path: Path, llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        tables = self.tables(llama, tokenizer, [repeated(random_batch(3, num_pairs=3), [1])])
        share = tables.share_closed["learned"]
        assert share.low is None
        assert share.high is None
        assert tables.order_gains["learned"].low is not None
        assert tables.metrics()["order_share_closed"] == share.mean
        tables.write(tmp_path)

    def test_a_first_trajectory_alone_waits_for_another_article(self, tokenizer: PreTrainedTokenizerFast) -> None:
        whole = random_batch(3)
        one_by_one = self.tables(tiny_llama(), tokenizer, [whole.select_rows([row]) for row in range(3)])
        together = self.tables(tiny_llama(), tokenizer, [whole])
        for name in (POLICY, EMPTY):
            assert one_by_one.queries[name].mean == pytest.approx(together.queries[name].mean, abs=1e-5)
        assert {estimate.num_values for estimate in one_by_one.queries.values()} == {3}
        for name, order in together.orders.items():
            assert one_by_one.orders[name].mean == pytest.approx(order.mean, abs=1e-5)

    def test_a_single_article_is_refused_with_the_way_out(
        self, llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        one = random_batch(2).select_rows([0])
        with pytest.raises(ValueError, match="all trajectories so far are on 'title 0'; evaluate on more articles"):
            self.tables(llama, tokenizer, [one, one])
