"""Sizes into tokens, floating-point operations and seconds: a roofline, that is, a time that cannot be undercut.

A forward takes as long as the slower of its two needs: operations at the device's rate, and bytes at its bandwidth
(the weights once, and the cached keys and values of every row). So decoding, a few tokens in each forward, waits for
the weights, and reading for the arithmetic. What a real run loses to launches, small matrices and dequantization is
not counted; `Accelerator.attained` scales it. Where a device was measured, `MeasuredSpeed` is taken instead.

Operations: 2 for each weight and token, 4 · layers · H · D for each token and token attended to, and 2 · C · vocabulary
for each position whose logits are computed. A backward through frozen weights computes the gradient of inputs alone: as
many as the forward, and twice the attention's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from attention_rl_trainer.planning.footprint import cache_bytes_per_token
from attention_rl_trainer.planning.sizes import ModelShape, RunShape
from attention_rl_trainer.rollout.groups import other_tokens
from attention_rl_trainer.rollout.information import MAX_TREE_TOKENS, choice_tokens, unread_tokens

# Share of a normal distribution above mean + 1 SD, which is what the default filter keeps.
KEPT_BY_DEFAULT_FILTER = 0.16


@dataclass(frozen=True)
class Accelerator:
    """What a device can do.

    Raises:
        ValueError: a figure is out of range.
    """

    bandwidth: float
    """Of its memory, bytes per second."""
    flops: float
    """Floating-point operations per second in the precision of the weights."""
    attained: float = 1.0
    """Share of both that is reached, in (0, 1]."""

    def __post_init__(self) -> None:
        for name in ("bandwidth", "flops"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if not 0 < self.attained <= 1:
            raise ValueError(f"attained must be in (0, 1], got {self.attained}")

    def seconds(self, flops: float, num_bytes: float) -> float:
        """Time of a forward of so many operations, which reads so many bytes."""
        return max(flops / self.flops, num_bytes / self.bandwidth) / self.attained


@dataclass(frozen=True)
class MeasuredSpeed:
    """What a device was seen to do."""

    reading: float
    """Tokens per second through either model, many in a forward."""
    decoding: float
    """Tokens per second of each query, while policy and reference write those of a whole batch."""
    update: float
    """Tokens per second of the trajectories that are trained on."""


@dataclass(frozen=True)
class Forward:
    """Forwards of one kind in a rollout batch."""

    kind: str
    count: int
    num_tokens: int
    """Tokens in each, of all rows."""
    num_rows: int
    cached: float
    """Tokens of a row that are read from the cache."""
    context: float
    """Tokens that a token attends to, on average."""
    positions: int = 0
    """Positions in each whose logits are computed."""

    def flops(self, shape: ModelShape, lora_rank: int) -> float:
        """Floating-point operations of one; the adapter is counted for half of the tokens, the policy's."""
        linear = 2 * self.num_tokens * (shape.linear_parameters + shape.adapter_parameters(lora_rank) / 2)
        attention = 4 * shape.num_layers * shape.query_width * self.num_tokens * self.context
        return linear + attention + 2 * self.positions * shape.head_parameters

    def bytes_read(self, shape: ModelShape, run: RunShape) -> float:
        """Bytes that one reads."""
        return shape.weight_bytes(run.weight_bits) + self.num_rows * self.cached * cache_bytes_per_token(shape, run)


