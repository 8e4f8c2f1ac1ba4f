"""The cached rollout against plain full forwards, a user's own reward, and what a row owes to its batch: nothing."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import checkpoint_activations, make_sampler, random_batch, tiny_gpt2, tiny_llama
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from attention_rl_trainer.errors import NonFiniteError
from attention_rl_trainer.memories.tokenization import PlainTextEncoder
from attention_rl_trainer.models.causal_lm import deterministic_inference
from attention_rl_trainer.models.heads import HeadNumber
from attention_rl_trainer.rollout.calibration import Calibration
from attention_rl_trainer.rollout.environment import DifferentiableEnvironment, KVMemoryEnvironment, SelectionOptions
from attention_rl_trainer.rollout.layout import Layout, LayoutOptions, Separators
from attention_rl_trainer.rollout.sampler import TrajectorySampler
from attention_rl_trainer.types import Trajectory, TrajectoryStep


def full_logprobs(sampler: TrajectorySampler, ids: Tensor, start: int, count: int, *, reference: bool) -> Tensor:
    """Mean log-probability of the tokens from ``start`` on, by one forward of the whole sequence without a cache."""
    model = sampler.policy.model
    with deterministic_inference(model):
        if reference:
            with model.disable_adapter():
                logits = model(input_ids=ids).logits
        else:
            logits = model(input_ids=ids).logits
    log_probabilities = torch.log_softmax(logits.float(), dim=-1)[:, start - 1 : start - 1 + count]
    return log_probabilities.gather(2, ids[:, start : start + count, None]).squeeze(2).mean(dim=1)


def check_against_full_forwards(sampler: TrajectorySampler, trajectory: Trajectory) -> None:
    """Compare every log-probability of a rollout with the definition."""
    policy, ids, layout = sampler.policy, trajectory.token_ids, sampler.layout
    response = torch.tensor(layout.separators.response).expand(ids.shape[0], -1)
    assert isinstance(sampler.environment, DifferentiableEnvironment)
    for number, step in enumerate(trajectory.steps):
        query_start, value_start = trajectory.query_starts[number], trajectory.value_starts[number]
        length, count = step.query_tokens.shape[1], step.selected_pair.value_tokens.shape[1]
        assert torch.equal(ids[:, query_start : query_start + length], step.query_tokens)
        assert torch.equal(ids[:, value_start : value_start + count], step.selected_pair.value_tokens)
        assert torch.equal(ids[:, :query_start], step.context_tokens)
        whole = ids[:, : value_start + count]
        keys = [step.selected_pair.key_tokens] if layout.include_key_in_context else []
        tail = torch.cat([response, *keys, step.selected_pair.value_tokens], dim=1)
        other = torch.cat([ids[:, :query_start], step.counterfactual_tokens, tail], dim=1)
        expected = {
            "policy_value_logprob": full_logprobs(sampler, whole, value_start, count, reference=False),
            "base_value_logprob": full_logprobs(sampler, whole, value_start, count, reference=True),
            "counterfactual_value_logprob": full_logprobs(sampler, other, value_start, count, reference=True),
        }
        for name, value in expected.items():
            torch.testing.assert_close(getattr(step, name), value, atol=1e-5, rtol=0, msg=f"{name} of step {number}")
        with deterministic_inference(policy.model):
            states = policy.forward(whole)[:, query_start - 1 : query_start - 1 + length]
            distribution = policy.query_log_probabilities(states)
        index = policy.allowed_index(step.query_tokens)
        one_pass = distribution.gather(2, index[:, :, None]).squeeze(2)
        torch.testing.assert_close(step.query_logprobs, one_pass, atol=1e-5, rtol=0)
        torch.testing.assert_close(
            step.query_gain + step.model_gain, step.policy_value_logprob - step.counterfactual_value_logprob
        )
        with deterministic_inference(policy.model), policy.attention.capture_queries() as capture:
            policy.forward(whole)
        vectors = capture.heads()[:, query_start : query_start + length].mean(dim=1)
        taken = trajectory.stack("selected_index")[:, : number + 1]
        earlier = torch.zeros(ids.shape[0], number, *vectors.shape[1:])
        vectors = torch.cat([earlier, vectors[:, None]], dim=1)
        log_prob = sampler.environment.log_prob(trajectory.memory, vectors, taken)[:, -1]
        torch.testing.assert_close(step.similarity_score.log(), log_prob, atol=1e-4, rtol=0)


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("include_key", [False, True])
def test_cached_rollout_equals_full_forwards(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, include_key: bool, joint: bool
) -> None:
    sampler = make_sampler(
        model, tokenizer, joint=joint, include_key_in_context=include_key, policy_options={"query_temperature": 0.7}
    )
    trajectory = sampler.sample(random_batch(4), range(4))
    check_against_full_forwards(sampler, trajectory)
    # The last step is not followed by another query separator.
    assert trajectory.token_ids.shape[1] == sampler.layout.for_batch(random_batch(4)).trajectory_tokens


def shows_keys(sampler: TrajectorySampler, tokenizer: PreTrainedTokenizerFast, show_keys: str) -> TrajectorySampler:
    """Let a sampler of 3 steps list the five keys of `random_batch` before the prompt."""
    options = LayoutOptions(num_kv_pairs=6, subset_fraction=1.0, num_steps=3, tokens_per_query=4, show_keys=show_keys)
    separators = Separators.encode(PlainTextEncoder(tokenizer), options)
    include_key = sampler.layout.include_key_in_context
    sampler.layout = replace(Layout.of(options, separators), include_key_in_context=include_key)
    return sampler


def calibrated(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, **options: Any) -> TrajectorySampler:
    """A sampler whose heads are chosen of both layers, out of order, and compared less made-up means."""
    generator = torch.Generator().manual_seed(6)
    heads = ["1.2", "0.3", "1.0"]
    means = [torch.randn(3, 8, generator=generator) for _ in range(2)]
    environment = KVMemoryEnvironment(
        SelectionOptions("auto", "scores", "cosine", center_vectors=True),
        Calibration(0.1, tuple(map(HeadNumber.parse, heads)), *means),
    )
    return make_sampler(model, tokenizer, environment, policy_options={"attention_heads": heads}, **options)


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("show_keys", ["plain", "numbered", "<{number}{key}>"])
def test_shown_keys_stand_in_the_whole_rollout(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, show_keys: str, joint: bool
) -> None:
    include_key = show_keys == "plain"
    options: dict[str, Any] = {"joint": joint, "include_key_in_context": include_key, "compute_order_gain": True}
    sampler, batch = make_sampler(model, tokenizer, **options), random_batch(4)
    sampler = shows_keys(sampler, tokenizer, show_keys)
    trajectory = sampler.sample(batch, range(4))
    check_against_full_forwards(sampler, trajectory)
    layout = sampler.layout.for_batch(batch)
    assert trajectory.token_ids.shape[1] == layout.trajectory_tokens
    assert (trajectory.query_starts, trajectory.value_starts) == (layout.query_starts, layout.value_starts)
    for row in range(4):
        place = len(layout.separators.around_keys[0])
        for number in range(5):
            assert torch.equal(trajectory.token_ids[row, place : place + 6], batch.key_tokens[row, number])
            place += 6 + len(layout.separators.around_keys[number + 1])
        assert place == layout.shown_tokens
    # What is read is still what the memory holds, and the list stays as it is after a pair was read.
    assert torch.equal(trajectory.memory.key_tokens, batch.key_tokens)
    for step in trajectory.steps:
        assert torch.equal(step.context_tokens[:, : layout.prompt_tokens], layout.prompt(batch, torch.device("cpu")))
    # The order gain is counted from pair 0 alone, before which the same keys stand.
    step = trajectory.steps[2]
    response = torch.tensor(layout.separators.response).expand(4, -1)
    drawn = [step.selected_pair.key_tokens] if include_key else []
    value = step.selected_pair.value_tokens
    alone = torch.cat([trajectory.steps[0].context_tokens, step.counterfactual_tokens, response, *drawn, value], dim=1)
    score = full_logprobs(sampler, alone, alone.shape[1] - value.shape[1], value.shape[1], reference=True)
    assert step.order_gain is not None
    torch.testing.assert_close(step.order_gain, step.counterfactual_value_logprob - score, atol=1e-5, rtol=0)


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("show_keys", ["none", "numbered"])
def test_a_calibrated_rollout_equals_full_forwards(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, show_keys: str, joint: bool
) -> None:
    sampler = calibrated(model, tokenizer, joint=joint)
    if show_keys != "none":
        sampler = shows_keys(sampler, tokenizer, show_keys)
    trajectory = sampler.sample(random_batch(4), range(4))
    check_against_full_forwards(sampler, trajectory)
    assert trajectory.memory.key_vectors.shape == (4, 5, 3, 8)
    literal = make_sampler(tiny_llama(), tokenizer).sample(random_batch(4), range(4))
    assert literal.memory.key_vectors.shape == (4, 5, 2, 8)
    # Nothing else than the draws depends on how vectors are compared: each memory is asked with the others' queries.
    for number, step in enumerate(trajectory.steps):
        assert step.selection_information is not None
        assert bool((step.selection_information > -1e-6).all())
        assert step.selection_information.max() < min(math.log(4), math.log(5 - number)) + 1e-6
        assert step.selection_information.max() > 1e-4


def test_a_calibrated_batch_of_four_is_four_batches_of_one(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    sampler, batch = shows_keys(calibrated(model, tokenizer), tokenizer, "plain"), random_batch(4)
    together = sampler.sample(batch, range(20, 24))
    alone = [sampler.sample(batch.select_rows([row]), [20 + row]) for row in range(4)]
    assert all(step.selection_information is None for rows in alone for step in rows.steps)
    rows = [rows_of(trajectory) for trajectory in alone]
    assert_same_rows(rows_of(together), {name: torch.cat([row[name] for row in rows]) for name in rows[0]})


def test_a_sliding_window_cache_is_rolled_back_too(tokenizer: PreTrainedTokenizerFast) -> None:
    config = AutoConfig.for_model(
        "mistral", vocab_size=420, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=64, max_position_embeddings=512, sliding_window=16, initializer_range=0.15,
    )  # fmt: skip
    torch.manual_seed(0)
    sampler = make_sampler(AutoModelForCausalLM.from_config(config).eval(), tokenizer)
    check_against_full_forwards(sampler, sampler.sample(random_batch(3), range(3)))


def test_the_prompt_is_laid_out_as_text(llama: PreTrainedModel, texts: list[str], tokenizer: Any) -> None:
    encoder = PlainTextEncoder(tokenizer)
    sampler = make_sampler(llama, tokenizer)
    batch = random_batch(2)
    trajectory = sampler.sample(batch, [0, 1])
    for row in range(2):
        text = f" Query:{encoder.decode(batch.example_keys[row])} Response:{encoder.decode(batch.example_values[row])}"
        for step in trajectory.steps:
            value = encoder.decode(step.selected_pair.value_tokens[row])
            text += f" Query:{encoder.decode(step.query_tokens[row])} Response:{value}"
        assert encoder.decode(trajectory.token_ids[row]) == text


def rows_of(trajectory: Trajectory) -> dict[str, Tensor]:
    names = ["query_tokens", "counterfactual_tokens", "selected_index", "reward", "query_logprobs", "query_gain"]
    stacked = {name: trajectory.stack(name) for name in names}
    return {**stacked, "token_ids": trajectory.token_ids, "avg_reward": trajectory.avg_reward}


def assert_same_rows(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, value in expected.items():
        if value.is_floating_point():
            torch.testing.assert_close(got[name], value, atol=1e-5, rtol=0, msg=name)
        else:
            assert torch.equal(got[name], value), name


def test_each_row_draws_its_own_pairs(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    sampler = make_sampler(model, tokenizer)
    one = random_batch(1)
    # Sixteen rows of the very same article: only the episode's own streams can make them differ.
    trajectory = sampler.sample(one.select_rows([0] * 16), range(16))
    assert len({tuple(row) for row in trajectory.stack("selected_index").tolist()}) > 4
    assert len({tuple(row) for row in trajectory.steps[0].query_tokens.tolist()}) > 12
    assert not torch.equal(trajectory.stack("query_tokens"), trajectory.stack("counterfactual_tokens"))


def test_permuting_the_batch_permutes_the_result(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    sampler, batch = make_sampler(model, tokenizer), random_batch(8)
    order = [5, 2, 7, 0, 1, 6, 3, 4]
    plain = rows_of(sampler.sample(batch, range(8)))
    permuted = rows_of(sampler.sample(batch.select_rows(order), order))
    assert_same_rows(permuted, {name: value[order] for name, value in plain.items()})


def test_one_batch_of_eight_is_eight_batches_of_one(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    sampler, batch = make_sampler(model, tokenizer), random_batch(8)
    together = rows_of(sampler.sample(batch, range(20, 28)))
    alone = [rows_of(sampler.sample(batch.select_rows([row]), [20 + row])) for row in range(8)]
    assert_same_rows(together, {name: torch.cat([rows[name] for rows in alone]) for name in together})


def test_order_gain_equals_its_definition(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    sampler = make_sampler(model, tokenizer, compute_order_gain=True, order_coef=0.5)
    trajectory = sampler.sample(random_batch(3), range(3))
    response = torch.tensor(sampler.layout.separators.response).expand(3, -1)
    prompt = trajectory.steps[0].context_tokens
    for number, step in enumerate(trajectory.steps):
        value = step.selected_pair.value_tokens
        alone = torch.cat([prompt, step.counterfactual_tokens, response, value], dim=1)
        score = full_logprobs(sampler, alone, alone.shape[1] - value.shape[1], value.shape[1], reference=True)
        assert step.order_gain is not None
        torch.testing.assert_close(step.order_gain, step.counterfactual_value_logprob - score, atol=1e-5, rtol=0)
        paid = step.query_gain + step.model_gain + 0.5 * step.order_gain
        torch.testing.assert_close(step.reward, paid, atol=1e-5, rtol=0)
        assert number or bool((step.order_gain == 0).all())


def test_rewards_are_means_over_steps(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    trajectory = make_sampler(llama, tokenizer).sample(random_batch(3), range(3))
    steps = trajectory.stack("reward")
    torch.testing.assert_close(trajectory.avg_reward, steps.sum(dim=1) / 3)
    torch.testing.assert_close(trajectory.total_reward, steps.sum(dim=1))


def test_rollout_runs_without_dropout_and_restores_the_mode(tokenizer: PreTrainedTokenizerFast) -> None:
    for model in (tiny_llama(attention_dropout=0.5), tiny_gpt2(attn_pdrop=0.5, resid_pdrop=0.5)):
        sampler, batch = make_sampler(model, tokenizer), random_batch(2)
        sampler.policy.model.train()
        first, second = sampler.sample(batch, [0, 1]), sampler.sample(batch, [0, 1])
        assert torch.equal(first.token_ids, second.token_ids)
        assert torch.equal(first.avg_reward, second.avg_reward)
        assert sampler.policy.model.training
        assert torch.is_grad_enabled()


def test_activation_checkpointing_does_not_drop_the_cache(tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny_llama()
    sampler, batch = make_sampler(model, tokenizer), random_batch(2)
    plain = sampler.sample(batch, [0, 1])
    checkpoint_activations(model)
    sampler.policy.model.train()
    checkpointed = sampler.sample(batch, [0, 1])
    assert torch.equal(plain.token_ids, checkpointed.token_ids)
    assert torch.equal(plain.avg_reward, checkpointed.avg_reward)


@pytest.mark.parametrize("joint", [True, False])
def test_forward_tokens_are_counted(joint: bool, llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    # No embedding batch is filled up.
    sampler = make_sampler(llama, tokenizer, policy_options={"embedding_batch_size": 5}, joint=joint)
    assert sampler.policy.can_read_jointly  # found out once, with tokens of its own
    seen = 0

    def count(module: Any, args: Any, options: dict[str, Any]) -> None:
        nonlocal seen
        seen += options["input_ids"].numel()

    handle = sampler.policy.backbone.register_forward_pre_hook(count, with_kwargs=True)
    trajectory = sampler.sample(random_batch(3), range(3))
    assert trajectory.forward_tokens == seen
    # The keys are remembered.
    again = sampler.sample(random_batch(3), range(3))
    handle.remove()
    assert again.forward_tokens == trajectory.forward_tokens - 3 * 5 * 6
    assert trajectory.forward_tokens + again.forward_tokens == seen


def test_seeds_change_everything_and_nothing_else_does(llama: PreTrainedModel, tokenizer: Any) -> None:
    batch = random_batch(3)
    first = make_sampler(llama, tokenizer).sample(batch, range(3))
    torch.rand(17)  # the global stream plays no part
    again = make_sampler(tiny_llama(), tokenizer).sample(batch, range(3))
    other = make_sampler(tiny_llama(), tokenizer, seed=8).sample(batch, range(3))
    assert torch.equal(first.token_ids, again.token_ids)
    assert not torch.equal(first.token_ids, other.token_ids)


@pytest.mark.parametrize("place", ["key vector", "query vector", "policy logit"])
def test_non_finite_numbers_name_step_article_and_place(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, place: str
) -> None:
    sampler = make_sampler(llama, tokenizer)
    attention = llama.model.layers[-1].self_attn
    with torch.no_grad():
        if place == "key vector":
            attention.k_proj.base_layer.weight[0, 0] = float("nan")
        elif place == "query vector":
            attention.q_proj.base_layer.weight[0, 0] = float("nan")
        else:
            llama.lm_head.weight[7, 3] = float("inf")
    with pytest.raises(NonFiniteError, match=r"is not finite at step [01] .* articles? 'title 0'") as error:
        sampler.sample(random_batch(2), [0, 1])
    if place != "query vector":  # a NaN query makes the whole forward NaN, so the logits are found first
        assert place in str(error.value)


def test_one_bad_article_is_the_one_that_is_named(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    sampler, batch = make_sampler(llama, tokenizer), random_batch(4)
    with torch.no_grad():
        llama.model.embed_tokens.weight[395] = float("nan")
    batch.value_tokens[2] = 395
    with pytest.raises(NonFiniteError, match=r"log-probability of a value.*step 1.*'title 2'.*row 2"):
        sampler.sample(batch, range(4))


def test_more_steps_than_pairs_are_refused(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="num_steps is 3, but a memory holds 2 pairs; lower num_steps"):
        make_sampler(llama, tokenizer).sample(random_batch(2, num_pairs=2), [0, 1])


class TestOwnReward:
    @pytest.mark.parametrize("joint", [False, True])
    def test_it_is_given_the_default_and_what_it_returns_counts(
        self, joint: bool, llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        options: dict[str, Any] = {"joint": joint, "order_coef": 0.5}
        default = make_sampler(llama, tokenizer, **options).sample(random_batch(3), range(3))
        seen: list[TrajectoryStep] = []

        def own(step: TrajectoryStep) -> Tensor:
            seen.append(step)
            return 2 * step.reward - len(seen)

        trajectory = make_sampler(tiny_llama(), tokenizer, reward_fn=own, **options).sample(random_batch(3), range(3))
        assert len(seen) == 3
        for number, (step, expected) in enumerate(zip(seen, default.steps, strict=True)):
            assert torch.equal(step.reward, expected.reward)
            assert torch.equal(step.query_tokens, expected.query_tokens)
            assert torch.equal(step.selected_index, expected.selected_index)
            assert torch.equal(trajectory.steps[number].reward, 2 * expected.reward - (number + 1))
            # The parts of the default reward stay as they are.
            assert torch.equal(trajectory.steps[number].query_gain, expected.query_gain)
        torch.testing.assert_close(trajectory.avg_reward, 2 * default.avg_reward - 2)
        torch.testing.assert_close(trajectory.total_reward, 2 * default.total_reward - 6)
        assert torch.equal(trajectory.token_ids, default.token_ids)

    def test_another_precision_becomes_the_default_rewards(
        self, llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        sampler = make_sampler(llama, tokenizer, reward_fn=lambda step: step.reward.double() + 0.25)
        steps = sampler.sample(random_batch(2), range(2)).steps
        assert [step.reward.dtype for step in steps] == [torch.float32] * 3

    @pytest.mark.parametrize(
        ("returned", "message"),
        [
            (torch.zeros(3), r"what reward_fn returns must have shape \[2\], got \[3\]"),
            (torch.zeros(2, 1), r"what reward_fn returns must have shape \[2\], got \[2, 1\]"),
            (torch.tensor(1.0), r"what reward_fn returns must have shape \[2\], got \[\]"),
            (torch.tensor([1, 0]), "what reward_fn returns must have a floating-point dtype, got torch.int64"),
            ([1.0, 0.0], r"reward_fn must return a tensor of shape \[2\], got \[1.0, 0.0\]"),
        ],
        ids=["rows", "columns", "scalar", "integers", "list"],
    )
    def test_a_wrong_shape_or_type_is_refused(
        self, returned: Any, message: str, llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        with pytest.raises(ValueError, match=message):
            make_sampler(llama, tokenizer, reward_fn=lambda _: returned).sample(random_batch(2), [0, 1])

    @pytest.mark.parametrize("number", [float("nan"), float("-inf")])
    def test_what_is_not_finite_names_the_function_the_step_and_the_article(
        self, number: float, llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        calls = 0

        def second_step_of_the_last_row(step: TrajectoryStep) -> Tensor:
            nonlocal calls
            calls += 1
            return torch.where(torch.tensor([False, calls == 2]), number, step.reward)

        sampler = make_sampler(llama, tokenizer, reward_fn=second_step_of_the_last_row)
        with pytest.raises(NonFiniteError, match=r"what reward_fn returns is not finite at step 2 .*'title 1'.*row 1"):
            sampler.sample(random_batch(2), [0, 1])
