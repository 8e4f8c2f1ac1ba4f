"""What a whole order of reading could be worth on some data, by orders that need no training (docs/results.md).

    python examples/experiments/order_bounds.py twenty_questions --fitted 120 --measured 60

Of held-out memories the base model scores, as an evaluation does, random orders, the greedy oracle's, the rules that
see no values, and what can be learned from the oracle's orders of training memories: the mean place of a key, and a
clone of the oracle that sees what was read, a linear choice among the unread pairs by

    key · key of each pair read and its answer, key · last key, key · last answer, key · share of the commonest answer,
    key, number of steps

where an answer is a value's first word. Keys must recur, as a game's do. It takes 5 s a memory on two cores.
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, sparse
from tqdm.auto import tqdm

from attention_rl_trainer.commands.headroom import parser
from attention_rl_trainer.commands.measured import Measured
from attention_rl_trainer.evaluation.estimates import clustered_mean, clustered_ratio
from attention_rl_trainer.evaluation.orders import Order, OrderScorer, ScoredMemory, article_order, random_orders
from attention_rl_trainer.memories.pairs import MemoryBatch
from attention_rl_trainer.rollout.environment import KVMemoryEnvironment
from attention_rl_trainer.rollout.sampler import TrajectorySampler

Numbers = NDArray[np.float64]

PENALTY = 1.0
"""Of the clone's squared weights; 0.3 and 3 fit held-out choices no better."""


@dataclass(frozen=True)
class Scored:
    """One memory, and its orders' scores."""

    article: Hashable
    keys: list[str]
    answers: list[str]
    in_article: Order
    random: list[tuple[Order, float]]
    oracle: tuple[Order, float]
    scorer: OrderScorer


def first_word(text: str) -> str:
    """Return what an answer begins with."""
    found = re.search(r"\w+", text.lower())
    return found.group() if found else ""


def scored(measured: Measured, sampler: TrajectorySampler, batch: MemoryBatch, num_random: int, seed: int) -> Scored:
    """Score random orders and the oracle's of a batch of one memory."""
    decode = measured.encoder.decode
    keys = [decode(ids) for ids in batch.key_tokens[0]]
    answers = [first_word(decode(ids)) for ids in batch.value_tokens[0]]
    scorer = OrderScorer(sampler.policy, ScoredMemory.of_row(sampler, batch, 0))
    oracle = scorer.greedy_oracle()
    orders = random_orders(scorer.num_pairs, num_random, (seed, 0))
    scorer.read([*orders, oracle])
    article = batch.articles[0]
    return Scored(
        (article.source, article.article_index),
        keys,
        answers,
        article_order(batch.pair_numbers[0]),
        [(order, scorer.score(order)) for order in orders],
        (oracle, scorer.score(oracle)),
        scorer,
    )


def features(memory: Scored, read: Sequence[int], column: int) -> Iterator[tuple[Hashable, float]]:
    """Describe the choice of a column after others."""
    key, done = memory.keys[column], len(read)
    yield ("key", key), 3.0
    yield ("steps", done), 3.0
    if not read:
        return
    for other in read:
        yield ("read", memory.keys[other], memory.answers[other], key), done**-0.5
    last = read[-1]
    yield ("last key", memory.keys[last], key), 1.0
    yield ("last answer", memory.answers[last], key), 1.0
    answers = [memory.answers[other] for other in read]
    yield ("commonest", key), Counter(answers).most_common(1)[0][1] / done


