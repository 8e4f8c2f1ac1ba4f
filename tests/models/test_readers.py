"""Policy and reference in one batch against one after the other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model_builders import sliding_model
from peft import IA3Config, LoraConfig, get_peft_model
from tiny import VOCABULARY_SIZE, make_policy, tiny_llama
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

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


EXPERTS: dict[str, Any] = {
    "vocab_size": VOCABULARY_SIZE,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 32,
    "moe_intermediate_size": 16,
    "initializer_range": 0.2,
    "pad_token_id": None,
}
FOUR_OF_TWO: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2}
ALL_LINEAR: dict[str, Any] = {"target_modules": "all-linear"}
MIXTURES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "shared expert": ("qwen2_moe", FOUR_OF_TWO | {"shared_expert_intermediate_size": 16}, ALL_LINEAR),
    "router": ("mixtral", {"num_local_experts": 4}, ALL_LINEAR),
    "router, qwen3": ("qwen3_moe", FOUR_OF_TWO | {"head_dim": 8}, ALL_LINEAR),
    "router, olmoe": ("olmoe", FOUR_OF_TWO, ALL_LINEAR),
    "experts' weights": (
        "olmoe",
        FOUR_OF_TWO,
        {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]},
    ),
    "experts' weights, mixtral": (
        "mixtral",
        {"num_local_experts": 4},
        {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.down_proj"]},
    ),
    "experts' weights, qwen3": (
        "qwen3_moe",
        FOUR_OF_TWO | {"head_dim": 8},
        {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.down_proj"]},
    ),
    "shared expert, dots1": (
        "dots1",
        {
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "first_k_dense_replace": 0,
            "n_group": 1,
            "topk_group": 1,
        },
        ALL_LINEAR,
    ),
    "shared expert, ernie": (
        "ernie4_5_moe",
        {"moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 0},
        ALL_LINEAR,
    ),
    "shared expert, glm4": (
        "glm4_moe",
        {"n_routed_experts": 4, "num_experts_per_tok": 2, "first_k_dense_replace": 0},
        ALL_LINEAR,
    ),
}


# Upstream: PEFT adds a pattern for weights that it was not asked to adapt.
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning")
@pytest.mark.parametrize("name", MIXTURES)
def test_experts_that_see_tokens_without_their_rows_read_separately(
    name: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    family, sizes, adapter = MIXTURES[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **EXPERTS | sizes)).eval()
    policy = adapted_by(LoraConfig(**adapter), model, tokenizer)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    prompt, noise = torch.randint(1, 380, (3, 6)), torch.rand(2, 3, 4, dtype=torch.float64)
    weights = {key: value.clone() for key, value in policy.model.state_dict().items()}
    with policy.inference():
        readers = open_readers(policy, prompt, 30)
        queries = readers.write_queries(noise[0], noise[1])
        whole = policy.forward(torch.cat([prompt, queries.query.token_ids], dim=1))
        logprobs = policy.query_log_probabilities(whole[:, 5:-1])
        with policy.reference():
            counterfactual = policy.forward(torch.cat([prompt, queries.counterfactual.token_ids], dim=1))
        base_logprobs = policy.query_log_probabilities(counterfactual[:, 5:-1])
    assert isinstance(readers, SeparateReaders)
    for query, expected in ((queries.query, logprobs), (queries.counterfactual, base_logprobs)):
        index = policy.allowed_index(query.token_ids)[..., None]
        torch.testing.assert_close(query.logprobs, expected.gather(2, index).squeeze(2), atol=1e-4, rtol=1e-4)
    # What was tried has left no trace.
    assert all(torch.equal(policy.model.state_dict()[key], value) for key, value in weights.items())


@pytest.mark.parametrize("family", ["mixtral", "olmoe"])
def test_attention_of_a_mixture_of_experts_reads_jointly(family: str, tokenizer: PreTrainedTokenizerFast) -> None:
    torch.manual_seed(0)
    sizes = {"mixtral": {"num_local_experts": 4}, "olmoe": FOUR_OF_TWO}[family]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **EXPERTS | sizes)).eval()
    assert make_policy(model, tokenizer).can_read_jointly


def test_joint_reading_can_be_switched_off(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    policy = make_policy(llama, tokenizer, joint_reading=False)
    with policy.inference():
        assert isinstance(open_readers(policy, torch.randint(1, 380, (2, 5)), 30), SeparateReaders)
