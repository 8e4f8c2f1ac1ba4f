"""Where every token of a trajectory is: worked by hand, as text, and against what the sampler produces."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from tiny import make_sampler, random_batch
from tokenizer_families import gpt2, llama_like, smollm2
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from attention_rl_trainer.memories.pairs import MemoryBatch
from attention_rl_trainer.memories.tokenization import PlainTextEncoder
from attention_rl_trainer.rollout.layout import Layout, LayoutOptions, Separators, positions, predicting
from attention_rl_trainer.types import ArticleReference, KeyValuePair, StreamPosition

CPU = torch.device("cpu")
HAND = Layout(Separators(query=(1, 2), response=(3,)), 2, tokens_per_query=4, tokens_per_key=5, tokens_per_value=6)
SENTENCE = "An article about the long history of the city of Amsterdam in the Netherlands"


@pytest.fixture(params=["gpt2-like", "llama-like"])
def encoder(request: pytest.FixtureRequest, texts: list[str], tokenizer: PreTrainedTokenizerFast) -> PlainTextEncoder:
    """The tiny byte-level tokenizer, and one of Llama's family."""
    return PlainTextEncoder(tokenizer if request.param == "gpt2-like" else llama_like(texts, has_prefix=False))


def one_article(
    example: tuple[list[int], list[int]], pairs: list[tuple[list[int], list[int]]] | None = None
) -> MemoryBatch:
    """A batch of one article by the token ids of its pairs."""
    pairs = pairs or [example]
    return MemoryBatch(
        example_keys=torch.tensor([example[0]]),
        example_values=torch.tensor([example[1]]),
        key_tokens=torch.tensor([[key for key, _ in pairs]]),
        value_tokens=torch.tensor([[value for _, value in pairs]]),
        pair_numbers=torch.arange(1, len(pairs) + 1)[None],
        articles=[ArticleReference("title", "made up", 0, 0, StreamPosition(0, 1))],
    )


def pair_of(batch: MemoryBatch, column: int) -> KeyValuePair:
    return KeyValuePair(batch.key_tokens[:, column], batch.value_tokens[:, column], torch.zeros(len(batch), 4))


class TestByHand:
    def test_lengths_of_two_steps(self) -> None:
        # Q Q k k k k k R v v v v v v Q Q | q q q q R v v v v v v Q Q | q q q q R v v v v v v (Q Q)
        assert HAND.frame_tokens == 3
        assert HAND.prompt_tokens == 16
        assert (HAND.value_offset, HAND.scored_tokens) == (1, 7)
        assert HAND.step_tokens == 13
        assert [HAND.block_tokens(step) for step in range(2)] == [9, 7]
        assert (HAND.trajectory_tokens, HAND.cached_tokens) == (40, 42)
        assert [HAND.context_tokens(step) for step in range(2)] == [16, 29]
        assert HAND.query_starts == (16, 29)
        assert HAND.value_starts == (21, 34)

    def test_the_key_is_before_its_value(self) -> None:
        layout = Layout(HAND.separators, 2, 4, 5, 6, include_key_in_context=True)
        assert layout.prompt_tokens == 16
        assert (layout.value_offset, layout.scored_tokens) == (6, 12)
        assert layout.step_tokens == 18
        assert [layout.block_tokens(step) for step in range(2)] == [14, 12]
        assert (layout.trajectory_tokens, layout.cached_tokens) == (50, 52)
        assert layout.query_starts == (16, 34)
        assert layout.value_starts == (26, 44)

    @pytest.mark.parametrize(("include_key", "expected"), [(False, 44 + 8 * 44), (True, 44 + 8 * 64)])
    def test_length_of_the_defaults(self, include_key: bool, expected: int) -> None:
        options = LayoutOptions(include_key_in_context=include_key)
        layout = Layout.of(options, Separators(query=(1, 2), response=(3, 4)))
        assert (layout.num_steps, layout.tokens_per_query) == (8, 20)
        assert (layout.tokens_per_key, layout.tokens_per_value) == (20, 20)
        assert layout.trajectory_tokens == expected

    def test_a_batch_brings_its_own_lengths(self) -> None:
        layout = HAND.for_batch(random_batch(2, key_length=7, value_length=3))
        assert layout == Layout(HAND.separators, 2, 4, 7, 3)

    def test_positions_of_runs(self) -> None:
        assert positions((3, 10), 3, CPU).tolist() == [3, 4, 5, 10, 11, 12]

    def test_a_token_is_predicted_one_position_earlier(self) -> None:
        hidden = torch.arange(10.0)[None, :, None]
        assert predicting(hidden, 4, 3)[0, :, 0].tolist() == [3, 4, 5]


