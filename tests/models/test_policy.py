"""One set of weights as policy and reference: log-probabilities, decoding, gradients."""

from __future__ import annotations

import math
import weakref

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import VOCABULARY_SIZE, adapted, make_policy, make_sampler
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from attention_rl_trainer.models.causal_lm import deterministic_inference
from attention_rl_trainer.models.decoding import PlainDecoder
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
        query = PlainDecoder(policy).decode(cache, policy.forward(prompt, cache)[:, -1], noise, read_last=True)
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
        PlainDecoder(policy).decode(cache, hidden[:, -1], torch.rand(2, 4), read_last=False)
    assert cache.get_seq_length() == 8


def test_the_head_never_sees_a_strided_slice(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """A strided slice goes through bmm with one copy of the weight per row; a contiguous one goes through mm."""
    policy = make_policy(model, tokenizer)
    states = torch.randn(8, 6, 32)
    with torch.no_grad(), torch.profiler.profile(record_shapes=True) as strided:
        policy.head.linear(states[:, -1:])
    with torch.no_grad(), torch.profiler.profile(record_shapes=True) as ours:
        policy.query_log_probabilities(states[:, -1])
        policy.token_logprobs(states[:, 1:4], torch.randint(1, 380, (8, 3)))
        policy.training_forward(policy.model, torch.randint(1, 380, (8, 6)), capture_queries=False)

    def copies_the_weight(profile: torch.profiler.profile) -> bool:
        # Rotary embeddings may go through bmm too, at other sizes.
        vocabulary = policy.head.linear.weight.shape[0]
        batched = [event for event in profile.events() if event.name == "aten::bmm"]
        return any(vocabulary in shape for event in batched for shape in event.input_shapes)

    assert copies_the_weight(strided), "the trap is gone; this test can go too"
    assert not copies_the_weight(ours)


def test_training_forward_gives_the_backbones_states_and_leaves_no_hook(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    policy = make_policy(model, tokenizer)
    ids = torch.randint(1, 380, (2, 6))
    hidden, capture = policy.training_forward(policy.model, ids, capture_queries=True)
    assert hidden.requires_grad
    assert capture is not None
    assert capture.heads().shape[:2] == (2, 6)
    collected = len(capture.outputs)
    with torch.no_grad():
        later = policy.forward(ids)
        torch.testing.assert_close(hidden.detach(), later)
        assert policy.model(input_ids=ids).logits.shape == (2, 6, VOCABULARY_SIZE)
    assert len(capture.outputs) == collected
    states = weakref.ref(later)
    del later
    assert states() is None, "a hook still collects the backbone's states"


def test_vocabulary_is_padded_in_the_tests(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(tokenizer) < VOCABULARY_SIZE


def test_a_trained_output_head_is_refused(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    model = get_peft_model(llama, LoraConfig(target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="leave it out of the adapter's target_modules"):
        PolicyModel(model, torch.arange(1, 380))
