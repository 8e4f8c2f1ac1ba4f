"""Policy and reference in one batch against one after the other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model_builders import sliding_model
from peft import IA3Config, LoraConfig, get_peft_model
from tiny import VOCABULARY_SIZE, make_policy, tiny_llama
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from attention_rl_trainer.memories.tokenization import allowed_token_ids
from attention_rl_trainer.models import grouped_attention
from attention_rl_trainer.models.policy import PolicyModel
from attention_rl_trainer.models.readers import JointReaders, Readers, SeparateReaders, open_readers


def two_steps(readers: Readers, rows: int = 3, tokens: int = 4) -> dict[str, torch.Tensor]:
    """Everything that two steps of a trajectory read and write."""
    generator = torch.Generator().manual_seed(5)
    results: dict[str, torch.Tensor] = {}
    for step in range(2):
        noise = torch.rand(2, rows, tokens, generator=generator, dtype=torch.float64)
        block = torch.randint(1, 380, (rows, 7), generator=generator)
        queries = readers.write_queries(noise[0], noise[1])
        policy_hidden, counterfactual_hidden = readers.read_response(block, 5)
        base_hidden = readers.follow(torch.cat([queries.query.token_ids, block], dim=1))
        alone = readers.read_after_prompt(torch.cat([queries.counterfactual.token_ids, block[:, :5]], dim=1))
        parts = {
            "query": queries.query.token_ids,
            "logprobs": queries.query.logprobs,
            "entropy": queries.query.entropy,
            "vectors": queries.vectors,
            "counterfactual": queries.counterfactual.token_ids,
            "counterfactual logprobs": queries.counterfactual.logprobs,
            "policy": policy_hidden,
            "counterfactual states": counterfactual_hidden[:, :5],
            "base": base_hidden,
            "alone": alone,
        }
        results |= {f"{name} {step}": tensor for name, tensor in parts.items()}
    return results


def test_joint_equals_separate(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    policy = make_policy(model, tokenizer)
    prompt = torch.randint(1, 380, (3, 9))
    with policy.inference():
        joint = two_steps(JointReaders(policy, prompt, 40))
        separate = two_steps(SeparateReaders(policy, prompt, 40))
    assert joint.keys() == separate.keys()
    for name, tensor in separate.items():
        torch.testing.assert_close(joint[name], tensor, atol=1e-5, rtol=0, msg=name)
    # The adapter makes a difference, or equality would say little.
    assert (joint["policy 0"] - joint["counterfactual states 0"][:, :1]).abs().max() > 1e-2


def test_attention_as_two_products_reads_alike(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = make_policy(model, tokenizer)
    prompt = torch.randint(1, 380, (3, 9))
    with policy.inference():
        by_kernel = two_steps(JointReaders(policy, prompt, 40))
        calls = []
        original = grouped_attention.attend_by_products

        def attend(*arguments: Any) -> torch.Tensor:
            calls.append(arguments[0].shape)
            return original(*arguments)

        monkeypatch.setattr(grouped_attention, "attend_by_products", attend)
        monkeypatch.setattr(grouped_attention, "DTYPES_OF_PRODUCTS", (torch.float32,))
        by_products = two_steps(JointReaders(policy, prompt, 40))
    assert calls
    for name, tensor in by_kernel.items():
        torch.testing.assert_close(by_products[name], tensor, atol=1e-5, rtol=0, msg=name)


def expect_halves(policy: PolicyModel, ids: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Read jointly, and compare each half with the model alone."""
    with policy.jointly(num_rows):
        both = policy.forward(ids)
    torch.testing.assert_close(both[:num_rows], policy.forward(ids[:num_rows]), atol=1e-5, rtol=0)
    with policy.reference():
        torch.testing.assert_close(both[num_rows:], policy.forward(ids[num_rows:]), atol=1e-5, rtol=0)
    return both


def test_each_half_reads_as_the_model_alone_would(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    policy = make_policy(model, tokenizer)
    ids = torch.randint(1, 380, (5, 8))
    with policy.inference():
        both = expect_halves(policy, ids, 3)
        with pytest.raises(KeyboardInterrupt), policy.jointly(3):
            raise KeyboardInterrupt
        torch.testing.assert_close(policy.forward(ids[:3]), both[:3], atol=1e-5, rtol=0)


def adapted_by(config: Any, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> PolicyModel:
    return PolicyModel(get_peft_model(model, config), allowed_token_ids(tokenizer, VOCABULARY_SIZE))


@pytest.mark.parametrize(
    ("config", "build"),
    [
        (LoraConfig(target_modules=["q_proj"], use_dora=True), tiny_llama),
        (LoraConfig(target_modules=["q_proj", "embed_tokens"]), tiny_llama),
        (IA3Config(target_modules=["k_proj"], feedforward_modules=[]), tiny_llama),
        (LoraConfig(target_modules=["q_proj"]), sliding_model),
    ],
    ids=["dora", "embedding", "ia3", "sliding window"],
)
def test_what_cannot_share_a_batch_reads_separately(
    config: Any, build: Any, tokenizer: PreTrainedTokenizerFast
) -> None:
    policy = adapted_by(config, build(), tokenizer)
    prompt = torch.randint(1, 380, (2, 5))
    with policy.inference():
        assert isinstance(open_readers(policy, prompt, 30), SeparateReaders)
        with pytest.raises(ValueError, match="share a batch only with plain LoRA"):
            open_readers(policy, prompt, 30, joint=True)


def test_plain_lora_reads_jointly_unless_told_otherwise(llama: PreTrainedModel, tokenizer: Any) -> None:
    policy = make_policy(llama, tokenizer)
    prompt = torch.randint(1, 380, (2, 5))
    with policy.inference():
        assert isinstance(open_readers(policy, prompt, 30), JointReaders)
        assert isinstance(open_readers(policy, prompt, 30, joint=False), SeparateReaders)


def test_rank_stabilized_lora_with_a_bias_reads_jointly_too(tokenizer: PreTrainedTokenizerFast) -> None:
    config = LoraConfig(target_modules=["q_proj", "o_proj"], use_rslora=True, lora_bias=True, lora_dropout=0.5)
    policy = adapted_by(config, tiny_llama(attention_bias=True), tokenizer)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    with policy.inference():
        expect_halves(policy, torch.randint(1, 380, (4, 6)), 2)


def test_no_number_of_a_decoding_step_is_asked_back_from_the_device(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    # Fake tensors have no numbers: whatever would wait for the device to read one raises instead.
    policy = make_policy(model, tokenizer)
    prompt, noise = torch.randint(1, 380, (3, 9)), torch.rand(3, 4, dtype=torch.float64)
    with policy.inference(), FakeTensorMode(allow_non_fake_inputs=True):
        readers = JointReaders(policy, prompt, 40)
        queries = readers.write_queries(noise, noise)
        policy_hidden, _ = readers.read_response(queries.query.token_ids, 4)
        assert readers.follow(queries.query.token_ids.repeat(1, 2)).shape == (3, 8, 32)
        assert policy.token_logprobs(policy_hidden, queries.query.token_ids).shape == (3, 4)
        with pytest.raises(DataDependentOutputException):
            bool(queries.query.logprobs.isfinite().all())
