"""Passages, keys and values, or one text into the memory that an adapter reads (design §3, §4).

What was an article's pair in training is a piece here: a key, by which a query finds it, and a value, which is read. A
passage is cut as an article is, so its first K tokens are its key; but all that follows is its value, however long.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch

from attention_rl_trainer.memories.pairs import MemoryBatch, MemoryRow, PairOptions, collate_memories, join_entry
from attention_rl_trainer.memories.tokenization import PlainTextEncoder
from attention_rl_trainer.types import ArticleReference, StreamPosition

KeyAndValue: TypeAlias = tuple[str, str] | Mapping[str, str]
NewMemory: TypeAlias = str | Sequence[str] | Sequence[KeyAndValue]
"""One text, which is cut into pieces; or passages; or keys with their values, as pairs or as ``{"key", "value"}``."""
Context: TypeAlias = str | tuple[str, str] | None
"""What was read before: a text, such as a question, or a key and its value."""

_FIELDS = ("key", "value")
_EXPECTED = (
    "give one text, or a list of passages, or a list of (key, value) pairs or of {'key': ..., 'value': ...} objects"
)


@dataclass(frozen=True)
class Pieces:
    """One memory in token ids, and what was read before it."""

    keys: Sequence[Sequence[int]]
    values: Sequence[Sequence[int]]
    """As many; none is empty."""
    texts: Sequence[str]
    """Of every piece that was given."""
    context_key: Sequence[int]
    context_value: Sequence[int]
    context: str
    first: int = 0
    """The number of the first piece that is ordered; 1 where piece 0 is the context."""

    def __len__(self) -> int:
        """Return M, the pieces that are ordered."""
        return len(self.keys)


def cut_pieces(
    given: NewMemory,
    context: Context,
    encoder: PlainTextEncoder,
    tokens_per_key: int,
    tokens_per_value: int,
    max_value_tokens: int | None = None,
) -> Pieces:
    """Turn what a user gives into a memory.

    Args:
        given: of a text every K + V tokens are a piece; the last may be shorter. A key is cut to K tokens. A passage
            that ends within its key is key and value both.
        context: ``None`` for nothing; but of a text the first piece is the context then, as in training.
        max_value_tokens: longer values are cut; ``None`` reads all of each.

    Raises:
        ValueError: it is nothing of this kind, a text is empty, or there is nothing to order.
    """
    length = tokens_per_key
    before = _context_of(context, encoder, length)
    if isinstance(given, str):
        chunks = _chunks(encoder.encode(given.strip()), tokens_per_key + tokens_per_value)
        pairs, texts = [_split(chunk, length) for chunk in chunks], [encoder.decode(chunk).strip() for chunk in chunks]
        if before is not None:
            return _pieces(pairs, texts, before, 0, max_value_tokens)
        if len(pairs) < 2:
            raise ValueError(
                f"the text has {sum(map(len, chunks))} tokens, which is {len(pairs)} piece of {tokens_per_key} + "
                f"{tokens_per_value} tokens, and the first is read before all others; give a longer text, a context, "
                "or several passages"
            )
        return _pieces(pairs[1:], texts, (*pairs[0], texts[0]), 1, max_value_tokens)
    if not isinstance(given, Sequence):
        raise ValueError(f"what is to be ordered is {_kind(given)}; {_EXPECTED}")
    if len(given) == 0:
        raise ValueError(f"there is nothing to order; {_EXPECTED}")
    are_passages = isinstance(given[0], str)
    pairs, texts = [], []
    for number, item in enumerate(given):
        if are_passages and isinstance(item, str):
            pairs.append(_split(_encoded(item, f"passage {number}", encoder), length))
            texts.append(item.strip())
            continue
        if are_passages or isinstance(item, str):
            raise ValueError(f"piece {number} is {_kind(item)}, but the first is {_kind(given[0])}; {_EXPECTED}")
        key, value = _key_and_value(item, f"piece {number}")
        key_ids, value_ids = (
            _encoded(text, f"the {name} of piece {number}", encoder)
            for name, text in zip(_FIELDS, (key, value), strict=True)
        )
        pairs.append((key_ids[:length], value_ids))
        texts.append(f"{key.strip()} {value.strip()}")
    return _pieces(pairs, texts, before or ([], [], ""), 0, max_value_tokens)


def _pieces(
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    texts: Sequence[str],
    context: tuple[Sequence[int], Sequence[int], str],
    first: int,
    max_value_tokens: int | None,
) -> Pieces:
    key, value, text = context
    keys, values = [one for one, _ in pairs], [one[:max_value_tokens] for _, one in pairs]
    return Pieces(keys, values, texts, key, value[:max_value_tokens], text, first)


def _chunks(token_ids: list[int], length: int) -> list[list[int]]:
    return [token_ids[start : start + length] for start in range(0, len(token_ids), length)]


def _split(token_ids: list[int], tokens_per_key: int) -> tuple[list[int], list[int]]:
    return token_ids[:tokens_per_key], token_ids[tokens_per_key:] or token_ids


def _encoded(text: str, name: str, encoder: PlainTextEncoder) -> list[int]:
    # A space before it, as inside a running text and as in tables of entries.
    token_ids = encoder.encode(f" {text.strip()}") if text.strip() else []
    if not token_ids:
        raise ValueError(f"{name} is empty; leave it out")
    return token_ids


def _key_and_value(item: object, name: str) -> tuple[str, str]:
    found: object = item
    if isinstance(item, Mapping):
        found = tuple(item.get(field) for field in _FIELDS)
    if isinstance(found, tuple | list) and len(found) == 2 and all(isinstance(part, str) for part in found):
        return found[0], found[1]
    raise ValueError(f"{name} is {_kind(item)} without a text for key and value; {_EXPECTED}")


def _context_of(
    context: Context, encoder: PlainTextEncoder, tokens_per_key: int
) -> tuple[list[int], list[int], str] | None:
    """Cut the context: key, value, text. A text that ends within its key has no value: none is scored."""
    if context is None:
        return None
    if isinstance(context, str):
        token_ids = _encoded(context, "context", encoder)
        return token_ids[:tokens_per_key], token_ids[tokens_per_key:], context.strip()
    key, value = _key_and_value(context, "context")
    encoded = [encoder.encode(f" {text.strip()}") if text.strip() else [] for text in (key, value)]
    return encoded[0][:tokens_per_key], encoded[1], f"{key.strip()} {value.strip()}".strip()


def _kind(item: object) -> str:
    return f"of type {type(item).__name__}"


def pair_lengths(memories: Sequence[Pieces]) -> dict[str, int]:
    """Return the options K and V that hold every key and value of some memories, their contexts included."""
    keys = [key for pieces in memories for key in (*pieces.keys, pieces.context_key)]
    values = [value for pieces in memories for value in (*pieces.values, pieces.context_value)]
    return {"tokens_per_key": max(map(len, keys)), "tokens_per_value": max(map(len, values))}


def batch_of(memories: Sequence[Pieces], numbers: Sequence[int], options: PairOptions) -> MemoryBatch:
    """Stack memories of M pieces each.

    Args:
        numbers: by which an error names them.
        options: K and V are at least `pair_lengths`.
    """
    rows = []
    for number, pieces in zip(numbers, memories, strict=True):
        chunks = [join_entry(key, value, options) for key, value in zip(pieces.keys, pieces.values, strict=True)]
        rows.append(
            MemoryRow(
                example=join_entry(pieces.context_key, pieces.context_value, options),
                chunks=torch.stack(chunks),
                pair_numbers=torch.arange(len(pieces)) + pieces.first,
                article=ArticleReference(f"memory {number}", "what is ordered", 0, number, StreamPosition()),
            )
        )
    return collate_memories(rows, options.tokens_per_key)
