"""What the order of reading is worth: orders of a memory, and the base model's score of each (design §11).

Every order is scored under one rule, whoever chose it: the base model reads all M values in that order, each after an
empty query,

    [" Query:"] key_0 [" Response:"] value_0   then   [" Query:"] [" Response:"] value   for each pair

and the score is the mean log-probability of the values in nats per token. No sampling takes part, so two orders differ
by the order alone. The rules that choose an order see keys, what was read before and the order in the article, never an
unread value; the oracles see everything.
"""

from __future__ import annotations

import copy
import itertools
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from types import ModuleType
from typing import cast

import numpy as np
import torch
from torch import Tensor
from transformers import Cache, DynamicCache

from attention_rl_trainer.memories.pairs import MemoryBatch, add_embeddings
from attention_rl_trainer.memories.tokenization import PlainTextEncoder
from attention_rl_trainer.models.padding import PaddedCache
from attention_rl_trainer.models.policy import PolicyModel
from attention_rl_trainer.models.readers import ContextReader
from attention_rl_trainer.models.sampling import Purpose
from attention_rl_trainer.rollout.layout import predicting
from attention_rl_trainer.rollout.reward import value_logprob
from attention_rl_trainer.rollout.sampler import TrajectorySampler

Order = tuple[int, ...]
"""Columns of a memory, in the order of reading; possibly only the first few."""

EXACT_MAX_PAIRS = 6
"""Larger memories do not have all of their orders scored; 6 pairs have 720."""
ORACLE, BEST, WORST, RANDOM = "greedy oracle", "exact best", "exact worst", "random"


# --- rules ----------------------------------------------------------------------------------------------------------


def article_order(pair_numbers: Tensor) -> Order:
    """Order pairs, by their numbers ``[M]``, as the article has them."""
    return tuple(pair_numbers.argsort().tolist())


def embedding_order(key_vectors: Tensor, example_vector: Tensor) -> Order:
    """Read next whatever key, of ``[M, G, D]``, has the largest cosine with the mean of the keys read so far.

    The example's key ``[G, D]`` counts as the first of them.
    """
    vectors = torch.nn.functional.normalize(key_vectors.flatten(1).float(), dim=1)
    read = [torch.nn.functional.normalize(example_vector.flatten().float(), dim=0)]
    order: list[int] = []
    while len(order) < len(vectors):
        similarity = vectors @ torch.stack(read).mean(dim=0)
        similarity[order] = -torch.inf
        order.append(int(similarity.argmax()))
        read.append(vectors[order[-1]])
    return tuple(order)


def bm25_order(keys: Sequence[str], values: Sequence[str], example: str) -> Order:
    """Read next whatever key BM25 ranks first, with all that was read so far, the example first, as the query.

    Words are compared without case, English stop words left out, as `bm25s` does by default. Among equals the pair that
    is first in the memory is taken.
    """
    bm25s = _import_bm25s()
    index = bm25s.BM25()
    documents = bm25s.tokenize(list(keys), stopwords="en", return_ids=False, show_progress=False)
    if any(documents):
        index.index(documents, show_progress=False)
    text, order = example, list[int]()
    while len(order) < len(keys):
        query = bm25s.tokenize(text, stopwords="en", return_ids=False, show_progress=False)[0]
        scores = np.array(index.get_scores(query)) if query and any(documents) else np.zeros(len(keys))
        scores[order] = -np.inf
        order.append(int(scores.argmax()))
        text += f" {keys[order[-1]]} {values[order[-1]]}"
    return tuple(order)


def _import_bm25s() -> ModuleType:
    """Import bm25s without JAX, which it would try out at once; and JAX keeps three quarters of a GPU's memory."""
    hidden = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "jax"}
    sys.modules.update(dict.fromkeys([*hidden, "jax"]))  # type: ignore[arg-type]  # None stands for a missing module
    try:
        import bm25s
    finally:
        del sys.modules["jax"]
        sys.modules.update(hidden)
    return cast(ModuleType, bm25s)


def random_orders(num_pairs: int, count: int, seed: Sequence[int]) -> list[Order]:
    """Draw orders uniformly."""
    generator = np.random.default_rng(list(seed))
    return [tuple(generator.permutation(num_pairs).tolist()) for _ in range(count)]


def attention_orders(
    sampler: TrajectorySampler, batch: MemoryBatch, episodes: Sequence[int], *, untrained: bool
) -> list[Order]:
    """Let queries and attention choose: the whole memory is read as in a rollout, with the same random numbers.

    With ``untrained`` the base model chooses. The sampler's number of steps is not used.
    """
    policy = sampler.policy
    with policy.inference(), policy.reference() if untrained else nullcontext():
        return _attention_orders(sampler, batch, episodes)


