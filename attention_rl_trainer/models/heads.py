"""Chosen heads of any layers, read together: what the calibrated selector compares (design §5).

Heads that retrieve are scattered over the middle layers (QRHead, Zhang et al. 2025), so the best ones of a model are in
several of them. `ChosenHeads` reads them as one attention layer with as many key groups as query heads: head i of what
it gives is the i-th that was chosen, with the keys of that head's group.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from attention_rl_trainer.models.attention import (
    AttentionLayer,
    VectorCapture,
    find_attention,
    find_decoder_layers,
    stopping_after,
)
from attention_rl_trainer.models.projections import AttentionHeads, UnsupportedArchitectureError, described


class HeadNumber(NamedTuple):
    """A query head of a layer, both counted from 0."""

    layer: int
    head: int

    def __str__(self) -> str:
        return f"{self.layer}.{self.head}"

    @classmethod
    def parse(cls, text: str) -> HeadNumber:
        """Read ``"17.3"``, head 3 of layer 17.

        Raises:
            ValueError: the text is not of this form.
        """
        layer, _, head = str(text).strip().partition(".")
        if not (layer.isdecimal() and head.isdecimal()):
            raise ValueError(f"a head is written as layer.head, both counted from 0, such as 17.3; got {text!r}")
        return cls(int(layer), int(head))


class Capture(Protocol):
    """Query or key heads that were computed while a forward was hooked."""

    @property
    def parts(self) -> list[VectorCapture]:
        """What was collected, by projection."""

    def heads(self) -> Tensor:
        """Return them over the tokens, ``[B, S, heads, D]`` in float32."""

    def mean(self) -> Tensor:
        """Average them over the tokens, ``[B, heads, D]`` in float32."""


class JoinedCapture:
    """The chosen heads out of the captures of several layers."""

    def __init__(self, parts: Sequence[tuple[VectorCapture, Tensor]], order: Tensor) -> None:
        self._parts = parts
        self._order = order

    @property
    def parts(self) -> list[VectorCapture]:
        """See `Capture`."""
        return [capture for capture, _ in self._parts]

    def heads(self) -> Tensor:
        """See `Capture`."""
        return self._joined([capture.heads() for capture, _ in self._parts])

    def mean(self) -> Tensor:
        """See `Capture`."""
        return self._joined([capture.mean() for capture, _ in self._parts])

    def _joined(self, layers: Sequence[Tensor]) -> Tensor:
        chosen = [heads[..., places, :] for heads, (_, places) in zip(layers, self._parts, strict=True)]
        return torch.cat(chosen, dim=-2)[..., self._order, :]


class ChosenHeads:
    """Query heads of one or more attention layers, and the key groups that they attend to.

    Args:
        model: without a PEFT wrapper.
        numbers: the heads, in the order in which they are given.

    Raises:
        UnsupportedArchitectureError: a layer cannot be read, or the heads are not all of one dimension.
        ValueError: there is no such layer or head, one is named twice, or none is.
    """

    def __init__(self, model: PreTrainedModel, numbers: Sequence[HeadNumber]) -> None:
        if not numbers or len(set(numbers)) < len(numbers):
            named = ", ".join(map(str, numbers)) or "none"
            raise ValueError(f"attention_heads must name one head or more, each once; got {named}")
        self.numbers = tuple(numbers)
        num_layers = len(find_decoder_layers(model))
        for number in numbers:
            if not 0 <= number.layer < num_layers:
                raise ValueError(f"attention_heads names {number}, but the model has layers 0 to {num_layers - 1}")
        self._layers = {number: AttentionLayer(model, number) for number in sorted({head.layer for head in numbers})}
        for number in numbers:
            count = self._layers[number.layer].heads.num_query_heads
            if not 0 <= number.head < count:
                raise ValueError(f"attention_heads names {number}, but layer {number.layer} has heads 0 to {count - 1}")
        dims = {layer: attention.heads.head_dim for layer, attention in self._layers.items()}
        if len(set(dims.values())) > 1:
            raise UnsupportedArchitectureError(
                f"the heads of {described(model)} differ in dimension between layers ({dims}), so they cannot be read "
                "together; name heads of layers of one dimension in attention_heads"
            )
        self.heads = AttentionHeads(len(numbers), len(numbers), next(iter(dims.values())))
        # Layers give their heads one after the other; this puts them into the order of the numbers.
        by_layer = sorted(range(len(numbers)), key=lambda place: self.numbers[place].layer)
        self._order = torch.tensor(by_layer).argsort()

    def __str__(self) -> str:
        return f"{len(self.numbers)} heads ({', '.join(map(str, self.numbers))})"

    @contextmanager
    def capture_queries(self) -> Iterator[JoinedCapture]:
        """Collect query heads, ``[B, S, n, D]``, while the context lasts."""
        with ExitStack() as stack:
            captures = [stack.enter_context(layer.capture_queries()) for layer in self._layers.values()]
            yield self._joined(captures, shared=False)

    @contextmanager
    def capture_keys(self) -> Iterator[JoinedCapture]:
        """Collect the keys of each head's group, ``[B, S, n, D]``, while the context lasts."""
        with ExitStack() as stack:
            captures = [stack.enter_context(layer.capture_keys()) for layer in self._layers.values()]
            yield self._joined(captures, shared=True)

    def run_to_keys(self, backbone: nn.Module, token_ids: Tensor) -> Tensor:
        """Run the decoder on ``[B, S]`` as far as the last layer's keys; ``[B, S, n, D]`` in float32."""
        last = self._layers[max(self._layers)]
        with self.capture_keys() as capture, stopping_after(last):
            backbone(input_ids=token_ids, use_cache=False)
        return capture.heads()

    def _joined(self, captures: Sequence[VectorCapture], *, shared: bool) -> JoinedCapture:
        parts = []
        for (number, layer), capture in zip(self._layers.items(), captures, strict=True):
            per_group = layer.heads.num_query_heads // layer.heads.num_key_value_groups if shared else 1
            places = [head.head // per_group for head in self.numbers if head.layer == number]
            parts.append((capture, torch.tensor(places)))
        return JoinedCapture(parts, self._order)


AttentionReader: TypeAlias = AttentionLayer | ChosenHeads
"""What query and key vectors are read off: all heads of one layer, or chosen heads of any."""


def readable_layers(model: PreTrainedModel) -> dict[int, AttentionLayer]:
    """Find the layers whose attention could select, by number; all of the dimension that most of them have.

    Raises:
        UnsupportedArchitectureError: there is none.
    """
    found: dict[int, AttentionLayer] = {}
    for number, layer in enumerate(find_decoder_layers(model)):
        if find_attention(layer) is None:
            continue
        try:
            found[number] = AttentionLayer(model, number)
        except UnsupportedArchitectureError:
            continue  # the next one may be of another kind
    if not found:
        AttentionLayer(model)  # says what is missing
    dims = [attention.heads.head_dim for attention in found.values()]
    most = max(set(dims), key=lambda dim: (dims.count(dim), dim))
    return {number: attention for number, attention in found.items() if attention.heads.head_dim == most}
