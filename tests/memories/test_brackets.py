"""Brackets and tags without partners, which bound the parser's work."""

from __future__ import annotations

import time

import mwparserfromhell
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attention_rl_trainer.memories.articles.brackets import count_unpaired
from attention_rl_trainer.memories.articles.markup import TangledMarkupError, plain_text


@pytest.mark.parametrize(
    ("markup", "expected"),
    [
        ("plain (text) with a < b > c", 0),
        ("{{a|{{b}}|c={{{1|}}}}} [[d|e]] [http://f g] <ref name=h>i</ref><br><ref name=j /><li>", 0),
        ("[[File:a|[http://b c]]] [[d|[e]]]", 0),
        ("[http://x see [[Foo]]] [in [[Paris]]] [[a [b]]]", 0),
        (":{|\n| a\n|}", 0),
        ("{|\n| a\n|}\n{{Infobox\n| a =|\n|}}", 0),
        ("{{a|", 1),
        ("a}} b]]", 2),
        ("<ref>a</Ref></ref>", 1),
        # A mark closes the innermost of its kind over the head of what is open inside.
        ("{{a|<b>}}</b>", 2),
        ("[[{{a]]}}", 2),
        # Its quotation continues in the text after the tag.
        ('<ref a=">b</ref>', 1),
        ('<ref a="b" c=d>e</ref>', 0),
        # Thirty may be in one another.
        ("{{a|" * 30 + "}}" * 30, 0),
        ("{{a|" * 33 + "}}" * 33, 3),
    ],
)
def test_unpaired_marks_are_counted(markup: str, expected: int) -> None:
    assert count_unpaired(markup) == expected


WHOLE = st.recursive(
    st.sampled_from(["word ", "\n", "<br>", "<ref name=a />", "a | b", "''"]),
    lambda inner: st.tuples(
        st.sampled_from([("{{", "}}"), ("[[", "]]"), ("<b>", "</b>"), ("[http://a ", "]"), ("\n{|\n", "\n|}\n")]),
        st.lists(inner, max_size=3),
    ).map(lambda pair: f"{pair[0][0]}x {''.join(pair[1])} y{pair[0][1]}"),
    max_leaves=12,
)


@settings(max_examples=100, deadline=None)
@given(WHOLE)
def test_in_one_another_they_are_all_paired(markup: str) -> None:
    assert count_unpaired(markup) == 0


TANGLES = [
    "{{a|", "{{{a|", "[[a|", "<ref>", "<b", "{|\n", "[http://a ", "{{a|b=", "<b>{{a|", "{{a|<b>}}</b>", "[[{{a|]]}}",
    ' </ref><ref a="]', "/><span style='", "<ref a='></ref>", "<nowiki>", "<p>\n",
]  # fmt: skip


@pytest.mark.parametrize("unit", TANGLES)
def test_what_would_take_the_parser_hours_is_refused(unit: str) -> None:
    """Also as the title of a section, and in many sections."""
    text = unit * (60_000 // len(unit))
    pages = [text, f"{text[:20_000]}\n== a ==\n" * 10]
    if "\n" not in unit:
        pages.append(f"== {text} ==\nb")
    for markup in pages:
        with pytest.raises(TangledMarkupError, match=r"without partners: .* expected at most 20,000,000"):
            plain_text(markup)


@pytest.mark.parametrize("unit", TANGLES)
def test_work_is_in_proportion_to_what_is_counted(unit: str) -> None:
    """What is just not refused takes seconds, not minutes."""
    length = int((20_000_000 * len(unit)) ** 0.5) // 3
    markup = (unit * length)[:length]
    assert 0 < count_unpaired(markup) * len(markup) <= 20_000_000
    start = time.process_time()
    mwparserfromhell.parse(markup, skip_style_tags=True)
    assert time.process_time() - start < 20
