"""How fast this machine is with the actual model: a few forwards and a gradient over made-up tokens are timed.

For a GPU a data sheet and a roofline have to do, because it may be elsewhere; a CPU is there, and no sheet says what it
reaches beside other work.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from attention_rl_trainer.config import AttentionGuidedRLConfig
from attention_rl_trainer.memories.pairs import MemoryBatch, add_embeddings
from attention_rl_trainer.models.policy import PolicyModel
from attention_rl_trainer.models.readers import open_readers
from attention_rl_trainer.options import take_options
from attention_rl_trainer.planning.timing import MeasuredSpeed
from attention_rl_trainer.rollout.environment import KVMemoryEnvironment, SelectionOptions
from attention_rl_trainer.rollout.layout import Layout, Separators
from attention_rl_trainer.types import ArticleReference, KeyValuePairs, StreamPosition
from attention_rl_trainer.update.kept import KeptTrajectories
from attention_rl_trainer.update.losses import LossOptions
from attention_rl_trainer.update.objective import compute_loss_terms
from attention_rl_trainer.update.previous_adapter import AdapterSnapshot

_FEW = 4
"""Trajectories whose matrices are large enough for a CPU, and whose activations fit anywhere; tokens to decode."""
_SHORT = 16
"""Tokens of a context before which a batch decodes: what a token takes hardly depends on them."""


@dataclass(frozen=True)
class Measurement:
    """What was timed, in seconds."""

    speed: MeasuredSpeed
    reading_seconds: float
    """Policy and reference read a few prompts."""
    decoding_seconds: float
    """Both write a few tokens of the queries of a whole batch."""
    update_seconds: float
    """The loss of a few trajectories, and its gradient."""


def measure(policy: PolicyModel, separators: Separators, config: AttentionGuidedRLConfig) -> Measurement:
    """Time the parts of a step, as the rollout and the update do them.

    The weights stay as they are. What the options of the selector say is not looked at: it takes no time.
    """
    layout, generator = Layout.of(config, separators), torch.Generator().manual_seed(config.seed)
    batch = made_up_memories(config, config.generation_batch_size, policy.allowed_ids, generator)
    few, num_tokens = batch.head(_FEW), min(_FEW, config.tokens_per_query)
    prompts = layout.prompt(batch, policy.device)
    noise = torch.rand(2, 2, len(batch), num_tokens, generator=generator).to(policy.device)
    with policy.inference():
        memory = add_embeddings(few, policy.embed_keys)  # warms up, too
        reading = _seconds(lambda: open_readers(policy, prompts[: len(few)], prompts.shape[1]))
        readers = open_readers(policy, prompts[:, -_SHORT:], _SHORT + 2 * num_tokens)
        readers.write_queries(*noise[0])
        decoding = _seconds(lambda: readers.write_queries(*noise[1]))
    trained_on = min(len(few), config.training_batch_size)
    update = _differentiate(policy, _made_up_trajectories(layout, memory, trained_on, policy, generator), config)
    return Measurement(
        MeasuredSpeed(
            reading=2 * len(few) * prompts.shape[1] / reading,
            decoding=num_tokens / decoding,
            update=trained_on * layout.trajectory_tokens / update,
        ),
        reading_seconds=reading,
        decoding_seconds=decoding,
        update_seconds=update,
    )


def made_up_memories(
    config: AttentionGuidedRLConfig, rows: int, token_ids: Tensor, generator: torch.Generator
) -> MemoryBatch:
    """Draw memories of the run's sizes from the ids of ordinary tokens."""

    def draw(*shape: int) -> Tensor:
        return _draw(token_ids.cpu(), (rows, *shape), generator)

    pairs = config.memory_size
    return MemoryBatch(
        example_keys=draw(config.tokens_per_key),
        example_values=draw(config.tokens_per_value),
        key_tokens=draw(pairs, config.tokens_per_key),
        value_tokens=draw(pairs, config.tokens_per_value),
        pair_numbers=torch.arange(1, pairs + 1).expand(rows, -1).clone(),
        articles=[ArticleReference("made up", "made up", 0, row, StreamPosition(0, row + 1)) for row in range(rows)],
    )


def _draw(token_ids: Tensor, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return token_ids[torch.randint(len(token_ids), shape, generator=generator).to(token_ids.device)]


def _made_up_trajectories(
    layout: Layout, memory: KeyValuePairs, count: int, policy: PolicyModel, generator: torch.Generator
) -> KeptTrajectories:
    device, num_steps = policy.device, layout.num_steps
    return KeptTrajectories(
        token_ids=_draw(policy.allowed_ids, (count, layout.trajectory_tokens), generator),
        query_starts=tuple(layout.query_starts),
        value_starts=tuple(layout.value_starts),
        query_length=layout.tokens_per_query,
        value_length=layout.tokens_per_value,
        rollout_logprobs=torch.zeros(count, num_steps, layout.tokens_per_query, device=device),
        selected_index=torch.arange(num_steps, device=device).expand(count, -1),
        memory=memory.select_rows(torch.arange(count, device=device)),
        advantages=torch.ones(count, num_steps, device=device),
        weights=torch.full((count,), 1 / count, device=device),
    )


def _differentiate(policy: PolicyModel, kept: KeptTrajectories, config: AttentionGuidedRLConfig) -> float:
    environment, snapshot = KVMemoryEnvironment(SelectionOptions()), AdapterSnapshot(policy.model)
    # What the choices would tell is read before, and counted by its tokens.
    options = take_options(LossOptions, config, selector_gradient="sampled")

    def differentiate() -> None:
        terms = compute_loss_terms(policy, policy.model, environment, snapshot, kept, options)
        terms.loss.backward()  # type: ignore[no-untyped-call]  # torch does not annotate it

    seconds = _seconds(differentiate)
    policy.model.zero_grad()
    return seconds


def _seconds(act: Callable[[], object]) -> float:
    begin = time.perf_counter()
    act()
    return time.perf_counter() - begin
