"""From the text of the nodes of a page to tidy lines: what no node was made of, and what left-out nodes leave behind.

Only what can be told to be left over goes: a bracket without its partner, a row of a table that has no beginning, and
separators beside a mark of something left out. The same characters in prose, as in "f()" or "|x|", stay.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from attention_rl_trainer.memories.articles.literal import APART, GONE, LIST_ITEM, LOST_MARK, RAISED, unshield
from attention_rl_trainer.memories.articles.sites import WikiSite
from attention_rl_trainer.memories.articles.tags import KNOWN_TAGS

_STRAY_TAG = re.compile(r"</?([a-zA-Z][a-zA-Z0-9]*)(?:\s[^<>]*)?/?>")
_MAGIC_WORD = re.compile(r"__([^\W\d_]+(?:_[^\W\d_]+)*)__")
_MAGIC_WORDS = frozenset(
    {
        "ARCHIVEDTALK", "DISAMBIG", "EXPECTUNUSEDCATEGORY", "EXPECTUNUSEDTEMPLATE", "EXPECTWITHOUTSCANS", "FORCETOC",
        "HIDDENCAT", "INDEX", "NEWSECTIONLINK", "NOCC", "NOCONTENTCONVERT", "NOEDITSECTION", "NOGALLERY", "NOGLOBAL",
        "NOINDEX", "NONEWSECTIONLINK", "NOTALK", "NOTC", "NOTITLECONVERT", "NOTOC", "STATICREDIRECT", "TOC",
    }
)  # fmt: skip
_STYLE_QUOTES = re.compile(r"'{2,}")
_SPACES = re.compile(r"[ \t\u00a0\u2009\u200a\u202f]+")
_INVISIBLE = re.compile(r"[\u200b\u200e\u200f\u2060\ufeff]")
_WORD = re.compile(r"\w")

_BRACKETS = re.compile(r"\{+|\}+|\[+|\]+")
_PAIR = re.compile(r"\{[{|]|[}|]\}|\[\[|\]\]")
_OPENING = {"}": "{", "]": "["}
_TABLE_START = re.compile(rf"[ \t{LIST_ITEM}]*\{{\|")
_TABLE_END = re.compile(r"[ \t]*\|\}")
_TABLE_MARK = re.compile(r"[ \t]*\|[-}+]|.*\{\|[ \t]*$")
_TABLE_LINE = re.compile(r"[ \t]*[|!]")
_MAX_TARGET = 200
"""Characters of a title that is not closed which are looked at."""

_LANGUAGE_VARIANTS = re.compile(r"-\{([^{}]*)\}-")
_VARIANT_FLAGS = re.compile(r"\s*([A-Z;\s-]*|[a-z;\s-]+)\|(.*)", re.DOTALL)
_VARIANT = re.compile(r"\s*(?:[^;:=]*=>\s*)?([a-z]{2,4}(?:-[a-z]+)*)\s*:\s*(.*)", re.DOTALL)
_NEXT_VARIANT = re.compile(r";(?=\s*(?:[^;:=]*=>\s*)?[a-z]{2,4}(?:-[a-z]+)*\s*:)")
_LANGUAGES_WITH_VARIANTS = frozenset(
    {"ban", "crh", "gan", "iu", "kk", "ku", "mni", "sh", "shi", "sr", "tg", "tly", "uz", "wuu", "zgh", "zh"}
)
_HIDDEN_VARIANTS = frozenset("HT-")


def tidy(text: str, site: WikiSite, lose: Callable[[str], str]) -> tuple[str, list[str]]:
    """Remove what the parser could not pair, and the traces that left-out nodes leave in lines and brackets.

    Args:
        lose: makes the mark of a template by its name; asked for one that is not closed, and is left out to the end of
            its line.

    Returns:
        The tidy lines, of which list items begin with `LIST_ITEM`, and the marks of templates that stood among words.
    """
    text = _INVISIBLE.sub("", _LANGUAGE_VARIANTS.sub(lambda found: _chosen_variant(found, site), text))
    text = _MAGIC_WORD.sub(lambda found: _without_magic_word(found, site), _STRAY_TAG.sub(_without_known_tag, text))
    lost: list[str] = []
    lines = [_tidy_line(_without_strays(line, site, lose), lost) for line in _without_table_lines(text.split("\n"))]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip(), lost


def _chosen_variant(found: re.Match[str], site: WikiSite) -> str:
    """Print the first of -{zh-hans:…; zh-hant:…}-, and what stands alone in -{…}- where a language has variants."""
    contents = found[1]
    has_variants = site.language.partition("-")[0] in _LANGUAGES_WITH_VARIANTS
    if has_variants and (flagged := _VARIANT_FLAGS.fullmatch(contents)):
        if _HIDDEN_VARIANTS.intersection(flagged[1].replace(" ", "").split(";")):
            return GONE
        contents = flagged[2]
    first = _VARIANT.fullmatch(_NEXT_VARIANT.split(contents)[0])
    if first and first[1].partition("-")[0] in _LANGUAGES_WITH_VARIANTS:
        return first[2].rstrip("; ")
    return contents if has_variants else found[0]


def _without_known_tag(found: re.Match[str]) -> str:
    return GONE if found[1].lower() in KNOWN_TAGS else found[0]


def _without_magic_word(found: re.Match[str], site: WikiSite) -> str:
    """Remove a switch of the page; all that is known of another language's is that none is in small letters."""
    is_switch = found[1] in _MAGIC_WORDS or (not site.is_english and found[1] == found[1].upper())
    return "" if is_switch else found[0]


