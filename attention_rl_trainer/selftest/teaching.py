"""A tiny Llama that is taught the planted language in seconds, as the base model of the self-test.

Two things are taught together: to continue the language (cross-entropy over every token), and that the attention layer
which selects draws the pair whose key a query names (cross-entropy of the shipped selector's distribution over keys).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from attention_rl_trainer.models.attention import AttentionLayer
from attention_rl_trainer.rollout.layout import positions
from attention_rl_trainer.rollout.selector import compute_similarity, selection_log_probabilities
from attention_rl_trainer.selftest.language import (
    LAYOUT,
    NAME_LENGTH,
    NUM_TOPICS,
    RELATED,
    VALUE_LENGTH,
    VOCABULARY_SIZE,
    draw_sequences,
    prompt_of,
    step_of,
    topic_names,
    topic_values,
)

# To look a value up in the context is the one thing that is hard to learn; without it 1,000 steps are too few.
_WEIGHT_OF_RELATED = 5.0


def teach(seed: int, *, num_steps: int = 1600, batch_size: int = 64, learning_rate: float = 5e-3) -> PreTrainedModel:
    """Teach a new model the language, with a learning rate that rises to its highest value and falls once.

    Returns:
        The model, in evaluation mode.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=VOCABULARY_SIZE,
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=128,
            )
        )
    generator = np.random.default_rng([seed, 2])
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=num_steps, pct_start=0.1)
    layer = AttentionLayer(model)
    for _ in range(num_steps):
        sequences, asked = draw_sequences(batch_size, generator)
        loss = _loss(model, layer, sequences, asked)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # not annotated upstream
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()  # type: ignore[no-untyped-call]  # not annotated upstream
    return model


def _loss(model: PreTrainedModel, layer: AttentionLayer, sequences: Tensor, asked: Tensor) -> Tensor:
    with layer.capture_queries() as queries:
        logits = model(input_ids=sequences, use_cache=False).logits
    # The prompt's own name and value are never predicted.
    start = LAYOUT.prompt_tokens - 1
    token_losses = torch.nn.functional.cross_entropy(
        logits[:, start:-1].flatten(0, 1), sequences[:, start + 1 :].flatten(), reduction="none"
    )
    weights = _token_weights(asked)
    reading = (token_losses * weights).sum() / weights.sum()
    with layer.capture_keys() as keys:
        model.base_model(input_ids=topic_names()[:NUM_TOPICS], use_cache=False)
    key_vectors = keys.mean()[None].expand(asked.numel(), -1, -1, -1)
    places = positions(replace(LAYOUT, num_steps=NUM_TOPICS).query_starts, NAME_LENGTH, sequences.device)
    query_vectors = torch.unflatten(queries.heads()[:, places], 1, (NUM_TOPICS, -1)).mean(dim=2).flatten(0, 1)
    available = torch.ones(asked.numel(), NUM_TOPICS, dtype=torch.bool)
    chosen = selection_log_probabilities(compute_similarity(query_vectors, key_vectors), available)
    return reading - chosen.gather(1, asked.flatten()[:, None]).mean()


def _token_weights(asked: Tensor) -> Tensor:
    """Weigh the tokens of the steps, flattened: the values of the related topics count more."""
    weights = torch.ones(*asked.shape, LAYOUT.step_tokens)
    is_related = torch.isin(asked, torch.tensor(RELATED))
    weights[is_related, NAME_LENGTH + 1 : -1] = _WEIGHT_OF_RELATED
    return weights.flatten()


@torch.no_grad()
def lesson_learned(model: PreTrainedModel, seed: int, count: int = 256) -> dict[str, float]:
    """Examine a taught model on new sequences.

    Returns:
        ``"copied"``: probability of a related topic's value right after another one's was read; ``"drawn"``:
        probability with which a name draws its pair; ``"named"``: probability that a query is the name of a topic.
    """
    values = topic_values(count, np.random.default_rng([seed, 3]))
    names = topic_names()
    rows = [step_of(names[topic].expand(count, -1), values[:, topic]) for topic in RELATED[:2]]
    sequence = torch.cat([prompt_of(values), *rows], dim=1)
    layer = AttentionLayer(model)
    with layer.capture_queries() as queries:
        probabilities = model(input_ids=sequence, use_cache=False).logits.softmax(-1)
    with layer.capture_keys() as keys:
        model.base_model(input_ids=names[:NUM_TOPICS], use_cache=False)
    start, value_start = LAYOUT.query_starts[1], LAYOUT.value_starts[1]
    value_places = torch.arange(value_start, value_start + VALUE_LENGTH)
    copied = probabilities[:, value_places - 1].gather(2, sequence[:, value_places, None]).prod(dim=1)
    query_vectors = queries.heads()[:, start : start + NAME_LENGTH].mean(dim=1)
    chosen = selection_log_probabilities(
        compute_similarity(query_vectors, keys.mean()[None].expand(count, -1, -1, -1)),
        torch.ones(count, NUM_TOPICS, dtype=torch.bool),
    ).exp()
    named = probabilities[:, start - 1, names[:, 0]].sum(dim=1)
    return {
        "copied": copied.mean().item(),
        "drawn": chosen[:, RELATED[1]].mean().item(),
        "named": named.mean().item(),
    }
