"""A supervised phase before the first episode: what a query is, before which query pays (design §9).

A small model writes prose where a query is wanted, and reinforcement alone does not find queries among all texts. Here
each query is the key of an unread pair, and the loss is the mean over steps of

    - mean_L log p(query tokens)  -  mean_V log p(value tokens)

weighed alike: with queries alone the reader is lost. A key shorter than a query is followed by line breaks. The order
of a lesson's pairs is learned with them: it is uniformly random, or that of the list of keys or of the article, or
drawn, at a temperature, by what each value would tell about the others (`rollout.information`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from attention_rl_trainer.errors import expect_finite
from attention_rl_trainer.memories.pairs import MemoryBatch
from attention_rl_trainer.memories.tokenization import PlainTextEncoder
from attention_rl_trainer.models.policy import PolicyModel
from attention_rl_trainer.models.sampling import Purpose, episode_noise
from attention_rl_trainer.options import CountOrZero, Options, Positive, Share, option
from attention_rl_trainer.rollout.information import first_choice_values
from attention_rl_trainer.rollout.layout import Layout, positions
from attention_rl_trainer.types import KeyValuePairs, is_token
from attention_rl_trainer.update.kept import KeptTrajectories
from attention_rl_trainer.update.losses import reward_gradient_term
from attention_rl_trainer.update.objective import reading_term

WarmStartOrder = Literal["random", "listed", "article"]


@dataclass
class WarmStartOptions(Options):
    """What comes before the first episode."""

    warm_start_episodes: CountOrZero = option(
        0,
        "Trajectories of a supervised phase before the first episode: each query is the key of an unread pair, and the "
        "loss is on queries and values alike.",
    )
    warm_start_order: WarmStartOrder = option(
        "random",
        "Order in which the warm start reads the pairs of a memory: random, listed (as show_keys lists them), or "
        "article (as the article or the group has them).",
    )
    warm_start_temperature: Positive | None = option(
        None,
        "Draw the warm start's pairs by a softmax of what each value, read first, would tell about the others (nats "
        "per token, divided by this), so that the policy learns to ask for what tells most. Default: all alike.",
    )
    warm_start_mismatch: Share | None = option(
        None,
        "Share of the warm start's steps whose query is the key of another pair than the one that is read, as it will "
        "happen: or the reader takes every query for the beginning of its answer. Acts in a warm start alone. Default: "
        "none.",
    )

    def check_options(self) -> None:
        """Check the ranges, and that order and temperature have something to act on, and not both."""
        super().check_options()
        fixed = None if self.warm_start_order == "random" else self.warm_start_order
        ordered = {"warm_start_temperature": self.warm_start_temperature, "warm_start_order": fixed}
        given = {name: value for name, value in ordered.items() if value is not None}
        if given and self.warm_start_episodes == 0:
            name, value = next(iter(given.items()))
            raise ValueError(
                f"{name} is {value}, but warm_start_episodes is 0, so nothing is read; set warm_start_episodes, or "
                f"leave {name} out"
            )
        if len(given) > 1:
            raise ValueError(
                f"warm_start_order is {self.warm_start_order} and warm_start_temperature "
                f"{self.warm_start_temperature}, and each of them says in which order pairs are read; leave one out"
            )


@dataclass(frozen=True, eq=False)
class WarmStartTerms:
    """The loss of a micro-batch, weighted by 1 / B_all, and its parts; scalars."""

    loss: Tensor
    """What to differentiate."""
    query_logprob: Tensor
    """Mean log-probability of the tokens of the queries that are learned, nats; NaN where none is."""
    num_learned: int
    """Queries that are learned."""
    value_logprob: Tensor
    """Mean log-probability of the values, nats per token."""


def as_query(keys: Tensor, num_tokens: int, filling: Sequence[int]) -> Tensor:
    """Turn keys ``[B, K]``, padded on the left, into queries ``[B, L]``: cut, or filled up with a text's ids."""
    rest = torch.tensor(filling, device=keys.device).repeat(num_tokens)
    return torch.stack([torch.cat([key[is_token(key)], rest])[:num_tokens] for key in keys])