def rollout_forwards(run: RunShape) -> Iterator[Forward]:
    """List the forwards of a rollout batch, as the sampler and its readers do them."""
    batch, prompt, query = run.generation_batch_size, run.layout.prompt_tokens, run.tokens_per_query
    num_keys = batch * run.memory_size
    for start in range(0, num_keys, run.embedding_batch_size):
        rows = min(run.embedding_batch_size, num_keys - start)
        yield Forward("keys", 1, rows * run.tokens_per_key, rows, 0, (run.tokens_per_key + 1) / 2)
    # Policy and reference in one batch, or one after the other. In one batch the policy's other queries have rows too.
    others = run.num_queries - 1
    together, apart = ((2 + others) * batch, 1) if run.joint else (batch, 2)
    yield Forward("prefill", apart, together * prompt, together, 0, (prompt + 1) / 2)
    if run.compute_order_gain and run.layout.num_steps > 1:
        yield Forward("order gain", 1, batch * prompt, batch, 0, (prompt + 1) / 2)
    for step in range(run.layout.num_steps):
        context, block = run.layout.context_tokens(step), run.layout.block_tokens(step)
        cached, attended = context + (query - 1) / 2, context + (query + 1) / 2
        yield Forward("decode", apart * query, together, together, cached, attended, together)
        if others and not run.joint:
            # The last token is drawn, and not read.
            yield Forward("decode", others * (query - 1), batch, batch, cached, attended, batch)
        after_query = context + query
        if run.joint:
            yield _reading("read", 2 * batch, block, after_query, run)
        else:
            yield _reading("read", batch, block, after_query, run)
            yield _reading("read", batch, run.layout.scored_tokens, after_query, run)
        yield _reading("follow", batch, query + block, context, run)
        if others and run.joint:
            yield Forward("follow", 1, others * batch * (query + block), others * batch, context, after_query)
        if run.compute_order_gain and step > 0:
            yield _reading("order gain", batch, query + run.layout.scored_tokens, prompt, run)
    if run.information_coef > 0:
        tokens = unread_tokens(run.layout, run.memory_size)
        yield _tree("information", run, tokens, (tokens - run.layout.cached_tokens) // run.layout.scored_tokens)
    if run.num_queries > 1:
        others = run.layout.num_steps * (run.num_queries - 1)
        yield _tree("other queries", run, other_tokens(run.layout, run.num_queries), others)


def _tree(kind: str, run: RunShape, num_tokens: int, num_values: int) -> Forward:
    """Values of trajectories that are read as branches: a place is compared with all others, seen or not."""
    rows = run.generation_batch_size
    return Forward(kind, 1, rows * num_tokens, rows, 0, num_tokens, rows * num_values * run.tokens_per_value)


def _reading(kind: str, rows: int, num_tokens: int, cached: int, run: RunShape) -> Forward:
    context = cached + (num_tokens + 1) / 2
    return Forward(kind, 1, rows * num_tokens, rows, cached, context, rows * run.tokens_per_value)


@dataclass(frozen=True)
class TimePlan:
    """What an episode takes; the update's share is that of the kept trajectories, spread over all."""

    forward_tokens: float
    """Tokens through either model in the rollout; what `Trajectory` counts."""
    rollout_flops: float
    """Floating-point operations."""
    update_flops: float
    decode_seconds: float
    """Of the rollout's seconds those that write query tokens."""
    rollout_seconds: float
    update_seconds: float

    @property
    def flops(self) -> float:
        """Floating-point operations of an episode."""
        return self.rollout_flops + self.update_flops

    @property
    def seconds(self) -> float:
        """Time of an episode."""
        return self.rollout_seconds + self.update_seconds

    def hours(self, num_episodes: int) -> float:
        """Time of a run."""
        return self.seconds * num_episodes / 3600


def update_flops(shape: ModelShape, run: RunShape) -> float:
    """Floating-point operations that one kept trajectory takes in the update."""
    queries = run.layout.num_steps * run.tokens_per_query
    # Other queries are branches; what is masked is computed too.
    tokens = run.layout.trajectory_tokens + (run.num_queries - 1) * queries
    attended = (tokens + 1) / 2 if run.num_queries == 1 else tokens
    linear = 2 * tokens * (shape.linear_parameters + shape.adapter_parameters(run.lora_rank))
    attention = 4 * shape.num_layers * shape.query_width * tokens * attended
    forwards = 1 + run.has_kl + run.activation_checkpointing
    # Logits of one or both distributions, and the gradient of one.
    heads = 2 + run.has_kl
    own = (forwards + 1) * linear + (forwards + 2) * attention
    return own + heads * 2 * run.num_queries * queries * shape.head_parameters + _choices_flops(shape, run)


def _choices_flops(shape: ModelShape, run: RunShape) -> float:
    """Floating-point operations of what every choice of a trajectory would tell, where the loss asks for it."""
    if not run.needs_choice_values:
        return 0.0
    return sum(choice_flops(shape, run, step) for step in range(run.layout.num_steps)) / run.num_iterations


def _choices_tokens(run: RunShape) -> int:
    return sum(choice_tokens(run.layout, step, run.memory_size - step) for step in range(run.layout.num_steps))


def choice_flops(shape: ModelShape, run: RunShape, step: int) -> float:
    """Floating-point operations of what every choice of a step, counted from 0, would tell."""
    unread = run.memory_size - step
    tokens = choice_tokens(run.layout, step, unread)
    linear = 2 * tokens * shape.linear_parameters + 2 * unread**2 * run.tokens_per_value * shape.head_parameters
    return linear + 4 * shape.num_layers * shape.query_width * tokens * min(tokens, MAX_TREE_TOKENS)


def plan_time(
    shape: ModelShape,
    run: RunShape,
    device: Accelerator | MeasuredSpeed,
    kept_fraction: float = KEPT_BY_DEFAULT_FILTER,
) -> TimePlan:
    """Plan the time of an episode; ``kept_fraction`` of the trajectories, in [0, 1], are trained on.

    A measured update had neither activation checkpointing nor other queries; it is scaled by what these add.

    Raises:
        ValueError: ``kept_fraction`` is out of range.
    """
    if not 0 <= kept_fraction <= 1:
        raise ValueError(f"kept_fraction must be in [0, 1], got {kept_fraction}")
    batch, forwards = run.generation_batch_size, list(rollout_forwards(run))
    forward_tokens = sum(forward.count * forward.num_tokens for forward in forwards) / batch
    kept = kept_fraction * batch
    update = run.num_iterations * kept * update_flops(shape, run)
    if isinstance(device, MeasuredSpeed):
        decode_seconds = run.layout.num_steps * run.tokens_per_query / device.decoding / batch
        others = sum(forward.count * forward.num_tokens for forward in forwards if forward.kind != "decode")
        rollout_seconds = others / batch / device.reading + decode_seconds
        sampled = replace(run, selector_gradient="sampled")
        measured = replace(sampled, activation_checkpointing=False, num_queries=1)
        more = update_flops(shape, sampled) / update_flops(shape, measured)
        tokens = run.num_iterations * kept_fraction * run.layout.trajectory_tokens
        update_seconds = more * tokens / device.update
        if run.needs_choice_values:
            update_seconds += kept_fraction * _choices_tokens(run) / device.reading
    else:

        def seconds(forward: Forward) -> float:
            flops, num_bytes = forward.flops(shape, run.lora_rank), forward.bytes_read(shape, run)
            return forward.count * device.seconds(flops, num_bytes)

        # Each micro-batch reads the weights in the forwards and in the backward.
        micro_batches = run.num_iterations * math.ceil(kept / run.micro_batch_size)
        passes = micro_batches * (2 + run.has_kl + run.activation_checkpointing)
        decode_seconds = sum(seconds(forward) for forward in forwards if forward.kind == "decode") / batch
        rollout_seconds = sum(seconds(forward) for forward in forwards) / batch
        update_seconds = device.seconds(update, passes * shape.weight_bytes(run.weight_bits)) / batch
    return TimePlan(
        forward_tokens=forward_tokens,
        rollout_flops=sum(forward.count * forward.flops(shape, run.lora_rank) for forward in forwards) / batch,
        update_flops=update / batch,
        decode_seconds=decode_seconds,
        rollout_seconds=rollout_seconds,
        update_seconds=update_seconds,
    )


def warm_start_seconds(shape: ModelShape, run: RunShape, device: Accelerator | MeasuredSpeed) -> float:
    """Plan the time of a trajectory of the warm start, which rolls nothing out, and trains on all in one step."""
    lesson = replace(run, num_iterations=1, num_queries=1, selector_coef=0.0, selector_gradient="sampled")
    seconds = plan_time(shape, lesson, device, 1.0).update_seconds
    if run.warm_start_temperature is None:
        return seconds
    if isinstance(device, MeasuredSpeed):
        return seconds + choice_tokens(run.layout, 0, run.memory_size) / device.reading
    return seconds + device.seconds(choice_flops(shape, run, 0), 0)