def _attention_orders(sampler: TrajectorySampler, batch: MemoryBatch, episodes: Sequence[int]) -> list[Order]:
    policy, environment = sampler.policy, sampler.environment
    num_pairs = batch.pair_numbers.shape[1]
    noise = sampler.noise(episodes, num_pairs)
    environment.reset(add_embeddings(batch, policy.embed_keys))
    layout = replace(sampler.layout.for_batch(batch), num_steps=num_pairs)
    prompt = layout.prompt(batch, policy.device)
    reader = ContextReader(policy, prompt, layout.cached_tokens, padded=batch.is_padded)
    chosen = []
    for step in range(num_pairs):
        with policy.attention.capture_queries() as capture:
            reader.decode(noise[Purpose.POLICY][:, step], read_last=True)
        selection = environment.step(capture.mean(), noise[Purpose.SELECTION][:, step])
        chosen.append(selection.index)
        reader.read(layout.response(selection.pairs, is_last=step == num_pairs - 1))
    return [tuple(row) for row in torch.stack(chosen, dim=1).tolist()]


# --- scores ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class ScoredMemory:
    """One memory to score orders of."""

    prompt: Tensor
    """The in-context example and the first query separator, ``[1, S]`` int64."""
    blocks: Tensor
    """What each pair appends: response separator, key if asked for, value, query separator, ``[M, n]`` int64."""
    value_start: int
    """Position of the value's first token in a block."""
    value_length: int
    is_padded: bool
    """Whether the values differ in length."""

    @classmethod
    def of_row(cls, sampler: TrajectorySampler, batch: MemoryBatch, row: int) -> ScoredMemory:
        """Take one row of a batch."""
        one = batch.select_rows([row])
        pairs = add_embeddings(one, sampler.policy.embed_keys)
        layout = sampler.layout.for_batch(one)
        columns = torch.arange(pairs.pair_numbers.shape[1], device=pairs.key_tokens.device)
        blocks = torch.cat([layout.response(pairs.gather(column), is_last=False) for column in columns[:, None]])
        prompt = layout.prompt(one, sampler.policy.device)
        return cls(prompt, blocks, layout.value_offset, layout.tokens_per_value, one.is_padded)


class OrderScorer:
    """Scores orders of one memory by the base model; what several orders have in common at their start is read once."""

    def __init__(self, policy: PolicyModel, memory: ScoredMemory, *, max_rows: int = 128) -> None:
        self._policy = policy
        self._memory = memory
        self._max_rows = max_rows
        self._scores: dict[Order, float] = {}

    @property
    def num_pairs(self) -> int:
        """M."""
        return len(self._memory.blocks)

    def value_logprob(self, prefix: Order) -> float:
        """Return the log-probability of the last value of an order's beginning that was scored, nats per token."""
        return self._scores[prefix]

    def score(self, order: Order) -> float:
        """Return the mean log-probability of an order's values, nats per token."""
        self.read([order])
        return sum(self._scores[order[: depth + 1]] for depth in range(len(order))) / len(order)

    def read(self, orders: Iterable[Order]) -> None:
        """Score orders and all of their beginnings."""
        wanted = {order[: depth + 1] for order in orders for depth in range(len(order))}
        wanted -= self._scores.keys()
        if not wanted:
            return
        # Beginnings that were scored already are read again where they lead to something new.
        tree = sorted({prefix[: depth + 1] for prefix in wanted for depth in range(len(prefix))})
        with self._policy.inference(), self._policy.reference():
            self._descend(self._read_prompt(), [()], tree)

    def _read_prompt(self) -> Cache:
        cache = PaddedCache() if self._memory.is_padded else DynamicCache(config=self._policy.causal_lm.config)
        self._policy.forward(self._memory.prompt, cache)
        return cache

    def _descend(self, cache: Cache, parents: list[Order], tree: list[Order]) -> None:
        """Read every continuation of some beginnings, and their own continuations."""
        depth = len(parents[0]) + 1
        places = {parent: row for row, parent in enumerate(parents)}
        children = [prefix for prefix in tree if len(prefix) == depth and prefix[:-1] in places]
        for start in range(0, len(children), self._max_rows):
            chunk = children[start : start + self._max_rows]
            forked = self._read_children(cache, [places[child[:-1]] for child in chunk], chunk)
            within = set(chunk)
            below = [prefix for prefix in tree if len(prefix) > depth and prefix[:depth] in within]
            if below:
                self._descend(forked, chunk, below)

    def _read_children(self, cache: Cache, rows: list[int], children: list[Order]) -> Cache:
        """Read prefixes after the rows of a cache that hold all but their last pair; returns a cache of them all."""
        forked = copy.deepcopy(cache)
        forked.batch_select_indices(torch.tensor(rows, device=self._policy.device))
        self._read_blocks(forked, children)
        return forked

    def _read_blocks(self, cache: Cache, prefixes: list[Order]) -> None:
        blocks = self._memory.blocks[[prefix[-1] for prefix in prefixes]]
        hidden = self._policy.forward(blocks, cache)
        start, length = self._memory.value_start, self._memory.value_length
        states, values = predicting(hidden, start, length), blocks[:, start : start + length]
        logprobs = value_logprob(self._policy.token_logprobs(states, values), values)
        self._scores.update(zip(prefixes, logprobs.tolist(), strict=True))

    def greedy_oracle(self) -> Order:
        """Read next whatever value the base model predicts best, having seen all of them."""
        order: Order = ()
        with self._policy.inference(), self._policy.reference():
            cache = self._read_prompt()
            while len(order) < self.num_pairs:
                order, cache = self._best_continuation(order, cache)
        return order

    def _best_continuation(self, order: Order, cache: Cache) -> tuple[Order, Cache]:
        """Append the pair whose value is predicted best to an order of one row, and to its cache."""
        candidates = [(*order, column) for column in range(self.num_pairs) if column not in order]
        best, best_cache = candidates[0], cache
        for start in range(0, len(candidates), self._max_rows):
            chunk = candidates[start : start + self._max_rows]
            forked = self._read_children(cache, [0] * len(chunk), chunk)
            winner = max(chunk, key=self.value_logprob)
            if start == 0 or self.value_logprob(winner) > self.value_logprob(best):
                forked.batch_select_indices(torch.tensor([chunk.index(winner)], device=self._policy.device))
                best, best_cache = winner, forked
        return best, best_cache


