"""A rollout is held against the update's forward, and a run stops where they differ."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import VOCABULARY_SIZE, article_texts, make_sampler, random_batch, tiny_llama, tiny_trainer
from tiny_families import build
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from attention_rl_trainer.memories.tokenization import PlainTextEncoder, allowed_token_ids
from attention_rl_trainer.models.policy import PolicyModel
from attention_rl_trainer.rollout.layout import Separators
from attention_rl_trainer.rollout.sampler import RolloutOptions, TrajectorySampler
from attention_rl_trainer.types import Trajectory
from attention_rl_trainer.update import agreement
from attention_rl_trainer.update.agreement import RolloutAgreement, RolloutDisagreementError, compare

ROWS = 4


def rolled_out(sampler: TrajectorySampler, seed: int = 0) -> Trajectory:
    trajectories = sampler.sample(random_batch(ROWS, seed=seed), range(ROWS))
    sampler.policy.model.train()
    return trajectories


def expect_all(sampler: TrajectorySampler, trajectories: Trajectory) -> dict[str, agreement.Disagreement]:
    return compare(sampler.policy, sampler.policy.model, trajectories, [torch.arange(3), torch.tensor([3])])


@pytest.mark.parametrize("joint", [True, False])
def test_a_sound_rollout_agrees(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, joint: bool) -> None:
    sampler = make_sampler(model, tokenizer, joint=joint)
    found = expect_all(sampler, rolled_out(sampler))
    assert list(found) == ["query tokens", "values under the policy", "values under the base model"]
    assert all(item.mean <= item.largest < 2e-5 for item in found.values())


def test_the_numbers_are_those_of_the_change(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    sampler = make_sampler(llama, tokenizer)
    trajectories = rolled_out(sampler)
    trajectories.steps[1].query_logprobs[2, 0] += 0.24
    with pytest.raises(
        RolloutDisagreementError,
        match=r"query tokens: 0\.005 on average, 0\.24 at most.*by at most 0\.001 on average.*the base model agrees",
    ):
        expect_all(sampler, trajectories)
    trajectories.steps[1].query_logprobs[2, 0] -= 0.24
    trajectories.steps[0].base_value_logprob[0] -= 0.12
    with pytest.raises(RolloutDisagreementError, match=r"base model: 0\.01 on average.*the base model itself differs"):
        expect_all(sampler, trajectories)


def test_the_first_rollout_and_the_kept_of_two_updates_are_compared(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler = make_sampler(llama, tokenizer)
    trajectories = rolled_out(sampler)
    compared: list[list[list[int]]] = []
    monkeypatch.setattr(agreement, "compare", lambda *arguments: compared.append([b.tolist() for b in arguments[3]]))
    check = RolloutAgreement(sampler.policy, batch_size=2)
    nothing, some = torch.zeros(ROWS, dtype=torch.bool), torch.tensor([True, False, True, True])
    for keep, num_updates in [(nothing, 7), (nothing, 7), (some, 7), (some, 7), (nothing, 8), (some, 8), (some, 9)]:
        check.expect(sampler.policy.model, trajectories, keep, num_updates)
    # The first rollout, both rollouts of the first update, one of the second; none of the third.
    assert compared == [[[0, 1]], [[0, 2], [3]], [[0, 2], [3]], [[0, 2], [3]]]


FAULTY: dict[str, tuple[str, dict[str, Any]]] = {
    "a cache that forgets a state": ("jamba+attention_last", {}),
    "a cache that is no fresh forward": ("bamba+attention_last", {}),
    "factors that switch with the length": ("phi3+longrope", {"original_max_position_embeddings": 40}),
    "frequencies that grow with the length": ("llama+dynamic_rope", {}),
    "jitter of a router": ("mixtral+jitter", {"random": True}),
    "experts that are drawn": ("phimoe+jitter", {"random": True}),
    "layers left out": ("opt+layerdrop", {"random": True}),
    "dropout of the attention": ("llama", {"random": True, "attention_dropout": 0.2}),
}


@pytest.mark.parametrize("fault", FAULTY)
def test_it_stops_at_every_fault_by_itself(
    fault: str, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, options = FAULTY[fault]
    if options.pop("random", False):
        # What switches randomness off elsewhere is taken away.
        monkeypatch.setattr(agreement, "update_mode", lambda model: nullcontext())
    sampler = make_sampler(build(name, **options), tokenizer)
    with pytest.raises(RolloutDisagreementError, match="do not compute alike"):
        expect_all(sampler, rolled_out(sampler))


def test_it_stops_at_an_adapter_on_tokens_without_rows(tokenizer: PreTrainedTokenizerFast) -> None:
    """A shared expert sees flattened tokens, of which the first are not the policy's rows."""
    model = get_peft_model(build("qwen2_moe"), LoraConfig(target_modules="all-linear"))
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    policy = PolicyModel(model, allowed_token_ids(tokenizer, VOCABULARY_SIZE))
    assert not policy.can_read_jointly
    separate = TrajectorySampler(policy, *parts_of_a_sampler(tokenizer))
    expect_all(separate, rolled_out(separate))
    policy.can_read_jointly = True
    joint = TrajectorySampler(policy, *parts_of_a_sampler(tokenizer))
    with pytest.raises(RolloutDisagreementError, match=r"the base model agrees.*set joint_reading to false"):
        expect_all(joint, rolled_out(joint))


