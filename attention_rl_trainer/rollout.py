"""Articles' pairs into trajectories: the one place that joins policy, environment and reward (design §6).

Policy and reference each keep a key-value cache over the whole trajectory, so every token of the context passes through
each of them once. Where a step's cost goes, in forwards of B rows:

1. policy: L single tokens decode the query, whose attention vectors draw a pair;
2. policy: one forward of ``[" Response:"] value [" Query:"]`` scores the value and opens the next step;
3. reference: L - 1 single tokens decode a counterfactual query, one forward scores the value behind it;
4. reference: rolled back, one forward of ``query [" Response:"] value [" Query:"]`` brings it level and scores the
   value behind the policy's query.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from attention_rl_trainer.memory import MemoryEnvironment, Selection
from attention_rl_trainer.pairs import ArticleBatch, ArticleReference, add_embeddings
from attention_rl_trainer.policy import DecodedQuery, PolicyModel, deterministic_inference
from attention_rl_trainer.reward import calculate_reward, trajectory_reward, value_logprob
from attention_rl_trainer.sampling import Purpose, episode_noise
from attention_rl_trainer.tokenization import Separators
from attention_rl_trainer.types import KeyValuePair, Trajectory, TrajectoryStep


class NonFiniteError(ArithmeticError):
    """A logit, embedding, reward or gradient is NaN or infinite."""


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


class _Reader:
    """One reader's cache and the state that predicts the next token."""

    def __init__(self, policy: PolicyModel, prompt: Tensor) -> None:
        self._policy = policy
        self._saved: DynamicCache | None = None
        self.cache = policy.new_cache()
        self.forward_tokens = 0
        self.last_hidden = self.read(prompt)[:, -1]

    def read(self, token_ids: Tensor) -> Tensor:
        """Append tokens to the context; returns their hidden states ``[B, S, C]``."""
        hidden = self._policy.forward(token_ids, self.cache)
        self.last_hidden = hidden[:, -1]
        self.forward_tokens += token_ids.numel()
        return hidden

    def decode(self, noise: Tensor, *, read_last: bool) -> DecodedQuery:
        """Sample a query in the present context."""
        self.forward_tokens += noise.shape[0] * (noise.shape[1] - (0 if read_last else 1))
        return self._policy.decode_query(self.cache, self.last_hidden, noise, read_last=read_last)

    def mark(self) -> None:
        """Remember the present context for `roll_back`: a copy where a layer forgets old tokens or has a state."""
        can_crop = all(type(layer) is DynamicLayer for layer in self.cache.layers)
        self._saved = None if can_crop else copy.deepcopy(self.cache)

    def roll_back(self, num_tokens: int) -> None:
        """Forget the tokens that were read since `mark`."""
        if self._saved is None:
            self.cache.crop(-num_tokens)
        else:
            self.cache = self._saved


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
    """

    def __init__(
        self, policy: PolicyModel, environment: MemoryEnvironment, separators: Separators, settings: RolloutSettings
    ) -> None:
        self.policy = policy
        self.environment = environment
        self.settings = settings
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
            NonFiniteError: a logit, embedding or reward is not finite; names step, article and place.
            ValueError: the memory holds fewer pairs than steps.
        """
        if self.settings.num_steps > batch.pair_numbers.shape[1]:
            raise ValueError(
                f"num_steps is {self.settings.num_steps}, but a memory holds {batch.pair_numbers.shape[1]} pairs"
            )
        with deterministic_inference(self.policy.model):
            return self._sample(batch, episodes)

    def _sample(self, batch: ArticleBatch, episodes: Sequence[int]) -> Trajectory:
        memory = add_embeddings(batch, self.policy.embed_keys)
        self._expect_finite({"key embedding": memory.key_vectors.flatten(1)}, 0, batch.articles)
        self.environment.reset(memory)
        prompt = self._prompt(batch)
        run = _Run(self, batch.articles, prompt, self._noise(episodes))
        steps = [run.step(number) for number in range(self.settings.num_steps)]
        rewards = torch.stack([step.reward for step in steps], dim=1)
        return Trajectory(
            steps=steps,
            avg_reward=trajectory_reward(rewards),
            total_reward=rewards.sum(dim=1),
            token_ids=torch.cat(run.blocks, dim=1),
            query_starts=run.query_starts,
            value_starts=run.value_starts,
            memory=memory,
            episodes=torch.tensor(list(episodes), dtype=torch.int64),
            forward_tokens=run.forward_tokens + batch.key_tokens.numel(),
        )

    def _prompt(self, batch: ArticleBatch) -> Tensor:
        """Build ``[" Query:"] key_0 [" Response:"] value_0 [" Query:"]``, ``[B, S0]``."""
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

    def _noise(self, episodes: Sequence[int]) -> dict[Purpose, Tensor]:
        steps, tokens, seed = self.settings.num_steps, self.settings.tokens_per_query, self.settings.seed
        shapes = {
            Purpose.POLICY: (steps, tokens),
            Purpose.COUNTERFACTUAL: (steps, tokens),
            Purpose.SELECTION: (steps,),
        }
        return {
            purpose: episode_noise(seed, episodes, purpose, shape).to(self.policy.device)
            for purpose, shape in shapes.items()
        }

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

    @staticmethod
    def _expect_finite(places: dict[str, Tensor], step: int, articles: Sequence[ArticleReference]) -> None:
        finite = torch.stack([values.isfinite().flatten(1).all(dim=1) for values in places.values()])
        if bool(finite.all()):
            return
        place, row = (~finite).nonzero()[0].tolist()
        raise NonFiniteError(
            f"{list(places)[place]} is not finite at step {step} of the trajectory on article "
            f"{articles[row].title!r} ({articles[row].source}, row {row} of the batch). Nothing was trained on it. "
            "Check the model's weights and precision; a lower learning_rate or float32 weights may help"
        )


