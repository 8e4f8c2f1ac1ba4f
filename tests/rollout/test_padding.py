"""Keys and values of different lengths: padding changes no number of a rollout, nor a gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from model_builders import sliding_model
from tiny import adapted, tiny_gpt2, tiny_llama
from tiny_families import build
from torch import Tensor
from transformers import PreTrainedModel

from attention_rl_trainer.evaluation.orders import OrderScorer, ScoredMemory, score_orders
from attention_rl_trainer.evaluation.queries import names_its_pair, rouge_l, score_queries
from attention_rl_trainer.memories.pairs import MemoryBatch
from attention_rl_trainer.memories.tokenization import PlainTextEncoder
from attention_rl_trainer.models.policy import PolicyModel, PolicyOptions
from attention_rl_trainer.models.projections import UnsupportedArchitectureError
from attention_rl_trainer.probing.calibrate import Probe
from attention_rl_trainer.rollout.environment import KVMemoryEnvironment, SelectionOptions
from attention_rl_trainer.rollout.layout import Separators
from attention_rl_trainer.rollout.sampler import RolloutOptions, TrajectorySampler
from attention_rl_trainer.types import PADDING, ArticleReference, StreamPosition, Trajectory
from attention_rl_trainer.update.agreement import compare
from attention_rl_trainer.update.filter import RewardStatistics, Verdict
from attention_rl_trainer.update.kept import KeptTrajectories
from attention_rl_trainer.update.losses import LossOptions
from attention_rl_trainer.update.objective import compute_loss_terms
from attention_rl_trainer.update.previous_adapter import AdapterSnapshot

ROWS, PAIRS, STEPS = 3, 5, 3
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: tiny_llama(max_position_embeddings=512),
    "gpt2": lambda: tiny_gpt2(n_positions=512),
    # Its window of 16 tokens is shorter than a trajectory.
    "sliding": sliding_model,
    "both": lambda: build("gemma2"),
}
MEASURED = (
    "query_logprobs",
    "query_entropy",
    "selection_probabilities",
    "reward",
    "policy_value_logprob",
    "base_value_logprob",
    "counterfactual_value_logprob",
    "order_gain",
)
SEPARATORS = Separators((5, 6), (7, 8))


def lengths_of(seed: int, count: int) -> list[int]:
    return torch.randint(1, 8, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def padded_memories(places: int, rows: tuple[int, ...] = tuple(range(ROWS))) -> MemoryBatch:
    """Memories whose keys and values have 1 to 7 tokens, all padded to so many places."""

    def texts(row: int, kind: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(100 * row + kind)
        lengths = lengths_of(100 * row + kind, PAIRS + 1)
        return [torch.randint(10, 380, (length,), generator=generator).tolist() for length in lengths]

    keys, values = ([texts(row, kind) for row in rows] for kind in (1, 2))
    padded_keys = torch.tensor([[[PADDING] * (places - len(k)) + k for k in row] for row in keys])
    padded_values = torch.tensor([[v + [PADDING] * (places - len(v)) for v in row] for row in values])
    return MemoryBatch(
        example_keys=padded_keys[:, 0],
        example_values=padded_values[:, 0],
        key_tokens=padded_keys[:, 1:],
        value_tokens=padded_values[:, 1:],
        pair_numbers=torch.arange(PAIRS).expand(len(rows), -1),
        articles=[ArticleReference(f"thing {row}", "tests", 0, row, StreamPosition(0, row + 1)) for row in rows],
        is_padded=True,
    )


def make_sampler(
    model: PreTrainedModel, *, shown: bool = False, joint: bool | None = None, **options: Any
) -> TrajectorySampler:
    policy = PolicyModel(adapted(model), torch.arange(10, 380), PolicyOptions(attention_layer=-1))
    rollout = RolloutOptions(
        num_kv_pairs=PAIRS + 1, subset_fraction=1.0, num_steps=STEPS, tokens_per_query=4, **options
    )
    separators = SEPARATORS
    if shown:
        rollout.show_keys = "plain"
        separators = replace(SEPARATORS, around_keys=((), *((9,) for _ in range(PAIRS - 1)), (9, 9)))
    environment = KVMemoryEnvironment(SelectionOptions(0.2))
    return TrajectorySampler(policy, environment, separators, rollout, seed=7, compute_order_gain=True, joint=joint)


def measured(trajectory: Trajectory) -> dict[str, Tensor]:
    return {name: trajectory.stack(name) for name in MEASURED}


def gradient(sampler: TrajectorySampler, trajectory: Trajectory) -> Tensor:
    """Of every term of the loss."""
    policy, options = sampler.policy, LossOptions(selector_coef=0.5, reward_gradient_coef=0.5, entropy_coef=0.01)
    verdict = Verdict(torch.ones(ROWS, dtype=torch.bool), RewardStatistics(), RewardStatistics())
    kept = KeptTrajectories.of(trajectory, verdict, options, ROWS)
    policy.model.zero_grad()
    terms = compute_loss_terms(policy, policy.model, sampler.environment, AdapterSnapshot(policy.model), kept, options)
    terms.loss.backward()
    trained = [parameter.grad for parameter in policy.model.parameters() if parameter.requires_grad]
    return torch.cat([part.flatten() for part in trained if part is not None])


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize(
    "options",
    [{}, {"include_key_in_context": True}, {"shown": True}, {"joint": False}],
    ids=lambda o: next(iter(o), ""),
)
def test_more_padding_changes_nothing(name: str, options: dict[str, Any]) -> None:
    sampler = make_sampler(MODELS[name](), **options)
    trajectory = sampler.sample(padded_memories(7), range(ROWS))
    expected, expected_gradient = measured(trajectory), gradient(sampler, trajectory)
    assert expected_gradient.norm() > 0.01
    for places in (20, 64):
        found = sampler.sample(padded_memories(places), range(ROWS))
        for what, numbers in measured(found).items():
            torch.testing.assert_close(numbers, expected[what], atol=1e-5, rtol=0, msg=f"{what}, {places} places")
        torch.testing.assert_close(gradient(sampler, found), expected_gradient, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("shown", [True, False])
def test_a_batch_of_mixed_lengths_equals_its_rows_alone(name: str, shown: bool) -> None:
    sampler = make_sampler(MODELS[name](), shown=shown)
    together = measured(sampler.sample(padded_memories(7), range(ROWS)))
    for row in range(ROWS):
        alone = measured(sampler.sample(padded_memories(9, (row,)), [row]))
        for what, numbers in alone.items():
            torch.testing.assert_close(numbers, together[what][row : row + 1], atol=1e-5, rtol=0, msg=what)


@pytest.mark.parametrize("name", list(MODELS))
def test_padding_is_read_as_plain_forwards_of_the_tokens_alone(name: str) -> None:
    sampler = make_sampler(MODELS[name](), include_key_in_context=True)
    trajectory = sampler.sample(padded_memories(11), range(ROWS))
    policy = sampler.policy
    for row in range(ROWS):
        for step in trajectory.steps:
            context, query = step.context_tokens[row], step.query_tokens[row]
            key, value = step.selected_pair.key_tokens[row], step.selected_pair.value_tokens[row]
            parts = [context, query, torch.tensor([7, 8]), key, value]
            tokens = torch.cat([part[part != PADDING] for part in parts])[None]
            length = int((value != PADDING).sum())
            with policy.inference():
                logits = policy.model(input_ids=tokens, use_cache=False).logits[0].float()
            logprobs = torch.log_softmax(logits, dim=-1)[-length - 1 : -1]
            expected = logprobs.gather(1, tokens[0, -length:, None]).mean()
            torch.testing.assert_close(step.policy_value_logprob[row], expected, atol=1e-5, rtol=0)


def test_full_masks_give_the_numbers_of_no_masks() -> None:
    sampler = make_sampler(MODELS["llama"]())
    tokens = torch.randint(10, 380, (ROWS, PAIRS + 1, 12))
    articles = padded_memories(7).articles
    keys, values = tokens[..., :5], tokens[..., 5:]
    batch = MemoryBatch(
        keys[:, 0], values[:, 0], keys[:, 1:], values[:, 1:], torch.arange(PAIRS).expand(ROWS, -1), articles
    )
    free, masked = (sampler.sample(replace(batch, is_padded=padded), range(ROWS)) for padded in (False, True))
    for what, numbers in measured(masked).items():
        torch.testing.assert_close(numbers, measured(free)[what], atol=1e-6, rtol=0, msg=what)


@pytest.mark.parametrize("name", list(MODELS))
def test_whole_forwards_agree(name: str) -> None:
    sampler = make_sampler(MODELS[name]())
    found = compare(
        sampler.policy, sampler.policy.model, sampler.sample(padded_memories(9), range(ROWS)), [torch.arange(ROWS)]
    )
    assert max(item.largest for item in found.values()) < 1e-4


def test_evaluations_do_not_see_padding() -> None:
    sampler = make_sampler(MODELS["llama"]())
    results = []
    for places in (7, 19):
        batch = padded_memories(places)
        trajectory = sampler.sample(batch, range(ROWS))
        gains = score_queries(sampler, batch, trajectory, trajectory.stack("query_tokens").roll(1, 0))
        scorer = OrderScorer(sampler.policy, ScoredMemory.of_row(sampler, batch, 0))
        orders = torch.tensor([scorer.score(order) for order in [(0, 1, 2, 3, 4), (4, 2, 0, 1, 3), (2, 3)]])
        named = names_its_pair(trajectory, trajectory.memory.key_tokens[:, :STEPS])
        results.append({**gains.gains, "orders": orders, "named": named.float()})
    for what, numbers in results[0].items():
        torch.testing.assert_close(results[1][what], numbers, atol=1e-5, rtol=0, msg=what)


def test_orders_equal_those_of_plain_forwards() -> None:
    sampler = make_sampler(MODELS["llama"]())
    batch = padded_memories(9)
    memory = ScoredMemory.of_row(sampler, batch, 1)
    order = (3, 0, 4)
    tokens, expected = memory.prompt[0], []
    with sampler.policy.inference(), sampler.policy.reference():
        for column in order:
            block = memory.blocks[column]
            whole = torch.cat([tokens, block])
            real = whole[whole != PADDING]
            value = batch.value_tokens[1, column]
            value = value[value != PADDING]
            logprobs = torch.log_softmax(sampler.policy.causal_lm(input_ids=real[None]).logits[0].float(), dim=-1)
            end = len(real) - 2  # the next query separator
            rows = logprobs[end - len(value) - 1 : end - 1]
            expected.append(rows.gather(1, value[:, None]).mean().item())
            tokens = whole
    assert OrderScorer(sampler.policy, memory).score(order) == pytest.approx(sum(expected) / 3, abs=1e-5)


def test_one_memory_that_begins_with_padding_is_read_in_bfloat16() -> None:
    """Nothing is seen from there: what the place gives is never used, and must be a number all the same."""
    batch = padded_memories(9, (1,))
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        sampler = make_sampler(MODELS["llama"]().to(dtype), shown=True)
        memory = ScoredMemory.of_row(sampler, batch, 0)
        assert memory.prompt[0, 0] == PADDING
        rewards = sampler.sample(batch, [0]).avg_reward
        found.append([OrderScorer(sampler.policy, memory).score((2, 0, 1)), rewards.isfinite().all().item()])
    assert found[0] == pytest.approx(found[1], abs=0.05)


def test_every_rule_orders_padded_memories(tokenizer: Any) -> None:
    sampler = make_sampler(MODELS["llama"]())
    few, many = (
        score_orders(sampler, padded_memories(places), range(ROWS), PlainTextEncoder(tokenizer)) for places in (7, 16)
    )
    for first, second in zip(few, many, strict=True):
        assert first.scores == pytest.approx(second.scores, abs=1e-5)


def test_a_calibration_does_not_see_padding() -> None:
    selection = SelectionOptions("auto", "scores", "cosine", center_vectors=True)
    heads = PolicyOptions(attention_heads="probe", probe_heads=3)
    fitted = []
    for places in (7, 16):
        sampler = make_sampler(MODELS["llama"]())
        fitted.append(
            Probe(sampler.policy, sampler.layout, heads, selection).fit(padded_memories(places), {}).calibration
        )
    assert fitted[0].heads == fitted[1].heads
    assert fitted[0].temperature == pytest.approx(fitted[1].temperature, rel=1e-3)


def test_rouge_l_counts_tokens_alone() -> None:
    first = torch.tensor([1, 2, 3, PADDING, PADDING])
    assert rouge_l(first, torch.tensor([PADDING, 1, 3])).item() == pytest.approx(2 * 2 / 5)
    assert rouge_l(first, torch.tensor([1, 2, 3])).item() == 1


@pytest.mark.parametrize("name", ["mamba", "whisper"])
def test_a_model_that_reads_padding_refuses(name: str) -> None:
    try:
        sampler = make_sampler(build(name))
    except UnsupportedArchitectureError:
        pytest.skip("has no attention that selects")
    with pytest.raises(UnsupportedArchitectureError, match="does not leave out padding"):
        sampler.sample(padded_memories(7), range(ROWS))


def test_a_key_has_one_vector_however_it_is_padded() -> None:
    policy = make_sampler(MODELS["llama"]()).policy
    short, long = (
        torch.tensor([[PADDING, 20, 30]]),
        torch.tensor([[PADDING, PADDING, PADDING, 20, 30], [1, 2, 3, 4, 5]]),
    )
    first, second = policy.embed_keys(short), policy.embed_keys(long)
    assert torch.equal(first[0], second[0])
    assert len(policy.key_cache) == 2
    torch.testing.assert_close(second[0], policy.embed_unseen(torch.tensor([[20, 30]]))[0], atol=1e-6, rtol=0)