def _without_table_lines(lines: list[str]) -> list[str]:
    """Remove what is left of tables and boxes: lines that begin with | or !, near one that shows that they are rows.

    A table that is opened goes on to its end. Otherwise the rows are those of a paragraph that also has another mark of
    a table, or half of a template.
    """
    kept: list[str] = []
    depth = 0
    start = 0
    while start < len(lines):
        end = start
        while end < len(lines) and lines[end].strip():
            end += 1
        marked = any(_TABLE_MARK.match(line) or _has_half_of_template(line) for line in lines[start:end])
        for line in lines[start:end]:
            is_row = (marked or depth > 0) and _TABLE_LINE.match(line) is not None
            if _TABLE_START.match(line):
                depth, is_row = depth + 1, True
            elif _TABLE_END.match(line):
                depth = max(depth - 1, 0)
            kept.append("" if is_row else line)
        kept += lines[end : end + 1]
        start = end + 1
    return kept


def _has_half_of_template(line: str) -> bool:
    if "{{" not in line and "}}" not in line:
        return False
    runs = list(_BRACKETS.finditer(line))
    literal, _ = _literal_runs(runs)
    return any(run[0][:2] in ("{{", "}}") for number, run in enumerate(runs) if number not in literal)


def _without_strays(line: str, site: WikiSite, lose: Callable[[str], str]) -> str:
    """Remove double brackets, and those of tables, unless all that they open is closed by others of the same line.

    A template or a file that is not closed goes with the rest of its line.
    """
    if not _PAIR.search(line):
        return line
    runs = list(_BRACKETS.finditer(line))
    literal, closed = _literal_runs(runs)
    last_pipe = line.rfind("|")
    parts: list[str] = []
    position = 0
    for number, run in enumerate(runs):
        if run.start() < position or number in literal:
            continue
        start, end = run.span()
        is_table = (run[0] == "{" and line[end : end + 1] == "|") or (run[0] == "}" and line[start - 1 : start] == "|")
        if len(run[0]) == 1 and not is_table:
            continue
        parts += [line[position : start - (is_table and run[0] == "}" and start > position)], GONE]
        position = end + (run[0] == "{" and is_table)
        if number in closed:
            continue
        target = line[end : end + _MAX_TARGET]
        if run[0].startswith("{{") and (last_pipe > end or target[:1].strip(GONE).strip()):
            # A name at once, or arguments after it; "{{ and so on" is prose.
            return "".join([*parts, lose(site.template_name(target.partition("|")[0]))])
        if run[0].startswith("[[") and site.opens_hidden_link(target):
            return "".join(parts)
    return "".join([*parts, line[position:]])


