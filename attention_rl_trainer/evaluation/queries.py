"""What a query is worth to the frozen reader: the policy's, and others in its place (design §11).

The policy's trajectories are followed by the base model. Before every value it reads each of these in the same context,
under the policy's own order, and then the value:

* the policy's query, sampled as in training;
* nothing, the empty query;
* another key of the memory, a *form control*: a well-formed query of another pair;
* the key of the very pair that was drawn;
* a content control: the policy's query at the same step of a trajectory on another article;
* counterfactual queries that the base model samples, several of them.

A query's gain is the log-probability of the value after it less the mean of those after the counterfactuals, nats per
token. A policy whose gain stays below the empty query's has learned nothing that silence would not give.

Beside the gains, what the queries say: whether each names the pair that it drew, by its tokens alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attention_rl_trainer.memories.pairs import MemoryBatch
from attention_rl_trainer.models.readers import ContextReader
from attention_rl_trainer.models.sampling import Purpose, episode_noise
from attention_rl_trainer.rollout.sampler import TrajectorySampler
from attention_rl_trainer.types import ArticleReference, Trajectory, is_token

POLICY, EMPTY, OTHER_KEY, OWN_KEY, CONTROL = (
    "policy",
    "empty query",
    "another key of the article",
    "the pair's own key",
    "content control",
)
FORM = "form control"
"""What the policy's query is compared with where it is compared with `OTHER_KEY`."""


@dataclass(frozen=True, eq=False)
class QueryGains:
    """What queries were worth on a batch of trajectories, averaged over the steps."""

    gains: dict[str, Tensor]
    """Nats per token, ``[B]``, by the name of the query."""
    counterfactual_std: Tensor
    """Standard deviation between the counterfactuals of a step, nats per token, ``[B]``."""


class ControlQueries:
    """Gives each trajectory the policy's queries from a trajectory on another article."""

    def __init__(self) -> None:
        self._articles: list[tuple[str, int]] = []
        self._queries: Tensor | None = None

    def has_others(self, articles: Sequence[ArticleReference]) -> bool:
        """Whether each of the articles, which come next, has a trajectory on another one to take queries from."""
        return len({*self._articles, *((article.source, article.article_index) for article in articles)}) > 1

    def take(self, articles: Sequence[ArticleReference], queries: Tensor) -> Tensor:
        """Choose for each row of queries ``[B, T, L]`` the next row, cyclically, or else the last before the batch.

        Raises:
            ValueError: no trajectory so far is on another article.
        """
        earlier = 0 if self._queries is None else len(self._queries)
        identities = [*self._articles, *((article.source, article.article_index) for article in articles)]
        pool = queries if self._queries is None else torch.cat([self._queries, queries])
        rows = []
        for row in range(earlier, len(identities)):
            following = [*range(row + 1, len(identities)), *range(earlier, row), *reversed(range(earlier))]
            others = [other for other in following if identities[other] != identities[row]]
            if not others:
                raise ValueError(
                    "the content control takes queries from a trajectory on another article, but all trajectories so "
                    f"far are on {articles[0].title!r}; evaluate on more articles, or raise generation_batch_size"
                )
            rows.append(others[0])
        self._articles, self._queries = identities[earlier:], queries
        return pool[rows]


def score_queries(
    sampler: TrajectorySampler,
    batch: MemoryBatch,
    trajectory: Trajectory,
    control_queries: Tensor,
    *,
    num_counterfactuals: int = 4,
) -> QueryGains:
    """Score the queries of trajectories that the sampler rolled out, and others in their place.

    Args:
        control_queries: the policy's queries from trajectories on other articles, ``[B, T, L]`` int64.
        num_counterfactuals: queries of the base model at each step, at least 1; the first is the rollout's own.

    Raises:
        ValueError: there is no counterfactual.
    """
    if num_counterfactuals < 1:
        raise ValueError(f"num_counterfactuals must be at least 1, got {num_counterfactuals}")
    with sampler.policy.inference(), sampler.policy.reference():
        return _Replay(sampler, batch, trajectory, control_queries).score(num_counterfactuals)


def rouge_l(first: Tensor, second: Tensor) -> Tensor:
    """Compare token sequences by the F1 of ROUGE-L (Lin 2004): 2 · LCS / (L + K).

    LCS is the length of the longest common subsequence: tokens in the same order, not necessarily in a row.

    Args:
        first: ``[..., L]`` int64; padding is no token.
        second: ``[..., K]`` int64; the other dimensions broadcast.

    Returns:
        ``[...]`` float32, 0 where no token is shared, 1 for equal sequences.
    """
    is_same = (first[..., :, None] == second[..., None, :]) & is_token(first)[..., :, None]
    length = is_same.new_zeros((*is_same.shape[:-2], is_same.shape[-1] + 1), dtype=torch.int64)
    for row in is_same.unbind(dim=-2):
        # A row of the usual table at once: what it takes from the left is a running maximum.
        extended = torch.maximum(length[..., 1:], length[..., :-1] + row)
        length[..., 1:] = extended.cummax(dim=-1).values
    return 2 * length[..., -1] / (is_token(first).sum(dim=-1) + is_token(second).sum(dim=-1))


