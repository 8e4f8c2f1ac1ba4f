"""How far a policy got between the random and the best one, both known by enumeration (design §11).

What a query is worth is measured by the untouched base model alone, exactly and not by sampling: the log-probability of
the value after the query, less its expectation after the base model's own queries, which are names of topics:

    gain(context, query, value) = log p(value | query) - Σ_c p(name_c | context) · log p(value | name_c)

Plans, that is, ordered choices of topics, are enumerated with their names as queries. The best policy follows the plan
of the highest mean gain; the random one asks as the base model does.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attention_rl_trainer.models.policy import PolicyModel
from attention_rl_trainer.selftest.language import (
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
    """The best and the random policy of a taught model."""

    best_plan: Plan
    """Topics in the order in which the best policy asks for them."""
    best: float
    """Its mean gain, nats per token."""
    random: float
    """Mean gain of the policy that asks as the base model does."""

    def gap_closed(self, gain: float) -> float:
        """Return how far a policy of a given mean gain got: 0 for the random one, 1 for the best."""
        return (gain - self.random) / (self.best - self.random)


class BaseReader:
    """The untouched base model, a policy's reference, as a judge of queries."""

    def __init__(self, policy: PolicyModel) -> None:
        self._policy = policy

    def read(self, contexts: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Read queries, ``[n, 2]`` int64, in contexts ``[n, P]`` int64.

        Returns:
            Log-probability of each query, ``[n]``, and of every value after it, ``[n, vocabulary]``, nats.
        """
        response = step_of(queries, queries[:, :VALUE_LENGTH])[:, NAME_LENGTH : NAME_LENGTH + 1]
        sequences = torch.cat([contexts, queries, response], dim=1)
        query_parts, value_parts = [], []
        with self._policy.inference(), self._policy.reference():
            for chunk in torch.split(sequences, _ROWS_AT_ONCE):
                hidden = self._policy.forward(chunk)[:, contexts.shape[1] - 1 :]
                scores = self._policy.head(hidden).log_softmax(dim=-1)
                names = chunk[:, contexts.shape[1] : -1]
                query_parts.append(scores[:, :NAME_LENGTH].gather(2, names[:, :, None]).sum(dim=(1, 2)))
                value_parts.append(scores[:, -1])
        return torch.cat(query_parts), torch.cat(value_parts)

    def read_names(self, contexts: Tensor) -> tuple[Tensor, Tensor]:
        """Read every topic's name as a query in contexts ``[n, P]`` int64.

        Returns:
            Probability of each name as the base model's query, ``[n, topics + 1]``, and log-probability of every value
            after it, ``[n, topics + 1, vocabulary]``.
        """
        names = topic_names()
        count = len(names)
        asked, values = self.read(contexts.repeat_interleave(count, dim=0), names.repeat(len(contexts), 1))
        return asked.view(-1, count).softmax(dim=1), torch.unflatten(values, 0, (-1, count))

    def gains(self, contexts: Tensor, queries: Tensor, values: Tensor) -> Tensor:
        """Judge queries ``[n, 2]`` in contexts ``[n, P]`` by the values ``[n, 1]`` read after them: gains, ``[n]``."""
        probabilities, after_names = self.read_names(contexts)
        _, after_query = self.read(contexts, queries)
        after_names = after_names.gather(2, values[:, None].expand(-1, after_names.shape[1], -1)).squeeze(2)
        expected = (probabilities * after_names).sum(dim=1)
        return after_query.gather(1, values)[:, 0] - expected


def enumerate_policies(reader: BaseReader, values: Tensor) -> KnownPolicies:
    """Score every plan on m articles, by every topic's value in each, ``[m, topics + 1, 1]`` int64."""
    num_articles, names = len(values), topic_names()
    plans: list[Plan] = [()]
    contexts = prompt_of(values)[:, None]
    gains = torch.zeros(num_articles, 1)
    probabilities = torch.ones(num_articles, 1)
    for _ in range(NUM_STEPS):
        asked, after_names = reader.read_names(contexts.flatten(0, 1))
        # Of every topic's value after every name, [m, plans, names, topics].
        present = values[:, None, None, :NUM_TOPICS, 0].expand(-1, len(plans), len(names), -1)
        read = torch.unflatten(after_names, 0, (num_articles, -1)).gather(3, present)
        asked = asked.view(num_articles, len(plans), -1)
        step_gains = read.diagonal(dim1=2, dim2=3) - torch.einsum("mpn,mpnt->mpt", asked, read)
        # What was drawn cannot be drawn again.
        is_there = torch.tensor([[topic not in plan for topic in range(NUM_TOPICS)] for plan in plans])
        chances = asked[:, :, :NUM_TOPICS] * is_there
        chances = chances / chances.sum(dim=2, keepdim=True)
        parents, topics = is_there.nonzero().T
        gains = gains[:, parents] + step_gains[:, parents, topics] / NUM_STEPS
        probabilities = probabilities[:, parents] * chances[:, parents, topics]
        steps = step_of(names[topics].repeat(num_articles, 1), values[:, topics].flatten(0, 1))
        contexts = torch.cat([contexts[:, parents], torch.unflatten(steps, 0, (num_articles, -1))], dim=2)
        plans = [(*plans[parent], topic) for parent, topic in zip(parents.tolist(), topics.tolist(), strict=True)]
    by_plan = gains.mean(dim=0)
    best = int(by_plan.argmax())
    random = (gains * probabilities).sum(dim=1).mean()
    return KnownPolicies(plans[best], by_plan[best].item(), random.item())


def trajectory_gains(reader: BaseReader, trajectory: Trajectory) -> Tensor:
    """Judge the queries of trajectories: mean gain over the steps, nats per token, ``[B]``."""
    steps = [
        reader.gains(step.context_tokens, step.query_tokens, step.selected_pair.value_tokens)
        for step in trajectory.steps
    ]
    return torch.stack(steps, dim=1).mean(dim=1)
