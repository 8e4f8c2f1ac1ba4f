"""A long text into token ids piece by piece: only what is looked at, with exactly the ids of the whole text.

To tokenize 20 MB at once takes 20 s and 3 GB, where a memory may need the first hundred tokens. A text is cut where no
token can reach over: between two words, or after the end of a line, if the vocabulary has no entry that goes across.
Byte-pair merges on the two sides of such a place never touch each other. What else decides about a token, the splitting
into words, looks at the characters around it, so each piece is encoded with some text on both sides, whose tokens are
dropped. A text without such places, and one for a tokenizer of another kind, is one piece.
"""

from __future__ import annotations

import hashlib
import json
import re
from array import array
from bisect import bisect_left, bisect_right
from functools import cached_property

from tokenizers import Tokenizer, decoders

PIECE_CHARACTERS = 2**13
"""A piece ends at the first cut after so many characters."""

CONTEXT_CHARACTERS = 2**8
"""Text on each side of a piece that is encoded with it: more than any splitting into words looks at."""

MAX_KNOWN_TEXTS = 1024
"""Long texts whose pieces are remembered, so that a random place of them is found without counting their tokens."""

_SPACE_CUT = r"(?<=\w)(?= \w)"
_LINE_CUT = r"(?<=\n)(?=\w)"
_SAMPLE = (
    "In 1879, the river's 2 bridges (of 12 345 m) weren't built; see A. B. Smith's \u201cnotes\u201d, p. 3\u20137.\n\n"
    "History\nThe first ones came by sea   and DIDN'T stay: 50% left!\nCaf\u00e9s, na\u00efve e\u0301 x2\n"
    "\u6f22\u5b57\u3068\u304b\u306a\u3002\n\u4e2d\u6587 \u5b57 1 \u0440\u0435\u043a\u0430 \u0438 \u043c "
    "\u0646\u0647\u0631 \U0001f642 \u00b2 \u2474 \ufb01n\n \t* a\r\nb  \n  end of it\n"
) * 2


def readable(text: str) -> str:
    """Replace lone surrogates, which stand for no character, by ``?``: a tokenizer works on UTF-8."""
    return text.encode("utf-8", errors="replace").decode("utf-8")


