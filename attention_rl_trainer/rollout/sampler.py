"""From memories to trajectories: the one place that joins policy, environment and reward (design §6).

Policy and reference each keep a key-value cache over the whole trajectory, so every token of the context passes through
each of them once (`models.readers`). The cost of a step:

1. L single tokens decode the policy's query, whose attention vectors draw a pair, and the reference's counterfactual;
2. one forward of ``[" Response:"] value [" Query:"]`` scores the value after either query and opens the next step;
3. the reference, rolled back, reads ``query [" Response:"] value [" Query:"]``, which brings it level with the context
   and scores the value after the policy's query.

Where ``information_coef`` > 0, the reference scores in the end every value that was unread (`information`), and where
``num_queries`` > 1 the policy scores the values after its other queries (`groups`), each as branches of a tree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from attention_rl_trainer.errors import expect_finite
from attention_rl_trainer.memories.pairs import MemoryBatch, add_embeddings
from attention_rl_trainer.models.policy import PolicyModel
from attention_rl_trainer.models.readers import open_readers
from attention_rl_trainer.models.sampling import Purpose, episode_noise
from attention_rl_trainer.options import Count, option
from attention_rl_trainer.rollout.environment import MemoryEnvironment
from attention_rl_trainer.rollout.groups import other_tokens, other_values
from attention_rl_trainer.rollout.information import information_gains, unread_tokens, unread_values
from attention_rl_trainer.rollout.layout import Layout, LayoutOptions, Separators, predicting
from attention_rl_trainer.rollout.reward import (
    RewardFunction,
    RewardOptions,
    calculate_reward,
    judge_step,
    trajectory_reward,
    value_logprob,
)
from attention_rl_trainer.types import KeyValuePairs, Trajectory, TrajectoryStep


@dataclass
class RolloutOptions(LayoutOptions, RewardOptions):
    """What is rolled out."""

    generation_batch_size: Count = option(
        64, "B: trajectories rolled out per process and step.", aliases=["--batch-size"]
    )
    num_queries: Count = option(
        1,
        "Queries written in each context, all of which are trained on. The first draws the pair and stays in the "
        "trajectory; each is judged by the value that was drawn, against the others' mean.",
    )


class TrajectorySampler:
    """Rolls batches of trajectories out.

    Args:
        policy: the adapted model and its reference.
        environment: what queries draw pairs from.
        separators: their ids.
        options: what is rolled out.
        seed: of the episodes' random streams.
        reward_fn: a reward in place of the default one.
        compute_order_gain: whether `TrajectoryStep.order_gain` is wanted, which costs T more forwards of the reference;
            by default where it is paid for.
        joint: whether policy and reference share a batch; by default wherever they can.

    Raises:
        ValueError: there is a ``reward_fn``, and ``num_queries`` > 1.
    """

    def __init__(
        self,
        policy: PolicyModel,
        environment: MemoryEnvironment,
        separators: Separators,
        options: RolloutOptions,
        seed: int,
        *,
        reward_fn: RewardFunction | None = None,
        compute_order_gain: bool | None = None,
        joint: bool | None = None,
    ) -> None:
        self.policy = policy
        self.environment = environment
        self.layout = Layout.of(options, separators)
        self.seed = seed
        if reward_fn is not None and options.num_queries > 1:
            raise ValueError(
                f"num_queries is {options.num_queries}, but a reward_fn judges the query that drew the pair alone; "
                "leave one of them out"
            )
        self.reward_fn = reward_fn
        self.order_coef = options.order_coef
        self.information_coef = options.information_coef
        self.num_queries = options.num_queries
        self.compute_order_gain = options.order_coef > 0 if compute_order_gain is None else compute_order_gain
        self.joint = joint

    def sample(self, batch: MemoryBatch, episodes: Sequence[int]) -> Trajectory:
        """Roll one batch out, in evaluation mode and without gradients; the episodes' numbers seed the rows' streams.

        Raises:
            NonFiniteError: a logit, vector, probability or reward is not finite; names which, the step, the article.
            ValueError: a memory has fewer pairs than there are steps, or ``reward_fn`` does not return ``[B]`` numbers.
        """
        if self.layout.num_steps > batch.pair_numbers.shape[1]:
            raise ValueError(
                f"num_steps is {self.layout.num_steps}, but a memory holds {batch.pair_numbers.shape[1]} pairs; lower "
                "num_steps, or sample from larger memories"
            )
        with self.policy.inference():
            return self._sample(batch, episodes)

    def _sample(self, batch: MemoryBatch, episodes: Sequence[int]) -> Trajectory:
        embedded_before = self.policy.embedded_tokens
        memory = add_embeddings(batch, self.policy.embed_keys)
        embedded_tokens = self.policy.embedded_tokens - embedded_before
        expect_finite({"key vector": memory.key_vectors}, batch.articles, trajectory_step=0)
        self.environment.reset(memory)
        layout = self.layout.for_batch(batch)
        run = _Run(self, layout, batch, self.noise(episodes, layout.num_steps))
        steps = [run.step(number) for number in range(layout.num_steps)]
        read_tokens = run.readers.forward_tokens
        if self.information_coef > 0:
            steps = run.informed(steps, memory)
            read_tokens += len(batch) * unread_tokens(layout, batch.pair_numbers.shape[1])
        if self.num_queries > 1:
            steps = run.compared(steps, memory)
            read_tokens += len(batch) * other_tokens(layout, self.num_queries)
        steps = [run.judged(step, number) for number, step in enumerate(steps, start=1)]
        rewards = torch.stack([step.reward for step in steps], dim=1)
        total_reward = rewards.sum(dim=1)
        expect_finite({"total reward": total_reward}, batch.articles, trajectory_step=layout.num_steps)
        return Trajectory(
            steps=steps,
            avg_reward=trajectory_reward(rewards),
            total_reward=total_reward,
            token_ids=torch.cat(run.blocks, dim=1),
            query_starts=layout.query_starts,
            value_starts=layout.value_starts,
            memory=memory,
            episodes=torch.tensor(list(episodes), dtype=torch.int64),
            forward_tokens=read_tokens + embedded_tokens,
        )

    def noise(self, episodes: Sequence[int], num_steps: int) -> dict[Purpose, Tensor]:
        """Draw the uniform numbers of episodes.

        ``[B, T, L]`` for the queries, ``[B, T]`` for the draws of pairs, ``[B, T, Q - 1, L]`` for the other queries.
        More steps leave the numbers of the first ones as they are.
        """
        tokens = self.layout.tokens_per_query
        shapes: dict[Purpose, tuple[int, ...]] = {
            Purpose.POLICY: (num_steps, tokens),
            Purpose.COUNTERFACTUAL: (num_steps, tokens),
            Purpose.SELECTION: (num_steps,),
        }
        if self.num_queries > 1:
            shapes[Purpose.OTHER_QUERIES] = (num_steps, self.num_queries - 1, tokens)
        return {
            purpose: episode_noise(self.seed, episodes, purpose, shape).to(self.policy.device)
            for purpose, shape in shapes.items()
        }

    def score(self, hidden: Tensor, start: int, value_tokens: Tensor) -> Tensor:
        """Mean log-probability of a value whose first token is at ``start``, ``[B]``."""
        return value_logprob(self.score_tokens(hidden, start, value_tokens), value_tokens)

    def score_tokens(self, hidden: Tensor, start: int, value_tokens: Tensor) -> Tensor:
        """Log-probability of each token of a value whose first one is at ``start``, ``[B, V]``; 0 for padding."""
        return self.policy.token_logprobs(predicting(hidden, start, value_tokens.shape[1]), value_tokens)


class _Run:
    """The state of one batch while it is rolled out."""

    def __init__(
        self, sampler: TrajectorySampler, layout: Layout, batch: MemoryBatch, noise: dict[Purpose, Tensor]
    ) -> None:
        self.sampler = sampler
        self.layout = layout
        self.articles = batch.articles
        self.noise = noise
        prompt = layout.prompt(batch, sampler.policy.device)
        self.blocks = [prompt]
        self.readers = open_readers(
            sampler.policy,
            prompt,
            layout.cached_tokens,
            joint=sampler.joint,
            padded=layout.is_padded,
            num_queries=sampler.num_queries,
        )

    def step(self, number: int) -> TrajectoryStep:
        sampler, layout = self.sampler, self.layout
        context = torch.cat(self.blocks, dim=1)
        queries = self.readers.write_queries(
            self.noise[Purpose.POLICY][:, number],
            self.noise[Purpose.COUNTERFACTUAL][:, number],
            self.noise[Purpose.OTHER_QUERIES][:, number] if Purpose.OTHER_QUERIES in self.noise else None,
        )
        query, counterfactual, others = queries.query, queries.counterfactual, queries.others
        # The entropy is finite only where the logit of every token is.
        written = torch.cat([other.logprobs + other.entropy for other in (query, *others)], dim=1)
        quantities = {
            "policy logit": written,
            "base model logit": counterfactual.logprobs + counterfactual.entropy,
            "query vector": queries.vectors,
        }
        expect_finite(quantities, self.articles, trajectory_step=number + 1)
        selection = sampler.environment.step(queries.vectors, self.noise[Purpose.SELECTION][:, number])
        value = selection.pairs.value_tokens
        block = layout.response(selection.pairs, is_last=number == layout.num_steps - 1)
        scored, offset = layout.scored_tokens, layout.value_offset
        policy_hidden, counterfactual_hidden = self.readers.read_response(block, scored)
        policy_by_token = sampler.score_tokens(policy_hidden, offset, value)
        counterfactual_by_token = sampler.score_tokens(counterfactual_hidden, offset, value)
        policy_logprob = value_logprob(policy_by_token, value)
        counterfactual_logprob = value_logprob(counterfactual_by_token, value)
        base_hidden = self.readers.follow(torch.cat([query.token_ids, block], dim=1))
        base_logprob = sampler.score(base_hidden, layout.tokens_per_query + offset, value)
        order_gain = self._order_gain(
            number, counterfactual.token_ids, block[:, :scored], value, counterfactual_logprob
        )
        reward = calculate_reward(policy_logprob, counterfactual_logprob)
        if order_gain is not None:
            reward = reward + sampler.order_coef * order_gain
        step = TrajectoryStep(
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
            selection_information=selection.information,
            value_token_gains=policy_by_token - counterfactual_by_token,
            other_queries=torch.stack([other.token_ids for other in others], dim=1) if others else None,
            other_query_logprobs=torch.stack([other.logprobs for other in others], dim=1) if others else None,
        )
        quantities = {
            "selection probability": selection.probabilities,
            "policy logit or log-probability of a value": policy_logprob,
            "base model logit or log-probability of a value": base_logprob,
            "base model logit or log-probability of a value after its own query": counterfactual_logprob,
        }
        expect_finite(quantities, self.articles, trajectory_step=number + 1)
        self.blocks += [query.token_ids, block]
        return step

    def informed(self, steps: Sequence[TrajectoryStep], memory: KeyValuePairs) -> list[TrajectoryStep]:
        """Add to the steps of a whole trajectory, and to their rewards, what each told about the values unread."""
        index = torch.stack([step.selected_index for step in steps], dim=1)
        values = unread_values(self.sampler.policy, self.layout, memory, torch.cat(self.blocks, dim=1), index)
        coef, gains = self.sampler.information_coef, information_gains(values, index).unbind(dim=1)
        return [
            replace(step, information_gain=gain, reward=step.reward + coef * gain)
            for step, gain in zip(steps, gains, strict=True)
        ]

    def compared(self, steps: Sequence[TrajectoryStep], memory: KeyValuePairs) -> list[TrajectoryStep]:
        """Add what each step's reward would be after the other queries, for the value that was drawn."""
        policy, token_ids = self.sampler.policy, torch.cat(self.blocks, dim=1)
        index = torch.stack([step.selected_index for step in steps], dim=1)
        queries = torch.stack([cast(Tensor, step.other_queries) for step in steps], dim=1)
        logprobs = other_values(policy, self.layout, memory, token_ids, index, queries)
        expect_finite({"policy logit or log-probability of a value after another query": logprobs}, self.articles)
        compared = []
        for step, after_others in zip(steps, logprobs.unbind(dim=1), strict=True):
            # All but the policy's own term of the reward is the same for every query of the context.
            rewards = step.reward[:, None] + after_others - step.policy_value_logprob[:, None]
            compared.append(replace(step, other_rewards=rewards))
        return compared

    def judged(self, step: TrajectoryStep, number: int) -> TrajectoryStep:
        """Let a user's own function judge a step, counted from 1, where there is one."""
        reward_fn = self.sampler.reward_fn
        if reward_fn is not None:
            step = judge_step(reward_fn, step)
        named = "reward" if reward_fn is None else "what reward_fn returns"
        expect_finite({named: step.reward}, self.articles, trajectory_step=number)
        return step

    def _order_gain(
        self, number: int, counterfactual: Tensor, block: Tensor, value: Tensor, in_context: Tensor
    ) -> Tensor | None:
        """What the pairs read so far brought to the reference, after the same counterfactual query."""
        if not self.sampler.compute_order_gain:
            return None
        if number == 0:
            return torch.zeros_like(in_context)
        hidden = self.readers.read_after_prompt(torch.cat([counterfactual, block], dim=1))
        start = hidden.shape[1] - value.shape[1]
        return in_context - self.sampler.score(hidden, start, value)