def parts_of_a_sampler(tokenizer: PreTrainedTokenizerFast) -> tuple[Any, ...]:
    sampler = make_sampler(tiny_llama(), tokenizer)
    separators = Separators.encode(PlainTextEncoder(tokenizer))
    return sampler.environment, separators, RolloutOptions(num_steps=3, tokens_per_query=4, subset_fraction=1.0), 7


@pytest.mark.parametrize("resumes", [False, True])
def test_a_run_stops_before_its_first_update(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, resumes: bool) -> None:
    texts = article_texts(30)
    if resumes:
        trainer = tiny_trainer(tmp_path, texts, tokenizer, num_episodes=32, save_episodes=16)
        trainer.train()
    model = tiny_llama()
    trainer = tiny_trainer(tmp_path, texts, tokenizer, model=model, num_episodes=48, save_episodes=16)
    layer = trainer.policy.causal_lm.model.layers[0]
    # A token that is read alone gets half of its attention.
    layer.self_attn.register_forward_hook(
        lambda module, arguments, output: (output[0] * (0.5 if output[0].shape[1] == 1 else 1.0), *output[1:])
    )
    before = {name: value.clone() for name, value in trainer.policy.model.state_dict().items()}
    with pytest.raises(RolloutDisagreementError, match="do not compute alike"):
        trainer.train(resume_from_checkpoint=resumes or None)
    assert trainer.filter.statistics.count == (32 if resumes else 0)
    if not resumes:
        assert all(torch.equal(value, before[name]) for name, value in trainer.policy.model.state_dict().items())


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "gemma3_text"])
def test_no_false_alarm_in_clean_updates(family: str, dtype: torch.dtype, tokenizer: PreTrainedTokenizerFast) -> None:
    """Of 250 rollouts by weights that move, none is refused; four families make a thousand in each precision."""
    sampler = make_sampler(build(family).to(dtype), tokenizer, num_steps=2, tokens_per_query=2)
    generator = torch.Generator().manual_seed(0)
    trained = [parameter for parameter in sampler.policy.model.parameters() if parameter.requires_grad]
    largest = 0.0
    for number in range(250):
        with torch.no_grad():
            for parameter in trained:
                parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))
        found = expect_all(sampler, rolled_out(sampler, seed=number))
        largest = max(largest, *(item.mean for item in found.values()))
    assert 0 < largest < (1e-4 if dtype == torch.float32 else 0.1)