class Clone:
    """A choice among unread pairs that imitates the oracle's."""

    def __init__(self, memories: Sequence[Scored]) -> None:
        self._numbers: dict[Hashable, int] = {}
        steps = [
            (memory, memory.oracle[0][:step], column)
            for memory in memories
            for step, column in enumerate(memory.oracle[0][:-1])
        ]
        rows = [self._rows(memory, read, grow=True) for memory, read, _ in steps]
        self._fit(rows, [unread(memory, read).index(column) for memory, read, column in steps])

    def _rows(self, memory: Scored, read: Sequence[int], *, grow: bool = False) -> list[list[tuple[int, float]]]:
        rows = []
        for column in unread(memory, read):
            named = features(memory, read, column)
            if grow:
                rows.append([(self._numbers.setdefault(name, len(self._numbers)), value) for name, value in named])
            else:
                rows.append([(self._numbers[name], value) for name, value in named if name in self._numbers])
        return rows

    def _matrix(self, rows: list[list[tuple[int, float]]]) -> sparse.csr_array:
        numbers = [number for found in rows for number, _ in found]
        values = [value for found in rows for _, value in found]
        ends = np.cumsum([0, *(len(found) for found in rows)])
        return sparse.csr_array((values, numbers, ends), shape=(len(rows), len(self._numbers)))

    def _fit(self, steps: list[list[list[tuple[int, float]]]], chosen: list[int]) -> None:
        matrix = self._matrix([row for rows in steps for row in rows])
        starts = np.cumsum([0, *(len(rows) for rows in steps[:-1])])
        step_of = np.repeat(np.arange(len(steps)), [len(rows) for rows in steps])
        places = starts + chosen

        def loss(weights: Numbers) -> tuple[float, Numbers]:
            scores = matrix @ weights
            scores -= np.maximum.reduceat(scores, starts)[step_of]
            totals = np.add.reduceat(np.exp(scores), starts)
            surplus = np.exp(scores) / totals[step_of]
            surplus[places] -= 1
            value = np.log(totals).sum() - scores[places].sum() + PENALTY * np.square(weights).sum()
            return float(value), matrix.T @ surplus + 2 * PENALTY * weights

        start = np.zeros(len(self._numbers))
        self._weights = optimize.minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": 200}).x

    def order(self, memory: Scored) -> Order:
        """Read a memory."""
        read: list[int] = []
        while len(read) < len(memory.keys):
            scores = self._matrix(self._rows(memory, read)) @ self._weights
            read.append(unread(memory, read)[int(scores.argmax())])
        return tuple(read)


def unread(memory: Scored, read: Sequence[int]) -> list[int]:
    """List the columns that were not read."""
    return [column for column in range(len(memory.keys)) if column not in read]


def mean_places(memories: Sequence[Scored]) -> dict[str, float]:
    """Average the place that each key has in the oracle's orders."""
    places: dict[str, list[int]] = {}
    for memory in memories:
        for place, column in enumerate(memory.oracle[0]):
            places.setdefault(memory.keys[column], []).append(place)
    return {key: float(np.mean(found)) for key, found in places.items()}


def main() -> None:
    """Read the command line, score, and print a table."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("config")
    arguments.add_argument("--fitted", type=int, default=120)
    arguments.add_argument("--measured", type=int, default=60)
    arguments.add_argument("--random", type=int, default=12)
    options = arguments.parse_args()
    data, config, model = parser().parse(["--config", options.config])
    measured = Measured(config, model)
    _, fitted, held_out = measured.memories(data, options.fitted, options.measured)
    given = measured.policy, KVMemoryEnvironment(), measured.layout.separators
    sampler = TrajectorySampler(*given, config, config.seed)

    def read(batch: MemoryBatch) -> list[Scored]:
        one_by_one = (batch.select_rows([row]).trimmed() for row in tqdm(range(len(batch))))
        return [scored(measured, sampler, one, options.random, row) for row, one in enumerate(one_by_one)]

    training, memories = read(fitted), read(held_out)
    clone, places = Clone(training), mean_places(training)
    worth: dict[str, list[float]] = {}
    for memory in tqdm(memories):
        by_place = sorted(range(len(memory.keys)), key=lambda column: places.get(memory.keys[column], np.inf))
        listed = tuple(range(len(memory.keys)))
        rules: dict[str, Order] = {
            "as listed" if sampler.layout.shown_tokens else "as drawn": listed,
            "greedy oracle": memory.oracle[0],
            f"best of {options.random} random orders": max(memory.random, key=lambda found: found[1])[0],
            "article or table order": memory.in_article,
            "clone of the oracle": clone.order(memory),
            "the oracle's mean places": tuple(by_place),
            "backwards": listed[::-1],
        }
        chance = float(np.mean([score for _, score in memory.random]))
        for name, order in rules.items():
            worth.setdefault(name, []).append(memory.scorer.score(order) - chance)
    articles = [memory.article for memory in memories]
    print("| order | less random | share of the gap to the greedy oracle |\n| --- | --- | --- |")
    for name, gains in worth.items():
        share = clustered_ratio(gains, worth["greedy oracle"], articles)
        print(f"| {name} | {clustered_mean(gains, articles)} | {share} |")
    ahead = [listed - oracle for listed, oracle in zip(next(iter(worth.values())), worth["greedy oracle"], strict=True)]
    print(f"\n{next(iter(worth))} less greedy oracle: {clustered_mean(ahead, articles)}")


if __name__ == "__main__":
    main()
