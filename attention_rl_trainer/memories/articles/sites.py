"""The wiki that a dump comes from: its language, and the names it gives to what a page does not show."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Final

from attention_rl_trainer.memories.articles.languages import ENGLISH, LANGUAGES, Language

_MEDIA, _FILE, _TEMPLATE, _CATEGORY = -2, 6, 10, 14
_ENGLISH_NAMES = {"media": _MEDIA, "file": _FILE, "image": _FILE, "template": _TEMPLATE, "category": _CATEGORY}
_HIDDEN_NAMESPACES = frozenset({_MEDIA, _FILE, _CATEGORY})

# Names that a wiki had before are still names; its dump does not list them, but what they name ends like a file.
_FILE_ENDING = re.compile(
    r"\.(?:apng|bmp|djvu|flac|gif|jpe?g|mid|mp3|mpe?g|oga|ogg|ogv|opus|pdf|png|stl|svg|tiff?|wav|webm|webp|xcf)$",
    re.IGNORECASE,
)
_REDIRECT = re.compile(r"\s*#redirect\b", re.IGNORECASE)
# One word and one link, alone in their line; a numbered list says more.
_REDIRECT_IN_ANY_LANGUAGE = re.compile(r"\s*#[^\W\d_]+\s*:?[ \t]*\[\[[^\[\]\n]+\]\][ \t]*$", re.MULTILINE)
_TEMPLATE_CALL = re.compile(r"\{\{([^|{}<>\[\]]++)(?:\||\}\})")


@dataclass(frozen=True)
class WikiSite:
    """A wiki, as its dump describes it."""

    name: str = ""
    """Such as "Wikipedia"."""
    language: str = "en"
    """Its code, such as "de" or "zh"; English where the dump says nothing."""
    namespaces: Mapping[str, int] = field(default_factory=dict)
    """Numbers of namespaces by their names of this wiki, in lower case, with spaces; the English ones hold too."""

    @property
    def is_english(self) -> bool:
        """Whether all that is known of English holds."""
        return self.language.partition("-")[0] in ("en", "simple")

    @cached_property
    def _own(self) -> Language | None:
        return LANGUAGES.get(self.language.partition("-")[0])

    @cached_property
    def apparatus_titles(self) -> frozenset[str]:
        """Titles (lower case) of sections that are left out unless they hold prose."""
        return ENGLISH.apparatus_titles | (self._own.apparatus_titles if self._own else frozenset())

    def namespace(self, prefix: str) -> int | None:
        """Return the number of a namespace by the part of a title before its colon; None where it is not one."""
        name = " ".join(prefix.replace("_", " ").split()).lower()
        return self.namespaces.get(name, _ENGLISH_NAMES.get(name))

    def hides_link(self, target: str) -> bool:
        """Whether a link shows no words: to a file, or of the page to its category."""
        prefix, colon, name = target.partition(":")
        if not colon or not prefix.strip() or name.startswith("//"):
            return False
        return self.namespace(prefix) in _HIDDEN_NAMESPACES or (
            "/" not in prefix and " " not in prefix.strip() and _FILE_ENDING.search(name.strip()) is not None
        )

    def opens_hidden_link(self, rest_of_line: str) -> bool:
        """Whether a link that is not closed begins as one that `hides_link`."""
        return self.hides_link(re.split(r"[|\[\]{}]", rest_of_line, maxsplit=1)[0].strip())

    def template_name(self, title: str) -> str:
        """Return the name by which a template is known: in lower case, with spaces, without its namespace."""
        name = " ".join(title.replace("_", " ").split()).lower().lstrip(":")
        prefix, colon, rest = name.partition(":")
        if colon and (prefix in ("subst", "safesubst") or self.namespace(prefix) == _TEMPLATE):
            return self.template_name(rest)
        return name

    def is_redirect(self, markup: str) -> bool:
        """Whether a page that its dump does not mark as one is a redirect, by the word that it begins with."""
        pattern = _REDIRECT if self.is_english else _REDIRECT_IN_ANY_LANGUAGE
        return pattern.match(markup) is not None or _REDIRECT.match(markup) is not None

    def is_disambiguation(self, title: str, markup: str) -> bool:
        """Whether a page tells several meanings of its title apart."""
        known = [ENGLISH, self._own] if self._own else [ENGLISH]
        if title.lower().endswith(tuple(ending for language in known for ending in language.disambiguation_titles)):
            return True
        return any(
            name.startswith("disambig-") or any(name in language.disambiguation_templates for language in known)
            for name in self._template_names(markup)
        )

    def is_list(self, title: str, markup: str) -> bool:
        """Whether a page is a list of pages."""
        beginnings = ENGLISH.list_titles + (self._own.list_titles if self._own else ())
        return title.startswith(beginnings) or not _LIST_TEMPLATES.isdisjoint(self._template_names(markup))

    def _template_names(self, markup: str) -> set[str]:
        return {self.template_name(found[1]) for found in _TEMPLATE_CALL.finditer(markup)}

    @property
    def what_is_not_known(self) -> str:
        """Say what is not known of a wiki that is not English; "" of one that is."""
        if self.is_english:
            return ""
        dump = f"The dump of {self.name or 'a wiki'!r} is in the language {self.language!r}"
        always = "of files, categories and redirects are known from the dump"
        words = (
            "Templates that print words are known by their English names alone; what the others print is left out, and "
            "counted by their names."
        )
        if self._own:
            return f"{dump}: those {always}, disambiguation pages and sections of references by a short list. {words}"
        return (
            f"{dump}: those {always}. Disambiguation pages, lists and sections of references are known by their "
            f"English names alone, and others are read as articles. {words}"
        )


_LIST_TEMPLATES = frozenset(
    {"given name", "mountainindex", "plant common name", "set index article", "shipindex", "sia", "surname"}
)

ENGLISH_WIKI: Final = WikiSite()
"""What is taken where a page comes without its wiki."""
