"""What readings tell about unread values: trees against a plain forward of every text, and the sums that must hold."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from model_builders import sliding_model
from tiny import make_policy, make_sampler, random_batch, tiny_gpt2, tiny_llama
from tiny_families import build
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from attention_rl_trainer.memories.pairs import MemoryBatch
from attention_rl_trainer.models.branches import TokenTree
from attention_rl_trainer.models.projections import UnsupportedArchitectureError
from attention_rl_trainer.rollout import branch_values, information
from attention_rl_trainer.rollout.information import (
    choice_tokens,
    choice_values,
    information_gains,
    unread_tokens,
    unread_values,
)
from attention_rl_trainer.rollout.sampler import TrajectorySampler
from attention_rl_trainer.types import PADDING, is_token

ROWS, PAIRS = 3, 5
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: tiny_llama(max_position_embeddings=512),
    "gpt2": lambda: tiny_gpt2(n_positions=512),
    # Its window of 16 tokens is shorter than a trajectory.
    "sliding": sliding_model,
    "qwen3": lambda: build("qwen3"),
    "phi3": lambda: build("phi3"),
    "gemma2": lambda: build("gemma2"),
}


NAMES = [
    *("llama", "gpt2", "sliding"),
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("qwen3", "phi3", "gemma2")),
]


def with_padding(batch: MemoryBatch) -> MemoryBatch:
    """Shorten some keys, on the left, and some values, on the right."""
    keys, values = batch.key_tokens.clone(), batch.value_tokens.clone()
    keys[:, ::2, :2] = PADDING
    values[0, 1, 3:] = values[1, :, 4:] = values[-1, 2, 2:] = PADDING
    return replace(batch, key_tokens=keys, value_tokens=values, is_padded=True)


class RolledOut:
    """Trajectories, and plain scores of what follows their contexts."""

    def __init__(self, sampler: TrajectorySampler, batch: MemoryBatch) -> None:
        self.sampler = sampler
        self.trajectory = sampler.sample(batch, range(len(batch)))
        self.index = self.trajectory.stack("selected_index")
        self.layout = sampler.layout.for_batch(batch)
        self.num_steps = self.index.shape[1]

    def values(self) -> Tensor:
        return unread_values(*self._arguments)

    def choices(self) -> Tensor:
        return choice_values(*self._arguments)

    @property
    def _arguments(self) -> tuple[object, ...]:
        return self.sampler.policy, self.layout, self.trajectory.memory, self.trajectory.token_ids, self.index

    def unread(self, row: int, step: int) -> list[int]:
        return [column for column in range(PAIRS) if column not in self.index[row, :step].tolist()]

    def score(self, row: int, step: int, columns: Sequence[int]) -> float:
        """Score the last of some values, read one after the other before a step, by one forward without cache."""
        query, response = (torch.tensor(ids) for ids in (self.layout.separators.query, self.layout.separators.response))
        memory, ids = self.trajectory.memory, self.trajectory.token_ids[row]
        pieces = [ids[: self.layout.context_tokens(step)], *([query] if step == self.num_steps else [])]
        for number, column in enumerate(columns):
            keys = [memory.key_tokens[row, column]] if self.layout.include_key_in_context else []
            pieces += [*([query] if number else []), response, *keys, memory.value_tokens[row, column]]
        text = torch.cat(pieces)
        text, count = text[is_token(text)], int(is_token(pieces[-1]).sum())
        with self.sampler.policy.inference(), self.sampler.policy.reference():
            scores = self.sampler.policy.model(input_ids=text[None]).logits.float().log_softmax(dim=-1)[0]
        return float(scores[-count - 1 : -1].gather(1, text[-count:, None]).mean())


@pytest.fixture(params=["alike", "padded", "keys read"])
def rolled_out(request: pytest.FixtureRequest, tokenizer: PreTrainedTokenizerFast) -> Callable[[str], RolledOut]:
    def roll_out(name: str) -> RolledOut:
        batch = random_batch(ROWS, PAIRS)
        sampler = make_sampler(MODELS[name](), tokenizer, include_key_in_context=request.param == "keys read")
        return RolledOut(sampler, with_padding(batch) if request.param == "padded" else batch)

    return roll_out


@pytest.mark.parametrize("name", NAMES)
def test_unread_values_are_those_of_plain_forwards(rolled_out: Callable[[str], RolledOut], name: str) -> None:
    run = rolled_out(name)
    found = run.values()

    expected = torch.zeros(ROWS, run.num_steps + 1, PAIRS)
    for row in range(ROWS):
        for step in range(run.num_steps + 1):
            for column in run.unread(row, step):
                expected[row, step, column] = run.score(row, step, [column])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("max_tree_tokens", [pytest.param(1024, marks=pytest.mark.slow), 1])
def test_choices_are_worth_what_they_tell_about_the_others(
    rolled_out: Callable[[str], RolledOut], name: str, max_tree_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A tree for all choices of a step, or one for each.
    monkeypatch.setattr(information, "MAX_TREE_TOKENS", max_tree_tokens)
    run = rolled_out(name)
    found = run.choices()

    expected = torch.zeros(ROWS, run.num_steps, PAIRS)
    for row in range(ROWS):
        for step in range(run.num_steps):
            unread = run.unread(row, step)
            for choice in unread:
                told = [
                    run.score(row, step, [choice, other]) - run.score(row, step, [other])
                    for other in unread
                    if other != choice
                ]
                expected[row, step, choice] = sum(told) / PAIRS
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_rows_may_be_read_in_parts(tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RolledOut(make_sampler(tiny_llama(), tokenizer), with_padding(random_batch(ROWS, PAIRS)))
    together = run.values(), run.choices()
    monkeypatch.setattr(branch_values, "_MAX_TOKENS", 1)

    for found, expected in zip((run.values(), run.choices()), together, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_over_a_whole_memory_the_gains_add_up_to_what_the_pairs_before_brought(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    run = RolledOut(make_sampler(tiny_llama(), tokenizer, num_steps=PAIRS), random_batch(ROWS, PAIRS))
    values = run.values()

    found = information_gains(values, run.index).sum(dim=1)

    when_read = values[:, :-1].gather(2, run.index[:, :, None]).squeeze(2)
    alone = values[:, 0].gather(1, run.index)
    torch.testing.assert_close(found, (when_read - alone).mean(dim=1))


@pytest.mark.parametrize("max_tree_tokens", [1, 150])
def test_unread_values_may_be_branches_of_several_trees(
    tokenizer: PreTrainedTokenizerFast, max_tree_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RolledOut(make_sampler(tiny_llama(), tokenizer), with_padding(random_batch(ROWS, PAIRS)))
    in_one = run.values()
    monkeypatch.setattr(information, "MAX_TREE_TOKENS", max_tree_tokens)

    torch.testing.assert_close(run.values(), in_one, atol=4e-6, rtol=0)
    assert unread_tokens(run.layout, PAIRS) > run.layout.cached_tokens + 14 * run.layout.scored_tokens


def test_what_is_drawn_does_not_count() -> None:
    values = torch.tensor([[[-1.0, -2.0, 0.0], [0.0, -1.5, -0.5]]])

    # An unread value may well be certain, which is 0 too.
    assert information_gains(values, torch.tensor([[0]])).tolist() == [[pytest.approx((0.5 - 0.5) / 3)]]


def test_tokens_are_counted(tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RolledOut(make_sampler(tiny_llama(), tokenizer), random_batch(ROWS, PAIRS))
    read: list[int] = []
    forward_tree = run.sampler.policy.forward_tree

    def count(tree: TokenTree) -> Tensor:
        read.append(tree.token_ids.numel())
        return forward_tree(tree)

    monkeypatch.setattr(run.sampler.policy, "forward_tree", count)
    run.values()
    assert read == [ROWS * unread_tokens(run.layout, PAIRS)]

    read.clear()
    run.choices()
    assert sum(read) == sum(ROWS * choice_tokens(run.layout, step, PAIRS - step) for step in range(run.num_steps))


def test_a_model_that_takes_no_tree_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    # Its recurrent layers read whatever comes before.
    policy = make_policy(build("jamba"), tokenizer, attention_layer=2)

    with pytest.raises(UnsupportedArchitectureError, match=r"^JambaForCausalLM .* does not read a tree of tokens"):
        policy.forward_tree(TokenTree(torch.arange(8)[None]))
