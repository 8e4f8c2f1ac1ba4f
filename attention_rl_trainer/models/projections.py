"""An attention layer's projections into the query and key heads that it compares (design §5).

A query or key vector is what the layer compares of a token at position 0: the output of the projection, without the
gate that some put beside it, after the norm and the clipping that follow, and before rotary embedding; up to one factor
that all tokens and heads share. Names alone do not say which of these an architecture applies, nor how a projection's
output is laid out. So every reading that the names allow is held against what the layer hands to its attention
function, on single tokens at position 0, where rotary embedding turns nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask

from attention_rl_trainer.models.modes import deterministic_inference

ToHeads: TypeAlias = Callable[[Tensor], Tensor]

_HEAD_DIM_NAMES = ("head_dim", "head_size")
_FUSED_NAMES = ("c_attn", "qkv_proj", "query_key_value", "Wqkv")
_QUERY_NORM_NAMES = ("q_norm", "q_layernorm", "q_layer_norm", "query_layernorm", "qk_norm", "qk_layernorm")
_KEY_NORM_NAMES = ("k_norm", "k_layernorm", "k_layer_norm", "key_layernorm", "qk_norm", "qk_layernorm")
SUPPORTED = (
    "separate q_proj and k_proj (Llama, Mistral, Qwen, Gemma, OLMo, OPT, ...) "
    "and fused c_attn (GPT-2), query_key_value (GPT-NeoX) and qkv_proj (Phi-3)"
)
"""What is known, for messages."""
_PLAIN_PARTS = {"q_proj", "k_proj", "v_proj", "o_proj", "out_proj"}
_NUM_TOKENS = 8
# What remains is rounding: both sides come from one forward.
_LARGEST_DIFFERENCE = 1e-2


class UnsupportedArchitectureError(ValueError):
    """The model cannot be read or trained here; the message names what is missing."""


@dataclass(frozen=True)
class AttentionHeads:
    """The head layout of an attention layer."""

    num_query_heads: int
    """H."""
    num_key_value_groups: int
    """G; each group is shared by H / G consecutive query heads."""
    head_dim: int
    """D."""

    def __post_init__(self) -> None:
        if min(self.num_query_heads, self.num_key_value_groups, self.head_dim) < 1:
            raise UnsupportedArchitectureError(f"head counts and dimension must be positive, got {self}")
        if self.num_query_heads % self.num_key_value_groups != 0:
            raise UnsupportedArchitectureError(
                f"{self.num_query_heads} query heads cannot share {self.num_key_value_groups} key-value groups evenly"
            )


@dataclass(frozen=True)
class Projection:
    """A module to hook, and how its output ``[B, S, features]`` becomes heads ``[B, S, heads, D]``."""

    module: nn.Module
    to_heads: ToHeads


def described(model: PreTrainedModel) -> str:
    """Name a model and its type, for messages."""
    return f"{type(model).__name__} (model_type {model.config.model_type!r})"


def find_child(parent: nn.Module, names: Sequence[str]) -> nn.Module | None:
    """Find the first child that has one of the names."""
    children = dict(parent.named_children())
    return next((children[name] for name in names if name in children), None)


def has_projections(attention: nn.Module) -> bool:
    """Whether a module's names are those of an attention whose projections may be resolved."""
    children = dict(attention.named_children())
    return {"q_proj", "k_proj"} <= children.keys() or any(name in children for name in _FUSED_NAMES)


@torch.no_grad()
def resolve_projections(model: PreTrainedModel, attention: nn.Module) -> tuple[AttentionHeads, Projection, Projection]:
    """Find how queries and keys are read off an attention layer of a model without a PEFT wrapper.

    Raises:
        UnsupportedArchitectureError: no reading of its projections gives what it compares, or none is known.
    """
    config = model.config.get_text_config()
    name = f"{type(attention).__name__} of {described(model)}"
    try:
        modules, readings = _readings(config, attention)
    except UnsupportedArchitectureError as error:
        raise UnsupportedArchitectureError(f"{name}: {error}") from error
    received = _observe(model, attention, modules)
    if received is None:
        return _unverified(name, config, attention, modules, readings)
    if not bool(received.query.isfinite().all() and received.key.isfinite().all()):
        raise UnsupportedArchitectureError(
            f"the queries or keys of {name} are not finite at the first {_NUM_TOKENS} tokens of the vocabulary, so its "
            "weights hold NaN or infinity; load or save them again"
        )
    queries = _best(received.query_output, received.query, readings.queries)
    keys = _best(received.key_output, received.key, readings.keys)
    for side, found in {"query": queries, "key": keys}.items():
        if found is None:
            raise UnsupportedArchitectureError(
                f"what {name} compares is not the output of its {side} projection, with or without the norms, gates "
                "and clipping that are known; choose another attention_layer, or another base model"
            )
    assert queries is not None
    assert keys is not None
    heads = AttentionHeads(
        queries(received.query_output).shape[-2], keys(received.key_output).shape[-2], received.query.shape[-1]
    )
    return heads, Projection(modules.query, queries), Projection(modules.key, keys)


# ---- What the names allow ----


