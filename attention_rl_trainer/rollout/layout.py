"""Where each token of a trajectory is (design §4).

A trajectory is ``(keys) [" Query:"] key_0 [" Response:"] value_0``, the in-context example, and then for each step
``[" Query:"] query [" Response:"] (key) value``. Every position, length and piece of a trajectory comes from here.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attention_rl_trainer.memories.pairs import MemoryBatch, PairOptions
from attention_rl_trainer.memories.tokenization import PlainTextEncoder
from attention_rl_trainer.options import Count, option
from attention_rl_trainer.types import KeyValuePair

QUERY_SEPARATOR = " Query:"
RESPONSE_SEPARATOR = " Response:"
KEY_TEMPLATES = {"plain": "{key}\n", "numbered": "{number}.{key}\n"}
"""How a key stands in the list before the prompt, by the names of ``show_keys``. Most keys begin with a space."""


@dataclass
class LayoutOptions(PairOptions):
    """What a trajectory consists of."""

    num_steps: int | None = option(None, "T: pairs read in a trajectory, at most M. Default: all M.")
    tokens_per_query: Count = option(20, "L: tokens of a query.")
    include_key_in_context: bool = option(
        False, "Put the drawn key before its value in the context: ' Response:' key value."
    )
    show_keys: str = option(
        "none",
        "List the memory's keys before the prompt, so that a query can name one: 'none', 'plain' (a line for each), "
        "'numbered', or a template of a key with {key} and, if wanted, {number}.",
    )

    @property
    def key_frames(self) -> tuple[str, ...]:
        """The texts before, between and after the keys that are shown, M + 1 of them; none where no keys are."""
        if self.show_keys == "none":
            return ()
        template = KEY_TEMPLATES.get(self.show_keys, self.show_keys)
        numbered = [template.replace("{number}", str(number)) for number in range(1, self.memory_size + 1)]
        return tuple("".join(numbered).split("{key}"))

    @property
    def steps_per_trajectory(self) -> int:
        """T, with the default resolved."""
        return self.memory_size if self.num_steps is None else self.num_steps

    def check_options(self) -> None:
        """Check the ranges, and that a memory holds a pair for every step."""
        super().check_options()
        is_known = self.show_keys == "none" or self.show_keys in KEY_TEMPLATES
        if not is_known and self.show_keys.count("{key}") != 1:
            raise ValueError(
                f"show_keys must be none, {', '.join(KEY_TEMPLATES)}, or a template with {{key}} in it once, got "
                f"{self.show_keys!r}"
            )
        if self.num_steps is not None and not 1 <= self.num_steps <= self.memory_size:
            raise ValueError(
                f"num_steps must be in 1..{self.memory_size}, the pairs of a memory "
                f"(subset_fraction {self.subset_fraction} of num_kv_pairs {self.num_kv_pairs}), got {self.num_steps}; "
                "raise subset_fraction or num_kv_pairs, or lower num_steps"
            )


@dataclass(frozen=True)
class Separators:
    """Token ids of ``" Query:"``, ``" Response:"`` and what is around shown keys, each encoded alone and once."""

    query: tuple[int, ...]
    response: tuple[int, ...]
    around_keys: tuple[tuple[int, ...], ...] = ()
    """Before, between and after the M keys that stand before the prompt, M + 1; none where no keys do."""

    @classmethod
    def encode(cls, encoder: PlainTextEncoder, options: LayoutOptions | None = None) -> Separators:
        """Encode them with the base model's tokenizer, those around keys where the options show keys."""
        frames = options.key_frames if options is not None else ()
        return cls(
            tuple(encoder.encode(QUERY_SEPARATOR)),
            tuple(encoder.encode(RESPONSE_SEPARATOR)),
            tuple(tuple(encoder.encode(text)) if text else () for text in frames),
        )