class TestOptions:
    def test_all_pairs_of_a_memory_are_read_by_default(self) -> None:
        assert LayoutOptions(num_kv_pairs=8, subset_fraction=0.5).steps_per_trajectory == 4
        assert LayoutOptions(num_kv_pairs=8, subset_fraction=0.5, num_steps=3).steps_per_trajectory == 3

    @pytest.mark.parametrize("num_steps", [0, 5])
    def test_more_steps_than_pairs_are_refused(self, num_steps: int) -> None:
        message = rf"num_steps must be in 1\.\.4, the pairs of a memory .*got {num_steps}; raise subset_fraction"
        with pytest.raises(ValueError, match=message):
            LayoutOptions(num_kv_pairs=8, subset_fraction=0.5, num_steps=num_steps)


class TestTokens:
    def test_separators_are_encoded_alone(self, encoder: PlainTextEncoder) -> None:
        separators = Separators.encode(encoder)
        assert encoder.decode(separators.query) == " Query:"
        assert encoder.decode(separators.response) == " Response:"

    @pytest.mark.parametrize("include_key", [False, True])
    def test_prompt_and_response_as_text(self, encoder: PlainTextEncoder, include_key: bool) -> None:
        ids = encoder.encode(" the river flows from a mountain lake to the northern sea and its valley was settled")
        key, value, other_key, other_value = ids[:3], ids[3:5], ids[5:8], ids[8:10]
        batch = one_article((key, value), [(other_key, other_value)])
        layout = Layout(Separators.encode(encoder), 2, 4, 3, 2, include_key_in_context=include_key)
        prompt = layout.prompt(batch, CPU)
        assert prompt.shape == (1, layout.prompt_tokens)
        assert encoder.decode(prompt[0]) == f" Query:{encoder.decode(key)} Response:{encoder.decode(value)} Query:"
        drawn = encoder.decode([*other_key, *other_value] if include_key else other_value)
        for step, (is_last, text) in enumerate([(False, f" Response:{drawn} Query:"), (True, f" Response:{drawn}")]):
            block = layout.response(pair_of(batch, 0), is_last=is_last)
            assert block.shape == (1, layout.block_tokens(step))
            assert encoder.decode(block[0]) == text
            value_places = slice(layout.value_offset, layout.scored_tokens)
            assert block[0, value_places].tolist() == other_value

    def test_every_row_has_its_own_tokens_and_the_same_separators(self) -> None:
        batch = random_batch(3, key_length=5, value_length=6)
        prompt = HAND.prompt(batch, CPU)
        assert prompt[:, [0, 1, 7, 14, 15]].tolist() == [[1, 2, 3, 1, 2]] * 3
        assert torch.equal(prompt[:, 2:7], batch.example_keys)
        assert torch.equal(prompt[:, 8:14], batch.example_values)
        block = HAND.response(pair_of(batch, 1), is_last=False)
        assert block[:, [0, 7, 8]].tolist() == [[3, 1, 2]] * 3
        assert torch.equal(block[:, 1:7], batch.value_tokens[:, 1])

    @pytest.mark.parametrize(
        ("tokenizer_of", "query", "response", "expected"),
        [
            # "ĠQuery", ":" and "ĠResponse", ":"
            (gpt2, (43301, 25), (18261, 25), [43301, 25, 262, 890, 2106, 18261, 25, 286, 262, 1748, 43301, 25]),
            (smollm2, (32351, 42), (14212, 42), [32351, 42, 260, 986, 1463, 14212, 42, 282, 260, 2240, 32351, 42]),
        ],
        ids=["gpt2", "smollm2"],
    )
    def test_ids_of_real_tokenizers_are_pinned(
        self,
        tokenizer_of: Callable[[], PreTrainedTokenizerFast],
        query: tuple[int, ...],
        response: tuple[int, ...],
        expected: list[int],
    ) -> None:
        encoder = PlainTextEncoder(tokenizer_of())
        separators = Separators.encode(encoder)
        assert (separators.query, separators.response) == (query, response)
        ids = encoder.encode(SENTENCE)
        layout = Layout(separators, 1, tokens_per_query=4, tokens_per_key=3, tokens_per_value=3)
        prompt = layout.prompt(one_article((ids[3:6], ids[6:9])), CPU)[0]
        assert prompt.tolist() == expected
        assert encoder.decode(prompt) == " Query: the long history Response: of the city Query:"


