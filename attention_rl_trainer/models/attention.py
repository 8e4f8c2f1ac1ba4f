r"""A language model's attention layer as a source of query and key vectors (design §5).

Finds the layer's query and key projections, whatever the architecture calls them, and reads vectors off them with
forward hooks, before rotary embedding and after the query / key norm where the architecture has one.

Query heads share key-value groups as in grouped-query attention, here H = 6 and G = 2::

    query heads   0   1   2   3   4   5
                   \  |  /     \  |  /
    key groups        0           1
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

_ATTENTION_NAMES = ("self_attn", "attn", "attention", "self_attention")
_HEAD_DIM_NAMES = ("head_dim", "head_size")
_SUPPORTED = (
    "separate q_proj and k_proj (Llama, Mistral, Qwen2, Qwen3, Gemma, OLMo, ...), "
    "c_attn (GPT-2), query_key_value (GPT-NeoX), qkv_proj (Phi-3)"
)


class UnsupportedArchitectureError(ValueError):
    """The model's attention cannot be resolved into query heads and key groups."""


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


def find_decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """Find the stack of decoder layers of a model without a PEFT wrapper: a list of as many as its config says.

    Raises:
        UnsupportedArchitectureError: there is none.
    """
    num_layers = model.config.get_text_config().num_hidden_layers
    found = [
        (name.count("."), name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == num_layers
    ]
    if not found:
        raise UnsupportedArchitectureError(f"{type(model).__name__} has no list of {num_layers} decoder layers")
    return min(found, key=lambda entry: entry[:2])[2]


def _find_child(parent: nn.Module, names: tuple[str, ...]) -> nn.Module | None:
    children = dict(parent.named_children())
    return next((children[name] for name in names if name in children), None)


def _output_features(projection: nn.Module) -> int:
    """Read a projection's output size; GPT-2's Conv1D calls it ``nf``, and a LoRA layer wraps the projection."""
    wrapped = dict(projection.named_children()).get("base_layer", projection)
    for name in ("out_features", "nf"):
        if hasattr(wrapped, name):
            return int(getattr(wrapped, name))
    raise UnsupportedArchitectureError(f"cannot read the output size of a {type(wrapped).__name__} projection")


def _head_dim(attention: nn.Module) -> int:
    for name in _HEAD_DIM_NAMES:
        if hasattr(attention, name):
            return int(getattr(attention, name))
    raise UnsupportedArchitectureError(
        f"{type(attention).__name__} has none of the attributes {', '.join(_HEAD_DIM_NAMES)}"
    )


def _normalized(heads: Tensor, norm: nn.Module | None) -> Tensor:
    """Apply a query / key norm to ``[..., heads, D]``; architectures norm either each head or all heads together."""
    if norm is None:
        return heads
    size = next(iter(norm.parameters())).shape[-1]
    if size == heads.shape[-1]:
        normalized: Tensor = norm(heads)
        return normalized
    together: Tensor = norm(heads.flatten(-2))
    return torch.unflatten(together, -1, heads.shape[-2:])


@dataclass(frozen=True)
class _Projection:
    """A module to hook, and how its output becomes heads ``[B, S, heads, D]``."""

    module: nn.Module
    to_heads: Callable[[Tensor], Tensor]


def _separate_projections(attention: nn.Module) -> tuple[AttentionHeads, _Projection, _Projection] | None:
    query, key = _find_child(attention, ("q_proj",)), _find_child(attention, ("k_proj",))
    if query is None or key is None:
        return None
    head_dim = _head_dim(attention)
    query_size, key_size = _output_features(query), _output_features(key)
    if query_size % head_dim or key_size % head_dim:
        raise UnsupportedArchitectureError(
            f"q_proj and k_proj give {query_size} and {key_size} features, expected multiples of the head dimension "
            f"{head_dim}"
        )
    heads = AttentionHeads(query_size // head_dim, key_size // head_dim, head_dim)
    query_norm, key_norm = _find_child(attention, ("q_norm",)), _find_child(attention, ("k_norm",))
    return (
        heads,
        _Projection(query, lambda out: _normalized(torch.unflatten(out, -1, (-1, head_dim)), query_norm)),
        _Projection(key, lambda out: _normalized(torch.unflatten(out, -1, (-1, head_dim)), key_norm)),
    )


def _side_by_side(module: nn.Module, heads: AttentionHeads) -> tuple[AttentionHeads, _Projection, _Projection]:
    """Read a fused projection laid out as [all queries | all keys | all values]."""
    query_size = heads.num_query_heads * heads.head_dim
    key_size = heads.num_key_value_groups * heads.head_dim
    if _output_features(module) != query_size + 2 * key_size:
        raise UnsupportedArchitectureError(
            f"the fused projection gives {_output_features(module)} features, expected {query_size + 2 * key_size} "
            f"for {heads}"
        )
    shape = (-1, heads.head_dim)
    return (
        heads,
        _Projection(module, lambda out: torch.unflatten(out[..., :query_size], -1, shape)),
        _Projection(module, lambda out: torch.unflatten(out[..., query_size : query_size + key_size], -1, shape)),
    )


def _interleaved(module: nn.Module, heads: AttentionHeads) -> tuple[AttentionHeads, _Projection, _Projection]:
    """Read GPT-NeoX's fused projection, laid out as [query | key | value] per head."""
    size = heads.head_dim
    if _output_features(module) != 3 * heads.num_query_heads * size:
        raise UnsupportedArchitectureError(
            f"the fused projection gives {_output_features(module)} features, expected "
            f"{3 * heads.num_query_heads * size}"
        )
    return (
        heads,
        _Projection(module, lambda out: torch.unflatten(out, -1, (-1, 3 * size))[..., :size]),
        _Projection(module, lambda out: torch.unflatten(out, -1, (-1, 3 * size))[..., size : 2 * size]),
    )


def _fused_projection(
    model: PreTrainedModel, attention: nn.Module
) -> tuple[AttentionHeads, _Projection, _Projection] | None:
    config = model.config.get_text_config()
    names = {"gpt2": "c_attn", "phi3": "qkv_proj", "gpt_neox": "query_key_value"}
    module = _find_child(attention, (names[config.model_type],)) if config.model_type in names else None
    if module is None:
        return None
    num_heads, head_dim = config.num_attention_heads, _head_dim(attention)
    if config.model_type == "gpt_neox":
        return _interleaved(module, AttentionHeads(num_heads, num_heads, head_dim))
    groups = config.num_key_value_heads if config.model_type == "phi3" else num_heads
    return _side_by_side(module, AttentionHeads(num_heads, groups, head_dim))


class VectorCapture:
    """Collects what a projection gives while it is hooked.

    The hook keeps the bare output: an operation inside a forward that activation checkpointing repeats in the backward,
    when the hook is gone, would make the two forwards differ.

    Attributes:
        outputs: what the projection gave so far, one ``[B, S, features]`` per forward.
    """

    def __init__(self, to_heads: Callable[[Tensor], Tensor]) -> None:
        self._to_heads = to_heads
        self.outputs: list[Tensor] = []

    def heads(self) -> Tensor:
        """Join what was collected, over the tokens: ``[B, S, heads, D]`` in float32."""
        return self._to_heads(torch.cat(self.outputs, dim=1)).float()

    def mean(self) -> Tensor:
        """Average what was collected over the tokens: ``[B, heads, D]`` in float32."""
        return self.heads().mean(dim=1)


class AttentionLayer:
    """One attention layer of a causal language model, read with hooks.

    Args:
        model: without a PEFT wrapper; LoRA layers inside it are hooked as wholes.
        layer: its number; negative numbers count from the last.

    Raises:
        UnsupportedArchitectureError: the layer's attention cannot be resolved.
        ValueError: there is no such layer.
    """

    def __init__(self, model: PreTrainedModel, layer: int = -1) -> None:
        layers = find_decoder_layers(model)
        if not -len(layers) <= layer < len(layers):
            raise ValueError(
                f"attention_layer must be in {-len(layers)}..{len(layers) - 1} for a model of {len(layers)} layers, "
                f"got {layer}"
            )
        attention = _find_child(layers[layer], _ATTENTION_NAMES)
        resolved = None
        if attention is not None:
            resolved = _separate_projections(attention) or _fused_projection(model, attention)
        if resolved is None:
            raise UnsupportedArchitectureError(
                f"cannot find the query and key projections of {type(model).__name__} "
                f"(model_type {model.config.model_type!r}, layer {layer}); supported are {_SUPPORTED}"
            )
        self.layer = layer % len(layers)
        self.heads, self._query, self._key = resolved

    def capture_queries(self) -> AbstractContextManager[VectorCapture]:
        """Collect query heads, ``[B, S, H, D]``, while the context lasts."""
        return _capture(self._query)

    def capture_keys(self) -> AbstractContextManager[VectorCapture]:
        """Collect key groups, ``[B, S, G, D]``, while the context lasts."""
        return _capture(self._key)

    def run_to_keys(self, backbone: nn.Module, token_ids: Tensor) -> Tensor:
        """Run the layer's decoder on ``[B, S]`` as far as this layer's keys, ``[B, S, G, D]`` in float32."""

        def stop(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            raise _ReachedError

        with self.capture_keys() as capture:
            # Called after the hook that captures, which was registered first.
            handle = self._key.module.register_forward_hook(stop)
            try:
                backbone(input_ids=token_ids, use_cache=False)
            except _ReachedError:
                pass
            finally:
                handle.remove()
        return capture.heads()


class _ReachedError(Exception):
    """The layer that is wanted was reached; the only way out of a forward of any architecture."""


@contextmanager
def _capture(projection: _Projection) -> Iterator[VectorCapture]:
    capture = VectorCapture(projection.to_heads)
    handle = projection.module.register_forward_hook(lambda module, arguments, output: capture.outputs.append(output))
    try:
        yield capture
    finally:
        handle.remove()


def find_attention_projections(model: PreTrainedModel) -> list[str]:
    """Name the linear projections of the attention layers of a model without a PEFT wrapper, as adapter targets.

    Returns:
        Names such as ``"self_attn.q_proj"``; each matches one module of every layer.

    Raises:
        UnsupportedArchitectureError: there are none.
    """
    names: set[str] = set()
    for layer in find_decoder_layers(model):
        for child_name in _ATTENTION_NAMES:
            attention = _find_child(layer, (child_name,))
            if attention is not None:
                linear = [name for name, child in attention.named_modules() if isinstance(child, nn.Linear | Conv1D)]
                names.update(f"{child_name}.{name}" for name in linear)
    if not names:
        raise UnsupportedArchitectureError(
            f"the layers of {type(model).__name__} have no attention with linear projections; give a peft_config"
        )
    return sorted(names)
