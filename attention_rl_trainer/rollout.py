"""Articles' pairs into trajectories: the one place that joins policy, environment and reward (design §6).

Policy and reference each keep a key-value cache over the whole trajectory, so every token of the context passes through
each of them once (`reading`). Where a step's cost goes:

1. L single tokens decode the policy's query, whose attention vectors draw a pair, and the reference's counterfactual;
2. one forward of ``[" Response:"] value [" Query:"]`` scores the value behind either query and opens the next step;
3. the reference, rolled back, reads ``query [" Response:"] value [" Query:"]``, which brings it level with the context
   and scores the value behind the policy's query.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attention_rl_trainer.finiteness import expect_finite
from attention_rl_trainer.memory import MemoryEnvironment
from attention_rl_trainer.pairs import ArticleBatch, ArticleReference, add_embeddings
from attention_rl_trainer.policy import PolicyModel
from attention_rl_trainer.reading import open_readers
from attention_rl_trainer.reward import calculate_reward, trajectory_reward, value_logprob
from attention_rl_trainer.sampling import Purpose, episode_noise
from attention_rl_trainer.tokenization import Separators
from attention_rl_trainer.types import KeyValuePair, Trajectory, TrajectoryStep


@dataclass(frozen=True)
class RolloutSettings:
    """What a rollout does.

    Attributes:
        num_steps: T.
        tokens_per_query: L.
        seed: seed of the episodes' streams.
        include_key_in_context: whether the drawn key is put before its value: ``[" Response:"] key value``.
        compute_order_gain: whether `TrajectoryStep.order_gain` is wanted; costs T more forwards of the reference.
        order_coef: weight of the order gain in the reward.
    """

    num_steps: int
    tokens_per_query: int
    seed: int
    include_key_in_context: bool = False
    compute_order_gain: bool = False
    order_coef: float = 0.0


def trajectory_length(
    separators: Separators, settings: RolloutSettings, tokens_per_key: int, tokens_per_value: int
) -> int:
    """Count the tokens S of a whole trajectory, which must fit into the model's context.

    Args:
        separators: the two separators' ids.
        settings: steps, query length and layout.
        tokens_per_key: K.
        tokens_per_value: V.
    """
    frame = len(separators.query) + len(separators.response)
    response = tokens_per_value + (tokens_per_key if settings.include_key_in_context else 0)
    example = frame + tokens_per_key + tokens_per_value
    return example + settings.num_steps * (frame + settings.tokens_per_query + response)


def predicting(hidden: Tensor, start: int, count: int) -> Tensor:
    """Take the states that predict the tokens ``start .. start + count - 1``: those one position earlier.

    Args:
        hidden: ``[B, S, C]``.
        start: position of the first predicted token, at least 1.
        count: number of tokens.
    """
    return hidden[:, start - 1 : start - 1 + count]


class TrajectorySampler:
    """Rolls batches of trajectories out.

    Args:
        policy: the adapted model and its reference.
        environment: where queries draw pairs from.
        separators: the separators' ids.
        settings: what to do.
        joint: whether policy and reference share a batch; by default wherever they can.
    """

    def __init__(
        self,
        policy: PolicyModel,
        environment: MemoryEnvironment,
        separators: Separators,
        settings: RolloutSettings,
        *,
        joint: bool | None = None,
    ) -> None:
        self.policy = policy
        self.environment = environment
        self.settings = settings
        self.joint = joint
        self._separators = separators
        self._query_separator = torch.tensor(separators.query, device=policy.device)
        self._response_separator = torch.tensor(separators.response, device=policy.device)

    def sample(self, batch: ArticleBatch, episodes: Sequence[int]) -> Trajectory:
        """Roll one batch out, in evaluation mode and without gradients.

        Args:
            batch: the pairs of B articles.
            episodes: the running number of each row's episode, which seeds its streams.

        Returns:
            The trajectories.

        Raises:
            NonFiniteError: a logit, vector, probability or reward is not finite; names which, the step of the
                trajectory and the article.
            ValueError: the memory holds fewer pairs than steps.
        """
        if self.settings.num_steps > batch.pair_numbers.shape[1]:
            raise ValueError(
                f"num_steps is {self.settings.num_steps}, but a memory holds {batch.pair_numbers.shape[1]} pairs"
            )
        with self.policy.inference():
            return self._sample(batch, episodes)

    def _sample(self, batch: ArticleBatch, episodes: Sequence[int]) -> Trajectory:
        embedded_before = self.policy.embedded_tokens
        memory = add_embeddings(batch, self.policy.embed_keys)
        embedded_tokens = self.policy.embedded_tokens - embedded_before
        expect_finite({"key vector": memory.key_vectors}, batch.articles, trajectory_step=0)
        self.environment.reset(memory)
        prompt, num_steps = self.prompt(batch), self.settings.num_steps
        noise = self.noise(episodes, num_steps)
        run = _Run(self, batch.articles, prompt, self.cache_capacity(batch), noise)
        steps = [run.step(number) for number in range(num_steps)]
        rewards = torch.stack([step.reward for step in steps], dim=1)
        total_reward = rewards.sum(dim=1)
        expect_finite({"total reward": total_reward}, batch.articles, trajectory_step=num_steps)
        return Trajectory(
            steps=steps,
            avg_reward=trajectory_reward(rewards),
            total_reward=total_reward,
            token_ids=torch.cat(run.blocks, dim=1),
            query_starts=run.query_starts,
            value_starts=run.value_starts,
            memory=memory,
            episodes=torch.tensor(list(episodes), dtype=torch.int64),
            forward_tokens=run.readers.forward_tokens + embedded_tokens,
        )

    def prompt(self, batch: ArticleBatch) -> Tensor:
        """Build ``[" Query:"] key_0 [" Response:"] value_0 [" Query:"]``, ``[B, S0]``.

        Args:
            batch: the articles.
        """
        device, rows = self.policy.device, len(batch)
        return torch.cat(
            [
                self.separator(self._query_separator, rows),
                batch.example_keys.to(device),
                self.separator(self._response_separator, rows),
                batch.example_values.to(device),
                self.separator(self._query_separator, rows),
            ],
            dim=1,
        )

    def noise(self, episodes: Sequence[int], num_steps: int) -> dict[Purpose, Tensor]:
        """Draw the uniform numbers of episodes; more steps leave those of the first ones as they are.

        Args:
            episodes: running numbers of the episodes.
            num_steps: T.

        Returns:
            ``[B, T, L]`` for the queries, ``[B, T]`` for the draws of pairs.
        """
        tokens, seed = self.settings.tokens_per_query, self.settings.seed
        shapes = {
            Purpose.POLICY: (num_steps, tokens),
            Purpose.COUNTERFACTUAL: (num_steps, tokens),
            Purpose.SELECTION: (num_steps,),
        }
        return {
            purpose: episode_noise(seed, episodes, purpose, shape).to(self.policy.device)
            for purpose, shape in shapes.items()
        }

    def cache_capacity(self, batch: ArticleBatch, num_steps: int | None = None) -> int:
        """Count the tokens that a row of the caches must hold: a whole trajectory, and the separator of its prompt.

        Args:
            batch: the pairs that will be read.
            num_steps: T; by default that of the settings.
        """
        key, value = batch.key_tokens.shape[2], batch.value_tokens.shape[2]
        settings = self.settings if num_steps is None else replace(self.settings, num_steps=num_steps)
        return trajectory_length(self._separators, settings, key, value) + len(self._separators.query)

    @staticmethod
    def separator(token_ids: Tensor, rows: int) -> Tensor:
        """Repeat a separator for every row, ``[B, n]``."""
        return token_ids.expand(rows, -1)

    def response(self, pair: KeyValuePair, *, is_last: bool) -> tuple[Tensor, int]:
        """Build what follows a query.

        Args:
            pair: the drawn pair.
            is_last: whether no query follows.

        Returns:
            ``[" Response:"] (key) value ([" Query:"])``, and the place of the value's first token in it.
        """
        rows = pair.value_tokens.shape[0]
        parts = [self.separator(self._response_separator, rows)]
        if self.settings.include_key_in_context:
            parts.append(pair.key_tokens)
        value_offset = sum(part.shape[1] for part in parts)
        parts.append(pair.value_tokens)
        if not is_last:
            parts.append(self.separator(self._query_separator, rows))
        return torch.cat(parts, dim=1), value_offset

    def score(self, hidden: Tensor, start: int, value_tokens: Tensor) -> Tensor:
        """Mean log-probability of a value whose first token stands at ``start``, ``[B]``."""
        states = predicting(hidden, start, value_tokens.shape[1])
        return value_logprob(self.policy.token_logprobs(states, value_tokens))


class _Run:
    """The state of one batch while it is rolled out."""

    def __init__(
        self,
        sampler: TrajectorySampler,
        articles: Sequence[ArticleReference],
        prompt: Tensor,
        capacity: int,
        noise: dict[Purpose, Tensor],
    ) -> None:
        self.sampler = sampler
        self.articles = articles
        self.noise = noise
        self.blocks = [prompt]
        self.query_starts: list[int] = []
        self.value_starts: list[int] = []
        self.readers = open_readers(sampler.policy, prompt, capacity, joint=sampler.joint)

    def step(self, number: int) -> TrajectoryStep:
        sampler, settings = self.sampler, self.sampler.settings
        context = torch.cat(self.blocks, dim=1)
        queries = self.readers.write_queries(
            self.noise[Purpose.POLICY][:, number], self.noise[Purpose.COUNTERFACTUAL][:, number]
        )
        query, counterfactual = queries.query, queries.counterfactual
        # The entropy is finite only where the logit of every token is.
        quantities = {
            "policy logit": query.logprobs + query.entropy,
            "base model logit": counterfactual.logprobs + counterfactual.entropy,
            "query vector": queries.vectors,
        }
        expect_finite(quantities, self.articles, trajectory_step=number + 1)
        selection = sampler.environment.step(queries.vectors, self.noise[Purpose.SELECTION][:, number])
        value = selection.pairs.value_tokens
        block, value_offset = sampler.response(selection.pairs, is_last=number == settings.num_steps - 1)
        num_scored = value_offset + value.shape[1]
        policy_hidden, counterfactual_hidden = self.readers.read_response(block, num_scored)
        policy_logprob = sampler.score(policy_hidden, value_offset, value)
        counterfactual_logprob = sampler.score(counterfactual_hidden, value_offset, value)
        base_hidden = self.readers.follow(torch.cat([query.token_ids, block], dim=1))
        base_logprob = sampler.score(base_hidden, settings.tokens_per_query + value_offset, value)
        order_gain = self._order_gain(
            number, counterfactual.token_ids, block[:, :num_scored], value, counterfactual_logprob
        )
        reward = calculate_reward(policy_logprob, counterfactual_logprob)
        if order_gain is not None:
            reward = reward + settings.order_coef * order_gain
        quantities = {
            "selection probability": selection.probabilities,
            "policy logit or log-probability of a value": policy_logprob,
            "base model logit or log-probability of a value": base_logprob,
            "base model logit or log-probability of a value behind its own query": counterfactual_logprob,
            "reward": reward,
        }
        expect_finite(quantities, self.articles, trajectory_step=number + 1)
        self.query_starts.append(context.shape[1])
        self.value_starts.append(context.shape[1] + settings.tokens_per_query + value_offset)
        self.blocks += [query.token_ids, block]
        return TrajectoryStep(
            context_tokens=context,
            query_tokens=query.token_ids,
            selected_pair=selection.pairs,
            reward=reward,
            similarity_score=selection.probabilities.gather(1, selection.index[:, None]).squeeze(1),
            selected_index=selection.index,
            selection_probabilities=selection.probabilities,
            query_logprobs=query.logprobs,
            query_entropy=query.entropy,
            counterfactual_tokens=counterfactual.token_ids,
            policy_value_logprob=policy_logprob,
            base_value_logprob=base_logprob,
            counterfactual_value_logprob=counterfactual_logprob,
            order_gain=order_gain,
        )

    def _order_gain(
        self, number: int, counterfactual: Tensor, block: Tensor, value: Tensor, in_context: Tensor
    ) -> Tensor | None:
        """What the pairs read so far brought to the reference, under the same counterfactual query."""
        if not self.sampler.settings.compute_order_gain:
            return None
        if number == 0:
            return torch.zeros_like(in_context)
        hidden = self.readers.read_behind_prompt(torch.cat([counterfactual, block], dim=1))
        start = hidden.shape[1] - value.shape[1]
        return in_context - self.sampler.score(hidden, start, value)