def lay_out_lessons(
    batch: MemoryBatch,
    layout: Layout,
    encoder: PlainTextEncoder,
    episodes: Sequence[int],
    seed: int,
    total: int,
    options: WarmStartOptions | None = None,
    device: torch.device | None = None,
    scores: Tensor | None = None,
) -> KeptTrajectories:
    """Make the trajectories of a batch in which every query is the key of the pair that follows.

    Args:
        layout: of the run.
        encoder: gives the line breaks after a short key.
        episodes: numbers of the trajectories among those of the phase, which seed their draws.
        total: B_all, the trajectories of the whole update.
        options: the order of the pairs, and the share of the steps whose query is the key of any other pair.
        device: where the trajectories, memories included, are; by default where the batch is.
        scores: where the order is random, pairs are drawn by their softmax, ``[B, M]``, without replacement; by default
            all alike.

    Returns:
        The trajectories; their advantages are 1, or 0 where the query is not to be learned.
    """
    options = WarmStartOptions() if options is None else options
    device = batch.key_tokens.device if device is None else device
    layout = layout.for_batch(batch)
    num_rows, num_pairs = batch.pair_numbers.shape
    noise = episode_noise(seed, episodes, Purpose.WARM_START, (num_pairs + layout.num_steps,)).to(device)
    ranks = _places_in_order(options.warm_start_order, batch.pair_numbers.to(device), noise[:, :num_pairs], scores)
    order = ranks.argsort(dim=1)[:, : layout.num_steps]
    is_ordered = options.warm_start_order != "random" or scores is not None
    asked = _mismatched(order, noise[:, num_pairs:], num_pairs, options.warm_start_mismatch or 0)
    memory = KeyValuePairs(
        key_tokens=batch.key_tokens.to(device),
        value_tokens=batch.value_tokens.to(device),
        key_vectors=torch.zeros(num_rows, num_pairs, 1, 1, device=device),
        pair_numbers=batch.pair_numbers.to(device),
        is_padded=batch.is_padded,
    )
    filling = encoder.encode("\n")
    blocks = [layout.prompt(batch, device)]
    for step, columns in enumerate(order.unbind(dim=1)):
        pair = memory.gather(columns)
        query = as_query(memory.gather(asked[:, step]).key_tokens, layout.tokens_per_query, filling)
        blocks += [query, layout.response(pair, is_last=step == layout.num_steps - 1)]
    steps = (num_rows, layout.num_steps)
    return KeptTrajectories(
        token_ids=torch.cat(blocks, dim=1),
        query_starts=layout.query_starts,
        value_starts=layout.value_starts,
        query_length=layout.tokens_per_query,
        value_length=layout.tokens_per_value,
        rollout_logprobs=torch.zeros(*steps, layout.tokens_per_query, device=device),
        selected_index=order,
        memory=memory,
        # Where the order is taught, no other pair is to be asked for.
        advantages=(asked == order).float() if is_ordered else torch.ones(steps, device=device),
        weights=torch.full((num_rows,), 1 / total, device=device),
        articles=tuple(batch.articles),
    )


def lesson_scores(policy: PolicyModel, layout: Layout, batch: MemoryBatch, options: WarmStartOptions) -> Tensor | None:
    """Score pairs ``[B, M]`` by what each value, read first, would tell, divided by ``warm_start_temperature``.

    Returns:
        The scores of `lay_out_lessons`; ``None`` where no temperature is given.

    Raises:
        NonFiniteError: a log-probability is not finite; names the articles.
    """
    if options.warm_start_temperature is None or len(batch) == 0:
        return None
    scores = first_choice_values(policy, layout, batch) / options.warm_start_temperature
    expect_finite({"log-probability of an unread value": scores}, batch.articles)
    return scores


def _places_in_order(order: WarmStartOrder, pair_numbers: Tensor, drawn: Tensor, scores: Tensor | None) -> Tensor:
    """Number the pairs ``[B, M]`` in a way that the smallest is read first, from uniform numbers of this shape."""
    if order == "listed":
        return torch.arange(pair_numbers.shape[1], device=pair_numbers.device).expand_as(pair_numbers)
    if order == "article":
        return pair_numbers
    # The largest of scores with Gumbel noise is a draw from their softmax, and so is the largest of the rest.
    return drawn if scores is None else (-drawn.log()).log() - scores


def _mismatched(order: Tensor, noise: Tensor, num_pairs: int, share: float) -> Tensor:
    """Replace a share of the pairs ``[B, T]`` by others of the memory, by uniform numbers ``[B, T]``."""
    if share == 0 or num_pairs == 1:
        return order
    # Below the share, the number is uniform again: it chooses one of the others, counted from the pair itself.
    shift = 1 + (noise / share * (num_pairs - 1)).long().clamp(max=num_pairs - 2)
    return torch.where(noise < share, (order + shift) % num_pairs, order)


def warm_start_terms(policy: PolicyModel, model: nn.Module, lessons: KeptTrajectories) -> WarmStartTerms:
    """Compute the loss of a micro-batch in one forward, in the mode that the caller has chosen.

    Args:
        model: the policy's model as the trainer wrapped it.

    Raises:
        NonFiniteError: a log-probability is not finite; names which, the step and the articles.
    """
    hidden, _ = policy.training_forward(
        model, lessons.token_ids, capture_queries=False, padded=lessons.memory.is_padded
    )
    places = positions(lessons.query_starts, lessons.query_length, lessons.token_ids.device)
    query_term, query_logprobs = reward_gradient_term(
        hidden[:, places - 1].flatten(0, 1),
        lessons.token_ids[:, places].flatten(),
        (lessons.weights[:, None] * lessons.advantages).repeat_interleave(lessons.query_length, dim=1).flatten()
        / len(places),
        policy.score_query_tokens,
        chunk_size=policy.logits_chunk_size,
    )
    value_term, value_logprobs = reading_term(policy, lessons, hidden)
    by_step = (len(lessons), len(lessons.query_starts), -1)
    expect_finite(
        {"policy logit": query_logprobs.view(by_step), "log-probability of a value": value_logprobs}, lessons.articles
    )
    values = is_token(lessons.token_ids[:, positions(lessons.value_starts, lessons.value_length, places.device)])
    means = value_logprobs.flatten(1).sum(dim=1) / values.sum(dim=1)
    learned = query_logprobs.view(by_step)[lessons.advantages > 0]
    return WarmStartTerms(query_term + value_term, learned.mean(), len(learned), means.mean())
