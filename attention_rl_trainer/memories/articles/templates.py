"""From a template inside a sentence of a wiki page to the words it stands for.

Most templates are boxes, notices and references, and leave nothing; a measure, a date, a fraction, a character or a
quotation is part of its sentence. What is neither known to leave nothing nor known by its words is lost, and said to
be. The names are those of the English Wikipedia.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from mwparserfromhell.nodes import Template

from attention_rl_trainer.memories.articles import measures
from attention_rl_trainer.memories.articles.arguments import Arguments, Render
from attention_rl_trainer.memories.articles.literal import GONE, LIST_ITEM, RAISED, shield
from attention_rl_trainer.memories.articles.sites import WikiSite
from attention_rl_trainer.memories.articles.template_names import (
    BLOCK_ARGUMENT,
    CHARACTERS,
    ENCLOSED,
    INLINE_LISTS,
    LAST_ARGUMENT,
    LINES,
    MONEY,
    MUSIC,
    PRINTED_ARGUMENT,
    SHIPS,
    prints_nothing,
)

_MONTH_AND_YEAR = re.compile(r"(?:[^\W\d_]+ )?\d{4}")


def render_template(template: Template, render: Render, lose: Callable[[str], str], site: WikiSite) -> str:
    """Return the words that a template stands for.

    Args:
        render: turns an argument into text.
        lose: makes the mark that stands for the words of a template, by its name, that are not known.

    Returns:
        The words, `GONE` where there are none, or a mark of ``lose``.
    """
    arguments = Arguments(template, render)
    name = site.template_name(render(template.name).strip())
    words = _words(name, arguments, site)
    if words is not None:
        return words or GONE
    if prints_nothing(name) or _MONTH_AND_YEAR.fullmatch(arguments.get("date")):
        # Notes of editors, whatever they are called, say when they were made.
        return GONE
    return lose(name)


def _words(name: str, arguments: Arguments, site: WikiSite) -> str | None:
    """Return what a template prints, or None where that is not known."""
    if ":" in name and (printed := _function(name, arguments, site)) is not None:
        return printed
    if name in _WORDS:
        return _WORDS[name](arguments)
    if name in CHARACTERS and (arguments.are_none or CHARACTERS[name].isspace()):
        return shield(CHARACTERS[name])
    if arguments.are_none:
        # Names are compared in small letters, and {{ESP}} is a country.
        return None
    if name.startswith(("lang-", "script/")):
        return arguments.get(1, "text")
    if name in LAST_ARGUMENT:
        return arguments.get("text") or "".join([*arguments.positional()][-1:])
    if name in MONEY:
        return measures.money(MONEY[name], arguments)
    if name in SHIPS:
        return f"{name.upper()} {arguments.get(1)}".strip()
    if name in ENCLOSED:
        before, after = ENCLOSED[name]
        inside = ", ".join(arguments.positional())
        return f"{shield(before)}{inside}{shield(after)}" if inside.strip(GONE) else ""
    if name in INLINE_LISTS:
        return INLINE_LISTS[name].join(part for part in arguments.positional() if part)
    return _blocks(name, arguments)


def _blocks(name: str, arguments: Arguments) -> str | None:
    if name in PRINTED_ARGUMENT:
        return arguments.get(PRINTED_ARGUMENT[name], "text")
    if name in BLOCK_ARGUMENT:
        return f"\n{text}\n" if (text := arguments.get(BLOCK_ARGUMENT[name], "text", "quote")) else ""
    if name in LINES:
        return "".join(f"\n{LIST_ITEM}{item}" for item in arguments.positional() if item) + "\n"
    return None


def _function(name: str, arguments: Arguments, site: WikiSite) -> str | None:
    """Print a function of the parser, such as {{formatnum:18}}, whose first argument is part of its name."""
    function, _, _ = name.partition(":")
    if function not in _FUNCTIONS:
        return None
    text = arguments.name.partition(":")[2].strip()
    return _FUNCTIONS[function](text, arguments, site)


_FUNCTIONS: dict[str, Callable[[str, Arguments, WikiSite], str]] = {
    "formatnum": lambda text, more, site: measures.grouped(text, more.get(1), site.is_english),
    "lc": lambda text, more, site: text.lower(),
    "lcfirst": lambda text, more, site: text[:1].lower() + text[1:],
    "uc": lambda text, more, site: text.upper(),
    "ucfirst": lambda text, more, site: text[:1].upper() + text[1:],
    "nowiki": lambda text, more, site: text,
}


def raised(contents: str) -> str:
    """Keep an exponent apart from the number before it: 10 with a raised 6 is not 106."""
    return f"{RAISED}{contents}" if re.fullmatch(r"[-+−]?\d+", contents.strip()) else contents


def _circa(arguments: Arguments) -> str:
    first, last = arguments.get(1), arguments.get(2)
    return f"c. {first} – c. {last}" if last else f"c. {first}"


def _sic(arguments: Arguments) -> str:
    """Print {{sic|wo|rd}} as "word [sic]", and with ``hide`` as "word"."""
    words = "".join(arguments.positional())
    return words if arguments.is_on("hide") else f"{words} {shield('[sic]')}".strip()


def _link_elsewhere(arguments: Arguments) -> str:
    return arguments.get("lt", 1, "en")


def _nihongo(arguments: Arguments) -> str:
    """Print {{nihongo|Tokyo|東京|Tōkyō}} as "Tokyo (東京, Tōkyō)"."""
    others = ", ".join(part for part in (arguments.get(2), arguments.get(3)) if part)
    return f"{arguments.get(1)} ({others})".strip() if others else arguments.get(1)


def _chinese(arguments: Arguments) -> str:
    forms = dict.fromkeys(arguments.get(name) for name in ("c", "s", "t", "p", "l", "1"))
    return "; ".join(form for form in forms if form)


def _ship(arguments: Arguments) -> str:
    return " ".join(part for part in list(arguments.positional())[:2] if part)


def _ship_class(arguments: Arguments) -> str:
    """Print {{sclass|Nimitz|aircraft carrier}} as "Nimitz-class aircraft carrier"."""
    return f"{arguments.get(1)}-class {arguments.get(2)}".strip()


def _harvard(arguments: Arguments) -> str | None:
    """Print {{harvtxt|Smith|Roe|1990}} as "Smith & Roe (1990)"."""
    *names, year = [*arguments.positional()] or [""]
    return f"{' & '.join(names)} ({year})" if names else None


def _bible(arguments: Arguments) -> str:
    return " ".join(part for part in [*arguments.positional()][:2] if part)


def _section_link(arguments: Arguments) -> str:
    page, *sections = [*arguments.positional()] or [""]
    return " ".join([page, *(f"§ {section}" for section in sections if section)]).strip()


def _chemical(arguments: Arguments) -> str:
    return "".join(arguments.positional())


def _reign(arguments: Arguments) -> str:
    return "r. " + "–".join(part for part in arguments.positional() if part)


def _sub_and_super(arguments: Arguments) -> str:
    """Print {{subsup|x|1|2}} as "x1" with a raised 2."""
    base, below, above = [*arguments.positional(), "", "", ""][:3]
    return f"{base}{below}{raised(above)}"


def _address(arguments: Arguments) -> str:
    """Print the words of an address, as of a link; an address without words is left out."""
    return arguments.get(2)


_WORDS: dict[str, Callable[[Arguments], str | None]] = {
    "as of": measures.as_of,
    "bibleref": _bible,
    "bibleref2": _bible,
    "bibleverse": _bible,
    "birth date": measures.date,
    "c.": _circa,
    "ca.": _circa,
    "chem": _chemical,
    "circa": _circa,
    "convert": measures.measure,
    "currency": lambda t: measures.money(MONEY.get((t.get(2) or "usd").lower(), ""), t) if t.get(1) else None,
    "cvt": measures.measure,
    "death date": measures.date,
    "end date": measures.date,
    "frac": measures.fraction,
    "fraction": measures.fraction,
    "gaps": measures.gaps,
    "harvtxt": _harvard,
    "height": measures.height,
    "ill": _link_elsewhere,
    "illm": _link_elsewhere,
    "inrconvert": measures.rupees,
    "interlanguage link": _link_elsewhere,
    "interlanguage link multi": _link_elsewhere,
    "lang-zh": _chinese,
    "math": lambda t: t.get(1),
    "music": lambda t: MUSIC.get(t.get(1).lower()) or None,
    "nihongo": _nihongo,
    "nihongo2": lambda t: t.get(1),
    "nihongo3": lambda t: t.get(1),
    "nts": lambda t: t.get(1),
    "nuclide": measures.nuclide,
    "nuclide2": measures.nuclide,
    "oldstyledate": measures.old_style_date,
    "oldstyledatedy": measures.old_style_date,
    "ord": measures.ordinal,
    "ordinal": measures.ordinal,
    "railgauge": measures.gauge,
    "reign": _reign,
    "sclass": _ship_class,
    "sclass2": _ship_class,
    "section link": _section_link,
    "sfrac": measures.fraction,
    "ship": _ship,
    "sic": _sic,
    "slink": _section_link,
    "start date": measures.date,
    "subsup": _sub_and_super,
    "su": lambda t: f"{t.get('b')}{raised(t.get('p'))}",
    "sup": lambda t: raised(t.get(1)),
    "track gauge": measures.gauge,
    "url": _address,
    "val": measures.value,
    "zh": _chinese,
}
"""Templates that stand for words inside a sentence, and how each is printed; None is for words that are not known."""
