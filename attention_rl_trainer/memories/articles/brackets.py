"""How many brackets and tags of wiki markup have no partner.

mwparserfromhell reads on from each of them to the end of what it was given before it takes it for text, so their number
times the length bounds its work.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence

from mwparserfromhell.definitions import is_single

# The parser gives up on what is nested deeper than 40, and takes it for text too.
_MAX_DEPTH = 30
_TOKEN = re.compile(
    r"(?P<table>^[ \t:*#]*\{\||^[ \t]*\|\}(?!\}))"
    r"|(?P<run>\{{2,}|\}{2,}|\[+|\]+)"
    r"|<(?P<slash>/?)(?P<tag>[a-z][a-z0-9]*)(?P<attributes>[^<>]*)",
    re.IGNORECASE | re.MULTILINE,
)
# A tag of which the parser looks for the end of a quotation in the text after it.
_OPEN_QUOTATION = re.compile(r"""=\s*(?:"[^"]*|'[^']*)\Z""")


def count_unpaired(markup: str) -> int:
    """Count the brackets, tables, quotations and tags that are opened and not closed, or closed and not opened.

    What is nested too deeply for the parser counts too. A closing mark closes the innermost of its kind, and what was
    opened inside of it remains unpaired. They are counted in one pass.
    """
    unpaired = 0
    open_marks: list[str] = []
    counts: Counter[str] = Counter()
    for mark, is_opening in _marks(markup, open_marks):
        if is_opening:
            open_marks.append(mark)
            counts[mark] += 1
            unpaired += len(open_marks) > _MAX_DEPTH
        elif not counts[mark]:
            unpaired += 1
        else:
            while (closed := open_marks.pop()) != mark:
                counts[closed] -= 1
                unpaired += 1
            counts[mark] -= 1
    return unpaired + len(open_marks)


def _marks(markup: str, open_marks: Sequence[str]) -> Iterator[tuple[str, bool]]:
    """Find what opens and what closes, each by the name of its kind, beside what is open at the time."""
    for token in _TOKEN.finditer(markup):
        if token["table"]:
            yield "{|", token["table"].endswith("{|")
        elif token["run"]:
            yield from _bracket_marks(token["run"], open_marks)
        else:
            if _OPEN_QUOTATION.search(token["attributes"]):
                yield '"', True
            if not is_single(token["tag"]) and not token["attributes"].endswith("/"):
                yield f"<{token['tag'].lower()}>", not token["slash"]


def _bracket_marks(run: str, open_marks: Sequence[str]) -> Iterator[tuple[str, bool]]:
    """Cut a run of one bracket into pairs, and square ones into single ones where the innermost open one is single."""
    if run[0] in "{}":
        yield from [("{{", run[0] == "{")] * (len(run) // 2)
    elif run[0] == "[":
        yield from [("[[", True)] * (len(run) // 2) + [("[", True)] * (len(run) % 2)
    else:
        left = len(run)
        while left > 0:
            is_single = left == 1 or open_marks[-1:] == ["["]
            yield "[" if is_single else "[[", False
            left -= 1 if is_single else 2
