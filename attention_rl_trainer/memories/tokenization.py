"""Text into token ids as plain text (design §3).

An article is untrusted text: none of it may turn into a control token. ``add_special_tokens=False`` is not enough for
that, because a tokenizer also *recognizes* its special and added tokens in the text (``<|endoftext|>``), so the text
goes through a copy of the tokenizer whose added vocabulary was taken out.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import torch
from tokenizers import AddedToken, Tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast, ProcessorMixin

from attention_rl_trainer.memories.pieces import PieceEncoder, PiecewiseIds, readable
from attention_rl_trainer.types import PADDING

EVERY_UTF8_BYTE = "".join(
    map(chr, (*range(0x801), *range(0x1000, 0xD800, 0x1000), 0xE000, 0xF000, *range(0x10000, 0x110000, 0x30000)))
)
"""Characters whose UTF-8 holds every byte that any text can hold."""


def control_token_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Collect the ids of special and added tokens, which no article text and no query may contain.

    White space alone commands nothing: a token of it, such as Gemma 3's for blank lines, is text unless it is special.
    """
    added = tokenizer.added_tokens_decoder.items()
    return frozenset(tokenizer.all_special_ids) | {i for i, token in added if token.special or not _is_blank(token)}


def _is_blank(token: AddedToken) -> bool:
    return token.content.replace("\u2581", " ").isspace()


def plain_text_tokenizer(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """Copy a tokenizer so that all text is plain text: it neither adds nor recognizes special and added tokens."""
    # `str(tokenizer)` on the backend would lose the options; its own serialization is the exact one.
    specification = json.loads(tokenizer.backend_tokenizer.to_str())
    specification.update(added_tokens=[], post_processor=None, truncation=None, padding=None)
    return Tokenizer.from_str(json.dumps(specification))


def expect_tokenizer(tokenizer: object) -> PreTrainedTokenizerFast:
    """Return a tokenizer if it is a fast one, and refuse whatever else is given.

    Raises:
        ValueError: names what was given, and the way out.
    """
    if isinstance(tokenizer, PreTrainedTokenizerFast):
        return tokenizer
    kind = f"the class {tokenizer.__name__}" if isinstance(tokenizer, type) else type(tokenizer).__name__
    if isinstance(tokenizer, ProcessorMixin):
        way_out = "give the tokenizer in it, `processor.tokenizer`"
    elif isinstance(tokenizer, PreTrainedTokenizerBase):
        way_out = "load it with AutoTokenizer.from_pretrained, or choose a model whose repository has a tokenizer.json"
    else:
        way_out = "load one with AutoTokenizer.from_pretrained, or leave it out for the base model's own"
    raise ValueError(f"processing_class must be a fast tokenizer (a PreTrainedTokenizerFast), got {kind}; {way_out}")


class PlainTextEncoder:
    """Turns article text into ids once, and ids into text for logs.

    A byte-level tokenizer gives every text back when it decodes. Others give back what they keep of it: a tokenizer
    with ``▁`` for the space makes a space of that sign, and one that normalizes to NFC composes accents.

    Raises:
        ValueError: the tokenizer is not a fast one, or its model turns the text of a control token into the token, or
            characters it does not know into the token for unknown ones.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer = expect_tokenizer(tokenizer)
        self._plain = plain_text_tokenizer(tokenizer)
        self.pieces = PieceEncoder(self._plain)
        self.control_ids = control_token_ids(tokenizer)
        self.max_token_id = max(self._plain.get_vocab(with_added_tokens=False).values())
        self._refuse_unknown_characters()
        self._refuse_leaks()

    def encode(self, text: str) -> list[int]:
        """Encode text as plain text: the texts of control tokens stay text, and no special token is added.

        A lone surrogate, which stands for no character, is read as ``?``.
        """
        return list(self._plain.encode(readable(text), add_special_tokens=False).ids)

    def encode_lazily(self, text: str) -> PiecewiseIds:
        """Return the ids of `encode`, of a long text only those that are looked at."""
        return PiecewiseIds(text, self.pieces)

    def decode(self, token_ids: Sequence[int] | Tensor) -> str:
        """Turn the ids of one sequence into text, without padding; for logs and reports only."""
        given = token_ids.tolist() if isinstance(token_ids, Tensor) else list(token_ids)
        ids = [token_id for token_id in given if token_id != PADDING]
        return str(self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def _refuse_unknown_characters(self) -> None:
        unknown = self.control_ids.intersection(self.encode(EVERY_UTF8_BYTE))
        if unknown:
            token = self.tokenizer.convert_ids_to_tokens(min(unknown))
            raise ValueError(
                f"the tokenizer turns characters it does not know into the control token {token!r}, so an article "
                "could inject it; choose a base model with a byte-level BPE tokenizer, or one with byte fallback"
            )

    def _refuse_leaks(self) -> None:
        added = self.tokenizer.added_tokens_decoder
        for control_id in sorted(self.control_ids):
            # The name of an added token may be normalized; in a text its content is matched.
            name = self.tokenizer.convert_ids_to_tokens(control_id)
            text = added[control_id].content if control_id in added else str(name or "")
            # What a model makes of a text may depend on what stands beside it.
            places = (f"a {text} b", f"a{text}b", f"{text} b", f"a {text}", text)
            if text and any(self.control_ids.intersection(self.encode(place)) for place in places):
                raise ValueError(
                    f"the tokenizer turns the plain text {text!r} into a control token, so an article could inject it; "
                    "choose a base model with a byte-level BPE tokenizer"
                )


def allowed_token_ids(tokenizer: PreTrainedTokenizerBase, vocabulary_size: int) -> Tensor:
    """List the ids that a query may contain: neither control tokens nor padding of the embedding matrix.

    Args:
        vocabulary_size: rows of the model's output head; those at or beyond ``len(tokenizer)`` are padding.

    Returns:
        The ids in ascending order, int64.
    """
    control_ids = control_token_ids(tokenizer)
    size = min(vocabulary_size, len(tokenizer))
    return torch.tensor([i for i in range(size) if i not in control_ids], dtype=torch.int64)
