"""A policy on held-out memories, in tables: what its orders are worth, queries and questions (design §11).

All are paired: every row of a table was measured on the same memories and contexts. Intervals are 95%, bootstrapped
over articles.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from torch import Tensor

from attention_rl_trainer.durability.staging import staged_files
from attention_rl_trainer.evaluation.asking import ASKED, GREEDY, RANDOM_QUESTIONS, AskedQuestions
from attention_rl_trainer.evaluation.estimates import Estimate, clustered_mean, clustered_ratio
from attention_rl_trainer.evaluation.orders import BEST, ORACLE, RANDOM, WORST, score_orders
from attention_rl_trainer.evaluation.queries import (
    CONTROL,
    EMPTY,
    FORM,
    OTHER_KEY,
    POLICY,
    ControlQueries,
    names_its_pair,
    score_queries,
)
from attention_rl_trainer.memories.pairs import MemoryBatch
from attention_rl_trainer.memories.tokenization import PlainTextEncoder
from attention_rl_trainer.records.metrics import distinct_queries, heard
from attention_rl_trainer.rollout.sampler import TrajectorySampler
from attention_rl_trainer.types import Trajectory

LEARNED = "learned"
# Nats per token: below it is rounding, as where all orders of a memory are the same, or it has one pair.
_SMALLEST_GAP = 1e-5
_NUM_EXAMPLES = 4
NAMES, CONTROL_NAMES, DISTINCT, BOUND = "names_its_pair", "control_names_its_pair", "distinct_queries", "query_bound"
# What the policy's query is compared with, and the row of the table that it is.
_COMPARED = {EMPTY: EMPTY, CONTROL: CONTROL, FORM: OTHER_KEY}
_LABELS = {
    NAMES: "share of the steps whose query names its pair",
    CONTROL_NAMES: "the same of the content control's queries",
    DISTINCT: "different queries of a trajectory, of T",
    "selection_information": "selection information, nats per draw",
    "chosen_ease": "how much easier the values that were read are than all of the memory",
    BOUND: "bound: selection information / V",
    OTHER_KEY: f"{OTHER_KEY} ({FORM})",
}


_SETTINGS = {
    "T": "queries of a trajectory (T)",
    "L": "tokens of a query (L)",
    "counterfactuals": "queries of the base model per step",
}


@dataclass(frozen=True)
class EvaluationTables:
    """What was measured, each figure with its interval, nats per token unless it says otherwise."""

    orders: dict[str, Estimate]
    """Mean log-probability of the values by the order's rule."""
    order_gains: dict[str, Estimate]
    """Each order less the random one, on the same memories."""
    share_closed: dict[str, Estimate]
    """Share of the gap between the random order and the oracle's that each order closes; empty without a gap."""
    queries: dict[str, Estimate]
    """Gain of each query over those that the base model samples."""
    policy_less: dict[str, Estimate]
    """Gain of the policy's query less that of another, on the same trajectories."""
    parts: dict[str, Estimate]
    """Reward of the trajectories and its parts, and how easy the chosen values are.

    Then of the queries: the share of steps that name their pair and the share that the content control's would, by
    chance; the different ones of a trajectory, a number; what the selector heard of them, nats per draw, and the bound.
    """
    settings: dict[str, int | float | str]
    """What the figures depend on."""
    asked: dict[str, Estimate] = field(default_factory=dict)
    """Of a game: what the questions of each player tell about the object, nats a trajectory."""
    asked_share: dict[str, Estimate] = field(default_factory=dict)
    """Share of the gap between random questions and the greedy player's that each player closes."""
    examples: list[dict[str, Any]] = field(default_factory=list)
    """Of the first trajectories the title, and each step's query, key and value, as text."""

    def metrics(self) -> dict[str, float]:
        """Name the figures that tell whether a policy has learned anything."""
        orders = {}
        if LEARNED in self.orders:
            orders["order_over_random"] = self.order_gains[LEARNED].mean
        if LEARNED in self.share_closed:
            orders["order_share_closed"] = self.share_closed[LEARNED].mean
        queries = {
            "query_over_counterfactuals": self.queries[POLICY].mean,
            "query_over_empty": self.policy_less[EMPTY].mean,
            "query_over_control": self.policy_less[CONTROL].mean,
        }
        if FORM in self.policy_less:
            queries["query_over_form"] = self.policy_less[FORM].mean
        said = {name: self.parts[name].mean for name in (NAMES, DISTINCT, BOUND) if name in self.parts}
        asked = {}
        if ASKED in self.asked:
            asked["questions_tell"] = self.asked[ASKED].mean
        if ASKED in self.asked_share:
            asked["questions_share_closed"] = self.asked_share[ASKED].mean
        return orders | queries | said | asked

    def to_markdown(self) -> str:
        """Write both tables as Markdown."""
        orders = [
            [name, str(score), str(self.order_gains.get(name, "")), str(self.share_closed.get(name, ""))]
            for name, score in sorted(self.orders.items(), key=lambda item: -item[1].mean)
        ]
        by_gain = sorted(self.queries.items(), key=lambda item: -item[1].mean)
        queries = [[_LABELS.get(name, name), str(gain)] for name, gain in by_gain]
        less = [[f"policy less {name}", str(gain)] for name, gain in self.policy_less.items()]
        parts = [[_LABELS.get(name, name.replace("_", " ")), str(value)] for name, value in self.parts.items()]
        settings = ", ".join(f"{_SETTINGS.get(name, name)} {value}" for name, value in self.settings.items())
        return "\n\n".join(
            [
                f"Nats per token, with 95% intervals bootstrapped over articles. {settings}.",
                f"### Orders, scored by the base model after empty queries: {_size(self.orders)}",
                _table(["order", "log-probability of the values", "less random", "share of the gap closed"], orders),
                f"### Queries, under the policy's own order, scored by the base model: {_size(self.queries)}",
                _table(["query", "gain over what the base model samples"], queries + less),
                *([_bound_sentence(self.parts[BOUND])] if BOUND in self.parts else []),
                "### The trajectories",
                _table(["", "mean"], parts),
                *self._asked_lines(),
                "",
            ]
        )

    def _asked_lines(self) -> list[str]:
        if not self.asked:
            return []
        rows = [[name, str(gain), str(self.asked_share.get(name, ""))] for name, gain in self.asked.items()]
        return [
            "### The questions: what the answers tell about which object it is, nats a trajectory",
            _table(["who asks, of the same memories", "told", "share of the gap from random to greedy"], rows),
        ]

    def write(self, folder: Path) -> list[Path]:
        """Write ``evaluation.json`` and ``evaluation.md`` into a folder, which is made if it is missing."""
        contents = {
            "evaluation.json": json.dumps(asdict(self), indent=2, allow_nan=False) + "\n",
            "evaluation.md": self.to_markdown(),
        }
        with staged_files(folder) as staging:
            for name, text in contents.items():
                (staging / name).write_text(text, encoding="utf-8")
        return [folder / name for name in contents]