@dataclass(frozen=True)
class _Modules:
    """The modules whose outputs hold queries and keys; one module where they are fused."""

    query: nn.Module
    key: nn.Module


@dataclass(frozen=True)
class _Readings:
    """Ways to read queries and keys off the modules' outputs, the likeliest first."""

    queries: list[ToHeads]
    keys: list[ToHeads]


def _readings(config: Any, attention: nn.Module) -> tuple[_Modules, _Readings]:
    head_dim = _head_dim(attention)
    query, key = find_child(attention, ("q_proj",)), find_child(attention, ("k_proj",))
    if query is not None and key is not None:
        for name, module in {"q_proj": query, "k_proj": key}.items():
            if _output_features(module) % head_dim:
                raise UnsupportedArchitectureError(
                    f"{name} gives {_output_features(module)} features, expected a multiple of the head dimension "
                    f"{head_dim}"
                )
        splits = _query_splits(head_dim, _output_features(query)), [_split(head_dim)]
        modules = _Modules(query, key)
    else:
        fused = find_child(attention, _FUSED_NAMES)
        assert fused is not None, "the caller has asked has_projections()"
        splits = _fused_splits(config, _output_features(fused), head_dim)
        modules = _Modules(fused, fused)
    clip = config.to_dict().get("clip_qkv")
    queries = _with_norm_and_clip(splits[0], attention, _QUERY_NORM_NAMES, clip)
    return modules, _Readings(queries, _with_norm_and_clip(splits[1], attention, _KEY_NORM_NAMES, clip))


def _output_features(projection: nn.Module) -> int:
    """Read a projection's output size; GPT-2's Conv1D calls it ``nf``, and a LoRA layer wraps the projection."""
    wrapped = dict(projection.named_children()).get("base_layer", projection)
    for name in ("out_features", "nf"):
        if hasattr(wrapped, name):
            return int(getattr(wrapped, name))
    raise UnsupportedArchitectureError(
        f"a {type(wrapped).__name__} does not say how many features it gives, as a projection of queries or keys "
        "should; choose another attention_layer, or another base model"
    )


def _head_dim(attention: nn.Module) -> int:
    for name in _HEAD_DIM_NAMES:
        if hasattr(attention, name):
            return int(getattr(attention, name))
    raise UnsupportedArchitectureError(
        f"{type(attention).__name__} has none of the attributes {', '.join(_HEAD_DIM_NAMES)}"
    )


def _split(head_dim: int) -> ToHeads:
    return lambda out: torch.unflatten(out, -1, (-1, head_dim))


