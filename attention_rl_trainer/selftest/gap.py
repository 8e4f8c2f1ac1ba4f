"""How far a policy got between the random and the best one, both known by enumeration (design §11).

What a query is worth is measured by the untouched base model alone, exactly and not by sampling: the log-probability of
the value behind the query, less its expectation behind the base model's own queries, which are names of topics:

    gain(context, query, value) = log p(value | query) - Σ_c p(name_c | context) · log p(value | name_c)

Plans, that is, ordered choices of topics, are enumerated with their names as queries. The best policy follows the plan
of the highest mean gain; the random one asks as the base model does.

Knows nothing about training.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attention_rl_trainer.policy import PolicyModel
from attention_rl_trainer.selftest.language import (
    EXAMPLE_TOPIC,
    NAME_LENGTH,
    NUM_STEPS,
    NUM_TOPICS,
    VALUE_LENGTH,
    prompt_of,
    step_of,
    topic_names,
)
from attention_rl_trainer.types import Trajectory

Plan = tuple[int, ...]
_ROWS_AT_ONCE = 8192


@dataclass(frozen=True)
class KnownPolicies:
    """The best and the random policy of a taught model.

    Attributes:
        best_plan: topics in the order in which the best policy asks for them.
        best: its mean gain, nats per token.
        random: mean gain of the policy that asks as the base model does.
    """

    best_plan: Plan
    best: float
    random: float

    def gap_closed(self, gain: float) -> float:
        """Return how far a policy of a given mean gain got: 0 for the random one, 1 for the best.

        Args:
            gain: nats per token.
        """
        return (gain - self.random) / (self.best - self.random)


class BaseReader:
    """The untouched base model as a judge of queries.

    Args:
        policy: the adapted model; its reference is the base model.
    """

    def __init__(self, policy: PolicyModel) -> None:
        self._policy = policy

    def gains(self, contexts: Tensor, queries: Tensor, values: Tensor) -> Tensor:
        """Judge queries.

        Args:
            contexts: everything before the query, ``[n, C]`` int64.
            queries: ``[n, 2]`` int64.
            values: what was read behind each, ``[n, 2]`` int64.

        Returns:
            Nats per token, ``[n]``.
        """
        _, behind_query = self.read(contexts, queries, values)
        expected, _ = self.expectation(contexts, values)
        return behind_query - expected

    def expectation(self, contexts: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Read values behind what the base model would ask.

        Args:
            contexts: ``[n, C]`` int64.
            values: ``[n, 2]`` int64.

        Returns:
            The expected log-probability of each value, nats per token, ``[n]``, and the probability of each topic's
            name as a query, ``[n, topics + 1]``.
        """
        names = topic_names()
        count = len(names)
        name_logprobs, value_logprobs = (
            result.view(-1, count)
            for result in self.read(
                contexts.repeat_interleave(count, dim=0),
                names.repeat(len(contexts), 1),
                values.repeat_interleave(count, dim=0),
            )
        )
        probabilities = name_logprobs.softmax(dim=1)
        return (probabilities * value_logprobs).sum(dim=1), probabilities

    def read(self, contexts: Tensor, queries: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Read values behind queries.

        Args:
            contexts: ``[n, C]`` int64.
            queries: ``[n, 2]`` int64.
            values: ``[n, 2]`` int64.

        Returns:
            Log-probability of each query, nats, and of the value behind it, nats per token; ``[n]`` each.
        """
        # The last separator is not read.
        sequences = torch.cat([contexts, step_of(queries, values)[:, :-1]], dim=1)
        query_parts, value_parts = [], []
        with self._policy.inference(), self._policy.reference():
            for chunk in torch.split(sequences, _ROWS_AT_ONCE):
                hidden = self._policy.forward(chunk)[:, contexts.shape[1] - 1 : -1]
                scores = self._policy.head(hidden).log_softmax(dim=-1)
                scores = scores.gather(2, chunk[:, contexts.shape[1] :, None]).squeeze(2)
                query_parts.append(scores[:, :NAME_LENGTH].sum(dim=1))
                value_parts.append(scores[:, -VALUE_LENGTH:].mean(dim=1))
        return torch.cat(query_parts), torch.cat(value_parts)


def enumerate_policies(reader: BaseReader, values: Tensor) -> KnownPolicies:
    """Score every plan on some articles.

    Args:
        reader: the base model.
        values: every topic's value in each article, ``[m, topics + 1, 2]`` int64.

    Returns:
        The best and the random policy.
    """
    num_articles, names = len(values), topic_names()
    articles = torch.arange(num_articles)
    plans: list[Plan] = [()]
    contexts = prompt_of(values)[:, None]
    gains = torch.zeros(num_articles, 1)
    probabilities = torch.ones(num_articles, 1)
    for _ in range(NUM_STEPS):
        longer = [
            (place, topic) for place, plan in enumerate(plans) for topic in range(NUM_TOPICS) if topic not in plan
        ]
        parents, topics = torch.tensor(longer).T
        context = contexts[:, parents].flatten(0, 1)
        name = names[topics].repeat(num_articles, 1)
        value = values[articles[:, None], topics].flatten(0, 1)
        expected, asked = reader.expectation(context, value)
        _, behind_name = reader.read(context, name, value)
        gains = gains[:, parents] + (behind_name - expected).view(num_articles, -1) / NUM_STEPS
        # Of a topic that is still there; what was drawn cannot be drawn again.
        asked = asked.view(num_articles, len(longer), -1)
        rest = torch.ones(len(longer), NUM_TOPICS + 1)
        rest[:, EXAMPLE_TOPIC] = 0
        for place, (parent, _topic) in enumerate(longer):
            rest[place, list(plans[parent])] = 0
        chosen = asked[:, torch.arange(len(longer)), topics] / (asked * rest).sum(dim=2)
        probabilities = probabilities[:, parents] * chosen
        contexts = torch.cat([context, step_of(name, value)], dim=1).view(num_articles, len(longer), -1)
        plans = [(*plans[parent], topic) for parent, topic in longer]
    by_plan = gains.mean(dim=0)
    best = int(by_plan.argmax())
    random = (gains * probabilities).sum(dim=1).mean()
    return KnownPolicies(plans[best], by_plan[best].item(), random.item())


def trajectory_gains(reader: BaseReader, trajectory: Trajectory) -> Tensor:
    """Judge the queries of trajectories.

    Args:
        reader: the base model.
        trajectory: the trajectories.

    Returns:
        Mean over the steps, nats per token, ``[B]``.
    """
    steps = [
        reader.gains(step.context_tokens, step.query_tokens, step.selected_pair.value_tokens)
        for step in trajectory.steps
    ]
    return torch.stack(steps, dim=1).mean(dim=1)
