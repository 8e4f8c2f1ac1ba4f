"""Reading token ids with padding among them, as if it were not there (`types.PADDING`).

A row's padding is anywhere between its tokens. Positions count tokens alone, nobody attends to padding, and what a
padding place computes is never used; so a row's states are those of its tokens in one piece. Where a model has sliding
windows, these are measured in positions too, which a mask of transformers' own would measure in places.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from attention_rl_trainer.models.rounding import are_equal_states
from attention_rl_trainer.types import PADDING, is_token


class PaddedCache(DynamicCache):
    """A dynamic cache that keeps every token, and knows which places hold one.

    Attributes:
        are_tokens: ``[rows, places]`` bool.
    """

    def __init__(self) -> None:
        super().__init__()
        self.are_tokens: Tensor | None = None

    def note(self, token_ids: Tensor) -> Tensor:
        """Note what comes next, ``[rows, S]``; returns which places hold a token, these included."""
        new = is_token(token_ids)
        self.are_tokens = new if self.are_tokens is None else torch.cat([self.are_tokens, new], dim=1)
        return self.are_tokens

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep or repeat rows."""
        super().batch_select_indices(indices)
        if self.are_tokens is not None:
            self.are_tokens = self.are_tokens[indices]


class PaddingReader:
    """What a model's forward is given where there is padding.

    Args:
        model: without a PEFT wrapper.
        backbone: the module whose forward takes the positions.
    """

    def __init__(self, model: PreTrainedModel, backbone: nn.Module) -> None:
        self._model = model
        config = model.config.get_text_config()
        layers = DynamicCache(config=model.config).layers
        self._kinds: list[str] | None = getattr(config, "layer_types", None)
        has_windows = any(type(layer) is DynamicSlidingWindowLayer for layer in layers)
        self._window: int | None = getattr(config, "sliding_window", None) if has_windows else None
        # Recurrent layers read whatever place is there; chunks of attention are none of the two masks.
        is_known = all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)
        self.can_be = bool(layers) and is_known and has_windows == (self._window is not None)
        self._takes_positions = "position_ids" in inspect.signature(backbone.forward).parameters

    def inputs(self, token_ids: Tensor, are_tokens: Tensor) -> dict[str, Any]:
        """Make the arguments of a forward.

        Args:
            token_ids: what is read, ``[B, S]`` int64.
            are_tokens: which places of the context, these the last of them, hold a token, ``[B, places]`` bool.
        """
        places = are_tokens.cumsum(dim=1).sub(1).clamp_min(0)
        positions = places[:, -token_ids.shape[1] :]
        # Any id that exists.
        inputs: dict[str, Any] = {"input_ids": token_ids.clamp_min(0)}
        if self._takes_positions:
            inputs["position_ids"] = positions
        inputs["attention_mask"] = are_tokens if self._window is None else self._windowed(are_tokens, places, positions)
        return inputs

    def tree_inputs(self, token_ids: Tensor, sees: Tensor) -> dict[str, Any]:
        """Make the arguments of a forward in which each place sees some places.

        Args:
            token_ids: what is read, ``[B, n]`` int64, with or without padding.
            sees: which places, of the columns, each place sees, itself included, ``[n, n]`` bool.
        """
        are_tokens = is_token(token_ids)
        # One mask for all rows where there is no padding.
        rows = are_tokens if not bool(are_tokens.all()) else are_tokens[:1]
        seen = sees.to(token_ids.device) & rows[:, None, :]
        positions = seen.sum(dim=2).sub(1).clamp_min(0)
        inputs: dict[str, Any] = {"input_ids": token_ids.clamp_min(0)}
        if self._takes_positions:
            inputs["position_ids"] = positions.expand(len(token_ids), -1)
        inputs["attention_mask"] = self._masks(seen[:, None], positions, positions)
        return inputs

    def _windowed(self, are_tokens: Tensor, places: Tensor, positions: Tensor) -> Any:
        seen = are_tokens[:, None, None, :] & (positions[:, None, :, None] >= places[:, None, None, :])
        return self._masks(seen, positions, places)

    def _masks(self, seen: Tensor, positions: Tensor, places: Tensor) -> Any:
        """Turn what is seen, ``[B, 1, S, places]``, into a mask, or one for each kind of layers.

        Args:
            positions: of those that see, ``[B, S]``.
            places: positions of those that are seen, ``[B, places]``.
        """
        if self._window is None:
            return self._bias(seen)
        distance = positions[:, None, :, None] - places[:, None, None, :]
        near = self._bias(seen & (distance < self._window))
        if not self._kinds:
            return near
        masks = {"full_attention": self._bias(seen), "sliding_attention": near}
        return {kind: masks[kind] for kind in set(self._kinds)}

    def _bias(self, seen: Tensor) -> Tensor:
        dtype = self._model.dtype
        lowest = torch.finfo(dtype).min
        return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, lowest)


def reads_padding_exactly(read: Callable[..., Tensor], token_ids: Tensor) -> bool:
    """Prove on a few tokens ``[B, S]`` that padding among them changes nothing, with a cache and without.

    Args:
        read: tokens, a cache and whether there is padding to hidden states; as `PolicyModel.forward`.
    """
    num_rows, num_tokens = token_ids.shape
    middle = num_tokens // 2
    padded = torch.full((num_rows, num_tokens + 3), PADDING, device=token_ids.device)
    padded[:, 1 : middle + 1], padded[:, middle + 2 : -1] = token_ids[:, :middle], token_ids[:, middle:]
    # A row without padding beside them, but for its end.
    padded[0, :num_tokens], padded[0, num_tokens:] = token_ids[0], PADDING
    expected = read(token_ids)
    cache = PaddedCache()
    first = read(padded[:, : middle + 1], cache)
    in_parts = torch.cat([first, read(padded[:, middle + 1 :], cache)], dim=1)
    whole = read(padded, padded=True)
    return all(
        are_equal_states(states[is_token(padded)].view(expected.shape), expected) for states in (whole, in_parts)
    )
