"""A rollout that does what the seed document says, word for word: the reference of the benchmark, and its check.

For each step: every key is embedded again; `generate` writes the query from the whole context; a forward of its own
gives the query's vector; the value's log-probability is one forward over everything; the base model, adapters disabled,
generates its own query from the whole context, and one more forward over everything scores the value after it.

Two things make it faster than the letter: the head sees contiguous states, and no logits are computed where none are
asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from scene import contiguous_head, lay_out_prompt
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from attention_rl_trainer.memories.pairs import MemoryBatch
from attention_rl_trainer.models.causal_lm import deterministic_inference
from attention_rl_trainer.models.policy import PolicyModel
from attention_rl_trainer.rollout.layout import Separators
from attention_rl_trainer.rollout.selector import compute_similarity, sample_key_value, selection_log_probabilities
from attention_rl_trainer.types import Trajectory, TrajectoryStep

Select = Callable[[Tensor], tuple[Tensor, Tensor]]


class GivenTokens(LogitsProcessor):
    """Makes greedy decoding write given tokens, and notes the log-probability that each would have had.

    Args:
        policy: the model.
        token_ids: ``[B, L]``.
    """

    def __init__(self, policy: PolicyModel, token_ids: Tensor) -> None:
        self.policy = policy
        self.token_ids = token_ids
        self.logprobs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Leave one token possible."""
        column = self.token_ids[:, len(self.logprobs)]
        allowed = torch.log_softmax(scores[:, self.policy.allowed_ids].float(), dim=-1)
        place = torch.searchsorted(self.policy.allowed_ids, column)
        self.logprobs.append(allowed.gather(1, place[:, None]).squeeze(1))
        return torch.full_like(scores, -torch.inf).scatter(1, column[:, None], 0.0)


@dataclass
class NaiveStep:
    """Queries ``[B, L]``, mean log-probabilities ``[B]`` and the selector's distribution ``[B, M]`` of a step."""

    query: Tensor
    counterfactual: Tensor
    query_logprobs: Tensor | None
    probabilities: Tensor
    policy_value_logprob: Tensor
    counterfactual_value_logprob: Tensor


class NaiveRollout:
    """Rolls trajectories out step by step, remembering nothing but the tokens.

    Args:
        policy: the model.
        separators: the separators.
        tokens: L.
    """

    def __init__(self, policy: PolicyModel, separators: Separators, tokens: int) -> None:
        self.policy = policy
        self.separators = separators
        self.tokens = tokens
        self.query_separator = torch.tensor(separators.query)[None]
        self.response_separator = torch.tensor(separators.response)[None]

    def embed_keys(self, keys: Tensor) -> Tensor:
        """Embed every key of the memory, ``[B, M, K]`` to ``[B, M, G, D]``."""
        policy, model = self.policy, self.policy.model
        with deterministic_inference(model), model.disable_adapter(), policy.attention.capture_keys() as capture:
            model(input_ids=keys.flatten(0, 1), use_cache=False, logits_to_keep=1)
        return capture.mean().unflatten(0, keys.shape[:2])

    def generate(self, context: Tensor, given: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Write a query after the whole context, ``[B, L]``: sampled as `generate` does, or given.

        Args:
            context: ``[B, S]``.
            given: a query to write, ``[B, L]``; its log-probabilities are returned beside it.
        """
        options: dict[str, Any] = {"do_sample": True, "top_k": 0, "top_p": 1.0}
        processor = None
        if given is not None:
            processor = GivenTokens(self.policy, given)
            options = {"do_sample": False, "logits_processor": LogitsProcessorList([processor])}
        length = self.tokens
        written = self.policy.model.generate(
            input_ids=context,
            attention_mask=torch.ones_like(context),
            use_cache=True,
            pad_token_id=0,
            max_new_tokens=length,
            min_new_tokens=length,
            **options,
        )
        logprobs = None if processor is None else torch.stack(processor.logprobs, dim=1)
        return written[:, context.shape[1] :], logprobs

    def query_vectors(self, context: Tensor, query: Tensor) -> Tensor:
        """Read the query's vectors in a forward over everything, ``[B, H, D]``."""
        with self.policy.attention.capture_queries() as capture:
            self.policy.model(input_ids=torch.cat([context, query], dim=1), use_cache=False, logits_to_keep=1)
        return capture.heads()[:, context.shape[1] :].mean(dim=1)

    def value_logprob(self, context: Tensor, query: Tensor, value: Tensor) -> Tensor:
        """Score a value in a forward over everything, ``[B]``."""
        response = self.response_separator.expand(len(value), -1)
        ids = torch.cat([context, query, response, value], dim=1)
        logits = self.policy.model(input_ids=ids, use_cache=False, logits_to_keep=value.shape[1] + 1).logits
        log_probabilities = torch.log_softmax(logits[:, :-1].float(), dim=-1)
        return log_probabilities.gather(2, value[:, :, None]).squeeze(2).mean(dim=1)

    def read(self, context: Tensor, select: Select, given: TrajectoryStep | None = None) -> NaiveStep:
        """One step after a context: everything but the embedding of the keys.

        Args:
            context: all tokens so far, ending in the query separator, ``[B, S]``.
            select: query vectors to the distribution over the memory and the values that are read.
            given: a step whose queries are written again.
        """
        model = self.policy.model
        with deterministic_inference(model), contiguous_head(self.policy):
            query, logprobs = self.generate(context, None if given is None else given.query_tokens)
            probabilities, value = select(self.query_vectors(context, query))
            logprob = self.value_logprob(context, query, value)
            with model.disable_adapter():
                counterfactual, _ = self.generate(context, None if given is None else given.counterfactual_tokens)
                base = self.value_logprob(context, counterfactual, value)
        return NaiveStep(query, counterfactual, logprobs, probabilities, logprob, base)

    def sample(self, batch: MemoryBatch, steps: int, given: Trajectory | None = None) -> list[NaiveStep]:
        """Roll a batch out.

        Args:
            batch: articles.
            steps: T.
            given: trajectories whose queries and choices are made again.
        """
        context = lay_out_prompt(batch, self.separators)
        rows = torch.arange(len(batch))
        available = torch.ones(batch.pair_numbers.shape, dtype=torch.bool)
        taken: list[NaiveStep] = []
        for number in range(steps):
            step = None if given is None else given.steps[number]
            with contiguous_head(self.policy):
                vectors = self.embed_keys(batch.key_tokens)
            memory = StepMemory(vectors, available, None if step is None else step.selected_index)
            taken.append(self.read(context, partial(memory.select, batch.value_tokens), step))
            available = available.scatter(1, memory.index[:, None], False)
            value = batch.value_tokens[rows, memory.index]
            response, query = (ids.expand(len(batch), -1) for ids in (self.response_separator, self.query_separator))
            context = torch.cat([context, taken[-1].query, response, value, query], dim=1)
        return taken


class StepMemory:
    """Key vectors ``[B, M, G, D]`` of one step, what is available of them, and what is or must be drawn."""

    def __init__(self, vectors: Tensor, available: Tensor, index: Tensor | None) -> None:
        self.vectors = vectors
        self.available = available
        self.given = index
        self.index = torch.zeros(len(vectors), dtype=torch.int64)

    def select(self, values: Tensor, query_vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Return the distribution and the drawn values ``[B, V]``."""
        similarity = compute_similarity(query_vectors, self.vectors)
        probabilities = selection_log_probabilities(similarity, self.available).exp()
        noise = torch.rand(len(values), dtype=torch.float64)
        self.index = sample_key_value(probabilities, noise) if self.given is None else self.given
        return probabilities, values[torch.arange(len(values)), self.index]