def _query_splits(head_dim: int, features: int) -> list[ToHeads]:
    """Ways to cut queries out of their projection: all of it, or without a gate per head or after all heads."""
    splits = [_split(head_dim)]
    if features % (2 * head_dim) == 0:
        splits.append(lambda out: torch.unflatten(out, -1, (-1, 2 * head_dim))[..., :head_dim])
        splits.append(lambda out: torch.unflatten(out[..., : features // 2], -1, (-1, head_dim)))
    return splits


def _fused_splits(config: Any, features: int, head_dim: int) -> tuple[list[ToHeads], list[ToHeads]]:
    """Ways to cut queries and keys out of one projection of both and of the values."""
    num_heads = int(config.num_attention_heads)
    groups, remainder = divmod(features // head_dim - num_heads, 2)
    if features % head_dim or remainder or groups < 1:
        raise UnsupportedArchitectureError(
            f"the fused projection gives {features} features, expected {num_heads} query heads of {head_dim} and as "
            "many key as value heads"
        )
    query_size, key_size = num_heads * head_dim, groups * head_dim
    per_group = num_heads // groups  # queries, then a key and a value, for each group
    queries: list[ToHeads] = [
        lambda out: torch.unflatten(out[..., :query_size], -1, (-1, head_dim)),
        lambda out: _blocks(out, groups, head_dim)[..., :per_group, :].flatten(-3, -2),
    ]
    keys: list[ToHeads] = [
        lambda out: torch.unflatten(out[..., query_size : query_size + key_size], -1, (-1, head_dim)),
        lambda out: _blocks(out, groups, head_dim)[..., per_group, :],
    ]
    return queries, keys


def _blocks(fused: Tensor, groups: int, head_dim: int) -> Tensor:
    """Cut the output of a fused projection into ``[..., G, H / G + 2, D]``."""
    return torch.unflatten(torch.unflatten(fused, -1, (-1, head_dim)), -2, (groups, -1))


def _with_norm_and_clip(
    splits: Sequence[ToHeads], attention: nn.Module, names: Sequence[str], clip: float | None
) -> list[ToHeads]:
    norm = find_child(attention, names)
    norms: list[ToHeads] = [lambda heads: heads]
    if norm is not None:
        norms = [
            norm,
            lambda heads: torch.unflatten(norm(heads.flatten(-2)), -1, heads.shape[-2:]),
            # One norm for each head, which expects the heads before the tokens.
            lambda heads: norm(heads.transpose(-3, -2)).transpose(-3, -2),
            *norms,
        ]
    clips: list[ToHeads] = [lambda heads: heads]
    if clip is not None:
        clips.insert(0, lambda heads: heads.clamp(-clip, clip))
    return [_chained(*steps) for steps in itertools.product(splits, norms, clips)]


def _chained(*steps: ToHeads) -> ToHeads:
    def apply(states: Tensor) -> Tensor:
        for step in steps:
            states = step(states)
        return states

    return apply


# ---- What the layer compares ----


@dataclass(frozen=True)
class _Received:
    """Outputs of the projections, ``[B, 1, features]``, and what the attention function got, ``[B, heads, 1, D]``."""

    query_output: Tensor
    key_output: Tensor
    query: Tensor
    key: Tensor


class _ComparedError(Exception):
    """The layer that is observed has called its attention function; carries queries and keys."""

    def __init__(self, query: Tensor, key: Tensor) -> None:
        super().__init__()
        self.query, self.key = query, key


class _Observer:
    """An attention function for single tokens at position 0, that stops the forward at one layer."""

    name = "attention_rl_observer"
    layer: nn.Module | None = None

    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        if module is self.layer:
            raise _ComparedError(query, key)
        # A single token attends to itself alone.
        return value.repeat_interleave(query.shape[1] // value.shape[1], dim=1).transpose(1, 2), None


_OBSERVER = _Observer()
AttentionInterface.register(_Observer.name, _OBSERVER)
AttentionMaskInterface.register(_Observer.name, eager_mask)


@contextmanager
def _observing(config: Any, layer: nn.Module) -> Iterator[None]:
    previous = config._attn_implementation
    config._attn_implementation, _OBSERVER.layer = _Observer.name, layer
    try:
        yield
    finally:
        config._attn_implementation, _OBSERVER.layer = previous, None


def _observe(model: PreTrainedModel, attention: nn.Module, modules: _Modules) -> _Received | None:
    """Read single tokens as far as the layer's comparison; ``None`` where it calls no exchangeable function."""
    outputs: dict[str, Tensor] = {}

    def keep(side: str) -> Callable[[nn.Module, Any, Tensor], None]:
        # A copy: some layers clip in place.
        return lambda module, arguments, output: outputs.update({side: output.clone()})

    hooks = [modules.query.register_forward_hook(keep("query")), modules.key.register_forward_hook(keep("key"))]
    ids = torch.arange(_NUM_TOKENS, device=next(model.get_input_embeddings().parameters()).device)[:, None]
    try:
        with deterministic_inference(model), _observing(model.config.get_text_config(), attention):
            model(input_ids=ids, use_cache=False)
    except _ComparedError as compared:
        if outputs.keys() == {"query", "key"}:
            return _Received(outputs["query"], outputs["key"], compared.query, compared.key)
    finally:
        for hook in hooks:
            hook.remove()
    return None


def _best(output: Tensor, expected: Tensor, readings: Sequence[ToHeads]) -> ToHeads | None:
    """Choose the reading of a projection's output that is nearest to the expected heads, ``[B, heads, 1, D]``."""
    differences = [(_difference(reading, output, expected.transpose(1, 2)), reading) for reading in readings]
    smallest, best = min(differences, key=lambda entry: entry[0])
    return best if smallest < _LARGEST_DIFFERENCE else None


def _difference(reading: ToHeads, output: Tensor, expected: Tensor) -> float:
    """Relative distance to the expected heads, up to a positive factor; infinite where the shapes do not fit."""
    try:
        heads = reading(output).float()
    except (RuntimeError, ValueError):
        return float("inf")
    # Some layers repeat the keys of a group for each of its query heads before they compare them.
    heads = heads.repeat_interleave(max(1, expected.shape[-2] // heads.shape[-2]), dim=-2)
    if heads.shape != expected.shape:
        return float("inf")
    heads, expected = heads.flatten(), expected.float().flatten()
    factor = heads.dot(expected) / heads.dot(heads)
    if not factor > 0:
        return float("inf")
    return float((factor * heads - expected).norm() / expected.norm())


def _unverified(
    name: str, config: Any, attention: nn.Module, modules: _Modules, readings: _Readings
) -> tuple[AttentionHeads, Projection, Projection]:
    """Take the likeliest reading of an attention that shows nothing, if its names leave no doubt."""
    head_dim = _head_dim(attention)
    query_heads, doubt = divmod(_output_features(modules.query), head_dim)
    doubt = doubt or modules.query is modules.key or query_heads != int(config.num_attention_heads)
    # Whatever else it holds may stand between projection and comparison: a norm, a convolution, a recurrence.
    others = {name for name, child in attention.named_children() if not isinstance(child, nn.Dropout)}
    doubt = doubt or not others <= _PLAIN_PARTS
    if doubt:
        raise UnsupportedArchitectureError(
            f"{name} does not call transformers' attention functions, and the names of its parts do not tell what it "
            f"compares; supported are {SUPPORTED}"
        )
    heads = AttentionHeads(query_heads, _output_features(modules.key) // head_dim, head_dim)
    return heads, Projection(modules.query, readings.queries[0]), Projection(modules.key, readings.keys[0])
