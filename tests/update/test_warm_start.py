"""The supervised phase: what is asked in it, and its loss against plain forwards written out by hand."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import make_policy, random_batch
from tokenizer_families import llama_like
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from attention_rl_trainer.errors import NonFiniteError
from attention_rl_trainer.memories.pairs import MemoryBatch
from attention_rl_trainer.memories.tokenization import PlainTextEncoder
from attention_rl_trainer.models.modes import update_mode
from attention_rl_trainer.models.policy import PolicyModel
from attention_rl_trainer.rollout.layout import Layout, LayoutOptions, Separators
from attention_rl_trainer.types import PADDING
from attention_rl_trainer.update.kept import KeptTrajectories
from attention_rl_trainer.update.warm_start import (
    WarmStartOptions,
    WarmStartTerms,
    as_query,
    lay_out_lessons,
    warm_start_terms,
)

ROWS, PAIRS, STEPS, QUERY, KEY, VALUE = 3, 5, 3, 4, 6, 5
QUERY_SEPARATOR, RESPONSE_SEPARATOR = (5, 6), (7, 8)
EXTRA_PLACES = 3


def layout_of(**changes: Any) -> Layout:
    """A layout with separators of two tokens, and, where keys are shown, a token around each."""
    sizes: dict[str, Any] = {"num_kv_pairs": PAIRS + 1, "subset_fraction": 1.0, "num_steps": STEPS}
    sizes |= {"tokens_per_query": QUERY, "tokens_per_key": KEY, "tokens_per_value": VALUE}
    options = LayoutOptions(**sizes | changes)
    around = ((9,),) * (PAIRS + 1) if options.show_keys != "none" else ()
    return Layout.of(options, Separators(QUERY_SEPARATOR, RESPONSE_SEPARATOR, around))


def padded(batch: MemoryBatch, places: int = EXTRA_PLACES) -> MemoryBatch:
    """Make keys and values shorter, each another length, and put more padding to all of them."""

    def cut(tokens: Tensor, *, left: bool) -> Tensor:
        tokens = tokens.clone()
        flat = tokens.view(-1, tokens.shape[-1])
        for number, row in enumerate(flat):
            gone = number % (len(row) - 1)
            row[:gone] = torch.where(torch.tensor(left), PADDING, row[:gone])
            row[len(row) - gone :] = torch.where(torch.tensor(left), row[len(row) - gone :], PADDING)
        return torch.nn.functional.pad(tokens, (places, 0) if left else (0, places), value=PADDING)

    return replace(
        batch,
        example_keys=cut(batch.example_keys, left=True),
        example_values=cut(batch.example_values, left=False),
        key_tokens=cut(batch.key_tokens, left=True),
        value_tokens=cut(batch.value_tokens, left=False),
        is_padded=True,
    )


def lessons_of(
    batch: MemoryBatch, encoder: PlainTextEncoder, layout: Layout | None = None, seed: int = 0, total: int = 16
) -> KeptTrajectories:
    return lay_out_lessons(batch, layout or layout_of(), encoder, range(len(batch)), seed, total)


def tokens_of(padded_ids: Tensor) -> list[int]:
    return [token for token in padded_ids.tolist() if token != PADDING]


def query_of(key: list[int], filling: list[int]) -> list[int]:
    return (key + filling * QUERY)[:QUERY]


@pytest.fixture(scope="module")
def encoder(tokenizer: PreTrainedTokenizerFast) -> PlainTextEncoder:
    return PlainTextEncoder(tokenizer)


class TestAsQuery:
    def test_a_long_key_is_cut_and_a_short_one_is_filled(self) -> None:
        keys = torch.tensor([[1, 2, 3, 4], [PADDING, 1, 2, 3], [PADDING, PADDING, PADDING, 1]])
        assert as_query(keys, 3, [9]).tolist() == [[1, 2, 3], [1, 2, 3], [1, 9, 9]]

    def test_how_far_a_key_is_padded_does_not_matter(self) -> None:
        one, other = torch.tensor([[1, 2]]), torch.tensor([[PADDING] * 5 + [1, 2]])
        assert as_query(one, 4, [9]).tolist() == as_query(other, 4, [9]).tolist() == [[1, 2, 9, 9]]

    def test_a_filling_of_several_tokens_begins_right_after_the_key(self) -> None:
        keys = torch.tensor([[PADDING, 1], [1, 2]])
        assert as_query(keys, 6, [8, 9]).tolist() == [[1, 8, 9, 8, 9, 8], [1, 2, 8, 9, 8, 9]]

    def test_queries_can_be_asked(self) -> None:
        query = as_query(torch.tensor([[3]]), 2, [9])
        assert query.dtype == torch.int64

    def test_a_tokenizer_with_another_line_break(self, texts: list[str]) -> None:
        """Two tokens, the first of which is the space before every text."""
        tokenizer = llama_like(texts, has_prefix=True)
        encoder = PlainTextEncoder(tokenizer)
        filling = encoder.encode("\n")
        assert len(filling) == 2
        lessons = lessons_of(padded(random_batch(ROWS, PAIRS, KEY, VALUE)), encoder)
        for row in range(ROWS):
            for start, column in zip(lessons.query_starts, lessons.selected_index[row].tolist(), strict=True):
                key = tokens_of(lessons.memory.key_tokens[row, column])
                assert lessons.token_ids[row, start : start + QUERY].tolist() == query_of(key, filling)


class TestLessons:
    @pytest.mark.parametrize("with_keys", [False, True])
    @pytest.mark.parametrize("show_keys", ["none", "plain"])
    @pytest.mark.parametrize("is_padded", [False, True])
    def test_every_token_is_where_the_layout_says(
        self, is_padded: bool, show_keys: str, with_keys: bool, encoder: PlainTextEncoder
    ) -> None:
        batch, filling = random_batch(ROWS, PAIRS, KEY, VALUE), encoder.encode("\n")
        batch = padded(batch) if is_padded else batch
        lessons = lessons_of(batch, encoder, layout_of(include_key_in_context=with_keys, show_keys=show_keys))
        q, r = list(QUERY_SEPARATOR), list(RESPONSE_SEPARATOR)
        for row in range(ROWS):
            order = lessons.selected_index[row].tolist()
            keys, values = batch.key_tokens[row].tolist(), batch.value_tokens[row].tolist()
            expected: list[int] = []
            if show_keys == "plain":
                expected += [token for key in keys for token in (9, *key)] + [9]
            expected += [*q, *batch.example_keys[row].tolist(), *r, *batch.example_values[row].tolist(), *q]
            for step, column in enumerate(order):
                assert lessons.query_starts[step] == len(expected)
                expected += query_of(tokens_of(batch.key_tokens[row, column]), filling) + r
                expected += keys[column] if with_keys else []
                assert lessons.value_starts[step] == len(expected)
                expected += values[column] + (q if step < STEPS - 1 else [])
            assert lessons.token_ids[row].tolist() == expected
        assert (lessons.query_length, lessons.value_length) == (QUERY, batch.value_tokens.shape[2])
        assert lessons.memory.is_padded == is_padded

    def test_no_pair_is_asked_twice_and_all_are_where_there_are_steps_for_them(self, encoder: PlainTextEncoder) -> None:
        batch = random_batch(20, PAIRS, KEY, VALUE)
        some = lessons_of(batch, encoder).selected_index
        assert all(len(set(order)) == STEPS for order in some.tolist())
        assert {column for order in some.tolist() for column in order} == set(range(PAIRS))
        every = lessons_of(batch, encoder, layout_of(num_steps=None)).selected_index
        assert all(sorted(order) == list(range(PAIRS)) for order in every.tolist())
        # Fewer steps are the first ones of the same order.
        assert torch.equal(every[:, :STEPS], some)

    def test_orders_are_uniform(self, encoder: PlainTextEncoder) -> None:
        """Each of the 6 orders of three pairs, 600 draws: 100 expected, 5 standard deviations are 46."""
        batch = random_batch(600, 3, 2, 2)
        layout = layout_of(num_kv_pairs=4, num_steps=3, tokens_per_query=1)
        orders = lessons_of(batch, encoder, layout).selected_index.tolist()
        counts = {tuple(order): orders.count(order) for order in orders}
        assert len(counts) == 6
        assert all(abs(count - 100) < 46 for count in counts.values())

    def test_scores_draw_by_their_softmax_without_replacement(self, encoder: PlainTextEncoder) -> None:
        """1,200 draws of an order of three; 5 standard deviations of the rarest count are at least 12."""
        batch = random_batch(1200, 3, 2, 2)
        layout = layout_of(num_kv_pairs=4, num_steps=3, tokens_per_query=1)
        weights = torch.tensor([4.0, 2.0, 1.0])
        scores = weights.log().expand(1200, -1)
        orders = lay_out_lessons(batch, layout, encoder, range(1200), 0, 16, scores=scores).selected_index.tolist()
        for order in itertools.permutations(range(3)):
            first, second, third = weights[list(order)].tolist()
            expected = 1200 * first / 7 * second / (second + third)
            assert abs(orders.count(list(order)) - expected) < 5 * math.sqrt(expected)

    @pytest.mark.parametrize("order", ["listed", "article"])
    def test_a_fixed_order_reads_from_its_start(self, order: Any, encoder: PlainTextEncoder) -> None:
        """The list of keys has the pairs as the memory has them, the article by their numbers."""
        batch = random_batch(ROWS, PAIRS, KEY, VALUE)
        numbers = torch.stack([torch.randperm(50)[:PAIRS] for _ in range(ROWS)])
        batch = replace(batch, pair_numbers=numbers)
        options = WarmStartOptions(warm_start_order=order, warm_start_episodes=8)
        lessons = lay_out_lessons(batch, layout_of(), encoder, range(ROWS), 0, 16, options)
        expected = torch.arange(STEPS).expand(ROWS, -1) if order == "listed" else numbers.argsort(dim=1)[:, :STEPS]
        assert torch.equal(lessons.selected_index, expected)
        first = lessons.value_starts[0]
        read = lessons.token_ids[:, first : first + VALUE]
        assert torch.equal(read, batch.value_tokens[torch.arange(ROWS), expected[:, 0]])

    @pytest.mark.parametrize(("order", "learned"), [("article", 0.0), ("random", 1.0)])
    def test_in_an_order_of_its_own_a_wrong_query_is_not_learned(
        self, order: Any, learned: float, encoder: PlainTextEncoder
    ) -> None:
        batch, layout = random_batch(40, PAIRS, KEY, VALUE), layout_of()
        options = WarmStartOptions(warm_start_order=order, warm_start_mismatch=0.4, warm_start_episodes=8)
        lessons = lay_out_lessons(batch, layout, encoder, range(40), 0, 16, options)
        wrong = torch.zeros_like(lessons.selected_index, dtype=torch.bool)
        for step, start in enumerate(lessons.query_starts):
            named = batch.key_tokens[torch.arange(40), lessons.selected_index[:, step], :QUERY]
            wrong[:, step] = (lessons.token_ids[:, start : start + QUERY] != named).any(dim=1)
        assert 30 < wrong.sum() < 70
        assert (lessons.advantages[wrong] == learned).all()
        assert (lessons.advantages[~wrong] == 1).all()

    def test_where_the_pairs_are_drawn_by_scores_a_wrong_query_is_not_learned(self, encoder: PlainTextEncoder) -> None:
        batch, layout = random_batch(40, PAIRS, KEY, VALUE), layout_of()
        options, scores = WarmStartOptions(warm_start_mismatch=0.4), torch.zeros(40, PAIRS)
        drawn = lay_out_lessons(batch, layout, encoder, range(40), 0, 40, options, scores=scores)
        filling = encoder.encode("\n")
        for step, start in enumerate(drawn.query_starts):
            own = as_query(drawn.memory.gather(drawn.selected_index[:, step]).key_tokens, QUERY, filling)
            is_own = (drawn.token_ids[:, start : start + QUERY] == own).all(dim=1)
            assert torch.equal(drawn.advantages[:, step], is_own.float())
        assert 0.3 < drawn.advantages.mean() < 0.9
        plain = lay_out_lessons(batch, layout, encoder, range(40), 0, 40, options)
        assert plain.advantages.min() == 1

    def test_equal_scores_leave_all_alike(self, encoder: PlainTextEncoder) -> None:
        batch = random_batch(300, PAIRS, KEY, VALUE)
        scores = torch.full((300, PAIRS), 0.7)
        lessons = lay_out_lessons(batch, layout_of(), encoder, range(300), 0, 16, scores=scores)
        counts = torch.bincount(lessons.selected_index[:, 0], minlength=PAIRS)
        assert (counts - 300 / PAIRS).abs().max() < 5 * math.sqrt(300 / PAIRS)

    def test_a_draw_depends_on_the_seed_and_the_number_alone(self, encoder: PlainTextEncoder) -> None:
        batch = random_batch(8, PAIRS, KEY, VALUE)
        whole = lay_out_lessons(batch, layout_of(), encoder, range(8), 3, 8)
        part = lay_out_lessons(batch.select_rows([6, 2]), layout_of(), encoder, [6, 2], 3, 2)
        assert torch.equal(part.token_ids, whole.token_ids[[6, 2]])
        others = random_batch(8, PAIRS, KEY, VALUE, seed=99)
        assert torch.equal(lessons_of(others, encoder, seed=3).selected_index, whole.selected_index)
        assert not torch.equal(lessons_of(batch, encoder, seed=4).selected_index, whole.selected_index)
        later = lay_out_lessons(batch, layout_of(), encoder, range(8, 16), 3, 8)
        assert not torch.equal(later.selected_index, whole.selected_index)

    @pytest.mark.parametrize("share", [0.25, 1.0])
    def test_a_share_of_the_queries_names_any_other_pair(self, share: float, encoder: PlainTextEncoder) -> None:
        """Of 1,200 draws; 5 standard deviations of the share are 0.07, of the count of another pair 75."""
        batch, layout = random_batch(400, PAIRS, KEY, VALUE), layout_of()
        plain = lessons_of(batch, encoder, layout)
        lessons = lay_out_lessons(
            batch, layout, encoder, range(400), 0, 16, WarmStartOptions(warm_start_mismatch=share)
        )
        assert torch.equal(lessons.selected_index, plain.selected_index)
        others: list[int] = []
        for row, order in enumerate(lessons.selected_index.tolist()):
            keys = [key[:QUERY] for key in batch.key_tokens[row].tolist()]
            for start, value_start, column in zip(lessons.query_starts, lessons.value_starts, order, strict=True):
                value = lessons.token_ids[row, value_start : value_start + VALUE]
                assert torch.equal(value, batch.value_tokens[row, column])
                asked = keys.index(lessons.token_ids[row, start : start + QUERY].tolist())
                others += [(asked - column) % PAIRS] if asked != column else []
        num_draws = 400 * STEPS
        assert len(others) / num_draws == pytest.approx(share, abs=0.07 if share < 1 else 0)
        counts = [others.count(distance) for distance in range(1, PAIRS)]
        assert all(abs(count - len(others) / (PAIRS - 1)) < 75 for count in counts)

    def test_of_one_pair_there_is_no_other(self, encoder: PlainTextEncoder) -> None:
        batch, layout = random_batch(4, 1, KEY, VALUE), layout_of(num_kv_pairs=2, num_steps=1)
        lessons = lay_out_lessons(batch, layout, encoder, range(4), 0, 4, WarmStartOptions(warm_start_mismatch=1.0))
        start = lessons.query_starts[0]
        assert torch.equal(lessons.token_ids[:, start : start + QUERY], batch.key_tokens[:, 0, :QUERY])

    def test_they_are_weighed_by_the_whole_update_and_keep_their_articles(self, encoder: PlainTextEncoder) -> None:
        batch = random_batch(ROWS, PAIRS, KEY, VALUE)
        lessons = lessons_of(batch, encoder, total=16)
        assert lessons.weights.tolist() == [1 / 16] * ROWS
        assert lessons.articles == tuple(batch.articles)
        assert [len(part) for part in lessons.split(2)] == [2, 1]


class Bench:
    """A policy, its lessons, and the loss of both by plain forwards over single trajectories, without padding."""

    def __init__(self, policy: PolicyModel, batch: MemoryBatch, encoder: PlainTextEncoder, layout: Layout) -> None:
        self.policy, self.batch, self.layout = policy, batch, layout
        self.filling = encoder.encode("\n")
        self.lessons = lessons_of(batch, encoder, layout)
        self.lessons = replace(self.lessons, weights=torch.tensor([0.1, 0.25, 0.5]))
        self.parameters = [p for p in policy.model.parameters() if p.requires_grad]

    def terms(self, lessons: KeptTrajectories | None = None) -> WarmStartTerms:
        with update_mode(self.policy.model):
            return warm_start_terms(self.policy, self.policy.model, self.lessons if lessons is None else lessons)

    def gradient(self, loss: Tensor) -> Tensor:
        return torch.cat([part.flatten() for part in torch.autograd.grad(loss, self.parameters)])

    def by_hand(self) -> WarmStartTerms:
        """- w / T · Σ over steps of (mean log p of the query + mean log p of the value), in sum over rows."""
        self.policy.model.eval()
        loss, queries, values = torch.zeros(()), [], []
        for row, weight in enumerate(self.lessons.weights):
            of_queries, of_values = self.logprobs(row)
            # The means of a step, the values' over that step's own tokens.
            learned = self.lessons.advantages[row]
            steps = [a * q.mean() + v.mean() for a, q, v in zip(learned, of_queries, of_values, strict=True)]
            loss = loss - weight * sum(steps) / STEPS
            queries += [query for is_learned, query in zip(learned, of_queries, strict=True) if is_learned]
            values.append(torch.cat(of_values).mean())
        return WarmStartTerms(loss, torch.stack(queries).mean(), len(queries), torch.stack(values).mean())

    def logprobs(self, row: int) -> tuple[list[Tensor], list[Tensor]]:
        """Log-probabilities of each step's query and value tokens, each predicted by a forward of what is before it."""
        batch, allowed = self.batch, self.policy.allowed_ids
        places = {token: place for place, token in enumerate(allowed.tolist())}
        context = [*QUERY_SEPARATOR, *tokens_of(batch.example_keys[row]), *RESPONSE_SEPARATOR]
        context += [*tokens_of(batch.example_values[row]), *QUERY_SEPARATOR]
        queries, values = [], []
        for column in self.lessons.selected_index[row].tolist():
            key, value = tokens_of(batch.key_tokens[row, column]), tokens_of(batch.value_tokens[row, column])
            query = query_of(key, self.filling)
            text = [*context, *query, *RESPONSE_SEPARATOR, *(key if self.layout.include_key_in_context else ()), *value]
            logits = self.policy.causal_lm(input_ids=torch.tensor([text])).logits[0]
            first, start = len(context), len(text) - len(value)
            over_allowed = torch.log_softmax(logits[first - 1 : first - 1 + QUERY][:, allowed], dim=-1)
            queries.append(over_allowed[torch.arange(QUERY), torch.tensor([places[token] for token in query])])
            over_all = torch.log_softmax(logits[start - 1 : -1], dim=-1)
            values.append(over_all[torch.arange(len(value)), torch.tensor(value)])
            context = [*text, *QUERY_SEPARATOR]
        return queries, values


