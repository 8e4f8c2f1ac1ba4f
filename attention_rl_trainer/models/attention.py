r"""A language model's attention layer as a source of query and key vectors (design §5).

Finds the layer, whatever the architecture calls it, and reads vectors off its projections with forward hooks
(`projections` says what a vector is).

Query heads share key-value groups as in grouped-query attention, here H = 6 and G = 2::

    query heads   0   1   2   3   4   5
                   \  |  /     \  |  /
    key groups        0           1
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from attention_rl_trainer.models.projections import (
    SUPPORTED,
    Projection,
    ToHeads,
    UnsupportedArchitectureError,
    described,
    find_child,
    has_projections,
    resolve_projections,
)

# PEFT takes a projection of this name for a part of a mixture's MLP, wherever it is.
_TAKEN_FOR_AN_MLP = "gate_proj"
_ATTENTION_NAMES = ("self_attn", "attn", "attention", "self_attention")


def find_decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """Find the stack of decoder layers of a model without a PEFT wrapper: a list of as many as its config says.

    Raises:
        UnsupportedArchitectureError: there is none.
    """
    num_layers = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    found = [
        (name.count("."), name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == num_layers
    ]
    if not found:
        raise UnsupportedArchitectureError(
            f"{type(model).__name__} has no list of decoder layers as long as its config says: {num_layers}"
        )
    return min(found, key=lambda entry: entry[:2])[2]


class VectorCapture:
    """Collects what a projection gives while it is hooked.

    The hook keeps the bare output: an operation inside a forward that activation checkpointing repeats in the backward,
    when the hook is gone, would make the two forwards differ.

    Attributes:
        outputs: what the projection gave so far, one ``[B, S, features]`` per forward.
    """

    def __init__(self, to_heads: ToHeads) -> None:
        self._to_heads = to_heads
        self.outputs: list[Tensor] = []

    @property
    def parts(self) -> list[VectorCapture]:
        """See `heads.Capture`."""
        return [self]

    def heads(self) -> Tensor:
        """Join what was collected, over the tokens: ``[B, S, heads, D]`` in float32.

        Raises:
            UnsupportedArchitectureError: the layer has computed none.
        """
        if not self.outputs:
            raise UnsupportedArchitectureError(
                "the attention layer has computed no queries or keys of its own (some layers share those of another); "
                "choose another attention_layer"
            )
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
        attention = find_attention(layers[layer])
        if attention is None:
            raise UnsupportedArchitectureError(_no_attention(model, layers, layer))
        self.layer = layer % len(layers)
        self.heads, self._query, self._key = resolve_projections(model, attention)

    @property
    def key_module(self) -> nn.Module:
        """The projection that gives the keys."""
        return self._key.module

    def capture_queries(self) -> AbstractContextManager[VectorCapture]:
        """Collect query heads, ``[B, S, H, D]``, while the context lasts."""
        return _capture(self._query)

    def capture_keys(self) -> AbstractContextManager[VectorCapture]:
        """Collect key groups, ``[B, S, G, D]``, while the context lasts."""
        return _capture(self._key)

    def run_to_keys(self, backbone: nn.Module, token_ids: Tensor) -> Tensor:
        """Run the layer's decoder on ``[B, S]`` as far as this layer's keys, ``[B, S, G, D]`` in float32."""
        with self.capture_keys() as capture, stopping_after(self):
            backbone(input_ids=token_ids, use_cache=False)
        return capture.heads()

    def __str__(self) -> str:
        heads = self.heads
        return (
            f"layer {self.layer}: {heads.num_query_heads} query heads, {heads.num_key_value_groups} key-value groups "
            f"of {heads.head_dim}"
        )


class _ReachedError(Exception):
    """The layer that is wanted was reached; the only way out of a forward of any architecture."""


@contextmanager
def stopping_after(layer: AttentionLayer) -> Iterator[None]:
    """End a forward that is run inside of the context once a layer has computed its keys.

    Hooks that are to see those keys must be there before.
    """

    def stop(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        raise _ReachedError

    handle = layer.key_module.register_forward_hook(stop)
    try:
        yield
    except _ReachedError:
        pass
    finally:
        handle.remove()


@contextmanager
def _capture(projection: Projection) -> Iterator[VectorCapture]:
    capture = VectorCapture(projection.to_heads)
    handle = projection.module.register_forward_hook(lambda module, arguments, output: capture.outputs.append(output))
    try:
        yield capture
    finally:
        handle.remove()


def find_attention(layer: nn.Module) -> nn.Module | None:
    """Find the self-attention of a decoder layer by its name, or inside a module of such a name."""
    outer = find_child(layer, _ATTENTION_NAMES)
    inner = None if outer is None else find_child(outer, _ATTENTION_NAMES)
    return next((module for module in (outer, inner) if module is not None and has_projections(module)), None)


def _no_attention(model: PreTrainedModel, layers: nn.ModuleList, layer: int) -> str:
    where = f"layer {layer} of {described(model)}"
    others = [number for number, other in enumerate(layers) if find_attention(other) is not None]
    if others:
        return (
            f"{where} has no attention that could select; set attention_layer to one that has: "
            f"{', '.join(map(str, others))}"
        )
    return f"{where} has no known query and key projections, nor has another layer; supported are {SUPPORTED}"


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
            attention = find_child(layer, (child_name,))
            if attention is not None:
                linear = [name for name, child in attention.named_modules() if isinstance(child, nn.Linear | Conv1D)]
                names.update(f"{child_name}.{name}" for name in linear if name != _TAKEN_FOR_AN_MLP)
    if not names:
        raise UnsupportedArchitectureError(
            f"the layers of {type(model).__name__} have no attention with linear projections; give a peft_config"
        )
    return sorted(names)
