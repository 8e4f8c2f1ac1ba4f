"""One set of weights as policy and reference: log-probabilities, decoding, heads, modes."""

from __future__ import annotations

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import VOCABULARY_SIZE, adapted, make_policy, make_sampler, tiny_llama
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from attention_rl_trainer.models.attention import UnsupportedArchitectureError
from attention_rl_trainer.models.causal_lm import (
    LogitsHead,
    default_logits_chunk_size,
    deterministic_inference,
    dropout_disabled,
)
from attention_rl_trainer.models.policy import PolicyModel
from attention_rl_trainer.rollout.layout import predicting


def test_a_perfect_predictor_scores_zero_and_a_token_copier_does_not(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    sampler = make_sampler(llama, tokenizer)
    directions = nn.functional.normalize(llama.get_output_embeddings().weight.detach(), dim=1) * 100
    ids = torch.randint(1, 380, (3, 12))
    ids[:, 1:] += (ids[:, 1:] == ids[:, :-1]).long()  # so that copying the last token is always wrong
    next_tokens = torch.cat([ids[:, 1:], ids[:, :1]], dim=1)
    perfect = sampler.score(directions[next_tokens] * 100, 4, ids[:, 4:9])
    copier = sampler.score(directions[ids] * 100, 4, ids[:, 4:9])
    torch.testing.assert_close(perfect, torch.zeros(3), atol=1e-3, rtol=0)
    assert copier.max() < -100


def test_token_logprobs_equal_a_slow_loop(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    policy = make_policy(model, tokenizer, logits_chunk_size=4)
    ids = torch.randint(1, 380, (2, 7))
    with deterministic_inference(policy.model):
        got = policy.token_logprobs(predicting(policy.forward(ids), 2, 5), ids[:, 2:])
        for row in range(2):
            for position in range(2, 7):
                logits = policy.model(input_ids=ids[row : row + 1, :position]).logits[0, -1].tolist()
                largest = max(logits)
                normalizer = largest + math.log(sum(math.exp(x - largest) for x in logits))
                expected = logits[ids[row, position]] - normalizer
                assert got[row, position - 2].item() == pytest.approx(expected, abs=1e-4)


def test_query_probabilities_are_over_allowed_ids_at_temperature(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    policy = make_policy(llama, tokenizer, query_temperature=0.5)
    hidden = torch.randn(3, 32)
    got = policy.query_log_probabilities(hidden)
    logits = policy.head(hidden)
    allowed = [i for i in range(len(tokenizer)) if i not in (0, tokenizer.convert_tokens_to_ids("<tool_call>"))]
    assert got.shape == (3, len(allowed))
    torch.testing.assert_close(got, torch.log_softmax(logits[:, allowed] / 0.5, dim=-1))
    assert bool(got.isfinite().all())
    index = policy.allowed_index(torch.tensor([allowed[0], allowed[5], allowed[-1]]))
    assert policy.allowed_ids[index].tolist() == [allowed[0], allowed[5], allowed[-1]]


def test_allowed_ids_with_gaps(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    from attention_rl_trainer.models.policy import PolicyModel

    policy = PolicyModel(adapted(llama), torch.tensor([3, 4, 9, 200]))
    hidden = torch.randn(2, 32)
    expected = torch.log_softmax(policy.head(hidden)[:, [3, 4, 9, 200]], dim=-1)
    torch.testing.assert_close(policy.query_log_probabilities(hidden), expected)
    assert policy.allowed_index(torch.tensor([[200, 3], [9, 4]])).tolist() == [[3, 0], [2, 1]]


def test_reference_is_the_base_model_and_the_adapter_comes_back(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    ids = torch.randint(1, 380, (2, 6))
    with torch.no_grad():
        base = model.base_model(input_ids=ids).last_hidden_state
    policy = make_policy(model, tokenizer)
    trainable = [name for name, p in policy.model.named_parameters() if p.requires_grad]
    with deterministic_inference(policy.model):
        before = policy.forward(ids)
        with policy.reference():
            torch.testing.assert_close(policy.forward(ids), base)
        assert (before - base).abs().max() > 1e-2
        assert torch.equal(policy.forward(ids), before)
    assert [name for name, p in policy.model.named_parameters() if p.requires_grad] == trainable


def test_adapter_comes_back_after_an_error(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    policy = make_policy(llama, tokenizer)
    ids = torch.randint(1, 380, (1, 4))
    with torch.no_grad():
        before = policy.forward(ids)
        with pytest.raises(KeyboardInterrupt), policy.reference():
            raise KeyboardInterrupt
        assert torch.equal(policy.forward(ids), before)


def test_decoding_equals_generating_step_by_step(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    policy = make_policy(model, tokenizer)
    prompt = torch.randint(1, 380, (3, 5))
    noise = torch.rand(3, 4, dtype=torch.float64)
    with deterministic_inference(policy.model):
        cache = policy.new_cache(3, 9)
        query = policy.decode_query(cache, policy.forward(prompt, cache)[:, -1], noise, read_last=True)
        assert cache.get_seq_length() == 9
        sequence = prompt
        for position in range(4):
            log_probabilities = policy.query_log_probabilities(policy.forward(sequence)[:, -1])
            for row in range(3):
                running, target = 0.0, noise[row, position].item()
                index = -1
                while running <= target:
                    index += 1
                    running += log_probabilities[row, index].exp().item()
                assert query.token_ids[row, position] == policy.allowed_ids[index]
                expected = log_probabilities[row, index].item()
                assert query.logprobs[row, position].item() == pytest.approx(expected, abs=1e-5)
                terms = [math.exp(x) * x for x in log_probabilities[row].tolist()]
                assert query.entropy[row, position].item() == pytest.approx(-sum(terms), abs=1e-4)
            sequence = torch.cat([sequence, query.token_ids[:, position : position + 1]], dim=1)


def test_the_last_token_can_be_left_unread(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    policy = make_policy(llama, tokenizer)
    with deterministic_inference(policy.model):
        cache = policy.new_cache(2, 8)
        hidden = policy.forward(torch.randint(1, 380, (2, 5)), cache)
        policy.decode_query(cache, hidden[:, -1], torch.rand(2, 4), read_last=False)
    assert cache.get_seq_length() == 8


def test_the_head_never_sees_a_strided_slice(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """A strided slice goes through bmm with one copy of the weight a row; a contiguous one goes through mm."""
    policy = make_policy(model, tokenizer)
    states = torch.randn(8, 6, 32)
    with torch.no_grad(), torch.profiler.profile() as strided:
        policy.head.linear(states[:, -1:])
    with torch.no_grad(), torch.profiler.profile() as ours:
        policy.query_log_probabilities(states[:, -1])
        policy.token_logprobs(states[:, 1:4], torch.randint(1, 380, (8, 3)))
        policy.training_forward(policy.model, torch.randint(1, 380, (8, 6)), capture_queries=False)
    assert "aten::bmm" in {event.name for event in strided.events()}, "the trap is gone; this test can go too"
    assert "aten::bmm" not in {event.name for event in ours.events()}


def test_training_forward_gives_the_backbones_states_and_leaves_no_hook(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    policy = make_policy(model, tokenizer)
    ids = torch.randint(1, 380, (2, 6))
    hidden, capture = policy.training_forward(policy.model, ids, capture_queries=True)
    assert hidden.requires_grad
    assert capture is not None
    assert capture.heads().shape[:2] == (2, 6)
    with torch.no_grad():
        torch.testing.assert_close(hidden.detach(), policy.forward(ids))
    for module in policy.model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_inference_mode_is_restored(llama: PreTrainedModel) -> None:
    model = adapted(llama).train()
    with deterministic_inference(model):
        assert not model.training
        assert not torch.is_grad_enabled()
    assert model.training
    assert torch.is_grad_enabled()


def test_dropout_is_zero_inside_and_restored_after(model: PreTrainedModel) -> None:
    peft_model = adapted(model).train()
    ids = torch.randint(1, 380, (2, 8))

    def forward() -> Tensor:
        return peft_model(input_ids=ids).logits

    with torch.no_grad():
        assert not torch.equal(forward(), forward())
        with dropout_disabled(peft_model):
            assert peft_model.training
            inside = forward()
            assert torch.equal(inside, forward())
        assert not torch.equal(forward(), forward())
        peft_model.eval()
        torch.testing.assert_close(inside, forward())
    assert any(isinstance(m, nn.Dropout) and m.p == 0.05 for m in peft_model.modules())


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("gemma2", {"final_logit_softcapping": 3.0, "head_dim": 8}),
        ("granite", {"logits_scaling": 4.0}),
        ("cohere", {"logit_scale": 0.25}),
    ],
)
def test_what_architectures_do_to_their_logits(name: str, options: dict[str, float]) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = AutoConfig.for_model(name, vocab_size=60, intermediate_size=32, pad_token_id=0, **sizes, **options)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    nn.init.normal_(model.get_output_embeddings().weight)
    ids = torch.randint(1, 50, (2, 3))
    with torch.no_grad():
        hidden = model.base_model(input_ids=ids).last_hidden_state
        logits = model(input_ids=ids).logits
        plain = model.get_output_embeddings()(hidden)
        torch.testing.assert_close(LogitsHead(model)(hidden), logits)
    assert (plain - logits).abs().max() > 0.1


def test_an_unknown_change_of_the_logits_is_refused() -> None:
    class Shifted(type(tiny_llama())):  # type: ignore[misc]
        def forward(self, *args: object, **options: object) -> object:
            output = super().forward(*args, **options)
            output.logits = output.logits * 2
            return output

    model = Shifted(tiny_llama().config)
    nn.init.normal_(model.get_output_embeddings().weight)
    with pytest.raises(UnsupportedArchitectureError, match="Shifted does something to its logits"):
        LogitsHead(model)


def test_vocabulary_is_padded_in_the_tests(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(tokenizer) < VOCABULARY_SIZE


def test_a_trained_output_head_is_refused(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    model = get_peft_model(llama, LoraConfig(target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="leave it out of the adapter's target_modules"):
        PolicyModel(model, torch.arange(1, 380))


def test_logits_chunks_hold_the_same_memory_for_any_vocabulary() -> None:
    for on_cpu, num_bytes in [(True, 40 * 2**20), (False, 64 * 2**20)]:
        for vocabulary in (49152, 128256, 262144):
            size = default_logits_chunk_size(vocabulary, on_cpu=on_cpu)
            assert size * vocabulary * 4 <= num_bytes < (size + 1) * vocabulary * 4
        assert default_logits_chunk_size(10**9, on_cpu=on_cpu) == 1
