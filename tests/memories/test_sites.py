"""Dumps of wikis in other languages, of other content, and what is said of both."""

from __future__ import annotations

from pathlib import Path

import pytest
from made_up_sources import dump, dump_of_wiki, numbered_dump, page, write

from attention_rl_trainer.memories.articles import dumps
from attention_rl_trainer.memories.articles.sites import WikiSite
from attention_rl_trainer.memories.articles.sources import load_articles
from attention_rl_trainer.memories.stream import ArticleStream

WIKIS = {
    "de": ("Wikipedia", {-2: "Medium", 6: "Datei", 10: "Vorlage", 14: "Kategorie"}),
    "fr": ("Wikipédia", {-2: "Média", 6: "Fichier", 10: "Modèle", 14: "Catégorie"}),
    "ja": ("Wikipedia", {-2: "メディア", 6: "ファイル", 10: "Template", 14: "Category"}),
    "ru": ("Википедия", {-2: "Медиа", 6: "Файл", 10: "Шаблон", 14: "Категория"}),
    "fi": ("Wikipedia", {-2: "Media", 6: "Tiedosto", 10: "Malline", 14: "Luokka"}),
}
PAGES = {
    "de": (
        page("Ada", "{{Vorlage:nowrap|Ada}} war.[[Datei:A.jpg|mini|hochkant|Ein ''Bild'']][[Bild:B.png|mini]] "
        "Sie lebte.\n== Weblinks ==\n* [[a]]\n[[Kategorie:Frau]] [[kategorie: X_y]] [[Category:Z]]\n"
        "__KEIN_INHALTSVERZEICHNIS__"),
        page("Weg", "#WEITERLEITUNG [[Ada]]"),
        page("Ada (Begriffsklärung)", "Ada"),
        page("Bo", "Bo ist\n{{Begriffsklärung}}"),
        page("Liste der Adas", "* Ada"),
    ),
    "fr": (
        page("Ada", "[[Fichier:A.jpg|vignette|redresse=1.2|Une image]]Ada était.[[Image:C.svg]]\n== Voir aussi ==\n"
        "* b\n[[Catégorie:Femme]]"),
        page("Weg", "#REDIRECTION [[Ada]]"),
        page("Bo", "{{Homonymie}}\n* Bo"),
    ),
    "ja": (
        page("Ada", "[[ファイル:A.jpg|サムネイル|説明]][[画像:B.jpg]]エイダ。[[Category:人]]\n== 脚注 ==\n* x"),
        page("Weg", "#転送 [[Ada]]"),
        page("Bo", "{{Aimai}}\n* Bo"),
    ),
    "ru": (
        page("Ada", "[[Файл:A.jpg|мини|справа|Подпись]]Ада.[[Изображение:B.jpg|мини]]\n== Примечания ==\n* x\n"
        "[[Категория:Люди]]"),
        page("Weg", "#перенаправление [[Ada]]"),
        page("Bo", "{{неоднозначность}}\n* Bo"),
    ),
    "fi": (page("Ada", "[[Tiedosto:A.jpg|pienoiskuva|Kuva]][[Kuva:B.jpg]]Ada.[[Luokka:Naiset]]"),
           page("Weg", "#OHJAUS [[Ada]]")),
}  # fmt: skip
TEXTS = {"de": "Ada war. Sie lebte.", "fr": "Ada était.", "ja": "エイダ。", "ru": "Ада.", "fi": "Ada."}


def path_of(language: str, folder: Path) -> Path:
    name, namespaces = WIKIS[language]
    return write(folder / f"{language}.xml", dump_of_wiki(language, name, namespaces, *PAGES[language]))


@pytest.mark.parametrize("language", WIKIS)
def test_a_dump_is_read_by_the_names_of_its_own_namespaces(language: str, tmp_path: Path) -> None:
    rows = list(dumps.article_rows((str(path_of(language, tmp_path)),)))
    assert [row["text"] for row in rows if row["text"]] == [TEXTS[language]]
    reasons = {row["title"]: row["skip_reason"] for row in rows}
    assert (reasons.pop("Ada"), reasons.pop("Weg")) == ("", "redirect")
    if language == "de":
        assert reasons.pop("Liste der Adas") == "list"
    assert set(reasons.values()) <= {"disambiguation"}


@pytest.mark.parametrize(
    ("markup", "is_redirect"),
    [
        ("#WEITERLEITUNG [[Ada]]\n{{Box}}", True),
        ("\n#redirect: [[Ada]] {{R}}", True),
        ("#PATRZ[[Ada]]", True),
        ("#Erster [[Ada]] und andere\n#Zweiter", False),
        ("# Ada [[Bo]]", False),
        ("Ada\n#WEITERLEITUNG [[Bo]]", False),
    ],
)
def test_a_redirect_that_the_dump_does_not_mark(markup: str, is_redirect: bool) -> None:
    assert WikiSite("Wikipedia", "de").is_redirect(markup) is is_redirect


