"""Markup of wiki pages to the text a reader sees."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attention_rl_trainer.memories.articles.markup import plain_page, plain_text
from attention_rl_trainer.memories.articles.sites import WikiSite

HANDWRITTEN_PAGE = Path(__file__).parent / "data" / "handwritten_page.wiki"
PROSE = "This sentence is long enough, with its many words, to be prose and not one more entry of a list. " * 3


@pytest.mark.parametrize(
    ("markup", "text"),
    [
        ("'''Anarchism''' is a ''political'' [[philosophy]].", "Anarchism is a political philosophy."),
        ("A [[Category theory|category]] and [[dog]]s.", "A category and dogs."),
        ("Text.{{infobox|a={{nested|b={{deeper}}}}|c=[[d]]}} More.", "Text. More."),
        ("Before\n{| class=wikitable\n|-\n! Head\n|-\n| cell || cell\n|}\nAfter", "Before\n\nAfter"),
        ("Outer {|\n| in {|\n| deep\n|}\n|}\nleft.", "Outer\n\nleft."),
        ("Fact.<ref name=a>{{cite web|url=x}}</ref><ref name=a /> More.", "Fact. More."),
        ("[[File:A.jpg|thumb|A [[link]] and ''style'']]Prose.", "Prose."),
        ("[[image:A.jpg|thumb|caption]]Prose.[[Category:Things]] [[de:Ding]]", "Prose."),
        ("See [[:Category:Things]] and [[wikt:word|word]].", "See Category:Things and word."),
        ("Area <math>x^2 {y}</math> is <!-- hidden -->known.", "Area is known."),
        ("<gallery>\nFile:A.jpg|A\n</gallery>\nProse. __NOTOC__", "Prose."),
        ("Its [http://a.example site], [http://b.example] and http://c.example end.", "Its site, and end."),
        ("A name (; {{IPA|x}}, born 1809) and ({{lang-xx}}) ends ({{a}}; ).", "A name (born 1809) and ends."),
        ("Caf&eacute;&nbsp;bar &ndash; open", "Café bar – open"),
        ("one\n\n\n\n\ntwo", "one\n\ntwo"),
        ("H<sub>2</sub>O is 10<sup>6</sup> and 3<sup>rd</sup>", "H2O is 10^6 and 3rd"),
        ("* one\n* two\n# three\n: four\n; term : its meaning", "one\ntwo\nthree\nfour\nterm its meaning"),
        ("A<br/>B<br>C", "A\nB\nC"),
        ("<nowiki>[[kept]] ''as'' is</nowiki>", "[[kept]] ''as'' is"),
        ("Broken {{template without an end\nnext line", "Broken\nnext line"),
        ("Broken [[File:A.svg|thumb|no end\nnext line", "Broken\nnext line"),
        ("Broken [[link and ''style\n|-\n| row\nlast</ref>", "Broken link and style\n\nlast"),
        ("Wait ... what", "Wait ... what"),
        ("'''A''''s and ''L'Étranger'' and '''''both''''',", "A's and L'Étranger and both,"),
        ("* {{cite|x}}, vol. 3\n: <math>x</math>;", "vol. 3"),
        ("<sup>14</sup>C", "14C"),
        ("<!-- == Not a heading ==\n{{ -->Text.<!-- no end", "Text."),
        ("", ""),
        ("{{stub}}\n[[Category:A]]", ""),
    ],
)
def test_markup_becomes_the_text_a_reader_sees(markup: str, text: str) -> None:
    assert plain_text(markup) == text


def test_headings_are_lines_and_go_with_an_empty_section() -> None:
    markup = "Lead.\n== Filled ==\nText.\n=== Empty ===\n{{table}}\n== Also ''empty'' ==\n=== Below ===\n[[File:x.png]]"
    assert plain_text(markup) == "Lead.\n\nFilled\n\nText."


def test_a_heading_over_a_filled_subsection_stays() -> None:
    assert plain_text("== Above ==\n=== Below ===\nText.") == "Above\n\nBelow\n\nText."


@pytest.mark.parametrize(
    "unclosed", ["''italics", "'''bold", "{|\n| cell", "<ref>note", "{{template", "[[link", "<div>"]
)
def test_what_is_not_closed_ends_with_its_section(unclosed: str) -> None:
    markup = f"Lead.\n\n{unclosed}\n== History ==\nText.\n{{|\n| cell\n|}}\n== References ==\n* Roe.\n"
    assert plain_text(markup).endswith("\n\nHistory\n\nText.")


def test_an_apparatus_is_left_out_with_its_subsections() -> None:
    markup = "Lead.\n== References ==\n{{reflist}}\n* Doe, ''Book''.\n=== Sources ===\n* Roe.\n== History ==\nText."
    assert plain_text(markup) == "Lead.\n\nHistory\n\nText."


@pytest.mark.parametrize("title", ["See also", "External links", "Further reading", "Notes and references", "NOTES:"])
def test_the_apparatus_is_known_by_its_title(title: str) -> None:
    assert plain_text(f"Lead.\n== {title} ==\n* [[a]]") == "Lead."


def test_an_apparatus_with_prose_stays_but_not_for_a_long_list_item() -> None:
    assert plain_text(f"Lead.\n== Sources ==\n{PROSE}").startswith("Lead.\n\nSources\n\nThis sentence")
    assert plain_text(f"Lead.\n== Sources ==\n* {PROSE}") == "Lead."


def test_a_handwritten_page_reads_as_an_article() -> None:
    markup = HANDWRITTEN_PAGE.read_text(encoding="utf-8")
    expected = HANDWRITTEN_PAGE.with_suffix(".txt").read_text(encoding="utf-8")
    assert plain_text(markup) == expected.rstrip("\n")


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.sampled_from(
            ["{{", "}}", "[[", "]]", "|", "==", "\n", "{|", "|}", "|-", "''", "<ref>", "</ref>", "<br>", "(", ")", ";",
             "word", " ", "File:", "http://a.example", "* ", "&amp;", "<!--", "-->", "<nowiki>", "\ue000"]
        ),
        max_size=30,
    )
)  # fmt: skip
def test_no_markup_however_broken_leaves_its_clutter(pieces: list[str]) -> None:
    text = plain_text("".join(pieces))
    assert "\n\n\n" not in text
    assert "\ue000" not in text
    # Of eight quotes in a row, five are marks of style.
    assert "''" not in text or pieces.count("''") > 3
    for line in text.split("\n"):
        # Brackets whose partners are in their line may be those of sets and the like.
        for opening, closing, marks in (("{", "}", ("{{", "}}", "{|")), ("[", "]", ("[[", "]]"))):
            assert line.count(opening) == line.count(closing) or not any(mark in line for mark in marks)
    assert text == text.strip()


@pytest.mark.parametrize("unit", ["\n", " \n", " ,", " ", "x", "(", "'", "{|", "|", "\u202e", "<!--"])
def test_a_page_of_one_thing_repeated_takes_no_longer_than_its_length_asks_for(unit: str) -> None:
    def seconds(num_characters: int) -> float:
        start = time.process_time()
        plain_text(unit * (num_characters // len(unit)))
        return time.process_time() - start

    # Time in proportion to the square would be 256 times as long.
    assert seconds(320_000) < 64 * max(seconds(20_000), 0.01)


LITERAL = {
    "<nowiki>{{</nowiki> opens a template, <nowiki>}}</nowiki> closes it.": "{{ opens a template, }} closes it.",
    "Write &#123;&#123;name&#125;&#125; or &lbrace;{ here.": "Write {{name}} or {{ here.",
    "In <code>print('{{')</code> the rest stays.": "In print('{{') the rest stays.",
    "A <code>dict[list[int]]</code> or <kbd>{|</kbd> stays.": "A dict[list[int]] or {| stays.",
    "The set {{1}, {2, 3}} has two elements.": "The set {{1}, {2, 3}} has two elements.",
    "Let S = {x : x ∈ {1, 2}} and T = {|x| : x < 0}.": "Let S = {x : x ∈ {1, 2}} and T = {|x| : x < 0}.",
    "The entry a[b[0]] and f() and g[] are read.": "The entry a[b[0]] and f() and g[] are read.",
    "!Kung is a language.": "!Kung is a language.",
    "First.\n\n|x| is the absolute value.\n\nLast.": "First.\n\n|x| is the absolute value.\n\nLast.",
    "!!! is a band.\n! and | begin lines.": "!!! is a band.\n! and | begin lines.",
    "Some engines open with {{ and go on.": "Some engines open with and go on.",
    "The tag &lt;b&gt; and &lt;ref name=x&gt; are tags.": "The tag <b> and <ref name=x> are tags.",
    "A vector<int> holds List<T> values.": "A vector<int> holds List<T> values.",
    "Two quotes &#39;&#39; and <nowiki>'''</nowiki> stay.": "Two quotes '' and ''' stay.",
    "<nowiki><!-- shown --></nowiki><!-- <nowiki> --> done": "<!-- shown --> done",
    "<pre>\n== no heading ==\n{{a}}\n| row\n</pre>": "== no heading ==\n{{a}}\n| row",
    "<syntaxhighlight lang=c>\n== a ==\nint x[2];\n</syntaxhighlight>\nText.": "Text.",
    "The call <syntaxhighlight lang=c inline>f({{0}})</syntaxhighlight> returns.": "The call f({{0}}) returns.",
    "<code>__FILE__</code> and __LINE__ are macros.__NOTOC__": "__FILE__ and __LINE__ are macros.",
    "&#42; and &num; and &lsqb;[ and <nowiki>== x ==</nowiki>": "* and # and [[ and == x ==",
    "Quoi ? Oui ! a ,, b (/a/) ^2 ( c )": "Quoi ? Oui ! a ,, b (/a/) ^2 ( c )",
    "...\n\n→": "...\n\n→",
    "&#xD800; is half a pair.": "&#xD800; is half a pair.",
    "{{{1|Shown}}} by default": "Shown by default",
}


@pytest.mark.parametrize("markup", LITERAL)
def test_what_is_literal_stays(markup: str) -> None:
    assert plain_text(markup) == LITERAL[markup]


@pytest.mark.parametrize(
    ("markup", "text"),
    [
        ("A {{x}} ( {{y}} ; ) and ({{z}}, b [{{z}}]), c.", "A and (b), c."),
        ("({{x}})[{{x}}] <ref>a</ref> , <ref>b</ref>, c", "c"),
        ("Text {{cite|x}} .", "Text."),
        ("Rows:\n| a\n|-\n| b\n! c\n|}\nText.", "Rows:\n\nText."),
        ("{|\n| a\n\n| b\nText.", "Text."),
        ("{{Box\n| a = b\n| c = d\nText.", "Text."),
        ("a |} b {| c", "a b c"),
        ("One<ref>a</ref> two</ref> three<b> four", "One two three four"),
        ("; {{x}}\n: . {{x}}", ""),
    ],
)
def test_what_is_left_over_goes(markup: str, text: str) -> None:
    assert plain_text(markup) == text


CHINESE = WikiSite("维基百科", "zh")


@pytest.mark.parametrize(
    ("markup", "site", "text"),
    [
        ("-{zh-hans:计算机; zh-hant:電腦;}-是", WikiSite(), "计算机是"),
        ("-{zh-cn:[[软件|软体]];zh-tw:[[軟體]]}-", CHINESE, "软体"),
        ("-{不转换}-和-{A|zh-hans:网络; zh-hant:網路}-", CHINESE, "不转换和网络"),
        ("-{T|zh:标题}-正文-{H|zh-cn:甲;zh-tw:乙}-", CHINESE, "正文"),
        ("-{sr-ec:Београд; sr-el:Beograd}-", WikiSite("Википедија", "sr"), "Београд"),
        ("x-{y}- and <nowiki>-{zh:a}-</nowiki>", WikiSite(), "x-{y}- and -{zh:a}-"),
    ],
)
def test_the_first_variant_of_a_language_is_printed(markup: str, site: WikiSite, text: str) -> None:
    assert plain_text(markup, site) == text


def test_templates_lost_among_words_are_counted_by_name() -> None:
    markup = (
        "{{Some box|a}}\n\nAbout {{Inflation|US|5}} dollars, {{inflation|US|6}} more{{citation needed|date=May 2015}}"
        "{{odd note|date=May 2015}}.\n* {{Some item}}\n{{unknown|no end\n== See also ==\n* a {{gone}} b"
    )
    page = plain_page(markup)
    assert page.text == "About dollars, more."
    assert page.lost_templates == {"inflation": 2, "some item": 1}


def test_a_template_that_is_not_closed_is_counted() -> None:
    assert plain_page("Broken {{ convert|5\nnext").lost_templates == {"convert": 1}


def test_the_marks_that_a_page_carries_are_taken_out_of_its_source() -> None:
    marks = "\U0001fffe\U0001ffff\U0002fffe\ufdd0\U000f0000\ue000"
    page = plain_page(f"a{marks}b")
    assert (page.text, page.lost_templates) == ("ab", {})