def folder_name(name: str) -> str:
    """Turn any name, such as a data set's, into a folder's: it leads nowhere else, and names stay different."""
    quoted = quote(name, safe=" +-=@_,", errors="surrogatepass")
    # A name of dots alone means a folder above; systems allow 255 bytes.
    quoted = quoted.replace(".", "%2E") if not quoted.strip(".") else quoted
    return quoted if len(quoted) <= 128 else f"{quoted[:111]}-{_digest(name)}"


def _digest(name: str) -> str:
    return hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _bound_sentence(bound: Estimate) -> str:
    return (
        f"To a calibrated reader a query that tells only which pair it drew is worth at most {bound.mean:+.3f} over "
        "silence (selection information / V, estimated from the queries of a batch): what *policy less empty query* "
        "has above that comes from form, an answer being expected, or from text that the query sets before the value, "
        "such as a key that was shown."
    )


def _size(estimates: Mapping[str, Estimate]) -> str:
    first = next(iter(estimates.values()), None)
    return "not measured" if first is None else f"{first.num_values} memories of {first.num_clusters} articles"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "| " + " | ".join("---" for _ in header) + " |"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


class TableBuilder:
    """Collects what a policy's trajectories and orders are worth, batch by batch.

    Args:
        encoder: turns ids into the text that BM25 compares.
        num_counterfactuals: queries of the base model at each step.
        num_random: random orders of a memory that is too large to score all of its orders.
        num_order_episodes: trajectories, the first ones, whose memories have their orders scored; by default all.
        questions: of the game that is evaluated, if it is one.
        on_scored: called after each memory whose orders were scored, the slow part.
    """

    def __init__(
        self,
        sampler: TrajectorySampler,
        encoder: PlainTextEncoder,
        *,
        num_counterfactuals: int = 4,
        num_random: int = 8,
        num_order_episodes: int | None = None,
        questions: AskedQuestions | None = None,
        on_scored: Callable[[], object] | None = None,
    ) -> None:
        self._sampler = sampler
        self._on_scored = on_scored
        self._questions = questions
        self._asked: dict[str, list[float]] = {}
        self._num_order_episodes = num_order_episodes
        self._encoder = encoder
        self._num_counterfactuals = num_counterfactuals
        self._num_random = num_random
        self._control = ControlQueries()
        self._waiting: list[tuple[MemoryBatch, Trajectory]] = []
        """Trajectories on one article, until there is another one to take control queries from."""
        self._articles: list[str] = []
        self._orders: dict[str, list[float]] = {}
        self._queries: dict[str, list[float]] = {}
        self._parts: dict[str, list[float]] = {}
        self._heard: dict[str, list[float]] = {}
        self._heard_articles: list[str] = []
        """Of the trajectories of which it was measured what the selector hears."""
        self._chosen_ease: list[float] = []
        self._examples: list[dict[str, Any]] = []

    def add(self, batch: MemoryBatch, trajectory: Trajectory) -> None:
        """Measure trajectories that the sampler rolled out; those on a first article wait for a second one."""
        self._waiting.append((batch, trajectory))
        self._add_examples(batch, trajectory)
        if not self._control.has_others([article for item, _ in self._waiting for article in item.articles]):
            return
        controls = torch.split(self._take_controls(), [len(item) for item, _ in self._waiting])
        for (item, rolled_out), control in zip(self._waiting, controls, strict=True):
            self._measure(item, rolled_out, control)
        self._waiting = []

    def _add_examples(self, batch: MemoryBatch, trajectory: Trajectory) -> None:
        decode = self._encoder.decode
        for row in range(min(len(batch), _NUM_EXAMPLES - len(self._examples))):
            steps = [
                {
                    "query": decode(step.query_tokens[row].cpu()),
                    "key": decode(step.selected_pair.key_tokens[row].cpu()),
                    "value": decode(step.selected_pair.value_tokens[row].cpu()),
                }
                for step in trajectory.steps
            ]
            self._examples.append({"title": batch.articles[row].title, "steps": steps})

    def _take_controls(self) -> Tensor:
        articles = [article for batch, _ in self._waiting for article in batch.articles]
        queries = torch.cat([trajectory.stack("query_tokens") for _, trajectory in self._waiting])
        return self._control.take(articles, queries)

    def _measure(self, batch: MemoryBatch, trajectory: Trajectory, control: Tensor) -> None:
        queries = score_queries(
            self._sampler, batch, trajectory, control, num_counterfactuals=self._num_counterfactuals
        )
        for name, gains in queries.gains.items():
            _extend(self._queries, name, gains.tolist())
        _extend(self._parts, "reward", trajectory.avg_reward.tolist())
        for name in ("query_gain", "model_gain"):
            _extend(self._parts, name, trajectory.stack(name).mean(dim=1).tolist())
        articles = [f"{article.source}:{article.article_index}" for article in batch.articles]
        self._articles += articles
        self._add_queries(trajectory, control, articles)
        num_steps, num_pairs = trajectory.stack("selected_index").shape[1], trajectory.memory.pair_numbers.shape[1]
        # Where all pairs are read, every player asks the same.
        if self._questions is not None and num_steps < num_pairs:
            self._add_questions(self._questions, batch, trajectory)
        self._add_orders(batch, trajectory.episodes.tolist())

    def _add_queries(self, trajectory: Trajectory, control: Tensor, articles: Sequence[str]) -> None:
        """Add what the queries say, and what the selector heard of them."""
        queries = trajectory.stack("query_tokens")
        if trajectory.memory.pair_numbers.shape[1] > 1:
            for name, asked in {NAMES: queries, CONTROL_NAMES: control}.items():
                _extend(self._parts, name, names_its_pair(trajectory, asked).float().mean(dim=1).tolist())
        _extend(self._parts, DISTINCT, distinct_queries(queries).tolist())
        information = heard(trajectory)
        for name, values in information.items():
            _extend(self._heard, name, values.tolist())
        self._heard_articles += articles if information else []

    def _add_questions(self, questions: AskedQuestions, batch: MemoryBatch, trajectory: Trajectory) -> None:
        memory = trajectory.memory.pair_numbers.tolist()
        asked = trajectory.memory.pair_numbers.gather(1, trajectory.stack("selected_index")).tolist()
        for row, (article, episode) in enumerate(zip(batch.articles, trajectory.episodes.tolist(), strict=True)):
            seed = (self._sampler.seed, episode)
            for name, told in questions.gains(article.article_index, memory[row], asked[row], seed).items():
                _extend(self._asked, name, [told])

    def _add_orders(self, batch: MemoryBatch, episodes: Sequence[int]) -> None:
        left = len(batch)
        if self._num_order_episodes is not None:
            left = min(left, self._num_order_episodes - len(self._chosen_ease))
        if left == 0:
            return
        records = score_orders(
            self._sampler,
            batch.select_rows(range(left)),
            episodes[:left],
            self._encoder,
            num_random=self._num_random,
            on_scored=self._on_scored,
        )
        for record in records:
            for name, score in record.scores.items():
                _extend(self._orders, name, [score])
        self._chosen_ease += [record.chosen_ease for record in records]

    def build(self) -> EvaluationTables:
        """Estimate every figure.

        Raises:
            ValueError: nothing was added, or all trajectories are on one article.
        """
        if self._waiting:
            self._take_controls()  # says that there is none
        articles = self._articles
        if not articles:
            raise ValueError("nothing was measured: add trajectories before building the tables")
        ordered = articles[: len(self._chosen_ease)]
        oracle = self._orders.get(BEST, self._orders.get(ORACLE, []))
        random = self._orders.get(RANDOM, [])
        gap = _less(oracle, random)
        others = {name: scores for name, scores in self._orders.items() if name not in (RANDOM, BEST, WORST)}
        if sum(gap) <= _SMALLEST_GAP * len(gap):
            others = {}
        ease = _estimates({"chosen_ease": self._chosen_ease} if ordered else {}, ordered)
        return EvaluationTables(
            orders=_estimates(self._orders, ordered),
            order_gains=_estimates(
                {name: _less(scores, random) for name, scores in self._orders.items() if name != RANDOM}, ordered
            ),
            share_closed={
                name: clustered_ratio(_less(scores, random), gap, ordered) for name, scores in others.items()
            },
            queries=_estimates(self._queries, articles),
            policy_less=_estimates(
                {
                    name: _less(self._queries[POLICY], self._queries[other])
                    for name, other in _COMPARED.items()
                    if other in self._queries
                },
                articles,
            ),
            parts=_estimates(self._parts, articles) | _estimates(self._heard, self._heard_articles) | ease,
            settings={
                # The user's: an evaluation's streams have the seed of training beyond the range of seeds.
                "seed": self._sampler.seed % 2**32,
                "T": self._sampler.layout.num_steps,
                "L": self._sampler.layout.tokens_per_query,
                "counterfactuals": self._num_counterfactuals,
            },
            asked=_estimates(self._asked, articles),
            asked_share=self._asked_share(articles),
            examples=self._examples,
        )

    def _asked_share(self, articles: Sequence[str]) -> dict[str, Estimate]:
        random, greedy = (self._asked.get(name, []) for name in (RANDOM_QUESTIONS, GREEDY))
        gap = _less(greedy, random)
        if sum(gap) <= _SMALLEST_GAP * len(gap):
            return {}
        others = {name: told for name, told in self._asked.items() if name != RANDOM_QUESTIONS}
        return {name: clustered_ratio(_less(told, random), gap, articles) for name, told in others.items()}


def _extend(columns: dict[str, list[float]], name: str, values: Iterable[float]) -> None:
    columns.setdefault(name, []).extend(values)


def _less(values: Sequence[float], others: Sequence[float]) -> list[float]:
    return [value - other for value, other in zip(values, others, strict=True)]


def _estimates(columns: Mapping[str, Sequence[float]], articles: Sequence[str]) -> dict[str, Estimate]:
    return {name: clustered_mean(values, articles) for name, values in columns.items()}
