"""What is known of wikis in languages other than English, beyond what their dumps say themselves.

A dump names its namespaces and marks its redirects. It does not say which templates mark a page that tells several
meanings apart, nor how its sections of references are called; that is listed here for twelve of the largest Wikipedias.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Language:
    """Names in lower case, as they are compared."""

    disambiguation_templates: frozenset[str]
    disambiguation_titles: tuple[str, ...]
    """What such a title ends with, in brackets."""
    list_titles: tuple[str, ...]
    """What the title of a list begins with, as it is written; none where works are called so too, as "Список
    Шиндлера" is."""
    apparatus_titles: frozenset[str]
    """Titles of sections that are left out unless they hold prose."""


def _language(templates: str, titles: str, lists: tuple[str, ...], apparatus: str) -> Language:
    return Language(
        frozenset(templates.split(", ")), tuple(titles.split(", ")), lists, frozenset(apparatus.split(", "))
    )


ENGLISH = Language(
    frozenset(
        {
            "airport disambiguation", "chinese title disambiguation", "dab", "disamb", "disambig", "disambiguation",
            "disambiguation page", "genus disambiguation", "geodis", "hndis", "hospital disambiguation",
            "letter disambiguation", "letter-ndash dab", "lettercombdisambig", "mathdab",
            "mathematical disambiguation", "mil-unit-dis", "numberdis", "place name disambiguation", "roaddis",
            "school disambiguation", "schooldis", "species latin name disambiguation", "station disambiguation",
            "taxonomy disambiguation",
        }
    ),
    ("(disambiguation)",),
    ("Index of ", "List of ", "Lists of ", "Outline of "),
    frozenset(
        {
            "bibliography", "citations", "cited sources", "explanatory notes", "external links", "footnotes",
            "further reading", "gallery", "general references", "image gallery", "notes", "notes and references",
            "references", "references and notes", "references and sources", "see also", "sources", "works cited",
        }
    ),
)  # fmt: skip
"""Holds for every wiki, whatever its language."""

LANGUAGES = {
    "de": _language(
        "begriffsklärung, falschschreibung",
        "(begriffsklärung)",
        ("Liste der ", "Liste des ", "Liste von ", "Listen der "),
        "anmerkungen, belege, bilder, einzelnachweise, einzelnachweise und anmerkungen, fußnoten, galerie, literatur, "
        "quellen, referenzen, siehe auch, weblinks, weiterführende literatur",
    ),
    "es": _language(
        "desambiguación, desambiguacion, desambig, disambig",
        "(desambiguación)",
        ("Lista de ",),
        "bibliografía, enlaces externos, fuentes, galería, lecturas adicionales, notas, notas y referencias, "
        "referencias, véase también",
    ),
    "fr": _language(
        "homonymie, patronymie, toponymie",
        "(homonymie)",
        ("Liste de ", "Liste des ", "Liste d'", "Liste d’"),
        "annexes, articles connexes, bibliographie, galerie, liens externes, notes, notes et références, références, "
        "sources, voir aussi",
    ),
    "it": _language(
        "disambigua, disambiguazione, disambig",
        "(disambigua), (disambiguazione)",
        ("Lista di ", "Liste di "),
        "altri progetti, bibliografia, collegamenti esterni, fonti, galleria d'immagini, note, voci correlate",
    ),
    "ja": _language(
        "aimai, 曖昧さ回避, disambig, 人名の曖昧さ回避, 地名の曖昧さ回避, 同名の地名, 同名の人物",
        "(曖昧さ回避)",
        (),
        "脚注, 注釈, 出典, 参考文献, 外部リンク, 関連項目, 関連書籍, ギャラリー, 注釈・出典",
    ),
    "nl": _language(
        "doorverwijspagina, dp",
        "(doorverwijspagina)",
        ("Lijst van ",),
        "bibliografie, bronnen, externe link, externe links, galerij, literatuur, noten, referenties, zie ook",
    ),
    "pl": _language(
        "ujednoznacznienie, disambig",
        "(ujednoznacznienie)",
        (),
        "bibliografia, galeria, linki zewnętrzne, przypisy, uwagi, zobacz też",
    ),
    "pt": _language(
        "desambiguação, desambig, disambig",
        "(desambiguação)",
        ("Lista de ",),
        "bibliografia, fontes, galeria, leitura adicional, ligações externas, notas, notas e referências, referências, "
        "ver também",
    ),
    "ru": _language(
        "неоднозначность, disambig, фамилия, список однофамильцев",
        "(значения)",
        (),
        "галерея, комментарии, литература, примечания, см. также, ссылки, источники",
    ),
    "sv": _language(
        "förgrening, gren, efternamn, disambig",
        "(olika betydelser), (förgrening)",
        ("Lista över ", "Listor över "),
        "bildgalleri, bibliografi, externa länkar, fotnoter, källor, litteratur, noter, referenser, se även, "
        "vidare läsning",
    ),
    "uk": _language(
        "неоднозначність, disambig, прізвище",
        "(значення)",
        (),
        "галерея, джерела, література, посилання, примітки, див. також",
    ),
    "zh": _language(
        "disambig, 消歧义, 消歧義, 消歧义页, 消歧義頁, disambiguation, 人名消歧义, 人名消歧義, 地名消歧义, 地名消歧義",
        "(消歧义), (消歧義)",
        (),
        "参考文献, 參考文獻, 参考资料, 參考資料, 参见, 參見, 参看, 參看, 外部链接, 外部連結, 外部链結, 外部連接, "
        "注释, 註釋, 注釋, 脚注, 腳註, 延伸阅读, 延伸閱讀, 相关条目, 相關條目, 扩展阅读, 來源, 来源",
    ),
}
"""By the code that a dump gives its language."""