@dataclass(frozen=True)
class Layout:
    """The lengths T, L, K and V that fix the place of every token."""

    separators: Separators
    num_steps: int
    tokens_per_query: int
    tokens_per_key: int
    tokens_per_value: int
    include_key_in_context: bool = False
    is_padded: bool = False
    """Whether keys and values may be shorter than K and V."""

    @classmethod
    def of(cls, options: LayoutOptions, separators: Separators) -> Layout:
        """Lay out the trajectories that the options ask for.

        Raises:
            ValueError: the separators were encoded for other shown keys.
        """
        if len(separators.around_keys) != len(options.key_frames):
            raise ValueError(
                f"show_keys is {options.show_keys!r}, but the separators were encoded for other options; give these to "
                "Separators.encode"
            )
        return cls(
            separators,
            options.steps_per_trajectory,
            options.tokens_per_query,
            options.tokens_per_key,
            options.tokens_per_value,
            options.include_key_in_context,
        )

    def for_batch(self, batch: MemoryBatch) -> Layout:
        """Take the lengths of keys and values from a batch."""
        return replace(
            self,
            tokens_per_key=batch.key_tokens.shape[2],
            tokens_per_value=batch.value_tokens.shape[2],
            is_padded=batch.is_padded,
        )

    # ---- Lengths, in tokens ----

    @property
    def frame_tokens(self) -> int:
        """Both separators."""
        return len(self.separators.query) + len(self.separators.response)

    @property
    def shown_tokens(self) -> int:
        """The keys that stand before the prompt, with what is around them."""
        frames = self.separators.around_keys
        return sum(map(len, frames)) + max(0, len(frames) - 1) * self.tokens_per_key

    @property
    def prompt_tokens(self) -> int:
        """``(keys) [" Query:"] key_0 [" Response:"] value_0 [" Query:"]``."""
        example = self.frame_tokens + self.tokens_per_key + self.tokens_per_value
        return self.shown_tokens + example + len(self.separators.query)

    @property
    def value_offset(self) -> int:
        """``[" Response:"] (key)``: the place of a value's first token after a query."""
        return len(self.separators.response) + (self.tokens_per_key if self.include_key_in_context else 0)

    @property
    def scored_tokens(self) -> int:
        """``[" Response:"] (key) value``."""
        return self.value_offset + self.tokens_per_value

    @property
    def step_tokens(self) -> int:
        """What a step adds to the context: query, response and the next query separator."""
        return self.tokens_per_query + self.scored_tokens + len(self.separators.query)

    @property
    def trajectory_tokens(self) -> int:
        """S, which must fit into the model's context: the last response is not followed by a separator."""
        return self.cached_tokens - len(self.separators.query)

    @property
    def cached_tokens(self) -> int:
        """Tokens of a row that the caches have room for: S and a separator after the last response."""
        return self.prompt_tokens + self.num_steps * self.step_tokens

    def told_tokens(self, step: int, num_values: int) -> int:
        """Tokens up to the end of so many values, read one after the other, without a query, where a step begins."""
        between = (num_values - 1) * len(self.separators.query)
        return self.context_tokens(step) + num_values * self.scored_tokens + between

    def block_tokens(self, step: int) -> int:
        """Tokens after the query of a step, counted from 0: the response, and a separator unless it is the last."""
        return self.scored_tokens + (0 if step == self.num_steps - 1 else len(self.separators.query))

    @property
    def sizes(self) -> dict[str, int]:
        """What matters for memory, by name."""
        return {"steps": self.num_steps, "tokens per trajectory": self.trajectory_tokens}

    # ---- Positions ----

    def context_tokens(self, step: int) -> int:
        """Tokens before the query of a step, counted from 0: the position of its first token."""
        return self.prompt_tokens + step * self.step_tokens

    @property
    def query_starts(self) -> tuple[int, ...]:
        """Position of each step's first query token, T integers."""
        return tuple(map(self.context_tokens, range(self.num_steps)))

    @property
    def value_starts(self) -> tuple[int, ...]:
        """Position of each step's first value token, T integers."""
        return tuple(start + self.tokens_per_query + self.value_offset for start in self.query_starts)

    # ---- Tokens ----

    def prompt(self, batch: MemoryBatch, device: torch.device) -> Tensor:
        """Build ``(keys) [" Query:"] key_0 [" Response:"] value_0 [" Query:"]``, ``[B, S0]`` int64.

        Raises:
            ValueError: keys are shown, and the memories have another number of pairs than the options say.
        """
        rows = len(batch)
        query = repeated(self.separators.query, rows, device)
        response = repeated(self.separators.response, rows, device)
        example = [query, batch.example_keys.to(device), response, batch.example_values.to(device), query]
        return torch.cat([*self._shown_keys(batch, device), *example], dim=1)

    def _shown_keys(self, batch: MemoryBatch, device: torch.device) -> list[Tensor]:
        frames, num_pairs = self.separators.around_keys, batch.key_tokens.shape[1]
        if not frames:
            return []
        if num_pairs != len(frames) - 1:
            raise ValueError(f"show_keys was prepared for memories of {len(frames) - 1} pairs, got {num_pairs}")
        keys = batch.key_tokens.to(device).unbind(dim=1)
        around = [repeated(frame, len(batch), device) for frame in frames]
        return [*(part for pair in zip(around[:-1], keys, strict=True) for part in pair), around[-1]]

    def response(self, pair: KeyValuePair, *, is_last: bool) -> Tensor:
        """Build what follows a query: ``[" Response:"] (key) value``, and ``[" Query:"]`` unless it is the last."""
        rows, device = pair.value_tokens.shape[0], pair.value_tokens.device
        parts = [repeated(self.separators.response, rows, device)]
        if self.include_key_in_context:
            parts.append(pair.key_tokens)
        parts.append(pair.value_tokens)
        if not is_last:
            parts.append(repeated(self.separators.query, rows, device))
        return torch.cat(parts, dim=1)


@functools.cache
def _on(device: torch.device, token_ids: tuple[int, ...]) -> Tensor:
    """A separator on a device, sent there once."""
    return torch.tensor(token_ids, dtype=torch.int64, device=device)


def repeated(token_ids: tuple[int, ...], rows: int, device: torch.device) -> Tensor:
    """A separator in every row, ``[B, n]`` int64."""
    return _on(device, token_ids).expand(rows, -1)


def positions(starts: Sequence[int], length: int, device: torch.device) -> Tensor:
    """List the positions of runs of tokens from T starts on, ``[T · length]``."""
    return (torch.tensor(starts, device=device)[:, None] + torch.arange(length, device=device)).flatten()


def predicting(hidden: Tensor, start: int, count: int) -> Tensor:
    """Take the states, of ``[B, S, C]``, that predict ``count`` tokens from ``start`` >= 1 on: one position earlier."""
    return hidden[:, start - 1 : start - 1 + count]
