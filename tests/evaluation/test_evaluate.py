"""An evaluation of held-out memories: means over the trajectories asked for, and the tables beside them."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_sampler, random_batch, tiny_llama
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from attention_rl_trainer.evaluation.evaluate import EvaluationOptions, evaluate, evaluate_policy
from attention_rl_trainer.memories.pairs import MemoryBatch
from attention_rl_trainer.memories.tokenization import PlainTextEncoder
from attention_rl_trainer.types import Trajectory


@pytest.mark.parametrize("compute_order_gain", [False, True])
def test_means_are_over_trajectories_of_unequal_batches(
    compute_order_gain: bool, llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    sampler = make_sampler(llama, tokenizer, compute_order_gain=compute_order_gain)
    seen: list[tuple[MemoryBatch, Trajectory]] = []
    batches = [random_batch(4), random_batch(3, seed=4), random_batch(2, seed=5)]
    results = evaluate_policy(sampler, iter(batches), 6, lambda *pair: seen.append(pair))
    # The last batch that is needed is cut, and no other is read.
    assert [len(batch) for batch, _ in seen] == [4, 2]
    assert torch.cat([trajectory.episodes for _, trajectory in seen]).tolist() == list(range(6))
    rewards = torch.cat([trajectory.avg_reward for _, trajectory in seen])
    assert results["episodes"] == 6
    assert results["reward"] == pytest.approx(rewards.mean().item(), abs=1e-6)
    assert results["reward_std"] == pytest.approx(rewards.std(correction=0).item(), abs=1e-6)
    assert results["reward_max"] == rewards.max().item()
    names = ["query_gain", "model_gain", *(["order_gain"] if compute_order_gain else [])]
    for name in names:
        values = torch.cat([trajectory.stack(name) for _, trajectory in seen])
        assert results[name] == pytest.approx(values.mean().item(), abs=1e-6)
    assert ("order_gain" in results) == compute_order_gain


def test_what_a_batch_lacks_is_left_out_of_the_mean(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """One trajectory alone does not show what its draws depend on."""
    sampler = make_sampler(llama, tokenizer)
    seen: list[Trajectory] = []
    batches = [random_batch(3), random_batch(1, seed=4), random_batch(2, seed=5)]
    results = evaluate_policy(sampler, batches, 6, lambda _, trajectory: seen.append(trajectory))
    measured = torch.cat([seen[number].stack("selection_information") for number in (0, 2)])
    assert seen[1].steps[0].selection_information is None
    assert results["selection_information"] == pytest.approx(measured.mean().item(), rel=1e-5)
    assert results["query_bound"] == pytest.approx(measured.mean().item() / 5, rel=1e-5)
    alone = evaluate_policy(sampler, [random_batch(1)], 6)
    assert "selection_information" not in alone
    assert "query_bound" not in alone


def test_fewer_memories_than_were_asked_for(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    assert evaluate_policy(make_sampler(llama, tokenizer), [random_batch(3)], 10)["episodes"] == 3


def test_tables_add_their_figures(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    sampler, encoder = make_sampler(llama, tokenizer), PlainTextEncoder(tokenizer)
    plain, nothing = evaluate(sampler, [random_batch(3)], encoder, EvaluationOptions(3, eval_tables=False))
    assert nothing is None
    # The order gain beside the rest, and streams of its own.
    apart = make_sampler(tiny_llama(), tokenizer, seed=sampler.seed + 2**32, compute_order_gain=True)
    assert plain == evaluate_policy(apart, [random_batch(3)], 3)
    assert (sampler.seed, sampler.compute_order_gain) == (7, False)
    options = EvaluationOptions(3, eval_order_episodes=1)
    results, tables = evaluate(sampler, [random_batch(3)], encoder, options)
    assert tables is not None
    assert results["query_over_empty"] == tables.policy_less["empty query"].mean
    figures = {"order_over_random", "order_share_closed", "query_over_empty", "query_over_control", "query_over_form"}
    assert results.keys() - plain.keys() == figures | {"query_over_counterfactuals", "names_its_pair"}
    assert {"distinct_queries", "selection_information", "query_bound"} < plain.keys()
    assert {name: results[name] for name in plain} == plain


@pytest.mark.parametrize(("tables", "num_ordered", "total"), [(False, None, 3), (True, None, 6), (True, 1, 4)])
def test_a_bar_counts_every_memory_and_again_those_whose_orders_are_scored(
    tables: bool,
    num_ordered: int | None,
    total: int,
    llama: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bars: list[tqdm[Any]] = []

    class Bar(tqdm):  # type: ignore[type-arg]
        def __init__(self, **options: Any) -> None:
            super().__init__(**options | {"file": io.StringIO(), "disable": bool(options["disable"])})
            bars.append(self)

    monkeypatch.setattr("attention_rl_trainer.evaluation.evaluate.tqdm", Bar)
    batches = [random_batch(2, num_pairs=3), random_batch(1, num_pairs=3, seed=4)]
    given = make_sampler(llama, tokenizer), batches, PlainTextEncoder(tokenizer)
    options = EvaluationOptions(3, eval_tables=tables, eval_order_episodes=num_ordered)
    evaluate(*given, options, show_progress=True)
    assert [(bar.n, bar.total) for bar in bars] == [(total, total)]
    evaluate(*given, EvaluationOptions(1, eval_tables=False))
    assert bars[1].disable


def test_the_seed_that_is_shown_is_the_users(
    tmp_path: Path, llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    options = EvaluationOptions(2, eval_order_episodes=0)
    given = make_sampler(llama, tokenizer), [random_batch(2)], PlainTextEncoder(tokenizer), options
    _, tables = evaluate(*given)
    assert tables is not None
    tables.write(tmp_path)
    assert json.loads((tmp_path / "evaluation.json").read_text(encoding="utf-8"))["settings"]["seed"] == 7
    assert "seed 7, queries of a trajectory (T) 3, " in (tmp_path / "evaluation.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("option", "value"), [("eval_episodes", 0), ("eval_epochs", 0), ("eval_order_episodes", -1), ("eval_episodes", 2.5)]
)
def test_options_out_of_range_are_refused(option: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{option} must be .*got {value}"):
        EvaluationOptions(**{option: value})