def names_its_pair(trajectory: Trajectory, queries: Tensor) -> Tensor:
    """Tell which queries are closer, by `rouge_l`, to the key of the pair drawn than to every other key of the memory.

    Args:
        queries: the trajectory's own or others in their place, ``[B, T, L]`` int64.

    Returns:
        ``[B, T]`` bool on the CPU; false where another key is as close.

    Raises:
        ValueError: a memory has a single pair, so that there is nothing to tell it from.
    """
    keys, chosen = trajectory.memory.key_tokens.cpu(), trajectory.stack("selected_index").cpu()[..., None]
    if keys.shape[1] < 2:
        raise ValueError("a query names a pair among others, but these memories have a single one")
    closeness = rouge_l(queries.cpu()[:, :, None], keys[:, None])
    nearest_other = closeness.scatter(2, chosen, -1.0).amax(dim=2)
    return closeness.gather(2, chosen).squeeze(2) > nearest_other


def draw_other_columns(trajectory: Trajectory, seed: int) -> Tensor:
    """Draw for each step a column of the memory other than the one read there, ``[B, T]``, on the CPU."""
    chosen = trajectory.stack("selected_index").cpu()
    num_pairs = trajectory.memory.pair_numbers.shape[1]
    noise = episode_noise(seed, trajectory.episodes.tolist(), Purpose.EVALUATION, (chosen.shape[1],))
    # One of the M - 1 others, counted from the chosen one; a memory of one pair has no other.
    shift = 1 + (noise * max(1, num_pairs - 1)).long()
    return (chosen + shift) % num_pairs


class _Replay:
    """The base model following trajectories that were rolled out."""

    def __init__(
        self, sampler: TrajectorySampler, batch: MemoryBatch, trajectory: Trajectory, control_queries: Tensor
    ) -> None:
        self._sampler = sampler
        self._trajectory = trajectory
        self._control_queries = control_queries
        self._other_columns = draw_other_columns(trajectory, sampler.seed)
        keys = trajectory.memory.key_tokens.shape[2]
        self._layout = sampler.layout.for_batch(batch)
        # A key in a query's place may be longer.
        capacity = self._layout.cached_tokens + max(0, keys - self._layout.tokens_per_query)
        prompt = self._layout.prompt(batch, sampler.policy.device)
        self._reader = ContextReader(sampler.policy, prompt, capacity, padded=batch.is_padded)

    def score(self, num_counterfactuals: int) -> QueryGains:
        """Follow the trajectories to their end."""
        trajectory, layout = self._trajectory, self._layout
        noise = episode_noise(
            self._sampler.seed,
            trajectory.episodes.tolist(),
            Purpose.COUNTERFACTUAL,
            (num_counterfactuals, layout.num_steps, layout.tokens_per_query),
        ).to(self._sampler.policy.device)
        scores: dict[str, list[Tensor]] = {}
        counterfactuals: list[Tensor] = []
        num_steps = len(trajectory.steps)
        for number, step in enumerate(trajectory.steps):
            block = layout.response(step.selected_pair, is_last=number == num_steps - 1)
            value = step.selected_pair.value_tokens
            response = block[:, : layout.scored_tokens]
            for name, query in self._queries(number).items():
                scores.setdefault(name, []).append(self._score_after(query, response, value))
            drawn = [step.counterfactual_value_logprob]
            drawn += [self._score_counterfactual(noise[:, k, number], response, value) for k in range(1, len(noise[0]))]
            counterfactuals.append(torch.stack(drawn, dim=1))
            self._reader.read(torch.cat([step.query_tokens, block], dim=1))
        after_counterfactuals = torch.stack(counterfactuals, dim=1)
        baseline = after_counterfactuals.mean(dim=2)
        scores[POLICY] = [step.base_value_logprob for step in trajectory.steps]
        gains = {name: (torch.stack(steps, dim=1) - baseline).mean(dim=1) for name, steps in scores.items()}
        spread = after_counterfactuals.std(dim=2, correction=0).mean(dim=1)
        return QueryGains(gains, spread)

    def _queries(self, number: int) -> dict[str, Tensor]:
        """What is read in place of the policy's query at a step."""
        step, memory = self._trajectory.steps[number], self._trajectory.memory
        queries = {
            EMPTY: step.query_tokens[:, :0],
            OWN_KEY: step.selected_pair.key_tokens,
            CONTROL: self._control_queries[:, number],
        }
        if memory.pair_numbers.shape[1] > 1:
            other = self._other_columns[:, number].to(memory.key_tokens.device)
            queries[OTHER_KEY] = memory.gather(other).key_tokens
        return queries

    def _score_after(self, query: Tensor, response: Tensor, value: Tensor) -> Tensor:
        """Log-probability of a value after a query in the present context, ``[B]``."""
        token_ids = torch.cat([query, response], dim=1)
        self._reader.mark()
        hidden = self._reader.read(token_ids)
        self._reader.roll_back(token_ids.shape[1])
        return self._sampler.score(hidden, token_ids.shape[1] - value.shape[1], value)

    def _score_counterfactual(self, noise: Tensor, response: Tensor, value: Tensor) -> Tensor:
        """Log-probability of a value after a query that the base model samples, ``[B]``."""
        self._reader.mark()
        query = self._reader.decode(noise, read_last=False)
        token_ids = torch.cat([query.token_ids[:, -1:], response], dim=1)
        hidden = self._reader.read(token_ids)
        self._reader.roll_back(noise.shape[1] - 1 + token_ids.shape[1])
        return self._sampler.score(hidden, token_ids.shape[1] - value.shape[1], value)