def all_orders(num_pairs: int) -> list[Order]:
    """List every order of a memory.

    Raises:
        ValueError: there are too many.
    """
    if num_pairs > EXACT_MAX_PAIRS:
        raise ValueError(
            f"a memory of {num_pairs} pairs has too many orders to score them all; {EXACT_MAX_PAIRS} pairs at most"
        )
    return list(itertools.permutations(range(num_pairs)))


@dataclass(frozen=True)
class MemoryOrders:
    """The scores of one memory's orders."""

    article: str
    scores: dict[str, float]
    """Nats per token by the rule; ``"random"`` is the mean over all orders where all were scored, else over some."""
    chosen_ease: float
    """Above 0 if the policy picks what is easy, nats per token.

    Mean log-probability, each after the example alone, of the values that the first T steps of the learned order read,
    less that of all values of the memory.
    """


def score_orders(
    sampler: TrajectorySampler,
    batch: MemoryBatch,
    episodes: Sequence[int],
    encoder: PlainTextEncoder,
    *,
    num_random: int = 8,
    max_rows: int = 128,
    on_scored: Callable[[], object] | None = None,
) -> list[MemoryOrders]:
    """Score the learned order, drawn with the episodes' random numbers, and every baseline on a batch of memories.

    Args:
        encoder: turns ids into the text that BM25 compares.
        num_random: random orders of a memory, where not all orders are scored.
        max_rows: orders that are read at once.
        on_scored: called after each memory, which takes seconds.
    """
    learned = attention_orders(sampler, batch, episodes, untrained=False)
    untrained = attention_orders(sampler, batch, episodes, untrained=True)
    vectors = add_embeddings(batch, sampler.policy.embed_keys).key_vectors
    example_vectors = sampler.policy.embed_keys(batch.example_keys)
    records = []
    for row, article in enumerate(batch.articles):
        scorer = OrderScorer(sampler.policy, ScoredMemory.of_row(sampler, batch, row), max_rows=max_rows)
        in_order = article_order(batch.pair_numbers[row])
        keys, values = ([encoder.decode(ids) for ids in part[row]] for part in (batch.key_tokens, batch.value_tokens))
        example = encoder.decode(torch.cat([batch.example_keys[row], batch.example_values[row]]))
        rules = {
            "learned": learned[row],
            "untrained attention": untrained[row],
            "article order": in_order,
            "reverse": in_order[::-1],
            "BM25": bm25_order(keys, values, example),
            "embedding similarity": embedding_order(vectors[row], example_vectors[row]),
        }
        if sampler.layout.shown_tokens > 0:
            rules["as listed"] = tuple(range(len(in_order)))
        scores = score_rules(scorer, rules, num_random, (sampler.seed, episodes[row]))
        alone = [scorer.score((column,)) for column in range(scorer.num_pairs)]
        chosen = learned[row][: sampler.layout.num_steps]
        ease = sum(alone[column] for column in chosen) / len(chosen) - sum(alone) / len(alone)
        records.append(MemoryOrders(f"{article.source}:{article.article_index}", scores, ease))
        if on_scored is not None:
            on_scored()
    return records


def score_rules(scorer: OrderScorer, rules: dict[str, Order], num_random: int, seed: Sequence[int]) -> dict[str, float]:
    """Score the orders of some rules by name, the oracles', and ``num_random`` drawn ones where not all are scored."""
    oracles: dict[str, float] = {}
    is_exact = scorer.num_pairs <= EXACT_MAX_PAIRS
    drawn = all_orders(scorer.num_pairs) if is_exact else random_orders(scorer.num_pairs, num_random, seed)
    # First what is read step by step, so that the rest finds it read; then all at once, so that what they share is read
    # once.
    oracle = scorer.greedy_oracle()
    scorer.read([*drawn, *rules.values()])
    random_scores = [scorer.score(order) for order in drawn]
    if is_exact:
        oracles = {BEST: max(random_scores), WORST: min(random_scores)}
    return {
        **{name: scorer.score(order) for name, order in rules.items()},
        RANDOM: sum(random_scores) / len(random_scores),
        ORACLE: scorer.score(oracle),
        **oracles,
    }