class _Run:
    """The state of one batch while it is rolled out."""

    def __init__(
        self,
        sampler: TrajectorySampler,
        articles: Sequence[ArticleReference],
        prompt: Tensor,
        noise: dict[Purpose, Tensor],
    ) -> None:
        self.sampler = sampler
        self.articles = articles
        self.prompt = prompt
        self.noise = noise
        self.blocks = [prompt]
        self.query_starts: list[int] = []
        self.value_starts: list[int] = []
        self.policy_reader = _Reader(sampler.policy, prompt)
        with sampler.policy.reference():
            self.reference_reader = _Reader(sampler.policy, prompt)
        self.order_tokens = 0

    @property
    def forward_tokens(self) -> int:
        return self.policy_reader.forward_tokens + self.reference_reader.forward_tokens + self.order_tokens

    def step(self, number: int) -> TrajectoryStep:
        sampler, settings = self.sampler, self.sampler.settings
        context = torch.cat(self.blocks, dim=1)
        with sampler.policy.attention.capture_queries() as capture:
            query = self.policy_reader.decode(self.noise[Purpose.POLICY][:, number], read_last=True)
        vectors = capture.mean()
        places = {"policy logit": query.logprobs + query.entropy, "query embedding": vectors}
        sampler._expect_finite(places, number + 1, self.articles)
        selection = sampler.environment.step(vectors, self.noise[Purpose.SELECTION][:, number])
        value = selection.pairs.value_tokens
        block, value_offset = sampler.response(selection.pairs, is_last=number == settings.num_steps - 1)
        policy_logprob = sampler.score(self.policy_reader.read(block), value_offset, value)
        with sampler.policy.reference():
            counterfactual, counterfactual_logprob = self._counterfactual(number, selection)
            hidden = self.reference_reader.read(torch.cat([query.token_ids, block], dim=1))
            base_logprob = sampler.score(hidden, settings.tokens_per_query + value_offset, value)
            order_gain = self._order_gain(number, selection, counterfactual, counterfactual_logprob)
        reward = calculate_reward(policy_logprob, counterfactual_logprob)
        if order_gain is not None:
            reward = reward + settings.order_coef * order_gain
        scores = torch.stack([policy_logprob, base_logprob, counterfactual_logprob, reward], dim=1)
        places = {"counterfactual logit": counterfactual.logprobs, "value log-probability": scores}
        sampler._expect_finite(places, number + 1, self.articles)
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

    def _counterfactual(self, number: int, selection: Selection) -> tuple[DecodedQuery, Tensor]:
        """Decode the reference's own query, score the value behind it, and forget both."""
        reader = self.reference_reader
        reader.mark()
        query = reader.decode(self.noise[Purpose.COUNTERFACTUAL][:, number], read_last=False)
        block, value_offset = self.sampler.response(selection.pairs, is_last=True)
        hidden = reader.read(torch.cat([query.token_ids[:, -1:], block], dim=1))
        logprob = self.sampler.score(hidden, 1 + value_offset, selection.pairs.value_tokens)
        reader.roll_back(query.token_ids.shape[1] + block.shape[1])
        return query, logprob

    def _order_gain(
        self, number: int, selection: Selection, counterfactual: DecodedQuery, in_context: Tensor
    ) -> Tensor | None:
        """What the pairs read so far brought to the reference, under the same counterfactual query."""
        if not self.sampler.settings.compute_order_gain:
            return None
        if number == 0:
            return torch.zeros_like(in_context)
        block, value_offset = self.sampler.response(selection.pairs, is_last=True)
        alone = torch.cat([self.prompt, counterfactual.token_ids, block], dim=1)
        start = self.prompt.shape[1] + counterfactual.token_ids.shape[1] + value_offset
        self.order_tokens += alone.numel()
        return in_context - self.sampler.score(self.sampler.policy.forward(alone), start, selection.pairs.value_tokens)
