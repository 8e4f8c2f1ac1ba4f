"""The tags of wiki pages, by what becomes of their contents."""

from __future__ import annotations

DROPPED_TAGS = frozenset(
    {
        "categorytree", "ce", "chem", "gallery", "graph", "hiero", "imagemap", "includeonly", "indicator", "inputbox",
        "mapframe", "maplink", "math", "ref", "references", "score", "section", "source", "style", "syntaxhighlight",
        "table", "templatedata", "templatestyles", "timeline",
    }
)  # fmt: skip
"""Tags that go with their contents; of ``source`` and ``syntaxhighlight`` not those inside of a line."""

CODE_TAGS = frozenset({"code", "kbd", "samp", "tt", "var"})
"""Tags in which text is literal, though templates and links are not."""

LITERAL_TAGS = frozenset({"nowiki", "pre"})
"""Tags whose contents are shown as they are."""

BLOCK_TAGS = frozenset({"blockquote", "center", "dl", "div", "ol", "p", "poem", "pre", "ul"})
LIST_TAGS = frozenset({"dd", "dt", "li"})

_OTHER_TAGS = frozenset(
    {
        "a", "abbr", "b", "bdi", "bdo", "big", "br", "caption", "cite", "col", "colgroup", "data", "del", "dfn", "em",
        "font", "h1", "h2", "h3", "h4", "h5", "h6", "hr", "i", "img", "ins", "langconvert", "languages", "link",
        "mark", "meta", "noinclude", "onlyinclude", "phonos", "q", "rb", "rp", "rt", "rtc", "ruby", "s", "small",
        "span", "strike", "strong", "sub", "sup", "tbody", "td", "tfoot", "th", "thead", "time", "tr", "translate",
        "tvar", "u", "wbr",
    }
)  # fmt: skip

KNOWN_TAGS = DROPPED_TAGS | CODE_TAGS | LITERAL_TAGS | BLOCK_TAGS | LIST_TAGS | _OTHER_TAGS
"""Names that are read as tags by MediaWiki, its extensions or browsers; others, as in ``list<int>``, are shown."""