def test_the_dump_itself_says_what_redirects(tmp_path: Path) -> None:
    page_ = page("Weg", "#ᎠᏍᏔᏅᏅ", extra='<redirect title="Ada" />')
    path = write(tmp_path / "a.xml", dump_of_wiki("chr", "W", {}, page_))
    assert [row["skip_reason"] for row in dumps.article_rows((str(path),))] == ["redirect"]


@pytest.mark.parametrize("language", [*WIKIS, "en", ""])
def test_what_is_not_known_of_a_language_is_said_once_in_every_run(
    language: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "set"
    text = "A text of {{unité|5|km}} more. {{unité|6|m}} {{Nombre|3}}"
    name, namespaces = WIKIS.get(language, ("Wikipedia", {}))
    for part in "ab":
        whole = dump_of_wiki(language, name, namespaces, page("T", text)) if language else numbered_dump(1)
        write(folder / f"{part}.xml", whole)
    for _ in range(2):
        caplog.clear()
        load_articles(str(folder))
        if language in ("en", ""):
            assert "is in the language" not in caplog.text
        else:
            assert caplog.text.count(f"The dump of {name!r} is in the language {language!r}") == 1
            assert ("by a short list" in caplog.text) == (language != "fi")


@pytest.mark.parametrize("streaming", [False, True])
def test_templates_that_were_lost_are_counted_by_name_in_every_run(
    streaming: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    texts = ["About {{unité|5|km}} and {{Unité|6|m}} more.", "A {{nombre|3}} here.", "About nothing.", "{{unité}}"]
    path = write(tmp_path / "a.xml", dump(*(page(f"T{number}", text) for number, text in enumerate(texts))))
    for _ in range(2):
        caplog.clear()
        rows = list(load_articles(str(path), streaming=streaming))
        assert [row["lost_templates"] for row in rows] == ['{"unité": 2}', '{"nombre": 1}', "", ""]
        assert caplog.text.count("3 templates were left out whose words are not known: 'unité' (2), 'nombre' (1).") == 1


def test_many_lost_templates_are_named_in_part(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = "A " + " ".join(f"{{{{unknown {number:02}}}}} b" for number in range(12))
    load_articles(str(write(tmp_path / "a.xml", dump(page("T", text)))))
    assert "12 templates were left out" in caplog.text
    assert "'unknown 09' (1) and 2 others." in caplog.text


MODELS = {
    "<model>wikitext</model><format>text/x-wiki</format>": "",
    "<format>text/x-wiki</format>": "",
    "": "",
    "<model>wikibase-item</model><format>application/json</format>": "content_model:wikibase-item",
    "<model>css</model><format>text/css</format>": "content_model:css",
    "<model>javascript</model>": "content_model:javascript",
    "<model>Scribunto</model><format>text/plain</format>": "content_model:Scribunto",
    "<model>sanitized-css</model>": "content_model:sanitized-css",
    "<format>application/json</format>": "content_model:application/json",
}


def test_what_is_not_wikitext_is_skipped_and_counted_by_name(tmp_path: Path) -> None:
    pages = [page(f"T{number}", '{"labels": "text"}', model=model) for number, model in enumerate(MODELS)]
    table = load_articles(str(write(tmp_path / "a.xml", dump(*pages))))
    assert table["skip_reason"][:] == list(MODELS.values())
    stream = ArticleStream(table, source="a", seed=0, num_epochs=1)
    assert len(list(stream)) == 3
    assert stream.skipped == {reason: 1 for reason in MODELS.values() if reason}


def test_a_template_that_is_only_spoken_of_marks_no_page(tmp_path: Path) -> None:
    text = "Write <nowiki>{{disambiguation}}</nowiki> there.<!-- {{surname}} -->"
    path = write(tmp_path / "a.xml", dump(page("T", text)))
    (row,) = dumps.article_rows((str(path),))
    assert (row["skip_reason"], row["text"]) == ("", "Write {{disambiguation}} there.")


@pytest.mark.parametrize(
    ("target", "is_hidden"),
    [
        ("File:A.jpg", True),
        ("datei : A b.JPG", True),
        ("Kategorie:X", True),
        ("Category:X", True),
        ("Grafika:A.svg", True),
        ("Bild:Kein Bild", False),
        (":Datei:A.jpg", False),
        ("Rom: offene Stadt", False),
        ("https://a.example/b.png", False),
        ("A.jpg", False),
    ],
)
def test_links_that_show_no_words(target: str, is_hidden: bool) -> None:
    site = WikiSite("Wikipedia", "de", {"datei": 6, "kategorie": 14})
    assert site.hides_link(target) is is_hidden