@pytest.fixture(params=["full", "padded, keys in context"])
def bench(
    request: pytest.FixtureRequest,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    encoder: PlainTextEncoder,
) -> Bench:
    batch = random_batch(ROWS, PAIRS, KEY, VALUE)
    batch = batch if request.param == "full" else padded(batch)
    layout = layout_of(include_key_in_context="keys" in request.param)
    # Chunks that no boundary of a trajectory falls on.
    return Bench(make_policy(model, tokenizer, logits_chunk_size=7), batch, encoder, layout)


class TestTerms:
    def test_they_and_their_gradient_are_those_of_plain_forwards(self, bench: Bench) -> None:
        found, expected = bench.terms(), bench.by_hand()
        for name in ("loss", "query_logprob", "value_logprob"):
            torch.testing.assert_close(getattr(found, name), getattr(expected, name), atol=1e-5, rtol=1e-5, msg=name)
        assert found.query_logprob < -1
        assert found.value_logprob < -1
        gradient = bench.gradient(expected.loss)
        assert gradient.norm() > 0.01
        torch.testing.assert_close(bench.gradient(found.loss), gradient, atol=1e-5, rtol=1e-4)

    def test_a_query_of_advantage_0_is_not_learned(self, bench: Bench) -> None:
        bench.lessons = replace(bench.lessons, advantages=torch.tensor([[1.0, 0, 1], [0, 0, 0], [1, 1, 0]]))
        found, expected = bench.terms(), bench.by_hand()
        torch.testing.assert_close(found.loss, expected.loss, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(bench.gradient(found.loss), bench.gradient(expected.loss), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(found.query_logprob, expected.query_logprob, atol=1e-5, rtol=1e-5)
        assert found.num_learned == expected.num_learned == 4

    def test_micro_batches_add_up(self, bench: Bench) -> None:
        whole, parts = bench.terms(), [bench.terms(part) for part in bench.lessons.split(2)]
        assert len(parts) == 2
        torch.testing.assert_close(sum(part.loss for part in parts), whole.loss, atol=1e-5, rtol=1e-5)
        for name in ("query_logprob", "value_logprob"):
            joined = (2 * getattr(parts[0], name) + getattr(parts[1], name)) / ROWS
            torch.testing.assert_close(joined, getattr(whole, name), atol=1e-5, rtol=1e-5)

    def test_what_is_logged_has_no_graph(self, bench: Bench) -> None:
        terms = bench.terms()
        assert terms.loss.requires_grad
        assert not terms.query_logprob.requires_grad
        assert not terms.value_logprob.requires_grad


def test_more_padding_adds_nothing(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, encoder: PlainTextEncoder
) -> None:
    policy, whole = make_policy(model, tokenizer), random_batch(ROWS, PAIRS, KEY, VALUE)
    few, many = (Bench(policy, padded(whole, places), encoder, layout_of(show_keys="plain")) for places in (0, 40))
    assert many.lessons.token_ids.shape[1] > few.lessons.token_ids.shape[1] + 200
    first, second = few.terms(), many.terms()
    for name in ("loss", "query_logprob", "value_logprob"):
        torch.testing.assert_close(getattr(first, name), getattr(second, name), atol=1e-5, rtol=0, msg=name)
    torch.testing.assert_close(few.gradient(first.loss), many.gradient(second.loss), atol=1e-5, rtol=1e-4)


def test_the_callers_dropout_acts(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, encoder: PlainTextEncoder
) -> None:
    """The trainer says whether the adapter's dropout acts; activation checkpointing must find it as the forward did."""
    bench = Bench(make_policy(llama, tokenizer), random_batch(ROWS, PAIRS, KEY, VALUE), encoder, layout_of())
    model = bench.policy.model.train()
    losses = {}
    for acts in (False, True):
        with update_mode(model, adapter_dropout=acts):
            losses[acts] = [warm_start_terms(bench.policy, model, bench.lessons).loss.item() for _ in range(2)]
    assert losses[False][0] == losses[False][1]
    assert losses[True][0] != losses[True][1]


def test_numbers_that_are_not_finite_are_named(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, encoder: PlainTextEncoder
) -> None:
    bench = Bench(make_policy(llama, tokenizer), random_batch(ROWS, PAIRS, KEY, VALUE), encoder, layout_of())
    head = bench.policy.head.linear.weight
    good = head.detach().clone()
    with torch.no_grad():
        head[bench.policy.allowed_ids[30]] = torch.inf
    with pytest.raises(NonFiniteError, match=r"policy logit.*title 0"):
        bench.terms()
    with torch.no_grad():
        head.copy_(good)
        # An id that no query may have, so that the values alone know it.
        head[-1] = torch.inf
    with pytest.raises(NonFiniteError, match=r"log-probability of a value.*title 0"):
        bench.terms()


@pytest.mark.parametrize(("name", "value"), [("warm_start_temperature", 0.1), ("warm_start_order", "listed")])
def test_an_order_without_a_phase_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{name} is {value}, but warm_start_episodes is 0, "):
        WarmStartOptions(**{name: value}).check_options()
    WarmStartOptions(**{name: value}, warm_start_episodes=8).check_options()


def test_two_orders_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^warm_start_order is article and warm_start_temperature 0\.1, "):
        WarmStartOptions(warm_start_episodes=8, warm_start_order="article", warm_start_temperature=0.1)


def test_the_phase_is_off_by_itself() -> None:
    assert WarmStartOptions().warm_start_episodes == 0
    with pytest.raises(ValueError, match="warm_start_episodes must be at least 0, got -1"):
        WarmStartOptions(warm_start_episodes=-1).check_options()
