"""Everything that a run asks of a model, tried once on a few tokens before the first episode (design §6, §9).

Architectures differ in where a forward passes, what it caches and which layers compute keys of their own. What does not
work is refused here, by name, and not after hours of rollouts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from attention_rl_trainer.models.branches import TokenTree
from attention_rl_trainer.models.causal_lm import is_loaded_in_4_bits
from attention_rl_trainer.models.modes import update_mode
from attention_rl_trainer.models.policy import PolicyModel
from attention_rl_trainer.models.projections import UnsupportedArchitectureError, described
from attention_rl_trainer.models.readers import open_readers

_ROWS, _TOKENS = 2, 4


def expect_trainable(policy: PolicyModel, *, through_choice: bool, trees_for: Sequence[str] = ()) -> None:
    """Embed keys, take a step of a rollout, and compute the gradient of an update, with a few tokens each.

    Weights, gradients and random states are those before.

    Args:
        through_choice: whether the update differentiates the choice of a pair too.
        trees_for: options that need trees to be read, for the message.

    Raises:
        UnsupportedArchitectureError: names what does not work, and the way out where there is one.
    """
    if policy.device.type == "cpu" and is_loaded_in_4_bits(policy.causal_lm):
        raise UnsupportedArchitectureError(
            f"{described(policy.causal_lm)} is loaded in 4 bits on a CPU, where bitsandbytes repacks such layers for "
            "evaluation and they give no gradient after that; load it in 16 or 32 bits, or use a GPU"
        )
    ids = policy.allowed_ids[torch.arange(_ROWS * _TOKENS, device=policy.device) % len(policy.allowed_ids)]
    ids = ids.view(_ROWS, _TOKENS)
    heads = policy.attention.heads
    with _named(policy, "embedding keys"):
        keys = policy.embed_unseen(ids)
        _expect_shape(keys, (_ROWS, heads.num_key_value_groups, heads.head_dim))
    with _named(policy, "a step of a rollout"), policy.inference():
        readers = open_readers(policy, ids, 4 * _TOKENS)
        noise = torch.full((_ROWS, _TOKENS), 0.5, dtype=torch.float64, device=policy.device)
        queries = readers.write_queries(noise, noise)
        _expect_shape(queries.vectors, (_ROWS, heads.num_query_heads, heads.head_dim))
        readers.read_response(ids, _TOKENS)
        readers.follow(torch.cat([queries.query.token_ids, ids], dim=1))
    tokens: Tensor | TokenTree = ids
    if trees_for:
        asked = ", ".join(trees_for)
        with _named(policy, f"reading branches of a text, which {asked} needs (leave it out),"), policy.inference():
            tokens = TokenTree(ids)
            tokens.grow(0, ids[:, :1])
            policy.forward_tree(tokens)
    with _named(policy, "the forward and backward of an update"):
        _expect_gradient(policy, tokens, through_choice=through_choice)


def _expect_gradient(policy: PolicyModel, tokens: Tensor | TokenTree, *, through_choice: bool) -> None:
    was_training = policy.model.training
    trained = [parameter for parameter in policy.model.parameters() if parameter.requires_grad]
    # Activation checkpointing acts in train mode alone.
    policy.model.train()
    try:
        with update_mode(policy.model):
            hidden, capture = policy.training_forward(policy.model, tokens, capture_queries=True)
            assert capture is not None
            vectors = capture.heads()
            shape = (tokens.token_ids if isinstance(tokens, TokenTree) else tokens).shape
            _expect_shape(hidden, (*shape, hidden.shape[-1]))
            heads = policy.attention.heads
            _expect_shape(vectors, (*shape, heads.num_query_heads, heads.head_dim))
            if through_choice and not vectors.requires_grad:
                raise UnsupportedArchitectureError(
                    "selector_coef is above 0, but the query vectors carry no gradient: either activation "
                    "checkpointing drops it, which gradient_checkpointing_kwargs={'use_reentrant': False} avoids, or "
                    "the adapter changes nothing up to the attention_layer; or set selector_coef to 0"
                )
            loss = policy.query_log_probabilities(hidden)[..., 0].sum()
            gradients = _gradients(loss, trained) if loss.requires_grad else []
    finally:
        policy.model.train(was_training)
    if all(gradient is None for gradient in gradients):
        raise UnsupportedArchitectureError(
            "no trained weight has a gradient: the adapter's parameters must have requires_grad, its layers must be "
            "those that compute the logits, and activation checkpointing needs "
            "gradient_checkpointing_kwargs={'use_reentrant': False}"
        )


def _gradients(loss: Tensor, parameters: Sequence[nn.Parameter]) -> list[Tensor | None]:
    """Differentiate as the update does, and put back the gradients that were there."""
    before = [parameter.grad for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.grad = None
        loss.backward()  # type: ignore[no-untyped-call]  # not annotated upstream
        return [parameter.grad for parameter in parameters]
    finally:
        for parameter, gradient in zip(parameters, before, strict=True):
            parameter.grad = gradient


def _expect_shape(tensor: Tensor, expected: tuple[int, ...]) -> None:
    if tensor.shape != expected:
        raise UnsupportedArchitectureError(f"expected a tensor of shape {expected}, got {tuple(tensor.shape)}")


@contextmanager
def _named(policy: PolicyModel, what: str) -> Iterator[None]:
    """Name the model and what was tried in whatever is raised inside, but for a lack of memory."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        reason = str(error) if isinstance(error, UnsupportedArchitectureError) else f"{type(error).__name__}: {error}"
        raise UnsupportedArchitectureError(
            f"{described(policy.causal_lm)} cannot be trained here: {what} fails: {reason}"
        ) from error
