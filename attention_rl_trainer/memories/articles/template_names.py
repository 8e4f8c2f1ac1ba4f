"""The templates of the English Wikipedia by what they print: a character, one argument, a block, or nothing."""

from __future__ import annotations

CHARACTERS = {
    "'": "'", "' \"": "' \"", "\" '": "\" '", "\"'": "\"'", "'\"": "'\"", "'s": "'s", "-\"": "\"", "!": "|", "!!": "||",
    "!(": "[", ")!": "]", "(": "{", ")": "}", "((": "{{", "))": "}}", "(((": "{{{", ")))": "}}}", "(!": "{|",
    "!)": "|}", "=": "=", "pipe": "|", "–": "–", "—": "—", "·": " · ", "•": " • ", "...": "...", "ellipsis": "...",
    "bull": " • ", "bullet": " • ", "dagger": "†", "dot": " · ", "emdash": "—", "em dash": "—", "en dash": "–",
    "endash": "–", "hamza": "ʾ", "hyphen": "-", "hyph": "-", "interpunct": " · ", "mdash": "—", "mdashb": "—",
    "middot": " · ", "nbhyph": "‑", "nbhyphen": "‑", "nbsp": " ", "ndash": "–", "okina": "ʻ", "ayin": "ʿ", "pi": "π",
    "spaced en dash": " – ", "spaced em dash": " — ", "spaced ndash": " – ", "spnd": " – ", "snd": " – ",
    "sdash": " – ",
    "spaces": " ", "space": " ", "sp": " ", "tsp": " ", "thin space": " ", "thinsp": " ", "hairsp": " ", "hsp": " ",
    "zwsp": "", "zwj": "", "shy": "", "wbr": "", "double-dagger": "‡", "minus": "−", "plusminus": "±", "times": "×",
    "degree": "°", "degrees": "°", "deg": "°", "euro": "€", "checkmark": "✓", "check mark": "✓", "tick": "✓",
    "yes check": "✓", "cross": "✗", "cross mark": "✗", "female": "♀", "male": "♂", "flat": "♭", "sharp": "♯",
    "natural": "♮", "br": "\n", "break": "\n", "crlf": "\n", "pb": "\n", "paragraph break": "\n", "sic": "[sic]",
    "bc": "BC", "bce": "BCE", "ce": "CE", "ad": "AD", "number sign": "#", "backslash": "\\", "tilde": "~",
}  # fmt: skip
"""Templates without arguments, and the characters that they print."""

MUSIC = {
    "flat": "♭", "b": "♭", "sharp": "♯", "#": "♯", "natural": "♮", "n": "♮", "doubleflat": "𝄫", "bb": "𝄫",
    "doublesharp": "𝄪", "x": "𝄪", "##": "𝄪", "quarter": "♩", "eighth": "♪",
}  # fmt: skip
"""Arguments of {{music}}, and what they print."""


def _names(text: str) -> list[str]:
    return [name.replace("_", " ") for name in text.split()]


_FIRST_ARGUMENT = """
    abbr abbrlink allcaps as_written avoid_wrap big birth-date blackletter bold boldital c+ caps char code death-date
    del
    em emphasis flag flagcountry flagdeco flagu format_price formatnum formatprice grc greek hebr hebrew highlight huge
    iast ins ital italic italics kbd large larger lcword linkless_exists m midsize mono mvar nastaliq no_bold no_italic
    no_wrap nobold nobr nobreak noitalic normal not_a_typo notatypo nowiki nowrap okay overline pie polytonic raise
    roman s samp sans-serif sc sc1 sc2 script small small_caps smallcaps smaller station stn strike strong sub syriac
    thai tibetan tmath tooltip tt typo u uncial underline unicode upper vanchor var varserif visible_anchor w wikilink
    wj xt !xt
"""
_SECOND_ARGUMENT = """
    align background_color bg color colour float font-size fs lang langx rtl-lang rws script transl translit
    transliteration wikt-lang wt
"""
PRINTED_ARGUMENT = {**dict.fromkeys(_names(_FIRST_ARGUMENT), 1), **dict.fromkeys(_names(_SECOND_ARGUMENT), 2)}
"""Templates that print one of their arguments, and its number."""

