"""Chosen heads of several layers against one layer at a time, and against weights by hand."""

from __future__ import annotations

import re

import pytest
import torch
from tiny import make_policy, tiny_gpt2, tiny_llama
from tiny_families import build
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from attention_rl_trainer.models.attention import AttentionLayer, VectorCapture
from attention_rl_trainer.models.causal_lm import backbone
from attention_rl_trainer.models.heads import ChosenHeads, HeadNumber, readable_layers
from attention_rl_trainer.models.projections import AttentionHeads, UnsupportedArchitectureError

# Separate, fused (two layouts), with norms, and one key group that all heads share (separate and fused).
FAMILIES = ["llama", "gpt2", "gpt_neox", "phi3", "qwen3", "gemma", "llama+multi_query", "gpt_bigcode"]
UNSORTED = tuple(map(HeadNumber.parse, ["1.2", "0.3", "1.0", "0.0", "1.3"]))


def token_ids(rows: int = 3, length: int = 7) -> Tensor:
    return torch.randint(5, 380, (rows, length), generator=torch.Generator().manual_seed(1))


def head_of_one_layer(model: PreTrainedModel, number: HeadNumber, ids: Tensor, *, keys: bool) -> Tensor:
    """One head of one layer, by a forward of its own, ``[B, S, D]``."""
    layer = AttentionLayer(model, number.layer)
    with layer.capture_keys() if keys else layer.capture_queries() as capture:
        model(input_ids=ids, use_cache=False)
    assert isinstance(capture, VectorCapture)
    group = number.head * layer.heads.num_key_value_groups // layer.heads.num_query_heads
    return capture.heads()[:, :, group if keys else number.head]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_each_head_is_that_of_its_layer_in_the_order_given(family: str) -> None:
    model, ids = build(family), token_ids()
    chosen = ChosenHeads(model, UNSORTED)
    with chosen.capture_queries() as queries, chosen.capture_keys() as keys:
        model(input_ids=ids, use_cache=False)
    for capture, of_keys in ((queries, False), (keys, True)):
        alone = [head_of_one_layer(model, number, ids, keys=of_keys) for number in UNSORTED]
        assert len({tuple(head.flatten().tolist()) for head in alone}) > 1
        torch.testing.assert_close(capture.heads(), torch.stack(alone, dim=2), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(capture.mean(), torch.stack(alone, dim=2).mean(dim=1), atol=1e-5, rtol=1e-5)
    head_dim = AttentionLayer(model).heads.head_dim
    assert chosen.heads == AttentionHeads(5, 5, head_dim)
    assert queries.heads().shape == keys.heads().shape == (3, 7, 5, head_dim)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_keys_without_the_rest_of_the_forward(family: str) -> None:
    model, ids = build(family), token_ids()
    for numbers in (UNSORTED, UNSORTED[1:2], UNSORTED[:1]):
        chosen = ChosenHeads(model, numbers)
        alone = [head_of_one_layer(model, number, ids, keys=True) for number in numbers]
        got = chosen.run_to_keys(backbone(model), ids)
        torch.testing.assert_close(got, torch.stack(alone, dim=2), atol=1e-5, rtol=1e-5)


def test_the_forward_ends_at_the_last_layer_that_is_needed(llama: PreTrainedModel) -> None:
    ran: list[int] = []
    for number, layer in enumerate(llama.model.layers):
        layer.mlp.register_forward_hook(lambda *_, number=number: ran.append(number))
    chosen = ChosenHeads(llama, [HeadNumber(1, 0), HeadNumber(0, 1)])
    ran.clear()
    chosen.run_to_keys(llama.model, token_ids())
    assert ran == [0]
    ChosenHeads(llama, [HeadNumber(0, 1)]).run_to_keys(llama.model, token_ids())
    assert ran == [0]


@torch.no_grad()
def test_llama_by_its_weights() -> None:
    # 4 query heads of 8 over 2 groups: heads 0, 1 attend to group 0 and heads 2, 3 to group 1.
    model, ids = tiny_llama(), token_ids()
    states = model(input_ids=ids, output_hidden_states=True).hidden_states

    def projected(layer: int, name: str, place: int) -> Tensor:
        block = model.model.layers[layer]
        weight = getattr(block.self_attn, name).weight[8 * place : 8 * place + 8]
        return block.input_layernorm(states[layer]) @ weight.T

    chosen = ChosenHeads(model, [HeadNumber(1, 2), HeadNumber(0, 1), HeadNumber(1, 1)])
    with chosen.capture_queries() as queries, chosen.capture_keys() as keys:
        model(input_ids=ids)
    by_hand = torch.stack([projected(1, "q_proj", 2), projected(0, "q_proj", 1), projected(1, "q_proj", 1)], dim=2)
    torch.testing.assert_close(queries.heads(), by_hand, atol=1e-5, rtol=1e-4)
    by_hand = torch.stack([projected(1, "k_proj", 1), projected(0, "k_proj", 0), projected(1, "k_proj", 0)], dim=2)
    torch.testing.assert_close(keys.heads(), by_hand, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_gpt2_by_its_weights() -> None:
    # One matrix gives 32 features of queries, 32 of keys and 32 of values; each head has keys of its own.
    model, ids = tiny_gpt2(), token_ids()
    states = model(input_ids=ids, output_hidden_states=True).hidden_states
    chosen = ChosenHeads(model, [HeadNumber(1, 3), HeadNumber(0, 2)])
    with chosen.capture_queries() as queries, chosen.capture_keys() as keys:
        model(input_ids=ids)
    fused = [block.attn.c_attn(block.ln_1(states[number])) for number, block in enumerate(model.transformer.h)]
    by_hand = torch.stack([fused[1][..., 24:32], fused[0][..., 16:24]], dim=2)
    torch.testing.assert_close(queries.heads(), by_hand, atol=1e-5, rtol=1e-4)
    by_hand = torch.stack([fused[1][..., 56:64], fused[0][..., 48:56]], dim=2)
    torch.testing.assert_close(keys.heads(), by_hand, atol=1e-5, rtol=1e-4)


def test_gradients_reach_the_layers_of_the_heads_and_no_other_head(llama: PreTrainedModel) -> None:
    chosen = ChosenHeads(llama, [HeadNumber(1, 3), HeadNumber(0, 0)])
    with chosen.capture_queries() as capture:
        llama(input_ids=token_ids())
    capture.heads().square().sum().backward()
    weights = [layer.self_attn.q_proj.weight for layer in llama.model.layers]
    largest = [[weight.grad[8 * head : 8 * head + 8].abs().max().item() for head in range(4)] for weight in weights]
    assert min(largest[1][3], *largest[0]) > 1e-3  # layer 1 is computed from all heads of layer 0
    assert largest[1][:3] == [0, 0, 0]
    assert llama.model.layers[1].self_attn.k_proj.weight.grad is None


def test_hooks_are_gone_afterwards_also_after_an_error(llama: PreTrainedModel) -> None:
    chosen = ChosenHeads(llama, UNSORTED)
    with chosen.capture_queries() as queries:
        llama(input_ids=token_ids(length=2))
    with pytest.raises(KeyboardInterrupt), chosen.capture_keys() as keys:
        raise KeyboardInterrupt
    llama(input_ids=token_ids(length=3))
    assert queries.heads().shape[1] == 2
    with pytest.raises(UnsupportedArchitectureError, match="has computed no queries or keys"):
        keys.heads()


class TestNumbers:
    @pytest.mark.parametrize(("text", "number"), [("17.3", (17, 3)), ("0.10", (0, 10)), (" 2.0 ", (2, 0))])
    def test_are_read_and_written(self, text: str, number: tuple[int, int]) -> None:
        assert HeadNumber.parse(text) == HeadNumber(*number)
        assert str(HeadNumber.parse(text)) == text.strip()

    @pytest.mark.parametrize("text", ["", "17", "17.", ".3", "-1.0", "1.-1", "1.2.3", "a.b", "1,2"])
    def test_another_form_is_refused(self, text: str) -> None:
        wanted = f"a head is written as layer.head, both counted from 0, such as 17.3; got {text!r}"
        with pytest.raises(ValueError, match=re.escape(wanted)):
            HeadNumber.parse(text)

    @pytest.mark.parametrize(
        ("numbers", "message"),
        [
            ([], "attention_heads must name one head or more, each once; got none"),
            ([(1, 0), (0, 1), (1, 0)], "attention_heads must name one head or more, each once; got 1.0, 0.1, 1.0"),
            ([(0, 1), (1, 4)], "attention_heads names 1.4, but layer 1 has heads 0 to 3"),
            ([(0, 1), (2, 0)], "attention_heads names 2.0, but the model has layers 0 to 1"),
            ([(0, 1), (-1, 0)], "attention_heads names -1.0, but the model has layers 0 to 1"),
            ([(0, -1)], "attention_heads names 0.-1, but layer 0 has heads 0 to 3"),
        ],
    )
    def test_what_a_model_lacks_is_refused_by_name(
        self, numbers: list[tuple[int, int]], message: str, llama: PreTrainedModel
    ) -> None:
        with pytest.raises(ValueError, match=re.escape(message)):
            ChosenHeads(llama, [HeadNumber(*number) for number in numbers])

    def test_the_choice_names_itself(self, llama: PreTrainedModel) -> None:
        assert str(ChosenHeads(llama, UNSORTED[:2])) == "2 heads (1.2, 0.3)"


class TestLayersOfAModel:
    def test_heads_of_two_dimensions_are_refused_together_and_taken_apart(self) -> None:
        model = build("gemma4_text")
        dims = {number: AttentionLayer(model, number).heads.head_dim for number in (0, 1)}
        assert dims == {0: 32, 1: 48}
        wanted = r"Gemma4.*differ in dimension between layers \({0: 32, 1: 48}\).*name heads of layers of one dimension"
        with pytest.raises(UnsupportedArchitectureError, match=wanted):
            ChosenHeads(model, [HeadNumber(0, 0), HeadNumber(1, 0)])
        for layer, dim in dims.items():
            assert ChosenHeads(model, [HeadNumber(layer, 0)]).heads.head_dim == dim

    def test_the_dimension_that_most_layers_have_is_read(self) -> None:
        assert list(readable_layers(tiny_llama(num_hidden_layers=3))) == [0, 1, 2]
        kinds = ["sliding_attention", "sliding_attention", "full_attention"]
        model = build("gemma4_text", layer_types=kinds, num_hidden_layers=3)
        assert {n: layer.heads.head_dim for n, layer in readable_layers(model).items()} == {0: 32, 1: 32}

    def test_layers_without_attention_are_passed_over(self) -> None:
        found = readable_layers(build("lfm2"))  # convolution, attention, convolution
        assert {number: layer.layer for number, layer in found.items()} == {1: 1}
        with pytest.raises(UnsupportedArchitectureError, match="has no known query and key projections"):
            readable_layers(build("mamba"))

    def test_layers_that_have_no_keys_of_their_own_are_passed_over(self) -> None:
        # The last two of four layers attend to the keys of earlier ones.
        assert list(readable_layers(build("gemma3n_text"))) == [0, 1]


class TestPolicy:
    def test_other_heads_forget_the_keys_that_were_embedded(
        self, llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        policy, keys = make_policy(llama, tokenizer), token_ids()
        policy.embed_keys(keys)
        limit = policy.key_cache.max_bytes
        assert len(policy.key_cache) == 3
        policy.choose_heads(UNSORTED)
        assert (len(policy.key_cache), policy.key_cache.max_bytes) == (0, limit)
        vectors, embedded = policy.embed_keys(keys), policy.embedded_tokens
        with policy.inference(), policy.reference():
            whole = ChosenHeads(policy.causal_lm, UNSORTED).run_to_keys(policy.backbone, keys)
        torch.testing.assert_close(vectors, whole.mean(dim=1), atol=1e-5, rtol=1e-5)
        policy.choose_heads(list(UNSORTED))  # the same ones
        assert torch.equal(policy.embed_keys(keys), vectors)
        assert policy.embedded_tokens == embedded
        policy.choose_heads(UNSORTED[::-1])
        torch.testing.assert_close(policy.embed_keys(keys), vectors.flip(1))

    def test_heads_by_option_are_those_by_choice(
        self, llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        named = make_policy(llama, tokenizer, attention_heads=["1.2", "0.3,1.0", "0.0,1.3"])
        assert isinstance(named.attention, ChosenHeads)
        assert named.attention.numbers == UNSORTED
        chosen = make_policy(tiny_llama(), tokenizer, attention_heads="probe")
        assert isinstance(chosen.attention, AttentionLayer)  # until the probe has chosen
        chosen.choose_heads(UNSORTED)
        assert torch.equal(chosen.embed_keys(token_ids()), named.embed_keys(token_ids()))

    def test_queries_of_chosen_heads_hear_the_adapter_and_keys_do_not(
        self, llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        policy, ids = make_policy(llama, tokenizer, attention_heads=list(map(str, UNSORTED))), token_ids()
        plain = tiny_llama()
        with torch.no_grad():
            base = ChosenHeads(plain, UNSORTED)
            with base.capture_queries() as without:
                plain(input_ids=ids)
            keys = base.run_to_keys(plain.model, ids).mean(dim=1)
        with policy.inference(), policy.attention.capture_queries() as adapted:
            policy.forward(ids)
        assert (adapted.mean() - without.mean()).abs().max() > 1e-2
        torch.testing.assert_close(policy.embed_keys(ids), keys, atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("given", ["", "1", ["1.0", "1.0"], ["1.0,1.0"], [], None, "layers", ["1.0", "probe"]])
    def test_bad_options_are_refused(self, given: object, tokenizer: PreTrainedTokenizerFast) -> None:
        with pytest.raises(ValueError, match="attention_heads must be 'layer', 'probe' or a list of"):
            make_policy(tiny_llama(), tokenizer, attention_heads=given)

    @pytest.mark.parametrize("given", [[1.3, 0.1], 1.3, [1]])
    def test_a_number_that_lost_its_zeros_is_refused(self, given: object, tokenizer: PreTrainedTokenizerFast) -> None:
        """YAML reads 18.10 as the number 18.1, which would be another head."""
        with pytest.raises(ValueError, match="attention_heads must be"):
            make_policy(tiny_llama(), tokenizer, attention_heads=given)
