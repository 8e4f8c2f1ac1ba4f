"""Rollouts on the device: equal to the CPU's, to the update's own forward, and never waited for while they decode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from moving import moved, synchronizations, tiny_policy, tiny_sampler
from tiny import random_batch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from attention_rl_trainer.models.decoding import PlainDecoder, ReplayedDecoder
from attention_rl_trainer.models.policy import PolicyOptions
from attention_rl_trainer.probing.calibrate import Probe
from attention_rl_trainer.rollout.environment import KVMemoryEnvironment, SelectionOptions
from attention_rl_trainer.types import Trajectory
from attention_rl_trainer.update.agreement import compare

CPU = torch.device("cpu")
ROWS = 4
# Largest difference of a number in float32, nats: kernels sum in another order.
TOLERANCE = 2e-4
COMPARED = (
    "query_logprobs",
    "query_entropy",
    "selection_probabilities",
    "policy_value_logprob",
    "base_value_logprob",
    "counterfactual_value_logprob",
)
CALIBRATED = SelectionOptions(0.1, "scores", "cosine")
SELECTORS: dict[str, tuple[dict[str, Any], SelectionOptions]] = {
    "literal": ({}, SelectionOptions(0.2)),
    "calibrated": ({"attention_heads": ["0.3", "1.1", "0.0"]}, CALIBRATED),
}


def expect_equal(found: Trajectory, expected: Trajectory) -> None:
    """Compare every draw, and every number within the tolerance."""
    assert torch.equal(found.token_ids.cpu(), expected.token_ids)
    for name in COMPARED:
        difference = (found.stack(name).cpu() - expected.stack(name)).abs().max().item()
        assert difference <= TOLERANCE, f"{name} differs by {difference}"


@pytest.mark.parametrize("cuda_graphs", [True, False])
@pytest.mark.parametrize("selector", list(SELECTORS))
def test_a_rollout_equals_that_of_the_cpu(
    device: torch.device, tokenizer: PreTrainedTokenizerFast, selector: str, cuda_graphs: bool
) -> None:
    policy_options, selection = SELECTORS[selector]

    def roll_out(place: torch.device) -> Trajectory:
        policy = tiny_policy(place, torch.float32, tokenizer, cuda_graphs=cuda_graphs, **policy_options)
        assert policy.can_replay == (cuda_graphs and place.type == "cuda")
        return tiny_sampler(policy, tokenizer, KVMemoryEnvironment(selection)).sample(random_batch(ROWS), range(ROWS))

    found, expected = roll_out(device), roll_out(CPU)
    assert found.token_ids.device == device
    expect_equal(found, expected)


def test_reading_one_after_the_other_equals_reading_jointly(
    device: torch.device, tokenizer: PreTrainedTokenizerFast
) -> None:
    batch = random_batch(ROWS)
    policy = tiny_policy(device, torch.float32, tokenizer)
    assert policy.can_read_jointly
    jointly = tiny_sampler(policy, tokenizer).sample(batch, range(ROWS))
    apart = tiny_sampler(tiny_policy(device, torch.float32, tokenizer, joint_reading=False), tokenizer)
    expect_equal(apart.sample(batch, range(ROWS)), moved(jointly, CPU))


@pytest.mark.parametrize("selector", list(SELECTORS))
def test_a_rollout_agrees_with_whole_forwards(
    device: torch.device, dtype: torch.dtype, tokenizer: PreTrainedTokenizerFast, selector: str
) -> None:
    policy_options, selection = SELECTORS[selector]
    policy = tiny_policy(device, dtype, tokenizer, **policy_options)
    sampler = tiny_sampler(policy, tokenizer, KVMemoryEnvironment(selection))
    trajectories = sampler.sample(random_batch(ROWS), range(ROWS))
    # Refuses more than rounding in this precision explains.
    found = compare(policy, policy.model, trajectories, [torch.arange(ROWS, device=device)])
    assert any(item.largest > 0 for item in found.values()) or device == CPU


def test_repeated_rollouts_are_equal_to_the_last_bit(
    device: torch.device, dtype: torch.dtype, tokenizer: PreTrainedTokenizerFast
) -> None:
    first, second = (
        tiny_sampler(tiny_policy(device, dtype, tokenizer), tokenizer).sample(random_batch(ROWS), range(ROWS))
        for _ in range(2)
    )
    assert torch.equal(first.token_ids, second.token_ids)
    for name in COMPARED:
        assert torch.equal(first.stack(name), second.stack(name)), name


def test_a_selector_is_calibrated_as_on_the_cpu(device: torch.device, tokenizer: PreTrainedTokenizerFast) -> None:
    heads = PolicyOptions(attention_heads="probe", probe_heads=3)
    selection = SelectionOptions("auto", "scores", "cosine", center_vectors=True)
    memories = random_batch(8)
    fitted = {}
    for place in (device, CPU):
        policy = tiny_policy(place, torch.float32, tokenizer)
        layout = tiny_sampler(policy, tokenizer).layout
        fitted[place] = Probe(policy, layout, heads, selection).fit(memories, {}).calibration
        policy.choose_heads(fitted[place].heads or ())
        environment = KVMemoryEnvironment(selection, fitted[place])
        assert len(tiny_sampler(policy, tokenizer, environment).sample(memories, range(8)).steps) == 3
    found, expected = fitted[device], fitted[CPU]
    assert found.heads == expected.heads
    # Scores are divided by it; of an untrained model's it takes almost everything, so only the quotient is well fitted.
    assert 1 / found.temperature == pytest.approx(1 / expected.temperature, rel=1e-2, abs=1e-4)
    for mean in (found.query_means, found.key_means):
        assert mean is not None
    torch.testing.assert_close(moved(found, CPU).query_means, expected.query_means, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(moved(found, CPU).key_means, expected.key_means, rtol=0, atol=TOLERANCE)


def test_waiting_is_noticed(cuda: torch.device) -> None:
    with synchronizations() as places:
        torch.ones((), device=cuda).item()
    assert places


@pytest.mark.parametrize("cuda_graphs", [True, False])
def test_the_host_never_waits_while_queries_are_decoded(
    cuda: torch.device,
    dtype: torch.dtype,
    cuda_graphs: bool,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[[str, object], None],
) -> None:
    waits: list[str] = []
    decoder = ReplayedDecoder if cuda_graphs else PlainDecoder
    decode = decoder.decode

    def watched(*arguments: Any, **options: Any) -> Any:
        with synchronizations() as places:
            decoded = decode(*arguments, **options)
        waits.extend(places)
        calls.append(decoded)
        return decoded

    calls: list[Any] = []
    sampler = tiny_sampler(tiny_policy(cuda, dtype, tokenizer, cuda_graphs=cuda_graphs), tokenizer)
    batch = random_batch(ROWS)
    # What is set up once may wait.
    sampler.sample(batch, range(ROWS))
    monkeypatch.setattr(decoder, "decode", watched)
    with synchronizations() as everywhere:
        sampler.sample(batch, range(ROWS))
    record_property("waits while decoding", len(waits))
    record_property("waits of a rollout of 3 steps", sorted(set(everywhere)))
    assert calls
    assert waits == []


def test_vectors_stay_on_the_device(device: torch.device, tokenizer: PreTrainedTokenizerFast) -> None:
    policy = tiny_policy(device, torch.float32, tokenizer, attention_heads=["1.0", "0.2"])
    trajectories = tiny_sampler(policy, tokenizer, KVMemoryEnvironment(CALIBRATED)).sample(random_batch(2), range(2))
    tensors: list[Tensor] = [trajectories.memory.key_vectors, *map(trajectories.stack, COMPARED)]
    assert {tensor.device for tensor in tensors} == {device}