LAST_ARGUMENT = frozenset(
    {
        "columns-list",
        "font color",
        "fontcolor",
        "font",
        "resize",
        "size",
        "style",
        "sort",
        "bgcolor",
        "color box",
        "colored text",
    }
)
"""Templates that print the last of their arguments."""

BLOCK_ARGUMENT = {
    **dict.fromkeys(
        (
            "block indent", "block quote", "blockindent", "blockquote", "bq", "bquote", "center", "centre",
            "centered pull quote", "col-list", "cquote", "flatlist", "gquote", "indent", "left",
            "longquote", "plainlist", "poem", "poem quote", "poemquote", "pull quote", "pullquote", "quotation",
            "quote", "quote box", "quote frame", "quotebox", "right",
        ),
        1,
    ),
    **dict.fromkeys(("rquote",), 2),
}  # fmt: skip
"""Templates that print one of their arguments as a paragraph, and its number."""

LINES = frozenset(
    {"bulleted list", "blist", "bulletlist", "ordered list", "ublist", "ubl", "unbulleted list", "unordered list"}
)
"""Templates that print each argument as an item of a list."""

INLINE_LISTS = {
    "hlist": " · ", "horizontal list": " · ", "cslist": ", ", "comma separated entries": ", ", "enum": ", ",
    "chem2": "", "key press": "+", "keypress": "+", "linktext": "", "sortname": " ",
}  # fmt: skip
"""Templates that print all arguments, and what stands between them."""

ENCLOSED = {
    "abs": ("|", "|"), "angbr": ("⟨", "⟩"), "angle bracket": ("⟨", "⟩"), "angle brackets": ("⟨", "⟩"),
    "bra": ("⟨", "|"), "bracket": ("[", "]"), "brackets": ("[", "]"), "brace": ("{", "}"), "ket": ("|", "⟩"),
    "mset": ("{", "}"), "norm": ("‖", "‖"), "oeis": ("OEIS: ", ""), "paren": ("(", ")"),
    "prime": ("", "′"), "pprime": ("", "″"), "radic": ("√", ""), "sqrt": ("√", ""), "tag": ("<", ">"),
    "tl": ("{{", "}}"), "tlx": ("{{", "}}"), "vr": ("⟨", "⟩"), "xtag": ("<", ">"), "grapheme": ("⟨", "⟩"),
    "10^": (" × 10^", ""), "e": (" × 10^", ""), "esp": (" × 10^", ""), "x10^": (" × 10^", ""), "exp": ("e^", ""),
    "b.": ("b. ", ""), "c.": ("c. ", ""), "d.": ("d. ", ""), "fl.": ("fl. ", ""), "floruit": ("fl. ", ""),
    "born in": ("born ", ""), "died-in": ("died ", ""), "nee": ("née ", ""), "née": ("née ", ""), "né": ("né ", ""),
    "ne": ("né ", ""), "pct": ("", "%"), "qt": ("“", "”"), "single": ("‘", "’"),
    "hands": ("", " hands"), "no.": ("No. ", ""), "numero": ("No. ", ""), "u+": ("U+", ""), "unichar": ("U+", ""),
}  # fmt: skip
"""Templates that print their first argument between two others."""

MONEY = {
    "$": "$", "a$": "A$", "aud": "A$", "bdt": "৳", "brl": "R$", "c$": "C$", "ca$": "C$", "cad": "C$", "chf": "CHF ",
    "cn¥": "CN¥", "cny": "CN¥", "czk": "Kč ", "dm": "DM ", "eur": "€", "euro": "€", "€": "€", "frf": "₣", "gbp": "£",
    "pound sterling": "£", "£": "£", "gbp£": "£", "hk$": "HK$", "hkd": "HK$", "idr": "Rp ", "ils": "₪", "inr": "₹",
    "indian rupee": "₹", "irr": "IRR ", "jp¥": "¥", "jpy": "¥", "¥": "¥", "krw": "₩", "₩": "₩", "lkr": "Rs. ",
    "mxn": "MX$", "myr": "RM", "ngn": "₦", "npr": "Rs. ", "nt$": "NT$", "ntd": "NT$", "nz$": "NZ$", "nzd": "NZ$",
    "peso": "₱", "philippine peso": "₱", "php": "₱", "₱": "₱", "pkr": "Rs. ", "r$": "R$", "rub": "₽", "rs": "Rs. ",
    "s$": "S$", "sgd": "S$", "thb": "฿", "try": "₺", "twd": "NT$", "uah": "₴", "us$": "US$", "usd": "US$",
    "us dollar": "US$", "vnd": "₫", "zar": "R", "₹": "₹", "rupee": "₹", "won": "₩", "yen": "¥", "shekel": "₪",
}  # fmt: skip
"""Templates of sums of money, and the sign before the sum."""