def _literal_runs(runs: list[re.Match[str]]) -> tuple[set[int], set[int]]:
    """Tell which runs of brackets are pairs of single ones, as in {{1}, {2}} and a[b[1]], and which are closed at all.

    Two opening brackets closed by two together are a template or link that is not one: not literal, but closed.
    """
    open_runs: dict[str, list[int]] = {"{": [], "[": []}
    partners: dict[int, list[int]] = {number: [] for number in range(len(runs))}
    for number, run in enumerate(runs):
        stack = open_runs[_OPENING.get(run[0][0], run[0][0])]
        if run[0][0] in open_runs:
            stack += [number] * len(run[0])
            continue
        for _ in run[0][: len(stack)]:
            opened = stack.pop()
            partners[opened].append(number)
            partners[number].append(opened)
    whole = {number for number, run in enumerate(runs) if len(partners[number]) == len(run[0])}
    strays = [number for number in range(len(runs)) if number not in whole]
    for number in whole:
        if len(runs[number][0]) == 2 and len(set(partners[number])) == 1 and len(runs[partners[number][0]][0]) == 2:
            strays.append(number)
    literal = set(range(len(runs)))
    while strays:
        number = strays.pop()
        if number in literal:
            literal.discard(number)
            strays += partners[number]
    return literal, whole


_SEPARATORS = re.compile(rf"(?<![\s,;:{GONE}])[\s,;:{GONE}]+(?=[)\]])")
_OPENED = re.compile(rf"([(\[])([\s,;:/{GONE}]+)")
_EMPTY = re.compile(rf"\({GONE}+\)|\[{GONE}+\]")
_DOUBLE_SEPARATOR = re.compile(rf"([,;])((?:[\s{GONE}]*[,;])+)")
_FIRST_SEPARATORS = re.compile(rf"^[\s,;:{GONE}]+")
_BEFORE_PUNCTUATION = re.compile(rf"(?<![ {GONE}])[ {GONE}]+(?=[,.;:!?)](?:\s|$|[)\"']))")


def _tidy_line(line: str, lost: list[str]) -> str:
    is_item = line.startswith(LIST_ITEM)
    marks = LOST_MARK.findall(line)
    line = LOST_MARK.sub(GONE, _STYLE_QUOTES.sub(_apostrophes, line.replace(LIST_ITEM, "")))
    line = _SPACES.sub(" ", line).strip()
    was_touched = GONE in line
    if was_touched:
        # Twice, for brackets that only held others.
        for _ in range(2):
            line = _OPENED.sub(lambda found: found[1] + GONE if GONE in found[2] else found[0], line)
            line = _EMPTY.sub(GONE, _SEPARATORS.sub(_only_gone, line))
        line = _DOUBLE_SEPARATOR.sub(lambda found: found[1] + GONE if GONE in found[2] else found[0], line)
        line = _FIRST_SEPARATORS.sub(_only_gone, line)
        line = _BEFORE_PUNCTUATION.sub(_only_gone, line)
        line = _SPACES.sub(" ", line.replace(GONE, "")).strip()
    has_words = _WORD.search(line) is not None
    if marks and (has_words or is_item):
        lost += marks
    if was_touched and not has_words:
        return ""
    line = re.sub(rf"(?<=\d){APART}", " ", unshield(line)).replace(APART, "")
    line = re.sub(rf"(?<=[\w)\]]){RAISED}", "^", line).replace(RAISED, "")
    return f"{LIST_ITEM}{line}" if is_item and line else line


def _only_gone(found: re.Match[str]) -> str:
    return GONE if GONE in found[0] else found[0]


def _apostrophes(quotes: re.Match[str]) -> str:
    """Keep what is left of a run of quotes after 2 for italics, 3 for bold, or 5 for both."""
    length = len(quotes[0])
    return "'" * (max(length - 5, 0) if length > 4 else length // 4)
