"""Templates that stand for words, and those that stand for nothing."""

from __future__ import annotations

import pytest

from attention_rl_trainer.memories.articles.markup import plain_text


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{convert|5|km|mi}}", "5 km"),
        ("{{convert|5|to|6|km|mi|abbr=on}}", "5 to 6 km"),
        ("{{cvt|5|-|6|kg}}", "5–6 kg"),
        ("{{lang|fr|une ''maison''}}", "une maison"),
        ("{{lang-de|Haus}}", "Haus"),
        ("{{Nowrap|[[a|b]] c}}", "b c"),
        ("a{{ndash}}b", "a–b"),
        ("it{{'s}}", "it's"),
        ("{{frac|1|2}} {{frac|3|1|2}} {{frac|4}}", "1/2 3 1/2 1/4"),
        ("{{val|1.5|e=6|u=m}} {{val|7}}", "1.5 × 10^6 m 7"),
        ("{{As of|2015|3}}", "As of 2015-03"),
        ("{{start_date|1969|7|16}}", "1969-07-16"),
        ("{{circa|1900}}", "c. 1900"),
        ("{{USS|Hornet|CV-12}}", "USS Hornet"),
        ("{{ship|HMS|Beagle||2}}", "HMS Beagle"),
        ("{{chem|H|2|O}}", "H2O"),
        ("10{{sup|6}}", "10^6"),
        ("{{quote|text=Veni.}}", "Veni."),
        ("{{math|x}} {{unknown|x}}.", "x."),
    ],
)
def test_a_template_that_stands_for_words_is_replaced_by_them(template: str, words: str) -> None:
    assert plain_text(template) == words