class TestShownKeys:
    # N N  k k k k k  N  k k k k k  (nothing), then the prompt as without keys.
    SHOWN = replace(HAND, separators=Separators((1, 2), (3,), ((9, 8), (9,), ())))

    def test_every_position_moves_by_their_length(self) -> None:
        assert self.SHOWN.shown_tokens == 2 + 5 + 1 + 5
        assert HAND.shown_tokens == 0
        assert self.SHOWN.prompt_tokens == 16 + 13
        assert self.SHOWN.query_starts == (16 + 13, 29 + 13)
        assert self.SHOWN.value_starts == (21 + 13, 34 + 13)
        assert (self.SHOWN.trajectory_tokens, self.SHOWN.cached_tokens) == (40 + 13, 42 + 13)
        assert self.SHOWN.sizes["tokens per trajectory"] == 53
        # A step is as long as it was.
        assert self.SHOWN.step_tokens == HAND.step_tokens
        assert [self.SHOWN.block_tokens(step) for step in range(2)] == [9, 7]

    def test_a_batch_of_other_lengths(self) -> None:
        layout = self.SHOWN.for_batch(random_batch(2, num_pairs=2, key_length=7, value_length=3))
        assert layout.shown_tokens == 2 + 7 + 1 + 7
        assert layout.prompt(random_batch(2, num_pairs=2, key_length=7, value_length=3), CPU).shape[1] == (
            layout.prompt_tokens
        )

    def test_prompt_by_hand(self) -> None:
        batch = one_article(([20] * 5, [30] * 6), [([41, 42, 43, 44, 45], [31] * 6), ([51, 52, 53, 54, 55], [32] * 6)])
        listed = [9, 8, 41, 42, 43, 44, 45, 9, 51, 52, 53, 54, 55]
        assert self.SHOWN.prompt(batch, CPU).dtype == torch.int64  # a frame without tokens too
        prompt = self.SHOWN.prompt(batch, CPU)[0].tolist()
        assert prompt == [*listed, 1, 2, *[20] * 5, 3, *[30] * 6, 1, 2]
        assert len(prompt) == self.SHOWN.prompt_tokens == self.SHOWN.query_starts[0]
        assert prompt[13:] == HAND.prompt(batch, CPU)[0].tolist()

    def test_every_row_lists_its_own_keys_in_the_order_of_its_memory(self) -> None:
        batch = random_batch(3, num_pairs=2, key_length=5, value_length=6)
        prompt = self.SHOWN.prompt(batch, CPU)
        assert torch.equal(prompt[:, 2:7], batch.key_tokens[:, 0])
        assert torch.equal(prompt[:, 8:13], batch.key_tokens[:, 1])
        assert prompt[:, [0, 1, 7]].tolist() == [[9, 8, 9]] * 3

    @pytest.mark.parametrize("num_pairs", [1, 3])
    def test_memories_of_another_size_are_refused(self, num_pairs: int) -> None:
        batch = random_batch(2, num_pairs=num_pairs, key_length=5, value_length=6)
        wanted = f"show_keys was prepared for memories of 2 pairs, got {num_pairs}"
        with pytest.raises(ValueError, match=wanted):
            self.SHOWN.prompt(batch, CPU)

    @pytest.mark.parametrize(
        ("template", "frames"),
        [
            ("none", ()),
            ("plain", ("", "\n", "\n", "\n")),
            ("numbered", ("1.", "\n2.", "\n3.", "\n")),
            ("- {key}\n", ("- ", "\n- ", "\n- ", "\n")),
            ("[{number}]{key};", ("[1]", ";[2]", ";[3]", ";")),
            ("{key}({number}/{number})", ("", "(1/1)", "(2/2)", "(3/3)")),
            ("{key}", ("", "", "", "")),
            ("{key} {other} {} %s", ("", *[" {other} {} %s"] * 3)),
        ],
    )
    def test_texts_around_keys(self, template: str, frames: tuple[str, ...], encoder: PlainTextEncoder) -> None:
        options = LayoutOptions(num_kv_pairs=6, subset_fraction=0.5, show_keys=template)
        assert options.memory_size == 3
        assert options.key_frames == frames
        separators = Separators.encode(encoder, options)
        assert tuple(encoder.decode(ids) for ids in separators.around_keys) == frames
        assert (separators.query, separators.response) == (
            Separators.encode(encoder).query,
            Separators.encode(encoder).response,
        )

    def test_one_pair_and_twelve(self) -> None:
        assert LayoutOptions(num_kv_pairs=2, subset_fraction=0.5, show_keys="numbered").key_frames == ("1.", "\n")
        frames = LayoutOptions(num_kv_pairs=13, subset_fraction=1.0, show_keys="numbered").key_frames
        assert len(frames) == 13
        assert frames[9:] == ("\n10.", "\n11.", "\n12.", "\n")

    def test_the_prompt_as_text(self, encoder: PlainTextEncoder) -> None:
        ids = encoder.encode(" the river flows from a mountain lake to the northern sea and its valley was settled")
        keys = [ids[:3], ids[3:6], ids[6:9]]
        batch = one_article((keys[0], ids[9:11]), [(keys[1], ids[11:13]), (keys[2], ids[13:15])])
        first, second, third = map(encoder.decode, keys)
        example = f" Query:{first} Response:{encoder.decode(ids[9:11])} Query:"
        for template, listed in {
            "plain": f"{second}\n{third}\n",
            "numbered": f"1.{second}\n2.{third}\n",
            "<|endoftext|>{key}": f"<|endoftext|>{second}<|endoftext|>{third}",
        }.items():
            options = LayoutOptions(
                num_kv_pairs=3, subset_fraction=1.0, tokens_per_key=3, tokens_per_value=2, show_keys=template
            )
            layout = Layout.of(options, Separators.encode(encoder, options))
            prompt = layout.prompt(batch, CPU)[0]
            assert encoder.decode(prompt) == listed + example
            assert len(prompt) == layout.prompt_tokens
            special = set(encoder.tokenizer.all_special_ids) - {None}
            assert not special & set(prompt.tolist())

    @pytest.mark.parametrize("template", ["", "None", "Plain", "keys", "{number}", "{key}{key}", "{Key}", "{ key }"])
    def test_a_template_without_one_key_is_refused(self, template: str) -> None:
        wanted = r"show_keys must be none, plain, numbered, or a template with \{key\} in it once, got "
        with pytest.raises(ValueError, match=wanted + re.escape(repr(template))):
            LayoutOptions(show_keys=template)

    def test_separators_that_were_encoded_without_the_options_are_refused(self, encoder: PlainTextEncoder) -> None:
        """The keys would be left out without a word."""
        options = LayoutOptions(num_kv_pairs=3, subset_fraction=1.0, show_keys="plain")
        with pytest.raises(ValueError, match="show_keys"):
            Layout.of(options, Separators.encode(encoder))