class PieceEncoder:
    """Encodes texts by pieces with one tokenizer.

    Args:
        tokenizer: it neither adds nor recognizes control tokens.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        piece_characters: int = PIECE_CHARACTERS,
        context_characters: int = CONTEXT_CHARACTERS,
    ) -> None:
        self.tokenizer = tokenizer
        self.piece_characters = piece_characters
        self.context_characters = context_characters
        self.known: dict[bytes, _Places] = {}

    @cached_property
    def cut(self) -> re.Pattern[str] | None:
        """Where a text may be cut; None if this tokenizer has to see all of it."""
        kinds = [kind for kind in _uncrossed(self.tokenizer) if self._gives_the_ids_of_the_whole(kind)]
        return re.compile("|".join(kinds)) if kinds else None

    def _gives_the_ids_of_the_whole(self, kind: str) -> bool:
        encoder = PieceEncoder(self.tokenizer, 1, 32)
        encoder.cut = re.compile(kind)
        return PiecewiseIds(_SAMPLE, encoder)[:] == self.tokenizer.encode(_SAMPLE, add_special_tokens=False).ids


class _Places:
    """The cuts of a text in characters, from 0 on, and the number of ids before each."""

    def __init__(self) -> None:
        self.cuts = array("q", [0])
        self.counts = array("q", [0])


class PiecewiseIds:
    """The ids of a text: those of a slice are made when it is taken, all of them when the length is asked for."""

    def __init__(self, text: str, encoder: PieceEncoder) -> None:
        self._text = text
        self._encoder = encoder
        self._places = _Places()
        self._pieces: dict[int, array[int]] = {}

    def __len__(self) -> int:
        """Return the number of ids; of a long text that was met before, without making them again."""
        if not self._is_complete and len(self._text) > self._encoder.piece_characters:
            digest = hashlib.blake2b(self._text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
            self._places = self._encoder.known.setdefault(digest, self._places)
            if len(self._encoder.known) > MAX_KNOWN_TEXTS:
                del self._encoder.known[next(iter(self._encoder.known))]
        while not self._is_complete:
            self._add_piece()
        return self._places.counts[-1]

    def __getitem__(self, part: slice) -> list[int]:
        """Return the ids from ``part.start`` to ``part.stop``, both counted from the beginning, or as many as are."""
        start, stop = part.start or 0, len(self) if part.stop is None else part.stop
        while self._places.counts[-1] < stop and not self._is_complete:
            self._add_piece()
        counts, ids = self._places.counts, array("i")
        first = max(0, bisect_right(counts, start) - 1)
        for number in range(first, min(bisect_left(counts, stop), len(counts) - 1)):
            ids.extend(self._piece(number))
        return ids[start - counts[first] : stop - counts[first]].tolist()

    @property
    def _is_complete(self) -> bool:
        return self._places.cuts[-1] == len(self._text)

    def _add_piece(self) -> None:
        places, cut = self._places, self._encoder.cut
        begin = places.cuts[-1]
        found = None if cut is None else cut.search(self._text, begin + self._encoder.piece_characters)
        places.cuts.append(len(self._text) if found is None else found.start())
        places.counts.append(places.counts[-1] + len(self._piece(len(places.cuts) - 2)))

    def _piece(self, number: int) -> array[int]:
        if number not in self._pieces:
            self._pieces[number] = array("i", self._encode(number))
        return self._pieces[number]

    def _encode(self, number: int) -> list[int]:
        begin, end = self._places.cuts[number : number + 2]
        context = self._encoder.context_characters
        first, last = self._context_start(number, begin - context), min(len(self._text), end + context)
        encoding = self._encoder.tokenizer.encode(readable(self._text[first:last]), add_special_tokens=False)
        low = 0 if first == begin else bisect_left(encoding.offsets, (begin - first,))
        high = None if last == end else bisect_left(encoding.offsets, (end - first,))
        return encoding.ids[low:high]

    def _context_start(self, number: int, place: int) -> int:
        """Find a cut before a piece from which to encode, since a tokenizer may put a space before every text."""
        cut = self._encoder.cut
        if number == 0 or place <= 0 or cut is None:
            return 0
        found = cut.search(self._text, place)
        before = self._places.cuts[number - 1]
        return before if found is None or found.start() >= self._places.cuts[number] else found.start()


def _uncrossed(tokenizer: Tokenizer) -> list[str]:
    """List the kinds of cuts that no entry of the vocabulary goes across; none of a model that is not plain BPE.

    A normalizer that makes something else of the space or of the end of a line takes that kind away.
    """
    specification = json.loads(tokenizer.to_str())
    model = specification["model"]
    if model["type"] != "BPE" or model["dropout"] or (model["fuse_unk"] and not model["byte_fallback"]):
        return []
    # These mark the ends of words, which then count.
    if model["continuing_subword_prefix"] or model["end_of_word_suffix"]:
        return []
    # The separator is white space, which is on neither side of a cut.
    entries = "\t".join(model["vocab"])
    if '"ByteLevel"' in json.dumps([specification["normalizer"], specification["pre_tokenizer"]]):
        entries = decoders.ByteLevel().decode(["\u0109".join(model["vocab"])])
    entries = entries.replace("\u2581", " ")
    normalizer = tokenizer.normalizer
    kept = "a b\na" if normalizer is None else normalizer.normalize_str("a b\na")
    return [
        kind
        for kind, crossing, sign in ((_SPACE_CUT, r"\S ", "a[ \u2581\u0120]b"), (_LINE_CUT, r"\n\S", "b[\n\u010a]a"))
        if re.search(sign, kept) and not re.search(crossing, entries)
    ]