SHIPS = frozenset(
    _names(
        """
        ara bap bns css gts hdms hmas hmbs hmcs hmics hmis hmnzs hmps hms hmsas hmss hmt hnlms hnoms hswms ijn ins jds
        kd kri mf ms mts mv nrp ns orp pns ps rfa rms rmv rv sas sms smu ss ssv sv td ts uscgc usat usns usrc uss
        """
    )
)
"""Templates of ships, called as the prefixes of ships are."""

_NOTHING = frozenset(
    _names(
        """
        - about according_to_whom according_to_whom? ambiguous anchor audio audio-nohelp authority_control
        automatic_taxobox bare_url_pdf better better_source bot bots by_whom by_whom? cbignore chart circular_reference
        citation citation_needed_span citation_style clade clarify clarifyme clear clear_left clear_right closed_access
        clr cn commons commons_category commonscat contradict coord copy_edit cref cref2 dead_link dead_links
        definition details distinguish distinguish2 disputed dmoz dn doi double_image dubious efn efn-lr efn-ua
        elucidate fact featured_article flag_icon flagicon flagicon_image for for_timeline free_access full further
        further_information gallery good_article harv harvcol harvcolnb harvid harvnb harvp hatnote hidden_begin
        hidden_end hs hsh in_lang infobox inflation-fn inflation/fn interwiki_conflict ipa ipac-en isbn issn
        italic_title j? jstor language_icon languageicon lccn legend listen location_map main main_article main_list
        medcn more_footnotes multiple_image multiple_images multiple_issues navbox navboxes nb no_footnotes nobots note
        note_label notelist notes ntsh oclc official official_website open_access opinion original_research orphan
        other_people other_persons other_places other_uses otheruses portal pov pov-statement quantify r redirect
        redirect-distinguish redirect2 ref ref_label refbegin refend refimprove reflist refn respell rp see see_also
        seealso sfn sfnm sfnp short_description sisterlinks sister_project_links specify speciesbox spoken_wikipedia
        subscription subscription_required taxobox tfd toc toclimit unreferenced unreliable_source unreliable_source?
        update vague verify_source vcite wayback webarchive when when? where where? which which? who who? whom whom?
        whose whose? why why? wide_image wikiquote wiktionary
        """
    )
)
_NOTHING_BEGINNINGS = (
    "#tag:ref", "attached ", "blockquote/", "chart/", "cite ", "cite/", "citation/", "col-", "cs1 ", "defaultsort",
    "defaultsort:", "displaytitle:", "div col", "end ", "engvar", "expand ", "infobox ", "ipa-", "ipac-", "jct-",
    "navbox ", "pp-", "pronunciation", "refimprove ", "s-", "sfn", "sister ", "start of ", "taxobox ", "toc ",
    "use dmy", "use mdy", "use american ", "use british ", "unreferenced ", "vcite ", "vancite ", "wikisource",
    "wikibooks", "wikispecies", "wikivoyage", "#seo:", "#related:", "#lst:",
)  # fmt: skip
_NOTHING_ENDINGS = (" icon", " needed", " needed?", "-inline", " inline", " stub", "-stub", " sidebar", " topics")


def prints_nothing(name: str) -> bool:
    """Whether a template is a note on a text, a reference, a pronunciation or a box, none of which is prose."""
    return name in _NOTHING or name.startswith(_NOTHING_BEGINNINGS) or name.endswith(_NOTHING_ENDINGS)