@pytest.mark.parametrize("num_steps", [1, 3])
@pytest.mark.parametrize("include_key", [False, True])
def test_the_sampler_produces_what_is_laid_out(
    include_key: bool, num_steps: int, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    sampler = make_sampler(model, tokenizer, num_steps=num_steps, include_key_in_context=include_key)
    batch = random_batch(3)
    layout = sampler.layout.for_batch(batch)
    trajectory = sampler.sample(batch, range(3))
    ids = trajectory.token_ids
    # The last response is not followed by another query separator; the caches have room for one.
    assert ids.shape == (3, layout.trajectory_tokens)
    assert layout.cached_tokens == layout.trajectory_tokens + len(layout.separators.query)
    assert (trajectory.query_starts, trajectory.value_starts) == (layout.query_starts, layout.value_starts)
    assert torch.equal(ids[:, : layout.prompt_tokens], layout.prompt(batch, CPU))
    for number, step in enumerate(trajectory.steps):
        start, value_start = layout.query_starts[number], layout.value_starts[number]
        assert step.context_tokens.shape[1] == layout.context_tokens(number) == start
        assert torch.equal(ids[:, :start], step.context_tokens)
        assert torch.equal(ids[:, start : start + layout.tokens_per_query], step.query_tokens)
        assert torch.equal(ids[:, value_start : value_start + 5], step.selected_pair.value_tokens)
        if include_key:
            assert torch.equal(ids[:, value_start - 6 : value_start], step.selected_pair.key_tokens)
        block = layout.response(step.selected_pair, is_last=number == num_steps - 1)
        after_query = start + layout.tokens_per_query
        assert block.shape[1] == layout.block_tokens(number)
        assert torch.equal(ids[:, after_query : after_query + block.shape[1]], block)
